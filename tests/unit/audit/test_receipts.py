"""Receipts and trails from elsewhere: what counts, what they show of a trail's end, and who notices a shorter one."""

from dataclasses import replace
from datetime import UTC, datetime
from types import SimpleNamespace

import pytest
from fedcore_clients.receipts import LINES, SECONDS
from fedcore_clients.receipts import Receipts as SiteReceipts
from fedcore_server.receipts import PAUSE_SECONDS
from fedcore_server.receipts import Receipts as CoordinatorReceipts

from fedcore.audit.evidence import COORDINATOR, TrustedParties
from fedcore.audit.keys import CoordinatorSigner, SiteSigner, site_key
from fedcore.audit.lines import Line, stamp
from fedcore.audit.receipt import RECEIPTS_FILE, Receipt, read_receipts
from fedcore.audit.trail import TRAIL_FILE, AuditTrail
from fedcore.audit.verification import verify
from fedcore.errors import BadInput, Refused
from fedcore.identity.authority import LOOPBACK, Authority
from fedcore.identity.kit import Kit
from fedcore.identity.signed_roster import KeptPin
from fedcore.secagg.crypto.identity_key import IdentityKey

NOW = datetime.now(UTC)
OURS = Authority.create("town", NOW)
KEYS = {name: IdentityKey() for name in ("va", "ch")}
PINS = {name: key.public for name, key in KEYS.items()}


@pytest.fixture(scope="session")
def kits(tmp_path_factory):
    """{name: kit}: the coordinator's, a site's, and a coordinator's of another authority under the same name."""
    folder, found = tmp_path_factory.mktemp("kits"), {}
    other = Authority.create("town", NOW)
    for name, authority, role, who in (
        ("hub", OURS, "coordinator", "hub"), ("va", OURS, "site", "va"), ("other", other, "coordinator", "hub"),
    ):  # fmt: skip
        hosts = LOOPBACK if role == "coordinator" else ()
        authority.issue(role, who, NOW, hosts=hosts).save(folder / name)
        found[name] = Kit.load(folder / name)
    return found


@pytest.fixture
def town(tmp_path, kits):
    """A site and its coordinator, with one receipt."""
    signer = CoordinatorSigner(kits["hub"])
    facts = {"party": "coordinator", "certificate": kits["hub"].certificate_pem.decode()}
    clock = SimpleNamespace(now=0.0)
    with (
        AuditTrail.open(tmp_path / "va", SiteSigner(KEYS["va"]), {"party": "va"}) as site,
        AuditTrail.open(tmp_path / "hub", signer, facts) as hub,
    ):
        given = CoordinatorReceipts(hub, signer, "town", lambda: clock.now)
        frames = []
        kept = SiteReceipts(site, tmp_path / "va", kits["va"], frames.append, lambda: clock.now)

        def exchange(*, change=lambda frame: frame):
            kept.ask()
            clock.now += PAUSE_SECONDS
            kept.take(change(given.confirm("va", frames[-1])))

        yield SimpleNamespace(
            folder=tmp_path, site=site, hub=hub, given=given, kept=kept, clock=clock, frames=frames,
            exchange=exchange, receipts=tmp_path / "va" / RECEIPTS_FILE,
        )  # fmt: skip


def federation(of="va", until=""):
    pins = [KeptPin(name, key, until if name != of else "") for name, key in PINS.items()]
    return TrustedParties("town", OURS.certificate_pem, pins, of)


def checked(town, *files, of="va", until=""):
    """The findings of a trail with evidence from these files. until: when the other sites left the roster."""
    evidence = [federation(of, until).read(path) for path in files]
    folder, key = town.folder / (of or "hub"), {town.hub._signer.public}
    if of:
        key = {site_key(PINS[of])}
    anchors = [each for found in evidence for each in found.anchors]
    witnesses = [each for found in evidence for each in found.witnesses]
    verdict = verify((folder / TRAIL_FILE).read_bytes(), key, anchors, witnesses)
    return [str(each) for each in verdict.findings], verdict.proven


def cut(path, lines):
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:lines]))


def test_receipt_confirms_both_trails(town):
    town.site.record("sent", bytes=1)
    town.exchange()
    assert checked(town, town.receipts) == ([], 2)
    assert checked(town, town.folder / "hub" / TRAIL_FILE) == ([], 2)
    assert checked(town, town.receipts, of=COORDINATOR) == ([], 2)


