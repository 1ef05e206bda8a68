"""Joining over the real port: who is let in, and each way in which one is not."""

from __future__ import annotations

import contextlib
import io
import json
import socket
import ssl
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import timedelta

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from fedcore_clients import joining
from fedcore_clients.cli import main
from fedcore_clients.config import read_config
from fedcore_server import enrolment
from fedcore_server.federation_views import sites_rows, sites_table
from rich.console import Console
from support.keystores import cheap_scrypt

from fedcore.audit.keys import SiteSigner
from fedcore.audit.lines import Line
from fedcore.audit.trail import AuditTrail
from fedcore.errors import AlreadyExists, BadInput, CertificateRefused, Refused
from fedcore.identity.authority import Authority
from fedcore.identity.identities import read_identity
from fedcore.identity.join_messages import (
    MOST_REQUEST,
    JoinAnswer,
    JoinLine,
    JoinRefused,
    JoinRequest,
    make_csr,
)
from fedcore.identity.kit import Kit
from fedcore.identity.peer import peer_of
from fedcore.identity.signed_roster import SignedRoster, read_pins
from fedcore.secagg.crypto.identity_key import IdentityKey
from fedcore.secagg.crypto.secret import SecretBytes
from fedcore.wire.frames import SOFTWARE
from tests.support.federations import authority_of, now, served


@pytest.fixture(autouse=True)
def _cheap(monkeypatch):
    cheap_scrypt(monkeypatch)


def invited(files, site="va", days=7.0):
    return files.invite(site, days, now())[0]


def join(line, folder, at=None):
    """What `fed-site join` does; None where it waits for approval."""
    answer = joining.ask(line, folder, None, at or now())
    return None if answer is None else joining.finish(folder, answer, now(), tasks=[])


def refused(line, folder):
    with pytest.raises(JoinRefused) as caught:
        join(line, folder)
    return caught.value.word


# ------------------------------------------------------------------------------------------ joining


def test_a_site_joins_with_its_line(files, tmp_path):
    with served(files):
        done = join(invited(files), tmp_path / "va")
    kit = Kit.load(tmp_path / "va" / "kit")
    kit.check("site", now())
    sites, signed = read_pins(tmp_path / "va" / "roster.toml", kit.authority_pem, "heart")
    assert (done.site, done.federation, done.roster.number, signed.number) == ("va", "heart", 2, 2)
    assert sites == {"va": read_identity(tmp_path / "va" / "identity.pem").public}
    assert files.roster() == signed
    config = read_config(tmp_path / "va" / "site.toml")
    assert (config.site, config.coordinator) == ("va", f"localhost:{files.config.port}")
    assert (config.kit, config.policy.minimum_sites) == (tmp_path / "va" / "kit", 3)
    assert not (tmp_path / "va" / "joining.json").exists()


def test_private_keys_are_made_at_the_site_and_not_sent(files, tmp_path):
    with served(files) as received:
        join(line := invited(files), tmp_path / "va")
    folder = tmp_path / "va"
    for name in ("identity.pem", "kit/key.pem"):
        assert (folder / name).stat().st_mode & 0o777 == 0o600
    token = line.text().rsplit(":", 1)[1]
    everything = b"".join(
        p.read_bytes() for p in files.config.roster.parent.rglob("*") if p.is_file()
    )
    for secret in (
        line.token.reveal(), token.encode(), line.token.reveal().hex().encode(),
        *((folder / name).read_bytes().split(b"\n")[1] for name in ("identity.pem", "kit/key.pem")),
    ):  # fmt: skip
        assert secret not in b"".join(received)
        assert secret not in everything


def test_sites_that_join_at_once_are_all_on_the_roster(files, tmp_path):
    names = ["a", "b", "c", "d", "e"]
    lines = {name: invited(files, name) for name in names}
    with served(files), ThreadPoolExecutor() as pool:
        found = dict(
            zip(
                names, pool.map(lambda name: join(lines[name], tmp_path / name), names), strict=True
            )
        )
    # Each is on the roster that it is given: the newest, which may have those of others too.
    assert all(name in each.roster.sites for name, each in found.items())
    assert {each.roster.number for each in found.values()} <= {2, 3, 4, 5, 6}
    roster = files.roster()
    assert (roster.number, sorted(roster.sites)) == (6, names)


