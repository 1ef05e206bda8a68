"""Each job at the coordinator has the roster of its submission, whatever roster.toml is later."""

import asyncio
import json
from datetime import UTC, datetime
from types import SimpleNamespace

import pytest
from fedcore_server.context import CoordinatorContext
from fedcore_server.coordinator import Coordinator
from fedcore_server.operators import head_text
from fedcore_server.operators_api import OperatorsApi
from fedcore_server.sessions import SiteSession
from fedcore_server.site_api import SiteApi, Transfers

from fedcore.config import build_job, wire_settings
from fedcore.errors import (
    BadInput,
    CertificateRefused,
    FedcoreError,
    RosterRefused,
    SignatureRefused,
    UnknownName,
)
from fedcore.identity.authority import Authority
from fedcore.identity.identities import write_roster
from fedcore.identity.roster import PinnedRoster, RosterFile
from fedcore.identity.signed_roster import SignedRoster
from fedcore.results import JobEvent
from fedcore.secagg.crypto.identity_key import IdentityKey
from fedcore.secagg.protocol.job.coordinator.events import SiteConnected
from fedcore.secagg.protocol.job.coordinator.facts import Limits, Moment
from fedcore.store.journal import Journal
from fedcore.store.spool import Spool
from fedcore.wire import frames

PEER = SimpleNamespace(name="op", fingerprint="f0", serial="1")
KEYS = {name: IdentityKey().public for name in "abcde"}


def roster_of(names):
    return {name: KEYS[name] for name in names}


class Town:
    """A coordinator whose roster is a file; `restart` is what a new process reads."""

    def __init__(self, folder):
        self.folder, self.path = folder, folder / "roster.toml"
        write_roster(self.path, roster_of("abcd"))
        self.start()

    def start(self):
        self.journal = Journal.open(self.folder / "journal.sqlite", party="hub")
        rosters = RosterFile(PinnedRoster({}), self.path)
        rosters.refresh()
        context = CoordinatorContext(
            "town", rosters, self.journal, Spool(self.folder / "spool"), None, self.folder, Limits()
        )
        self.hub = Coordinator(context, gate=None)

    def restart(self):
        self.journal.close()
        self.start()

    def submit(self, **settings):
        complete = build_job({"max_examples": 16, "batch_size": 8, **settings})
        about = json.dumps({"settings": wire_settings(complete)})
        asked = frames.SubmitRequest(b"# job\n", "t", "0" * 64, about.encode())
        return self.hub.jobs[asyncio.run(OperatorsApi(self.hub).submit(PEER, asked)).job]

    def change(self, names):
        write_roster(self.path, roster_of(names))
        return self.hub.context.rosters.refresh()


@pytest.fixture
def town(tmp_path):
    found = Town(tmp_path)
    yield found
    found.journal.close()


def test_a_new_roster_is_for_the_next_job_and_not_for_the_one_before(town):
    first = town.submit()
    assert town.change("abcde")
    second = town.submit()
    assert list(first.facts.pins) == list("abcd")
    assert list(second.facts.pins) == list("abcde")
    assert first.roster.digest != second.roster.digest


@pytest.mark.parametrize("later", ["abcde", "abc", "dcba"])
def test_a_restarted_coordinator_gives_a_job_the_roster_of_its_submission(town, later):
    name = town.submit().id
    town.change(later)
    town.restart()
    assert town.hub.jobs[name].facts.pins == roster_of("abcd")
    assert list(town.hub.jobs[name].facts.pins) == list("abcd")
    assert list(town.hub.context.rosters) == list(later)


def test_a_replaced_key_is_for_the_next_job(town):
    first = town.submit()
    write_roster(town.path, roster_of("abc") | {"d": KEYS["e"]})
    assert town.hub.context.rosters.refresh()
    assert first.facts.pins["d"] == KEYS["d"]
    assert town.submit().facts.pins["d"] == KEYS["e"]


def test_a_site_that_is_not_on_a_jobs_roster_has_no_part_in_it(town):
    first = town.submit()
    town.change("abcde")
    first.put(SiteConnected("e"))
    first.doing("e", "training")
    first.withdrawn("e")
    assert not first.mailbox.backlog
    assert "e" not in first.facts.sites and not first.facts.withdrawn
    first.put(SiteConnected("a"))
    assert first.mailbox.backlog == 1, "the control: a site of the job"


def test_a_sum_is_given_to_sites_of_the_job_only(town):
    first = town.submit()
    first.disk.sum = SimpleNamespace(digest=b"d" * 32)
    assert first.download("e", "sum", b"d" * 32) is None
    assert first.download("a", "sum", b"d" * 32) is first.disk.sum


