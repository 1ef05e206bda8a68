"""Which proxy a connection goes through: `proxy` of a file, [proxy], or the variables of the environment.

    proxy = "none"                              # the default: the environment is not asked
    proxy = "socks5://proxy.example.org:1080"   # or http://HOST:PORT, a CONNECT proxy
    proxy = "environment"                       # HTTPS_PROXY, else ALL_PROXY, except for hosts in NO_PROXY

    [proxy]
    url = "http://proxy.example.org:3128"
    user = "site-north"
    password = "file:/run/secrets/proxy-password"   # or "env:NAME"
    direct = ["hub.example.org", "10.0.0.0/8"]      # without the proxy, written as in NO_PROXY

Invariant: a password is in a private file or in the environment, never in a file of settings and never an argument;
it is in no message, and is removed from the environment once it was read, so that no child process inherits it.
"""

from __future__ import annotations

import ipaddress
import os
import re
from collections.abc import Iterable, Mapping, MutableMapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Self
from urllib.parse import SplitResult, quote, unquote, urlsplit

from pydantic import BeforeValidator, Field

from fedcore.errors import BadInput
from fedcore.files.toml import Section
from fedcore.identity.addresses import authority_of, ip_of
from fedcore.identity.kit import read_private
from fedcore.identity.passphrase import taken_variable
from fedcore.secagg.crypto.secret import SecretBytes

NONE, ENVIRONMENT = "none", "environment"
VARIABLES = ("https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY")
"""In the order in which they are asked."""

_EXCEPT = ("no_proxy", "NO_PROXY")
_SCHEMES = {"http": "http", "socks5": "socks5", "socks5h": "socks5"}
_FORM = "http://HOST:PORT or socks5://HOST:PORT"


@dataclass(frozen=True)
class Proxy:
    """One proxy. scheme: "http" (CONNECT) or "socks5"; direct: hosts that are reached without it, as in NO_PROXY."""

    scheme: str
    host: str
    port: int
    user: str = ""
    password: SecretBytes | None = None
    direct: tuple[str, ...] = ()

    @classmethod
    def parse(cls, url: str) -> Self:
        """Of scheme://[user[:password]@]host:port. Raises BadInput, which does not show the URL: it may hold a
        password."""
        try:
            found = urlsplit(url)
            scheme, host, port = found.scheme.lower(), found.hostname, found.port
        except ValueError:
            raise _malformed("something else") from None
        if scheme in {"https", "socks4", "socks4a"}:
            raise _malformed(f"a proxy of kind {scheme}")
        if scheme not in _SCHEMES or not host or not port or _rest(found):
            raise _malformed("something else")
        authority_of(host, port)
        secret = None if found.password is None else SecretBytes(unquote(found.password).encode())
        return cls(_SCHEMES[scheme], host, port, unquote(found.username or ""), secret)

    @property
    def where(self) -> str:
        """host:port."""
        return authority_of(self.host, self.port)

    @property
    def text(self) -> str:
        """In words: kind and place, and whether it is given a user; never the password."""
        return f"{self.scheme} proxy {self.where}{f' as user {self.user!r}' if self.user else ''}"

    def serves(self, host: str, port: int) -> bool:
        """Whether a host is reached through it. A loopback address never is."""
        address = ip_of(host)
        if host.lower().rstrip(".") == "localhost" or (address and address.is_loopback):
            return False
        return not is_exempt(host, port, self.direct)


def _rest(found: SplitResult) -> str:
    return found.path.strip("/") + found.query + found.fragment


def _malformed(found: str) -> BadInput:
    return BadInput(
        f"proxy: found {found}, expected {_FORM}",
        remedy='as "http://proxy.example.org:3128"; HTTP CONNECT and SOCKS5 are spoken, no other protocol',
    )


def is_exempt(host: str, port: int, patterns: Iterable[str]) -> bool:
    """Whether a host is to be reached directly, by entries of NO_PROXY: `*`, a name (with all names below it, also
    written .example.org or *.example.org), an address, a network as 10.0.0.0/8; each with :PORT for one port only."""
    name, address = host.lower().rstrip("."), ip_of(host)
    for written in patterns:
        pattern, only = _with_port(written.strip().lower())
        if not pattern or (only is not None and only != port):
            continue
        if pattern == "*":
            return True
        if address is not None:
            if _in_network(address, pattern):
                return True
            continue
        suffix = pattern.removeprefix("*").strip(".")
        if name == suffix or name.endswith(f".{suffix}"):
            return True
    return False


def _with_port(pattern: str) -> tuple[str, int | None]:
    """(host or network, port or None) of one entry; an IPv6 address with a port is in brackets."""
    found = re.fullmatch(r"\[([^\]]+)\](?::(\d+))?|([^:]+):(\d+)", pattern)
    if found is None:
        return pattern, None
    port = found[2] or found[4]
    return found[1] or found[3], int(port) if port else None


def _in_network(address: ipaddress.IPv4Address | ipaddress.IPv6Address, pattern: str) -> bool:
    try:
        return address in ipaddress.ip_network(pattern, strict=False)
    except ValueError:
        return False


