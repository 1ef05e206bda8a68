"""The sandbox that keeps the task's code from the site's keys: bubblewrap, Linux namespaces, another user, or none.

The training process runs as the site's user, and so could read identity.pem, kit/key.pem, the journal and the spool.
In a sandbox these and the network are hidden; code and data of the task are not.
Invariant: a method is used only after a probe with the same command as the training process could read none of the
hidden files; a method that was named and does not work here is refused, never skipped.

No method prevents reading and writing other files of its user (use `user:NAME` and file rights), or opening unix
sockets, such as a container engine's.
"""

import logging
import os
import pwd
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import fedcore_clients
from fedcore_clients.config import SiteConfig

import fedcore
from fedcore.errors import BadInput, Unavailable
from fedcore.identity.kit import KEY_FILE
from fedcore.learning.task_code import FLOWER

LOG = logging.getLogger("fedcore.site.sandbox")

WORKER = "fedcore_clients.worker"
CONFINE = "fedcore_clients.confine"
PROBE_SECONDS = 30.0
"""For a Python that starts and reads a few files: it takes 0.1 s on an idle machine."""

NONE_HINT = (
    "install bubblewrap, let users make namespaces (sysctl user.max_user_namespaces), or give the task a "
    'user of its own with sandbox = "user:NAME" in site.toml'
)


@dataclass(frozen=True)
class Sandbox:
    """How the training process is started. method: "bwrap", "unshare", "user:NAME" or "none"."""

    method: str
    command: tuple[str, ...]
    network: bool
    why: str = ""
    """Of "none" where it was not asked for: what the others lack here."""

    @property
    def text(self) -> str:
        """One line for the log and `fed-site check`."""
        if self.method == "none":
            asked = f" ({self.why})" if self.why else ' (sandbox = "none")'
            return f"sandbox none: the task's code can read this site's keys and journal{asked}"
        net = "with the network" if self.network else "without network"
        return f"sandbox {self.method}: the task cannot read keys, journal or spool; it runs {net}"


def hidden(config: SiteConfig) -> tuple[Path, ...]:
    """The existing files and folders that are hidden from a task. Raises BadInput where one of them is also the place
    of a task or its data."""
    inside = _needed_below(config, config.folder)
    if inside is not None:
        raise BadInput(
            f"folder: found {inside} inside it, expected a folder of this site's own",
            remedy="a sandbox hides this folder from the task: name another `folder` in site.toml, or "
            'write sandbox = "none"',
        )
    kit = config.kit if _needed_below(config, config.kit) is None else config.kit / KEY_FILE
    found = [config.identity, kit, config.folder, *_unlocking(config)]
    return tuple(path.resolve() for path in found if path.exists())


def _unlocking(config: SiteConfig) -> tuple[Path, ...]:
    """What opens encrypted keys, the keystore and the passphrase's file, and the file of the proxy's password."""
    section = config.keystore
    files = (section.file, section.passphrase_file) if section is not None else ()
    return tuple(path for path in (*files, config.proxy.password_file) if path is not None)


def _needed_below(config: SiteConfig, folder: Path) -> Path | None:
    return next(
        (path for path in _needed(config) if folder == path or folder in path.parents), None
    )


def _needed(config: SiteConfig) -> set[Path]:
    """Paths of tasks and of their data."""
    found = {config.base}
    for section in config.tasks.values():
        for text in (section.task.removeprefix(FLOWER).partition(":")[0], section.source):
            if isinstance(text, str) and text and (config.base / text).exists():
                found.add(config.base / text)
    return found


def _fixed(config: SiteConfig) -> tuple[Path, ...]:
    """The code of the site's own process: a task that could change it would get the keys later."""
    packages = [Path(str(each.__file__)).resolve().parent for each in (fedcore, fedcore_clients)]
    python = [Path(sys.prefix).resolve(), Path(sys.base_prefix).resolve()]
    found = [config.file, config.roster, *packages, *python]
    return tuple(dict.fromkeys(path for path in found if path.exists()))


def _python(*args: str) -> tuple[str, ...]:
    return (sys.executable, "-P", "-m", *args)


def _each(option: str, paths: Sequence[Path]) -> tuple[str, ...]:
    return tuple(part for path in paths for part in (option, str(path)))


def _program(name: str) -> str:
    found = shutil.which(name)
    if found is None:
        raise Unavailable(f"sandbox: found no {name} here, expected it installed")
    return found