@pytest.mark.parametrize("source", ["receipts", "trail"])
def test_cut_end_is_located_by_what_the_coordinator_signed(town, source):
    for _ in range(3):
        town.site.record("sent", bytes=1)
    town.exchange()
    cut(town.folder / "va" / TRAIL_FILE, 2)
    path = town.receipts if source == "receipts" else town.folder / "hub" / TRAIL_FILE
    (found,), _ = checked(town, path)
    assert found.startswith("line 3: cut off: numbers 3 to 4 are missing, which ")


def test_cut_end_of_the_coordinators_trail_is_located_by_a_sites_receipts(town):
    town.exchange()
    cut(town.folder / "hub" / TRAIL_FILE, 1)
    (found,), _ = checked(town, town.receipts, of=COORDINATOR)
    assert found.startswith("line 2: cut off: number 2 is missing, which the receipt of")


def test_round_that_another_site_saw_released_is_missed(town):
    town.site.record("sent", header="aa" * 32)
    with AuditTrail.open(town.folder / "ch", SiteSigner(KEYS["ch"]), {"party": "ch"}) as other:
        for header, survivors in (("aa", ["va", "ch"]), ("bb", ["va", "ch"]), ("cc", ["ch"])):
            about = {"header": header * 32, "number": 1, "job": "heart-1"}
            other.record("released", survivors=survivors, **about)
    (found,), _ = checked(town, town.folder / "ch" / TRAIL_FILE)
    assert found == (
        "line 3: before it no line of a round is there: the trail of site ch, line 3, has release 1 of "
        "job heart-1"
    )


def released(trail, header):
    about = {"header": header * 32, "number": 1, "job": "heart-1", "survivors": ["va", "ch"]}
    trail.record("released", **about)


@pytest.mark.parametrize("left", [True, False])
def test_what_a_site_signed_after_it_was_revoked_accuses_nobody(town, left):
    """A thief has its key, and writes releases that the others are to have hidden; what it signed before counts."""
    times = iter([1.8e9 + number for number in range(9)])
    with AuditTrail.open(
        town.folder / "ch", SiteSigner(KEYS["ch"]), {"party": "ch"}, now=lambda: next(times)
    ) as other:
        released(other, "aa")
        released(other, "bb")
        released(other, "cc")
    path = town.folder / "ch" / TRAIL_FILE
    lines = [Line.parse(raw) for raw in path.read_bytes().splitlines()]
    until = lines[1].time[:19] + "Z" if left else ""
    found, _ = checked(town, path, until=until)
    assert len(found) == (1 if left else 3), "control: with the key on the roster all count"
    assert "line 2, has release" in found[0]
    (note,) = federation("va", until).read(path).notes or ("",)
    assert note == (
        f"the trail of site ch from line 3 on counts for nothing: its key left the roster at {until}"
        if left
        else ""
    )


def test_lines_that_are_dated_back_behind_one_that_is_too_late_do_not_count(town):
    times = iter([1.8e9, 1.8e9 + 100, 1.8e9 + 1])
    with AuditTrail.open(
        town.folder / "ch", SiteSigner(KEYS["ch"]), {"party": "ch"}, now=lambda: next(times)
    ) as other:
        released(other, "aa")
        released(other, "bb")
    path = town.folder / "ch" / TRAIL_FILE
    until = stamp(1.8e9 + 50)
    assert checked(town, path, until=until)[0] == []


def test_older_copy_of_the_trail_confirms_it(town):
    copy = town.folder / "copy.jsonl"
    town.site.record("sent", bytes=1)
    copy.write_bytes((town.folder / "va" / TRAIL_FILE).read_bytes())
    town.site.record("sent", bytes=1)
    assert checked(town, copy) == ([], 2)
    cut(town.folder / "va" / TRAIL_FILE, 1)
    assert checked(town, copy)[0] == [
        "line 2: cut off: number 2 is missing, which the copy copy.jsonl confirms"
    ]


def test_coordinator_notices_a_shorter_trail_and_says_so_in_its_own(town, caplog):
    for _ in range(3):
        town.site.record("sent", bytes=1)
    town.exchange()
    number = town.site.sequence
    town.site.sequence -= 2  # as after a restart on a file that was cut
    town.exchange()
    assert "expected the one confirmed up to number" in caplog.text
    words = [line.facts["word"] for line in verified(town) if line.event == "receipt"]
    assert words == ["confirmed", "shorter than confirmed"]
    assert number > town.site.sequence


