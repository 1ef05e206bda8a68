"""A site's policy for tests of something else, and one site's job with a record of what it says.

Journal, spool, ledger and policy are real; training is drawn numbers, and the session is a list.
"""

from __future__ import annotations

from fedcore_clients.bench_sites import Drawn
from fedcore_clients.context import SiteContext
from fedcore_clients.job_runner import JobRunner
from fedcore_clients.ledger import Ledger
from fedcore_clients.policy import PolicySection, SitePolicy

from fedcore.identity.roster import PinnedRoster, RosterFile
from fedcore.secagg.crypto.identity_key import IdentityKey
from fedcore.secagg.plan import canonical
from fedcore.secagg.protocol import job_messages
from fedcore.secagg.protocol.job.site.events import Started
from fedcore.store.journal import Journal
from fedcore.store.spool import Spool

BENCH = {"bench": "0" * 64}
WIDE = {"protections": ("layered", "masked", "encrypted"), "jobs_per_month": 1000}
"""Beside the defaults: one folder runs many jobs, under each protection."""

FOUR = ("a", "b", "c", "d")


def policy_of(sites=4, tasks=None, **rules):
    """rules: keys of [policy], beside WIDE."""
    return SitePolicy(PolicySection(**{**WIDE, **rules}), sites, BENCH if tasks is None else tasks)


class Link:
    """A session that keeps what a site says in `said`."""

    def __init__(self):
        self.said = []

    def say(self, _, message):
        self.said.append(message)

    def doing(self, *_):
        pass


class Rows(Drawn):
    """Counts in `loaded` how often rows were read; `row` is what every release is worth."""

    def __init__(self, site="a", parameters=5, row=None):
        super().__init__(site, parameters)
        self.loaded, self.row = 0, row

    async def load(self, *args):
        self.loaded += 1
        return await super().load(*args)

    async def track(self, *_):
        return self.row


async def begin(found):
    """Start a site's job, and handle what comes of loading its rows: they are loaded or refused then."""
    await found.handle(Started())
    while found.job.loading:
        await found.mailbox.turn(found.handle, lambda: None)


def job_at_a_site(folder, settings, policy, row=None, link=None, **more):
    """Site a of four, offered the benchmark's task with these settings; it has done nothing yet.

    more: of its context.
    """
    key = IdentityKey()
    pins = {name: key.public if name == "a" else IdentityKey().public for name in FOUR}
    journal = Journal.open(folder / "journal.sqlite", party="site a")
    ledger, spool = Ledger.open(folder, key), Spool(folder / "spool")
    context = SiteContext(
        "town",
        "a",
        key,
        RosterFile(PinnedRoster(pins)),
        journal,
        spool,
        folder,
        policy,
        ledger,
        **more,
    )
    offer = job_messages.JobOffer("job", "bench", BENCH["bench"], canonical(settings))
    return JobRunner(context, link or Link(), Rows(row=row), offer)