def test_a_site_that_was_revoked_joins_with_new_keys(files, tmp_path):
    with served(files):
        join(first := invited(files), tmp_path / "old")
        files.revoke("va")
        files.sign_roster(authority_of(files), now())
        assert refused(first, tmp_path / "again") == "token"
        done = join(invited(files), tmp_path / "new")
    assert done.roster.number == 4
    assert files.roster().sites["va"] == read_identity(tmp_path / "new" / "identity.pem").public
    serials = {
        peer_of((tmp_path / n / "kit" / "certificate.pem").read_bytes()).serial
        for n in ("old", "new")
    }
    assert set(files.enrolment("va").serials) == serials


# ------------------------------------------------------------------------------------------ retries


def test_an_attempt_whose_answer_was_lost_is_repeated(files, tmp_path):
    line = invited(files)
    with served(files) as received:
        assert (
            joining.ask(line, tmp_path / "va", None, now()) is not None
        )  # and the machine stops here
        assert not (tmp_path / "va" / "site.toml").exists()
        done = join(line, tmp_path / "va")
    assert done.roster.number == 2
    assert received[0] == received[1]
    assert len(files.enrolment("va").serials) == 1


@pytest.mark.parametrize("lost", ["kit/certificate.pem", "site.toml", "roster.toml"])
def test_an_attempt_that_was_killed_while_writing_is_repeated(files, tmp_path, lost, monkeypatch):
    line, write = invited(files), joining.write_atomic

    def killed(path, data):
        if str(path).endswith(lost):
            raise OSError("no space")
        write(path, data)

    with served(files):
        monkeypatch.setattr(joining, "write_atomic", killed)
        with pytest.raises(OSError, match="no space"):
            join(line, tmp_path / "va")
        monkeypatch.undo()
        assert join(line, tmp_path / "va").roster.number == 2
    assert read_config(tmp_path / "va" / "site.toml").site == "va"


def test_an_attempt_before_the_coordinator_runs_leaves_nothing(files, tmp_path):
    line = invited(files)
    with pytest.raises(BadInput, match="found no connection"):
        join(line, tmp_path / "va")
    assert not (tmp_path / "va").exists()
    with served(files):
        assert join(line, tmp_path / "va").roster.number == 2


def test_a_site_that_has_joined_keeps_its_keys(files, tmp_path):
    with served(files):
        join(line := invited(files), tmp_path / "va")
        before = (tmp_path / "va" / "kit" / "key.pem").read_bytes()
        with pytest.raises(AlreadyExists, match="a site that has joined already"):
            join(line, tmp_path / "va")
    assert (tmp_path / "va" / "kit" / "key.pem").read_bytes() == before


# ------------------------------------------------------------------------------------------ refusals


def test_a_line_works_once(files, tmp_path):
    with served(files):
        join(line := invited(files), tmp_path / "va")
        assert refused(line, tmp_path / "other") == "used"
    assert files.roster().number == 2


def test_a_line_expires(files, tmp_path):
    line, at = invited(files, days=2), now() + timedelta(days=2, minutes=1)
    with served(files, clock=lambda: at):
        assert refused(line, tmp_path / "va") == "expired"
    assert files.enrolment("va").state == "invited"


def test_a_request_that_waits_does_not_expire(files, tmp_path):
    line, at = invited(files, days=2), [now()]
    with served(files, manual=True, clock=lambda: at[0]):
        assert join(line, tmp_path / "va") is None
        at[0] += timedelta(days=3)
        assert join(line, tmp_path / "va") is None


def test_a_forged_token_is_refused(files, tmp_path):
    line = invited(files)
    with served(files):
        for forged in (
            replace(line, token=SecretBytes(bytes(32))),
            replace(line, site="oslo"),  # never invited
            JoinLine.create(line.host, line.port, "va", line.fingerprint),
        ):
            assert refused(forged, tmp_path / "forged") == "token"
            for each in (tmp_path / "forged").glob("joining.json"):
                each.unlink()
        newer = invited(files)
        assert refused(line, tmp_path / "older") == "token"
        assert join(newer, tmp_path / "va").roster.number == 2