def test_sites_of_a_job_that_is_not_over_may_connect_with_its_roster(town):
    api = SiteApi(town.hub, Transfers(town.hub))
    first = town.submit()
    town.change("abcde")
    newest = town.hub.context.rosters.current.digest
    for pins in (first.roster.digest, newest):
        assert asyncio.run(api.check(PEER, frames.Hello(pins))).federation == "town"
    first.end("stopped", "")
    with pytest.raises(BadInput, match="other identity keys"):
        asyncio.run(api.check(PEER, frames.Hello(first.roster.digest)))


def test_the_welcome_has_the_number_of_the_newest_roster(town):
    api = SiteApi(town.hub, Transfers(town.hub))

    def number():
        asked = frames.Hello(town.hub.context.rosters.current.digest)
        return asyncio.run(api.check(PEER, asked)).roster

    assert number() == 0, "a roster without a number"
    town.hub.context.rosters.current = PinnedRoster(roster_of("abc"), 7, b"signed")
    assert number() == 7


def test_evicting_a_new_site_leaves_the_jobs_without_it_alone(town):
    first, api = town.submit(), OperatorsApi(town.hub)
    town.change("abcde")
    second = town.submit()
    asyncio.run(api.evict(PEER, frames.SiteRequest("e")))
    assert second.facts.sites["e"].unable == "evicted" and "e" not in first.facts.sites
    with pytest.raises(UnknownName):
        asyncio.run(api.evict(PEER, frames.SiteRequest("f")))


def test_a_broken_file_changes_nothing_and_is_reported_once(town):
    town.path.write_text("[sites]\na = 3\n")
    with pytest.raises(BadInput, match=r"sites\.a"):
        town.hub.context.rosters.refresh()
    assert not town.hub.context.rosters.refresh()
    assert list(town.hub.context.rosters) == list("abcd")
    assert town.change("abc")


def test_the_same_roster_written_again_is_no_change(town):
    assert not town.change("abcd")


# ---------------------------------------------------------------- the file changes while it runs


def signed(folder, number, names, authority):
    made = SignedRoster("town", number, datetime(2026, 11, 30, tzinfo=UTC), roster_of(names))
    made.sign(authority).save(folder / "roster.toml")


@pytest.fixture
def authority():
    return Authority.create("town", datetime.now(UTC))


@pytest.fixture
def numbered(tmp_path, authority):
    """The roster of a file that the authority signed, number 2: a, b, c, d."""
    signed(tmp_path, 2, "abcd", authority)
    path, pem = tmp_path / "roster.toml", authority.certificate_pem
    found = RosterFile(PinnedRoster({}), path, pem, "town")
    assert found.refresh() and found.current.number == 2
    return found


def test_a_newer_signed_roster_takes_the_place_of_an_older(tmp_path, numbered, authority):
    signed(tmp_path, 3, "abcde", authority)
    assert numbered.refresh() and list(numbered) == list("abcde")
    assert SignedRoster.parse(numbered.current.document).number == 3


@pytest.mark.parametrize(
    ("number", "names", "reason"),
    [
        (1, "abcde", "found number 1, expected 2 or newer"),
        (2, "abcde", "found number 2 with other sites, expected one roster of each number"),
        (2, "dcba", "found number 2 with other sites"),
    ],
)
def test_an_older_roster_or_a_second_one_of_a_number_is_not_taken(
    tmp_path, numbered, authority, number, names, reason
):
    signed(tmp_path, number, names, authority)
    with pytest.raises(RosterRefused, match=reason):
        numbered.refresh()
    assert numbered.current.number == 2 and list(numbered) == list("abcd")


def test_a_signed_roster_is_not_followed_by_one_without_a_signature(tmp_path, numbered):
    write_roster(tmp_path / "roster.toml", roster_of("abcde"))
    with pytest.raises(RosterRefused, match="a roster without a number"):
        numbered.refresh()


def test_a_roster_of_another_authority_is_not_taken(tmp_path, numbered):
    signed(tmp_path, 3, "abcde", Authority.create("town", datetime.now(UTC)))
    with pytest.raises(SignatureRefused, match="another authority"):
        numbered.refresh()
    assert list(numbered) == list("abcd")


