"""Names and addresses of a coordinator, as people write them: host:port, an IPv6 address in brackets."""

import ipaddress

from fedcore.errors import BadInput


def endpoint(text: str, what: str = "coordinator") -> tuple[str, int]:
    """(host, port) of the text `host:port`, an IPv6 address in brackets. Raises BadInput."""
    host, _, port = text.rpartition(":")
    bare = host.removeprefix("[").removesuffix("]")
    written = f"[{bare}]" if ":" in bare else bare
    if not bare or not port.isdecimal() or host != written:
        raise BadInput(
            f"{what}: found {text!r}, expected host:port, as hub.example.org:7443 or [::1]:7443"
        )
    authority_of(bare, int(port))
    return bare, int(port)


def authority_of(host: str, port: int) -> str:
    """`host:port` for a URL, an IPv6 address in brackets. Raises BadInput."""
    if not 0 < port < 65536:
        raise BadInput(f"coordinator: found port {port}, expected 1 to 65535")
    if ip_of(host) is None and not all(
        0 < len(label) < 64
        and label.replace("-", "a").replace("_", "a").isalnum()
        and label.isascii()
        for label in host.removesuffix(".").split(".")
    ):
        raise BadInput(f"coordinator: found host {host!r}, expected a DNS name or an address")
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def ip_of(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """The address that a host is written as; None for a name."""
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None