def answered(files, request):
    """The answer to one JSON request over the real port."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(cadata=files.authority_pem.decode())
    where = "localhost", files.config.enrol_port
    with (
        socket.create_connection(where, 10) as plain,
        context.wrap_socket(plain, server_hostname="localhost") as secured,
        secured.makefile("rb") as reader,
    ):
        json.loads(reader.readline())
        data = request if isinstance(request, bytes) else json.dumps(request.to_json()).encode()
        secured.sendall(data + b"\n")
        return json.loads(reader.readline())


def a_request(files, folder, site="va"):
    return joining.begin(invited(files, site), folder)


@pytest.mark.parametrize("name", ["oslo", "VA", "va/../oslo", "coordinator"])
def test_a_certificate_request_for_another_name_is_refused(files, monkeypatch, name):
    line, csr = invited(files), make_csr(name, ec.generate_private_key(ec.SECP256R1()))
    monkeypatch.setattr("fedcore.identity.join_messages.make_csr", lambda *_: csr)
    request = JoinRequest.create(line, None, IdentityKey())
    with served(files):
        assert answered(files, request) == {"state": "refused", "word": "name"}
    assert files.enrolment("va").state == "invited"


def test_a_site_on_the_roster_is_not_replaced(files, tmp_path):
    with served(files):
        join(invited(files), tmp_path / "va")
        with pytest.raises(Refused, match="found it on roster 2"):
            invited(files)
        request = a_request(files, tmp_path / "oslo", "oslo")
        # as if the roster had got the name while the line was out
        roster = files.roster()
        both = {**roster.sites, "oslo": IdentityKey().public}
        SignedRoster("heart", 3, now(), both).sign(authority_of(files)).save(files.config.roster)
        assert answered(files, request) == {"state": "refused", "word": "joined"}
    assert files.roster().sites["oslo"] == both["oslo"]


def test_a_request_that_was_altered_on_its_way_is_refused(files, tmp_path):
    request = a_request(files, tmp_path / "va")
    stranger = IdentityKey()
    with served(files):
        for other, word in (
            (replace(request, identity=stranger.public), "token"),
            (replace(request, csr=request.csr[:-1] + b"x"), "token"),
            (replace(request, by_token=bytes(64)), "token"),
            (replace(request, by_identity=bytes(64)), "request"),
            (replace(request, site="va\n"), "request"),
        ):
            assert answered(files, other) == {"state": "refused", "word": word}
    assert files.enrolment("va").state == "invited"


def test_malformed_and_endless_requests_are_refused(files, tmp_path):
    request = a_request(files, tmp_path / "va")
    with served(files) as received:
        for data in (b"", b"[]", b"\xff\xfe", b"{}", b"[" * 4000, b'{"site": 3}', b"null"):
            assert answered(files, data) == {"state": "refused", "word": "request"}
        before = len(received)
        with contextlib.suppress(
            OSError, ValueError
        ):  # the connection may be reset while bytes are on their way
            assert answered(files, b"x" * (MOST_REQUEST + 1)) == {
                "state": "refused",
                "word": "request",
            }
        assert len(received) == before
        assert answered(files, request)["state"] == "joined"


def test_a_peer_that_says_nothing_is_disconnected(files, monkeypatch, tmp_path):
    monkeypatch.setattr(enrolment, "SECONDS", 0.2)
    with (
        served(files),
        socket.create_connection(("localhost", files.config.enrol_port), 10) as mute,
    ):
        assert mute.recv(1) == b""


def test_connections_of_one_address_are_few(files, tmp_path):
    line = invited(files)
    with served(files):
        with contextlib.ExitStack() as opened:
            many = [
                opened.enter_context(socket.create_connection(("127.0.0.1", line.port), 10))
                for _ in range(enrolment.MOST_OF_ADDRESS + 1)
            ]
            assert many[-1].recv(1) == b""  # closed at once, while the others may go on
        while True:  # until the server has seen that they are closed
            with contextlib.suppress(BadInput):
                assert join(line, tmp_path / "va").roster.number == 2
                break


# ------------------------------------------------------------------------------------------ trust


def events(folder):
    """(event, facts) of every line of an audit trail."""
    lines = (folder / "audit.jsonl").read_bytes().splitlines()
    return [(found.event, found.facts) for found in map(Line.parse, lines)]


def test_joining_and_its_refusals_are_in_both_audit_trails(files, tmp_path):
    signer = SiteSigner(IdentityKey())
    with AuditTrail.open(tmp_path / "hub", signer, {}) as trail, served(files, audit=trail):
        join(line := invited(files), tmp_path / "va")
        assert refused(line, tmp_path / "other") == "used"
    (_, joined), (_, no) = (each for each in events(tmp_path / "hub") if each[0] != "opened")
    assert (joined["site"], joined["decision"]) == ("va", "joined")
    assert (no["site"], no["decision"]) == ("va", "used")
    (_, there) = (
        each for each in events(tmp_path / "va" / "state") if each[0] != "opened"
    ).__next__()
    assert (there["decision"], there["roster"], there["serial"]) == ("joined", 2, joined["serial"])
    ((event, here),) = (
        each for each in events(tmp_path / "other" / "state") if each[0] != "opened"
    )
    assert (event, here["word"]) == ("refused", "used")
    assert events(tmp_path / "va" / "state")[0][1]["software"] == SOFTWARE
    token = line.text().rsplit(":", 1)[1]
    for path in tmp_path.rglob("audit.jsonl"):
        assert token not in path.read_text()


@pytest.mark.parametrize(
    ("case", "at_hub", "at_site"),
    [
        ("used", "used", "used"),
        ("expired", "expired", "expired"),
        ("forged", "token", "token"),
        ("another name", "name", "name"),
        ("wrong fingerprint", "no request", "not trusted"),
    ],
)
def test_each_refusal_is_in_the_trails_of_both_ends(
    files, tmp_path, monkeypatch, case, at_hub, at_site
):
    line, at = invited(files), [now()]
    signer = SiteSigner(IdentityKey())
    with (
        AuditTrail.open(tmp_path / "hub", signer, {}) as trail,
        served(files, audit=trail, clock=lambda: at[0]),
    ):
        if case == "used":
            join(line, tmp_path / "first")
        elif case == "expired":
            at[0] += timedelta(days=8)
        elif case == "forged":
            line = replace(line, token=SecretBytes(bytes(32)))
        elif case == "another name":
            csr = make_csr("oslo", ec.generate_private_key(ec.SECP256R1()))
            monkeypatch.setattr("fedcore.identity.join_messages.make_csr", lambda *_: csr)
        else:
            line = replace(line, fingerprint="0" * 64)
        with pytest.raises((JoinRefused, CertificateRefused)):
            join(line, tmp_path / "va")
        hub = tmp_path / "hub"
        wait_until(lambda: any(event == "refused" for event, _ in events(hub)))
    (no,) = (facts for event, facts in events(hub) if event == "refused")
    assert at_hub in (no.get("decision"), no.get("word"))
    assert no.get("site") == "va" or no["address"] == "127.0.0.1"
    (here,) = (f for event, f in events(tmp_path / "va" / "state") if event == "refused")
    assert here["word"] == at_site


def wait_until(holds):
    """At most 10 s: the other end's thread is not waited for."""
    for _ in range(1000):
        if holds():
            return
        time.sleep(0.01)
    pytest.fail("it did not happen")


