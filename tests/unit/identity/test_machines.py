"""Files for a coordinator on another machine: its certificate, where it listens, and the address that sites have."""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
import tomllib
from datetime import UTC, datetime

import pytest
from support.preloaded import preloaded

from fedcore.cli import main as commands
from fedcore.errors import BadInput, CertificateRefused
from fedcore.identity.kit import Kit
from fedcore.identity.preflight import preflight
from fedcore.identity.verify import check_certificate
from fedcore.local_deployment import address_from, write


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("hub.example.org", ("hub.example.org", 7443)),
        ("hub:9000", ("hub", 9000)),
        ("10.77.0.1", ("10.77.0.1", 7443)),
        ("[2001:db8::1]", ("2001:db8::1", 7443)),
        ("[2001:db8::1]:9000", ("2001:db8::1", 9000)),
    ],
)
def test_an_address_may_leave_its_port_out(text, address):
    assert address_from(text) == address


@pytest.mark.parametrize(
    "text",
    [
        "",
        ":7443",
        "hub:0",
        "hub:70000",
        "hub:x",
        "a b",
        "hub..x",
        "2001:db8::1",
        "[::1",
        "0.0.0.0",
        "[::]",
    ],
)
def test_what_is_no_address_is_refused_before_anything_runs(text, tmp_path, monkeypatch, capsys):
    with pytest.raises(BadInput, match="found"):
        address_from(text)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        commands.main(["up", "--task", "heart", "--address", text])
    assert ended.value.code == 2
    assert capsys.readouterr().err.splitlines()[1].startswith("error: ")
    assert list(tmp_path.iterdir()) == []


TASK = {"heart": {"task": "heart", "sha256": "0" * 64, "source": "va"}}
SITES = ("a", "b", "c")


def written(folder, address):
    return write(
        folder, "f", dict.fromkeys(SITES, TASK), {"task": "heart"}, policy={}, address=address
    )


def toml(path):
    return tomllib.loads(path.read_text())


@pytest.mark.parametrize(
    ("host", "listens", "shown"),
    [
        ("hub.example.org", "::", "hub.example.org:7443"),
        ("10.77.0.1", "0.0.0.0", "10.77.0.1:7443"),
        ("2001:db8::1", "::", "[2001:db8::1]:7443"),
        ("127.0.0.2", "127.0.0.2", "127.0.0.2:7443"),
    ],
)
def test_certificate_listener_and_sites_have_the_address(tmp_path, host, listens, shown):
    found = written(tmp_path / "machines", (host, 7443))
    federation = toml(found.coordinator / "federation.toml")
    assert (federation["listen"], federation["port"]) == ([listens], 7443)
    files = [found.site(name) / "site.toml" for name in SITES]
    for path in [*files, found.folder / "operator" / "operator.toml"]:
        assert toml(path)["coordinator"] == shown
    kit, now = Kit.load(found.coordinator / "kit"), datetime.now(UTC)
    about = {"federation": "f", "role": "coordinator", "now": now}
    for name in (host, "localhost", "127.0.0.1"):
        check_certificate(kit.certificate_pem, kit.authority_pem, host=name, **about)
    with pytest.raises(CertificateRefused, match=r"other\.example\.org"):
        check_certificate(kit.certificate_pem, kit.authority_pem, host="other.example.org", **about)
    assert {path.name for path in found.folder.iterdir()} == {
        "authority", "coordinator", "operator", "sites",
    }  # fmt: skip


@pytest.mark.skipif(sys.platform != "linux", reason="others have one loopback address")
def test_a_site_reaches_a_coordinator_at_another_address_than_localhost(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.2", 0))
        port = probe.getsockname()[1]
    found = written(tmp_path / "machines", ("127.0.0.2", port))
    serve, *_ = found.commands().values()
    with (tmp_path / "log").open("wb") as log:
        hub = preloaded().start(serve[1:], env=os.environ, output=log)
        try:
            while b"listening" not in (tmp_path / "log").read_bytes():
                assert hub.poll() is None, (tmp_path / "log").read_text()
                time.sleep(0.01)
            kit, now = Kit.load(found.site("a") / "kit"), datetime.now(UTC)
            address = address_from(toml(found.site("a") / "site.toml")["coordinator"])
            peer, *_ = preflight(kit, *address, now=now)
        finally:
            hub.send_signal(signal.SIGKILL)
            hub.wait()
    assert (peer.role, peer.federation) == ("coordinator", "f")
