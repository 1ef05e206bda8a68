"""Each job at the coordinator has the roster of its submission, whatever roster.toml is later."""

import asyncio
import json
from types import SimpleNamespace

import pytest
from fedcore_server.context import CoordinatorContext
from fedcore_server.coordinator import Coordinator
from fedcore_server.operators_api import OperatorsApi
from fedcore_server.site_api import SiteApi, Transfers

from fedcore.config import build_job, wire_settings
from fedcore.errors import BadInput, UnknownName
from fedcore.identity.identities import write_roster
from fedcore.identity.roster import Roster, RosterFile
from fedcore.secagg.crypto.identity_key import IdentityKey
from fedcore.secagg.protocol.job.coordinator.events import SiteConnected
from fedcore.secagg.protocol.job.coordinator.facts import Limits
from fedcore.store.journal import Journal
from fedcore.store.spool import Spool
from fedcore.wire import frames

PEER = SimpleNamespace(name="op")
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
        rosters = RosterFile(Roster({}), self.path)
        rosters.refresh()
        context = CoordinatorContext(
            "town", rosters, self.journal, Spool(self.folder / "spool"), None, self.folder, Limits()
        )
        self.hub = Coordinator(context, gate=None)

    def restart(self):
        self.journal.close()
        self.start()

    def submit(self):
        about = json.dumps(
            {"settings": wire_settings(build_job({"max_examples": 16, "batch_size": 8}))}
        )
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


def test_changes_are_told_in_words():
    before = Roster(roster_of("abc"))
    after = Roster({"a": KEYS["a"], "b": KEYS["e"], "d": KEYS["d"]})
    assert after.changes(before) == [
        "1 site added: d", "1 site removed: c", "1 site with another key: b",
    ]  # fmt: skip
    assert Roster(roster_of("abcde")).changes(before) == ["2 sites added: d, e"]
    assert Roster(roster_of("cba")).changes(before) == ["the order of the sites is another one"]
    assert not before.changes(before)