def test_nothing_is_sent_to_another_authority(files, tmp_path):
    line = replace(invited(files), fingerprint="0" * 64)
    with (
        served(files) as received,
        pytest.raises(CertificateRefused, match="found the authority") as caught,
    ):
        join(line, tmp_path / "va")
    assert "nothing was sent" in caught.value.remedy
    assert received == []
    assert not (tmp_path / "va" / "kit").exists()


class Impostor:
    """A TLS server that says what it is told, and records what it is sent."""

    def __init__(self, folder, kit, first):
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.context.load_cert_chain(kit.certificate_path, kit.key_path)
        self.first, self.received = first, []
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]

    def serve(self):
        with contextlib.suppress(OSError):
            plain, _ = self.listener.accept()
            with plain, self.context.wrap_socket(plain, server_side=True) as secured:
                secured.sendall(self.first)
                if self.first.endswith(b"\n"):
                    self.received.append(secured.recv(1))

    def __enter__(self):
        self.thread = threading.Thread(target=self.serve)
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.listener.close()
        self.thread.join(10)


def kit_of(authority, folder, role="coordinator", hosts=("localhost",)):
    return authority.issue(role, role, now(), hosts=hosts if role == "coordinator" else ()).save(
        folder
    )


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("relayed authority", "that is not trusted here"),
        ("a second authority", "found the authority"),
        ("a site's certificate", "found role 'operator'"),
        ("another host", "found it made out to elsewhere.example"),
        ("no JSON", "found something else there"),
        ("a cut line", "found something else there"),
    ],
)
def test_an_impostor_is_sent_nothing(files, tmp_path, case, words):
    """It may know the authority's certificate, which is public."""
    theirs, ours = Authority.create("heart", now()), authority_of(files)
    kit = {
        "a site's certificate": lambda: kit_of(ours, tmp_path / "kit", "operator"),
        "another host": lambda: kit_of(ours, tmp_path / "kit", hosts=("elsewhere.example",)),
    }.get(case, lambda: kit_of(theirs, tmp_path / "kit"))()
    shown = files.authority_pem
    if case == "a second authority":
        shown += theirs.certificate_pem
    first = json.dumps({"authority": shown.decode()}).encode() + b"\n"
    first = {"no JSON": b"HTTP/1.1 400 Bad Request\r\n", "a cut line": first[:100]}.get(case, first)
    line = invited(files)
    with (
        Impostor(tmp_path, kit, first) as impostor,
        pytest.raises((CertificateRefused, BadInput), match=words),
    ):
        join(replace(line, port=impostor.port), tmp_path / "va")
    assert impostor.received in ([], [b""])
    assert not (tmp_path / "va" / "kit").exists()


