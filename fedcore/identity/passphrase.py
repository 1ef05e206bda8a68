"""A passphrase, from where its owner keeps it: a file, the environment, the output of a command, or the terminal.

Invariant: a passphrase is never an argument, which others can read in the list of processes, and is in no message. A
variable is removed from the environment once it was read, so that no child process inherits it.
"""

from __future__ import annotations

import getpass
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Self

from pydantic import Field

from fedcore.errors import BadInput
from fedcore.files.toml import Section
from fedcore.identity.kit import read_private
from fedcore.secagg.crypto.secret import SecretBytes

LEAST_CHARACTERS = 12
"""Of a new passphrase: a copied file can be tried offline."""

IN_SECTION = 'unlock = "file:PATH" in [keystore]'
COMMAND_SECONDS = 30.0
_VARIABLE = re.compile("[A-Za-z_][A-Za-z0-9_]*")


class KeystoreSection(Section):
    """[keystore]: a party's private keys are encrypted at rest.

    unlock: where the passphrase is: `file:PATH`, `env:NAME`, `command:PROGRAM ARGUMENTS` (of a key service; what it
    prints is the passphrase) or `prompt`; file: of the keystore.
    """

    unlock: str = Field(repr=False)
    file: Path = Path("keystore.json")

    def placed(self, path: Path, where: str = "keystore.unlock") -> Self:
        """With paths that count from the folder of the file that it stands in. where: of `unlock`. Raises BadInput."""
        kind, _, value = self.unlock.partition(":")
        known = kind in {"file", "command"} and value
        if not (known or self.unlock == "prompt" or (kind == "env" and _VARIABLE.fullmatch(value))):
            raise BadInput(
                f"{where}: found a text of {len(self.unlock)} characters, expected "
                "file:PATH, env:NAME, command:PROGRAM or prompt",
                remedy='name the place of the passphrase, as unlock = "file:/run/secrets/site-passphrase"; the '
                "passphrase itself is never in this file",
            )
        base = path.resolve().parent
        unlock = f"file:{base / value}" if kind == "file" else self.unlock
        return self.model_copy(update={"unlock": unlock, "file": base / self.file})

    @property
    def passphrase_file(self) -> Path | None:
        """The file that has the passphrase, if it is in one."""
        kind, _, value = self.unlock.partition(":")
        return Path(value) if kind == "file" else None

    @property
    def source(self) -> str:
        """Where the passphrase is, in words; without the arguments of a command."""
        return self.unlock.partition(" ")[0] if self.unlock.startswith("command:") else self.unlock

    def read(
        self, *, new: bool = False, of: str = "the keystore", otherwise: str = IN_SECTION
    ) -> SecretBytes:
        """The passphrase. new: for a new keystore, so that a short one is refused. of, otherwise: as for
        `ask_passphrase`. Raises BadInput."""
        kind, _, value = self.unlock.partition(":")
        if kind == "file":
            found = passphrase_in(Path(value))
        elif kind == "env":
            found = _of_environment(value)
        elif kind == "command":
            found = _of_command(value)
        else:
            found = ask_passphrase(of, otherwise, new=new)
        return check_new(found) if new else found


def passphrase_in(path: Path) -> SecretBytes:
    """The passphrase in a file, without the line's end. Raises BadInput for a file that others on this machine can
    read, or an empty one."""
    if not path.exists():
        raise BadInput(
            f"{path}: found no such file, expected a passphrase in it",
            remedy="mount the secret there, or name another place of the passphrase",
        )
    return _checked(read_private(path), str(path))


def _of_environment(name: str) -> SecretBytes:
    found = taken_variable(
        name, "keystore.unlock", "passphrase", "name another place of the passphrase"
    )
    return _checked(found, f"variable {name}")


def taken_variable(name: str, key: str, what: str, otherwise: str) -> bytes:
    """The value of a variable with a secret, which leaves the environment: no child process inherits it. key: the
    setting that names it; what: the secret; otherwise: what to do instead of setting it. Raises BadInput."""
    found = os.environ.pop(name, None)
    if found is None:
        raise BadInput(
            f"{key}: found no variable {name} in the environment, expected the {what} in it",
            remedy=f"set {name} for this process, or {otherwise}",
        )
    return os.fsencode(found)


def _of_command(line: str) -> SecretBytes:
    """What a command prints. Its standard error goes where this process's goes. Raises BadInput."""
    try:
        command = shlex.split(line)
    except ValueError as error:
        raise BadInput(f"keystore.unlock: found a command that cannot be split ({error})") from None
    what = f"keystore.unlock: command {command[0] if command else ''}"
    try:
        done = subprocess.run(  # noqa: S603  # the program of this machine's operator, without a shell
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, timeout=COMMAND_SECONDS, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise BadInput(
            f"{what}: found no end after {COMMAND_SECONDS:g} s, expected the passphrase",
            remedy="run it by hand: it must not ask for anything",
        ) from None
    except (OSError, IndexError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or "no program named"
        raise BadInput(f"{what}: it cannot be started ({reason})") from None
    if done.returncode:
        raise BadInput(
            f"{what}: found exit status {done.returncode}, expected 0 and the passphrase",
            remedy="its own messages are above; run it by hand as this user",
        )
    return _checked(done.stdout, what)


def _checked(data: bytes, where: str) -> SecretBytes:
    text = data.rstrip(b"\r\n")
    if not text:
        raise BadInput(f"{where}: found it empty, expected a passphrase")
    return SecretBytes(text)


def ask_passphrase(of: str, otherwise: str, *, new: bool = False) -> SecretBytes:
    """Ask at the terminal, twice for a new one. otherwise: the hint where there is no terminal. Raises BadInput without
    a terminal, or if the two differ."""
    if not sys.stdin.isatty():
        raise BadInput(
            f"passphrase of {of}: found none and no terminal to ask at, expected it",
            remedy=otherwise,
        )
    text = getpass.getpass(f"{'new ' if new else ''}passphrase of {of}: ")
    if new and getpass.getpass("the same again: ") != text:
        raise BadInput("passphrase: found two that differ, expected the same twice")
    return _checked(text.encode(), f"passphrase of {of}")


def check_new(passphrase: SecretBytes) -> SecretBytes:
    """A passphrase for a new key. Raises BadInput for a short one."""
    found = len(passphrase.reveal())
    if found < LEAST_CHARACTERS:
        raise BadInput(
            f"passphrase: found {found} characters, expected {LEAST_CHARACTERS} or more",
            remedy="a long random one, in a file of its own: (umask 077; openssl rand -base64 24 > FILE)",
        )
    return passphrase