def _as_table(found: object) -> object:
    return {"url": found} if isinstance(found, str) else found


class ProxySection(Section):
    """[proxy], or `proxy = URL`. url: also "none" and "environment"; user, password: for a proxy that asks; password:
    where it is, as file:PATH or env:NAME; direct: hosts that are reached without it."""

    url: str = Field(default=NONE, repr=False)
    user: str = ""
    password: str | None = Field(default=None, repr=False)
    direct: tuple[str, ...] = ()

    def placed(self, base: Path, where: str) -> Self:
        """With the password's file counting from a folder. where: of these keys, for messages. Raises BadInput for a
        password among them, and for keys that do not go together."""
        if self.url in {NONE, ENVIRONMENT}:
            if self.user or self.password is not None or self.direct:
                raise BadInput(
                    f'{where}: found url = "{self.url}" beside other keys, expected a URL',
                    remedy=f"name the proxy, as {_FORM}, or remove the other keys",
                )
            return self
        found = Proxy.parse(self.url)
        if found.password is not None or (found.user and self.user):
            what = "a password in the URL" if found.password is not None else "two users"
            raise BadInput(
                f"{where}: found {what}, expected the user once, and the place of the password",
                remedy='name the place of the password: password = "file:PATH" or "env:NAME" in [proxy], or '
                "--proxy-password",
            )
        if (self.password is not None) != bool(self.user or found.user):
            raise BadInput(
                f"{where}: found {'a password without its user' if self.password else 'a user without a password'}, "
                "expected both",
                remedy='user = "NAME" and password = "file:PATH" or "env:NAME" in [proxy], or a user in the URL and '
                "--proxy-password",
            )
        return self if self.password is None else self._with_file(base, f"{where}.password")

    def _with_file(self, base: Path, where: str) -> Self:
        kind, _, value = (self.password or "").partition(":")
        if kind not in {"file", "env"} or not value:
            raise BadInput(
                f"{where}: found a text of {len(self.password or '')} characters, expected file:PATH or env:NAME",
                remedy="name the place of the password; the password itself is never in this file",
            )
        if kind == "env":
            return self
        return self.model_copy(update={"password": f"file:{base / value}"})

    def open(self) -> Proxy | None:
        """The proxy with its password; None for none. Raises BadInput."""
        if self.url == NONE:
            return None
        if self.url == ENVIRONMENT:
            return of_environment(os.environ)
        found = Proxy.parse(self.url)
        secret = found.password if self.password is None else _secret(self.password)
        user = self.user or found.user
        return replace(found, user=user, password=secret, direct=self.direct)

    @property
    def password_file(self) -> Path | None:
        """The file that has the password, if it is in one."""
        kind, _, value = (self.password or "").partition(":")
        return Path(value) if kind == "file" else None

    def written(self) -> Mapping[str, Any]:
        """As `site.toml` has it."""
        if self.password is None and not self.direct:
            return {"proxy": self.url}
        more = {"user": self.user, "password": self.password, "direct": list(self.direct)}
        return {"proxy": {"url": self.url} | {key: value for key, value in more.items() if value}}


ProxyKey = Annotated[ProxySection, BeforeValidator(_as_table)]
"""A key of a file: a URL, "none" or "environment", or a table."""


def _secret(place: str) -> SecretBytes:
    """The password at file:PATH or env:NAME. Raises BadInput. A file is read anew each time, so that a new password
    needs no restart."""
    kind, _, value = place.partition(":")
    data = _of_variable(value) if kind == "env" else read_private(Path(value)).rstrip(b"\r\n")
    if not data:
        raise BadInput(f"proxy.password: found {value} empty, expected the password in it")
    return SecretBytes(data)


@cache
def _of_variable(name: str) -> bytes:
    return taken_variable(name, "proxy.password", "password", "name a file")


def variable_set(variables: Mapping[str, str]) -> str | None:
    """The first variable that names a proxy; None where none does."""
    return next((each for each in VARIABLES if variables.get(each)), None)


_TAKEN: dict[str, Proxy] = {}
"""Proxies whose password was removed from the environment, by the URL that is left there."""


def of_environment(variables: MutableMapping[str, str]) -> Proxy | None:
    """The proxy of HTTPS_PROXY, else of ALL_PROXY, in small letters first; None where neither is set. Passwords are
    removed from these variables. Raises BadInput."""
    found = None
    for name in VARIABLES:
        if written := variables.get(name):
            try:
                one = _taken(variables, name, written)
            except BadInput as error:
                raise BadInput(f"{name}: {error}", remedy=error.remedy) from None
            found = found or one
    if found is None:
        return None
    hosts = next((variables[each] for each in _EXCEPT if variables.get(each)), "")
    return replace(found, direct=tuple(re.split(r"[,\s]+", hosts.strip())))


def _taken(variables: MutableMapping[str, str], name: str, written: str) -> Proxy:
    url = written if "://" in written else f"http://{written}"
    found = _TAKEN.get(url) or Proxy.parse(url)
    if found.password is not None:
        user = f"{quote(found.user, safe='')}@" if found.user else ""
        variables[name] = left = f"{found.scheme}://{user}{found.where}"
        _TAKEN[left] = found
    return found