def test_an_answer_of_another_authority_is_not_written(files, tmp_path):
    request = a_request(files, tmp_path / "va")
    good = files_answer(files, request)
    other = Authority.create("heart", now())
    for bad, kind in (
        (replace(good, authority=other.certificate_pem), CertificateRefused),
        (
            replace(good, certificate=other.issue("site", "va", now()).certificate_pem),
            CertificateRefused,
        ),
        (
            replace(
                good, certificate=authority_of(files).issue("site", "va", now()).certificate_pem
            ),
            CertificateRefused,
        ),
        (
            replace(
                good, certificate=authority_of(files).issue("site", "oslo", now()).certificate_pem
            ),
            CertificateRefused,
        ),
        (replace(good, roster=SignedRoster("heart", 2, now(), {}).sign(other).to_toml()), Refused),
        (
            replace(
                good, roster=SignedRoster("heart", 2, now(), {}).sign(authority_of(files)).to_toml()
            ),
            BadInput,
        ),
    ):
        with pytest.raises(kind):
            joining.finish(tmp_path / "va", bad, now(), tasks=[])
        assert not (tmp_path / "va" / "site.toml").exists()
        assert not (tmp_path / "va" / "kit" / "certificate.pem").exists()
    assert joining.finish(tmp_path / "va", good, now(), tasks=[]).site == "va"


def files_answer(files, request):
    """What a site that is approved gets."""
    files.ask(request, now())
    return files.answer(files.approve(request.site, authority_of(files), now()))


# ------------------------------------------------------------------------------------------ approval


def test_a_request_waits_for_approval(files, tmp_path):
    line = invited(files)
    with served(files, manual=True):
        assert join(line, tmp_path / "va") is None
        assert files.enrolment("va").state == "asked"
        assert files.roster().number == 1
        files.approve("va", authority_of(files), now())
        assert files.enrolment("va").state == "approved"
        assert join(line, tmp_path / "va").roster.number == 2
        assert files.enrolment("va").state == "joined"


def test_a_request_that_waits_is_bound_to_its_keys(files, tmp_path):
    line = invited(files)
    with served(files, manual=True):
        join(line, tmp_path / "va")
        assert refused(line, tmp_path / "thief") == "used"


def test_a_site_that_has_not_asked_is_not_approved(files):
    invited(files)
    with pytest.raises(Refused, match="found it invited, expected a request"):
        files.approve("va", authority_of(files), now())
    with pytest.raises(BadInput, match="site: found 'vb', which is not known"):
        files.approve("vb", authority_of(files), now())


# ------------------------------------------------------------------------------------------ lines


def test_a_line_is_read_back(files):
    line = invited(files)
    again = JoinLine.parse(line.text())
    assert (again.host, again.port, again.site) == ("localhost", files.config.enrol_port, "va")
    assert again.token_key == line.token_key
    assert (
        JoinLine.parse(f"  {line.text()[:50]}\n {line.text()[50:]}\r\n").token_key == line.token_key
    )
    six = JoinLine.create("::1", 7444, "va", line.fingerprint)
    assert JoinLine.parse(six.text()).host == "::1"
    assert line.text().rsplit(":", 1)[1] not in repr(line)


@pytest.mark.parametrize("cut", [1, 20, 43, 60, 110, 140])
def test_a_line_that_is_cut_off_is_refused_without_its_token(files, cut):
    text = invited(files).text()
    with pytest.raises(BadInput, match="join line: found") as caught:
        JoinLine.parse(text[:-cut])
    assert text.rsplit(":", 1)[1][:16] not in str(caught.value)


def test_requests_are_read_from_any_bytes():
    with pytest.raises(JoinRefused):
        JoinRequest.parse(b"x" * (MOST_REQUEST + 1))
    with pytest.raises(BadInput, match="found no answer"):
        JoinAnswer.parse(b'{"state": "joined"}', "coordinator")
    with pytest.raises(BadInput, match="found no answer"):
        JoinAnswer.parse(b'{"state": "refused", "word": "other"}', "coordinator")