def _bwrap(config: SiteConfig, hide: tuple[Path, ...]) -> tuple[str, ...]:
    covers: list[str] = []
    for path in _fixed(config):
        covers += ["--ro-bind", str(path), str(path)]
    for path in hide:
        covers += ["--tmpfs", str(path)] if path.is_dir() else ["--ro-bind", "/dev/null", str(path)]
    net = () if config.task_network else ("--unshare-net",)
    return (
        _program("bwrap"), "--dev-bind", "/", "/", "--proc", "/proc", *covers,
        "--unshare-user", "--unshare-pid", "--unshare-ipc", *net,
        "--cap-drop", "ALL", "--die-with-parent", "--",
    )  # fmt: skip


def _unshare(config: SiteConfig) -> tuple[str, ...]:
    net = () if config.task_network else ("--net",)
    return (
        _program("unshare"), "--user", "--map-root-user", "--mount", "--pid", "--fork", "--mount-proc",
        "--kill-child", "--ipc", *net, "--",
    )  # fmt: skip


def _user(config: SiteConfig, name: str) -> tuple[str, ...]:
    try:
        found = pwd.getpwnam(name)
    except KeyError:
        raise BadInput(
            f"sandbox: found user {name!r}, whom this machine does not know",
            remedy=f"make the user first (useradd --system {name}), or name another one",
        ) from None
    if found.pw_uid == os.geteuid():
        raise BadInput(
            f"sandbox: found user {name!r}, who runs this site, expected another one",
            remedy="the task must not have the rights of the site's own user",
        )
    net = () if config.task_network else (_program("unshare"), "--net", "--")
    return (
        *net, _program("setpriv"), f"--reuid={found.pw_uid}", f"--regid={found.pw_gid}", "--init-groups",
        "--no-new-privs", "--inh-caps=-all", "--bounding-set=-all", "--",
    )  # fmt: skip


def _method(config: SiteConfig, name: str) -> Sandbox:
    """A method that works here. Raises BadInput, Unavailable."""
    hide, confine = hidden(config), tuple[str, ...]()
    if name == "bwrap":
        prefix = _bwrap(config, hide)
    elif name == "unshare":
        prefix = _unshare(config)
        confine = (*_each("--fix", _fixed(config)), *_each("--hide", hide))
    else:
        prefix = _user(config, name.removeprefix("user:"))
    secret = (config.identity, config.kit / KEY_FILE, config.folder, *_unlocking(config))
    looks = (*_each("--probe", secret), *_each("--need", sorted(_needed(config))))
    _probe(name, (*prefix, *_python(CONFINE, *confine, *looks)))
    module = (CONFINE, *confine, WORKER) if confine else (WORKER,)
    return Sandbox(name, (*prefix, *_python(*module)), config.task_network)


def _probe(name: str, command: tuple[str, ...]) -> None:
    """Start a process like the training process: it must not be able to read what is hidden, and must be able to read
    tasks and data. Raises Unavailable."""
    try:
        found = subprocess.run(  # noqa: S603  # this interpreter, behind a program of the system
            command, stdin=subprocess.DEVNULL, capture_output=True, timeout=PROBE_SECONDS, check=False,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Unavailable(f"sandbox: found that {name} does not start here ({error})") from error
    if found.returncode:
        said = found.stderr.decode(errors="replace").strip().splitlines()
        raise Unavailable(
            f"sandbox: found that {name} does not hold here ({said[-1] if said else 'no reason given'})"
        )


def choose(config: SiteConfig) -> Sandbox:
    """The sandbox that site.toml names; under "auto" the first that works here, or none. Raises BadInput and
    Unavailable for one that was named and does not work."""
    asked = config.sandbox
    none = Sandbox("none", _python(WORKER), network=True)
    if asked == "none":
        return none
    if asked != "auto":
        try:
            return _method(config, asked)
        except Unavailable as error:
            raise Unavailable(str(error), remedy=NONE_HINT) from error
    reasons: list[str] = []
    for name in ("bwrap", "unshare"):
        try:
            return _method(config, name)
        except (BadInput, Unavailable) as error:
            reasons.append(str(error).removeprefix("sandbox: "))
    return Sandbox("none", none.command, network=True, why="; ".join(dict.fromkeys(reasons)))


def logged(found: Sandbox) -> Sandbox:
    """The same sandbox, after a line in the log."""
    if found.method == "none":
        LOG.warning("%s; hint: %s", found.text, NONE_HINT)
    else:
        LOG.info("%s", found.text)
    return found
