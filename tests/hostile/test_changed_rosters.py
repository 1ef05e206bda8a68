"""A coordinator that uses the roster as a weapon: which one it shows to whom, when, and with whose keys.

It may hold the authority's key as well, so that what it shows is signed. A site judges by what it has seen and what
its operator approved; the header of every round has the digest of the job's roster under every signature
(`test_announce.py`). Each control is the same attack where the site has no such memory, approval or rule.
"""

from __future__ import annotations

import asyncio
import json
from types import SimpleNamespace

import pytest
from fedcore_clients.app import Site
from fedcore_clients.context import SiteContext
from fedcore_clients.job_policy import JobPolicy
from fedcore_clients.ledger import Exposure, JobLedger, Ledger
from fedcore_clients.rosters import APPROVED_FILE, NEWEST_FILE, approve_roster

from fedcore.identity.roster import PinnedRoster
from fedcore.identity.signed_roster import SignedRoster
from fedcore.secagg.label import Terms, collusion
from fedcore.secagg.plan import canonical, default_threshold
from fedcore.secagg.protocol import job_messages as job
from fedcore.secagg.protocol.job.site.participation import RowsInSum
from fedcore.store.journal import Journal
from fedcore.store.spool import Spool
from fedcore.wire.frames import JobRoster, Roster, RosterSeen
from fedcore.wire.records import TO_SITE, pack_record
from tests.support.deployed_jobs import submitted
from tests.support.policies import BENCH, Rows, policy_of
from tests.support.rosters import IDENTITIES, KEYS, SiteFolder, document


def digest_of(data):
    return SignedRoster.parse(data).digest


class Hospital:
    """Site a with a real folder, journal and jobs; `said` is what it sent of jobs, `seen` what of rosters."""

    def __init__(self, folder, **rules):
        self.files = SiteFolder(folder, **rules)
        self.folder, self.rows = self.files.config.folder, Rows()
        self.start()

    def start(self):
        """A new process. Its session is not connected: what it sends is kept."""
        files, key = self.files, IDENTITIES["a"]
        self.journal = Journal.open(self.folder / "journal.sqlite", party="site a")
        context = SiteContext(
            "town", "a", key, files.live, self.journal, Spool(self.folder / "spool"), self.folder,
            files.policy, Ledger.open(self.folder, key), files.trail,
        )  # fmt: skip
        config = SimpleNamespace(
            **vars(files.config), policy_file=None, addresses=[("127.0.0.1", 1)], tasks={},
            keep_secrets_days=7.0,
        )  # fmt: skip
        self.site = Site(config, files.kit, context, self.rows)
        self.said, self.seen = [], []
        self.site.session.say = lambda _, message: self.said.append(message)
        self.site.session.roster_seen = self.seen.append

    def roster(self, data):
        """A roster from the coordinator; the site's word on it."""
        self.site._on_frame(Roster(data))
        return self.seen[-1].word

    def offer(self, name, data=None):
        """Offer a job, of this roster if one is named."""
        if data is not None:
            number = SignedRoster.parse(data).number
            self.site._on_frame(JobRoster(name, number, digest_of(data)))
        settings = canonical(submitted())
        message = job.JobOffer(name, "bench", BENCH["bench"], settings)
        self.site._on_frame(pack_record(name, message, TO_SITE))

    async def work(self):
        """Until every job that began here surveyed its rows, or was refused."""
        for found in self.site.jobs.values():
            while not any(message.job == found.id for message in self.said):  # noqa: ASYNC110
                await asyncio.sleep(0.005)
        for task in self.site._running.values():
            task.cancel()
        await asyncio.gather(*self.site._running.values(), return_exceptions=True)

    def sent(self, name):
        """The kinds of messages about a job that left the site."""
        return {type(message).__name__ for message in self.said if message.job == name}


@pytest.fixture
def hospital(tmp_path):
    made = []

    def make(name="1", **rules):
        (tmp_path / name).mkdir(exist_ok=True)
        made.append(Hospital(tmp_path / name, **rules))
        return made[-1]

    yield make
    for each in made:
        each.journal.close()
        each.site.context.ledger.close()


def play(scene):
    asyncio.run(scene)


# ------------------------------------------------------------------------------------- Sybil


def test_invited_sites_of_the_coordinator_reach_no_threshold_without_approval(hospital):
    """e, x, y, z are the coordinator's: more than may collude among seven. Control: a policy that takes any roster."""
    packed = document(2, "abcexyz")
    assert collusion(Terms("layered", 7, default_threshold(7))).active < len("exyz")

    async def scene():
        asks, takes = hospital("asks"), hospital("takes", roster="any")
        for each in (asks, takes):
            each.roster(packed)
            each.offer("j", packed)
            await each.work()
        assert asks.seen[-1] == RosterSeen(1, "waiting")
        assert not asks.said and not asks.site.jobs and not asks.rows.loaded
        shown = asks.site.status()["roster"]
        assert shown["waiting"]["changes"] == ["4 sites added: e, x, y, z"] and shown["held"] == [
            "j"
        ]
        assert takes.sent("j") == {"SiteSurvey"} and takes.rows.loaded

    play(scene())