def test_coordinator_remembers_the_heads_across_a_restart(town, kits, caplog):
    for _ in range(3):
        town.site.record("sent", bytes=1)
    town.exchange()
    again = CoordinatorReceipts(town.hub, CoordinatorSigner(kits["hub"]), "town")
    again.confirm("va", replace(town.frames[-1], number=1))
    assert "ends at number 1" in caplog.text


def verified(town):
    found = verify((town.folder / "hub" / TRAIL_FILE).read_bytes(), {town.hub._signer.public})
    assert found.findings == ()
    return found.lines


def test_flood_of_heads_is_confirmed_now_and_then_only(town):
    town.exchange()
    head = town.frames[-1]
    assert [town.given.confirm("va", head) for _ in range(5)] == [None] * 5
    assert town.given.confirm("ch", head) is not None, "each site for itself"


@pytest.mark.parametrize(
    "change",
    [
        lambda frame: replace(frame, signature=bytes(64)),
        lambda frame: replace(frame, number=frame.number + 1),
        lambda frame: replace(frame, own_number=frame.own_number + 1),
        lambda frame: replace(frame, time_ms=0),
        lambda frame: replace(frame, certificate=b"none"),
    ],
    ids=["signature", "number", "own number", "time", "certificate"],
)
def test_receipt_that_does_not_count_is_dropped_by_the_site(town, change):
    before = town.site.head
    town.exchange(change=change)
    assert not town.receipts.exists()
    assert town.site.head == before


def test_receipt_of_another_authority_or_role_is_refused(town, kits):
    town.exchange()
    (real,) = read_receipts(town.receipts.read_bytes())
    other = CoordinatorSigner(kits["other"])
    forged = replace(real, certificate=kits["other"].certificate_pem.decode()).signed(other)
    site = replace(real, certificate=kits["va"].certificate_pem.decode()).signed(
        CoordinatorSigner(kits["va"])
    )
    for each in (forged, site):
        with pytest.raises(Refused, match="a certificate that does not count"):
            each.check(OURS.certificate_pem, "town")
    with pytest.raises(Refused):
        real.check(OURS.certificate_pem, "city")
    real.check(OURS.certificate_pem, "town")


def test_receipts_of_another_site_or_changed_ones_are_refused(town):
    town.exchange()
    with pytest.raises(Refused, match="found one of site va, expected site ch"):
        federation("ch").read(town.receipts)
    text = town.receipts.read_text()
    town.receipts.write_text(text.replace('"number": 1', '"number": 2'))
    with pytest.raises(Refused, match="the coordinator did not sign"):
        federation().read(town.receipts)


def test_changed_trail_of_another_party_is_refused(town):
    town.exchange()
    path = town.folder / "hub" / TRAIL_FILE
    path.write_bytes(path.read_bytes().replace(b'"word":"confirmed"', b'"word":"confirmeD"'))
    with pytest.raises(Refused, match="line 2: changed or inserted"):
        federation().read(path)


@pytest.mark.parametrize("data", [b"", b"{}\n", b'{"receipt": 1}\n', b"\0\n"])
def test_other_file_is_refused_in_one_line(tmp_path, data):
    (tmp_path / "x").write_bytes(data)
    with pytest.raises(BadInput, match="neither receipts nor a trail"):
        federation().read(tmp_path / "x")


def test_receipt_is_read_back_from_its_line(town):
    town.exchange()
    (found,) = read_receipts(town.receipts.read_bytes() + b'{"receipt"')  # cut off by a crash
    assert Receipt.parse(town.receipts.read_bytes()) == found


def test_site_asks_after_many_lines_or_some_seconds_and_never_for_nothing(town):
    town.exchange()
    town.kept.tick()
    asked = len(town.frames)
    town.clock.now += 10 * SECONDS
    town.kept.tick()
    assert len(town.frames) == asked, "nothing is new but the receipt"
    town.site.record("sent", bytes=1)
    town.kept.tick()
    assert len(town.frames) == asked + 1, "one line, and long enough"
    for _ in range(LINES):
        town.site.record("sent", bytes=1)
    town.kept.tick()
    assert len(town.frames) == asked + 2, "many lines"