def test_the_running_coordinator_logs_what_changed_and_what_is_refused(town, caplog):
    caplog.set_level("INFO", "fedcore.coordinator")
    write_roster(town.path, roster_of("abce"))
    town.hub.refresh_roster()
    assert [each.message for each in caplog.records] == [
        "roster (not numbered): 1 site added: e", "roster (not numbered): 1 site removed: d",
    ]  # fmt: skip
    town.path.write_text("[sites")
    town.hub.refresh_roster()
    town.hub.refresh_roster()
    assert len(caplog.records) == 3 and "stays in force" in caplog.text
    assert list(town.hub.context.rosters) == list("abce")


# -------------------------------------------------------------------- sites that are sent away


def gate(town, revoked=()):
    """Stands in for certificates: a site is admitted while it is on the newest roster and not revoked."""

    def still(peer):
        if peer.name in revoked:
            raise CertificateRefused(f"{peer.name}: revoked", check="revoked")
        if peer.name not in town.hub.context.rosters:
            raise CertificateRefused(f"{peer.name}: not on it", check="roster")

    return SimpleNamespace(still=still)


def connect(town, name):
    peer = SimpleNamespace(name=name, fingerprint="f0", serial="1")
    town.hub.sessions.last_peers[name] = peer
    session = SiteSession(peer)
    town.hub.sessions.begin(name, session)
    return session


@pytest.mark.parametrize("how", ["removed", "revoked"])
def test_the_running_job_goes_on_without_a_site_that_was_sent_away(town, how):
    job, revoked = town.submit(), set()
    town.hub.sessions.gate = gate(town, revoked)
    gone, stays = connect(town, "d"), connect(town, "a")
    town.hub.withdraw()
    assert not job.facts.withdrawn, "the control: nobody is sent away"
    if how == "removed":
        town.change("abc")
    else:
        revoked.add("d")
    town.hub.sessions.check(None)
    town.hub.withdraw()
    assert gone.over and not stays.over
    assert job.facts.withdrawn == {"d"}, "so the next round has new keys"
    assert how in job.facts.sites["d"].unable
    assert job.mailbox.backlog == 1, "its round does not wait for the grace"
    town.hub.returned("d")
    assert not job.facts.sites["d"].unable


def test_a_job_that_falls_below_the_minimum_says_who_was_sent_away(town):
    job = town.submit()
    job.facts.threshold = 3
    for name in "cd":
        job.facts.sites[name].unable = "removed from the roster"
    wait = job.machine.gathering
    assert wait.check("ab", Moment(0.0, 0.0, "ab")) is False
    assert wait.check("ab", Moment(61.0, 61.0, "ab")) == (
        "2 sites were there after 60 s, too few for a round, which needs 3; cannot take part: "
        "c (removed from the roster), d (removed from the roster)"
    )


def test_a_restarted_coordinator_knows_that_a_site_was_removed(town):
    name = town.submit().id
    town.change("abc")
    town.restart()
    sites = town.hub.jobs[name].facts.sites
    assert [site for site, view in sites.items() if view.unable] == ["d"]


# ---------------------------------------------------------------------------- jobs in the queue


def begun(job):
    """The job left the queue."""
    job._begin()
    job.on_begin(job)
    return job


def test_a_job_begins_with_the_newest_roster_and_keeps_it_then(town):
    """Sites take no job of an older roster than they have seen, so one that waited would never run."""
    job = town.submit()
    town.change("abcde")
    assert list(begun(job).facts.sites) == list("abcde")
    assert job.facts.evicted is town.hub.sessions.evicted
    town.change("abcd")
    assert list(begun(job).facts.sites) == list("abcde")
    town.restart()
    again = begun(town.hub.jobs[job.id])
    assert list(again.facts.sites) == list("abcde")
    assert again.facts.sites["e"].unable == "removed from the roster"


def test_a_roster_that_the_jobs_threshold_does_not_fit_ends_the_job(town):
    job = town.submit(threshold=4)
    town.change("abc")
    assert "threshold" in refusal_of(begun(job))
    other = town.submit()
    assert not refusal_of(begun(other)), "the control"


def refusal_of(job):
    try:
        job._plan.threshold()
    except FedcoreError as refused:
        return str(refused)
    return ""


def test_operators_see_the_number_of_a_jobs_roster(town):
    """A static roster has none."""
    job = town.submit()
    event = JobEvent.from_json(town.hub.about(job).to_json() | {"sites": {}})
    assert head_text(event) == f"{job.id} (t, layered): queued"
    numbered = JobEvent.from_json(event.to_json() | {"roster": 3})
    assert head_text(numbered) == f"{job.id} (t, layered, roster 3): queued"