def test_a_job_begins_once_its_roster_is_approved(hospital):
    async def scene():
        site, packed = hospital(), document(2, "abcd")
        site.roster(packed)
        site.offer("j", packed)
        approve_roster(site.files.config, site.files.kit, 2)
        site.site._follow_rosters()
        await site.work()
        assert site.sent("j") == {"SiteSurvey"}
        assert site.seen[-1] == RosterSeen(2, "approved")
        assert list(site.site.jobs["j"].roster.sites) == list("abcd")

    play(scene())


def test_a_job_that_ended_while_its_roster_waited_does_not_begin_after_the_approval(hospital):
    async def scene():
        site, packed = hospital(), document(2, "abcd")
        site.roster(packed)
        site.offer("j", packed)
        ended = pack_record("j", job.JobEnded("j", "failed", "too few"), TO_SITE)
        site.site._on_frame(ended)
        approve_roster(site.files.config, site.files.kit, 2)
        site.site._follow_rosters()
        assert not site.site.jobs and not site.site.rosters.held and not site.rows.loaded

    play(scene())


def test_an_offer_without_the_name_of_its_roster_is_under_the_approved_one(hospital):
    """So a coordinator that leaves the name out meets its own roster's digest in no round: `test_announce.py`."""

    async def scene():
        site = hospital()
        site.roster(document(2, "abcxyz"))
        site.offer("j")
        await site.work()
        assert list(site.site.jobs["j"].job.part.me.pins) == list("abc")

    play(scene())


# ------------------------------------------------------------------- an old roster, after a removal


def test_a_removed_site_is_not_put_back_by_the_roster_before(hospital):
    """c was removed by roster 2. Control: a site whose folder has forgotten roster 2."""
    before, after = document(1, "abc"), document(2, "abd")

    async def scene():
        site = hospital(roster="any")
        assert site.roster(after) == "approved"
        assert site.roster(before) == "older"
        site.offer("j", before)
        await site.work()
        assert site.seen[-1].word == "older"
        assert site.said == [job.SiteUnavailable("j", "a", "roster")] and not site.site.jobs
        refusals = [facts for event, facts in site.files.trail.events if event == "refused"]
        assert refusals == [
            {"what": "roster", "why": "older"},
            {"what": "job", "job": "j", "why": "roster older"},
        ]
        site.journal.close()
        for name in (NEWEST_FILE, APPROVED_FILE):
            (site.folder / name).unlink()
        site.files.start()
        site.start()
        site.offer("j", before)
        await site.work()
        assert site.sent("j") == {"SiteSurvey"}

    play(scene())


def test_the_memory_of_the_newest_roster_outlives_the_process(hospital):
    """Also of one that was never approved: the operator's no is no way back to an older one."""
    site = hospital()
    assert site.roster(document(3, "abd")) == "waiting"
    site.journal.close()
    site.files.start()
    site.start()
    assert site.roster(document(2, "abcx")) == "older"


# ------------------------------------------------------------------- two rosters to two sites


def test_two_rosters_of_one_number_are_refused_by_whoever_sees_both(hospital):
    """Control: a site that has seen neither takes either."""
    one, two = document(2, "abd"), document(2, "abx")
    site, other = hospital("1", roster="any"), hospital("2", roster="any")
    assert (site.roster(one), other.roster(two)) == ("approved", "approved")
    assert (site.roster(two), other.roster(one)) == ("differs", "differs")
    assert (site.files.sites, other.files.sites) == ("abd", "abx")


# ---------------------------------------------------------------------------- a swapped key


def test_a_swapped_key_counts_for_no_job_that_runs(hospital):
    """Control: the next job has it, where the policy takes any roster."""

    async def scene():
        site, swapped = hospital(roster="any"), document(2, "abc", b=KEYS["x"])
        site.offer("first")
        site.roster(swapped)
        site.offer("second", swapped)
        await site.work()
        pins = {name: found.job.part.me.pins for name, found in site.site.jobs.items()}
        assert pins["first"]["b"] == KEYS["b"]
        assert pins["second"]["b"] == KEYS["x"]

    play(scene())


def test_a_swapped_key_waits_for_approval_and_is_named(hospital):
    site = hospital()
    assert site.roster(document(2, "abc", b=KEYS["x"])) == "waiting"
    waiting = site.site.status()["roster"]["waiting"]
    assert waiting["changes"] == ["1 site with another identity key: b"]
    assert site.files.live.current.sites["b"] == KEYS["b"]