# ------------------------------------------------------------------------------------------ the command


@pytest.fixture
def fed_site(capsys, monkeypatch):
    """Run a command of fed-site with this line on stdin: its exit code, stdout and stderr."""

    def run(*words, line=""):
        monkeypatch.setattr("sys.stdin", io.StringIO(f"{line}\n"))
        with pytest.raises(SystemExit) as ended:
            main([*words])
        return ended.value.code, *capsys.readouterr()

    return run


def test_the_command_waits_for_approval_and_goes_on(files, tmp_path, fed_site):
    line, out = invited(files).text(), str(tmp_path / "va")
    with served(files, manual=True):
        code, shown, said = fed_site("join", "--out", out, line=line)
        assert (code, shown) == (3, "")
        assert "the operator has to approve it: fed-coordinator approve va" in said
        assert "hint: run the same command again" in said
        (row,) = sites_rows(files, None)
        assert f"identity key {row['identity']}" in said
        files.approve("va", authority_of(files), now())
        code, shown, said = fed_site("join", "--out", out, "--json", line=line)
    assert (code, said) == (0, "")
    assert {"state": "joined", "site": "va", "roster": 2}.items() <= json.loads(shown).items()
    code, _, said = fed_site("join", "--out", out, line=line)
    assert code == 2
    assert "found a site that has joined already" in said


def test_the_table_of_sites_has_whole_fingerprints_in_a_narrow_terminal(files, tmp_path):
    with served(files):
        for name in ("va", "hospital-of-switzerland"):
            join(invited(files, name), tmp_path / name)
        invited(files, "lakeside")
    rows, page = sites_rows(files, None), Console(width=80, file=io.StringIO())
    page.print(sites_table(rows))
    shown = page.file.getvalue()
    assert all(row["identity"] in shown for row in rows if row["identity"])
    assert rows[-1]["invitation_expires"][11:16] in shown and "\u2026" not in shown


def test_the_command_shows_what_it_wrote_and_no_secret(files, tmp_path, fed_site):
    line = invited(files).text()
    with served(files):
        code, shown, said = fed_site("join", "--out", str(tmp_path / "va"), line=line)
    assert code == 0
    written = {
        path.relative_to(tmp_path / "va").as_posix() for path in (tmp_path / "va").rglob("*.*")
    }
    for name in ("kit/key.pem", "identity.pem", "roster.toml", "site.toml", "policy.toml"):
        assert name in written
        assert name in shown
    assert "fed-site check --config" in shown
    keys = [
        (tmp_path / "va" / n).read_text().split("\n")[1] for n in ("kit/key.pem", "identity.pem")
    ]
    for secret in (line.rsplit(":", 1)[1], *keys):
        assert secret not in shown + said


def test_the_command_by_files(files, tmp_path, fed_site, monkeypatch):
    monkeypatch.chdir(tmp_path)
    line = invited(files).text()
    code, shown, _ = fed_site("join", "--out", "va", "--request", "request.json", line=line)
    assert code == 0
    assert "it holds no private key and no token" in shown
    text = (tmp_path / "request.json").read_text()
    assert line.rsplit(":", 1)[1] not in text
    answer = files_answer(files, JoinRequest.parse(text.encode()))
    (tmp_path / "answer.json").write_text(json.dumps(answer.to_json()))
    assert fed_site("join", "--out", "elsewhere", "--answer", "answer.json")[0] == 2
    code, shown, _ = fed_site("join", "--out", "va", "--answer", "answer.json")
    assert (code, "site 'va' is in 'heart'" in shown) == (0, True)
    answer = files.renew("va", None, authority_of(files), now())
    (tmp_path / "answer.json").write_text(json.dumps(answer.to_json()))
    code, shown, _ = fed_site("join", "--out", "va", "--answer", "answer.json")
    assert (code, "the new certificate" in shown) == (0, True)


def test_a_refusal_is_one_line_and_a_hint(files, tmp_path, fed_site):
    line = invited(files).text()
    with served(files):
        fed_site("join", "--out", str(tmp_path / "va"), line=line)
        code, shown, said = fed_site("join", "--out", str(tmp_path / "other"), line=line)
    assert (code, shown) == (3, "")
    error, hint = said.splitlines()
    assert error.startswith("error: coordinator localhost:")
    assert "used before with other keys" in error
    assert hint.startswith("hint: ")