# ------------------------------------------------------- two jobs whose rosters differ by one site

ROWS = "1f" * 32


@pytest.fixture
def ledger(tmp_path):
    with Ledger.open(tmp_path, IDENTITIES["a"]) as found:
        yield found


def given(ledger, names, number=1, **keys):
    """A sum of statistics over this site's rows was opened, with these sites."""
    pins = {name: keys.get(name, KEYS[name]) for name in names}
    header = SimpleNamespace(
        digest=bytes([number]) * 32, purpose="statistics", job=f"j{number}", plan_digest="0" * 64,
        round=1, training_round=0, roster=tuple(names),
    )  # fmt: skip
    ledger.exposed(Exposure.of(header, names, rows=ROWS, columns=["age"], pins=pins))


def again(ledger, names, **keys):
    """With whom a job of this roster may have the same statistics again."""
    pins = {name: keys.get(name, KEYS[name]) for name in names}
    return JobLedger(ledger, pins).statistics_only_with(ROWS, ["age"])


def test_a_roster_without_one_site_gets_no_statistics_again(ledger):
    """The difference of two sums would be d's. The machine refuses any other cohort: `test_statistics_again.py`.
    Control: the same sites, and a larger roster of which the same sites take part."""
    given(ledger, "abcd")
    assert again(ledger, "abc") == ()
    assert again(ledger, "abcd") == tuple("abcd")
    assert again(ledger, "abcde") == tuple("abcd")


def test_another_party_under_a_sites_name_gets_no_statistics_again(ledger):
    """The names are the same, but d is the coordinator's own by now: it knows what that d gives, and the difference
    of the two sums is what the first d gave. Control: the rule before, by names alone, and the same key."""
    given(ledger, "abcd")
    assert again(ledger, "abcd", d=KEYS["x"]) == ()
    assert ledger.statistics_only_with(ROWS, ["age"]) == tuple("abcd")
    assert again(ledger, "abcd") == tuple("abcd")
    values = dict(zip("abcd", (3.0, 5.0, 7.0, 11.0), strict=True))
    known = 100.0
    first, second = sum(values.values()), sum(values.values()) - values["d"] + known
    assert first - second + known == values["d"], "what the two sums would tell"


def test_a_key_of_a_site_that_was_not_in_the_sum_does_not_matter(ledger):
    given(ledger, "abcd")
    assert again(ledger, "abcde", e=KEYS["x"]) == tuple("abcd")


def test_the_keys_are_kept_by_the_file_and_older_entries_have_none(ledger, tmp_path):
    given(ledger, "abcd")
    path = tmp_path / "ledger.jsonl"
    with Ledger.open(tmp_path, IDENTITIES["a"]) as read:
        assert again(read, "abcd", d=KEYS["x"]) == () and again(read, "abcd") == tuple("abcd")
    old = json.loads(path.read_text())
    del old["exposed"]["keys"]
    path.write_text(json.dumps(old) + "\n")
    with Ledger.open(tmp_path, IDENTITIES["a"]) as read:
        assert again(read, "abcd", d=KEYS["x"]) == tuple("abcd"), "by names, as when it was written"


@pytest.mark.parametrize(
    ("names", "keys", "apart"),
    [
        ("abcd", {}, 0), ("abcde", {}, 1), ("abc", {}, 1), ("abcd", {"d": KEYS["x"]}, 1),
        ("abce", {}, 2), ("abcdex", {}, 2),
    ],
)  # fmt: skip
def test_two_jobs_whose_rosters_differ_by_one_site(ledger, names, keys, apart):
    """The difference of two models is about what that site gave. Control: the default, which allows it."""
    given(ledger, "abcd")
    sites = {name: keys.get(name, KEYS[name]) for name in names}
    asked = RowsInSum("j2", {"j1"})
    for least, refused in ((1, False), (2, apart == 1)):
        policy = policy_of(4, least_roster_change=least)
        found = JobPolicy(policy, ledger, sites, "a", KEYS["a"]).on_release(asked)
        assert (found is not None) == refused
        if found is not None:
            assert found.word == "policy" and "policy.least_roster_change" in str(found)
            assert "1 other than in an earlier job over the same rows, expected none or 2" in str(
                found
            )
    begun = RowsInSum("j2", {"j1", "j2"})
    policy = policy_of(4, least_roster_change=3)
    assert JobPolicy(policy, ledger, sites, "a", KEYS["a"]).on_release(begun) is None


def test_a_roster_kept_with_a_job_is_the_one_that_was_offered():
    roster = PinnedRoster({name: KEYS[name] for name in "cab"}, 3)
    again = PinnedRoster.from_bytes(roster.to_bytes())
    assert (again.number, list(again.sites), again.digest) == (3, list("cab"), roster.digest)
