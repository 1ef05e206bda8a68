"""A deployed job at a site and at the coordinator, with its settings, plan, certificate and public metrics."""

from __future__ import annotations

import asyncio

import pytest
from fedcore_server.context import CoordinatorContext
from fedcore_server.job_runner import JobRunner
from support.plans import round_plan
from support.policies import begin, job_at_a_site, policy_of

from fedcore.cli import main
from fedcore.config import build_job, plan_of, wire_settings
from fedcore.identity.roster import PinnedRoster, RosterFile
from fedcore.results import SiteRow
from fedcore.secagg.crypto.identity_key import IdentityKey
from fedcore.secagg.plan import METRIC, RoundHeader, Wide, canonical
from fedcore.secagg.protocol import job_messages
from fedcore.secagg.protocol.job.coordinator.facts import Limits
from fedcore.secagg.protocol.job.effects import Track
from fedcore.secagg.protocol.job.site.events import MessageReceived
from fedcore.secagg.protocol.job_messages import told
from fedcore.secagg.protocol.messages import Certificate
from fedcore.secagg.protocol.schedule import PlannedRound
from fedcore.secagg.protocol.wire_form import encode
from fedcore.store.journal import Journal
from fedcore.store.spool import Spool

SITES = ("a", "b", "c", "d")
VALUES = {"auc": 0.8125, "accuracy": 2 / 3}
OTHERS = {"auc": 0.99, "accuracy": 0.99}


def plan_for(protection="layered", **changes):
    sums = tuple(Wide(METRIC + name, 2, 8) for name in VALUES)
    small = {"sites": SITES, "bits": 8, "max_examples": 64, "rounds": 3, "metric_sums": sums}
    return round_plan(protection=protection, **small | changes)


PUBLIC = plan_for(public_metrics=True)


def certificate(number=7, survivors=SITES, purpose="update", threshold=3, training_round=2):
    header = RoundHeader(
        "clinics", "job", 1, number, training_round, purpose, SITES, "pins", threshold, "layered",
        PUBLIC.digest,
    )  # fmt: skip
    return Certificate(header, survivors, b"s" * 32, b"n" * 32, ())


def word(site, values=VALUES, of=None):
    return told(PUBLIC, of or certificate(), site, values)


def check_refused(verb, flag, value, error, capfd, folder, monkeypatch):
    """The command refuses a flag under `encrypted`: one line, a hint, its code, and nothing written."""
    monkeypatch.chdir(folder)
    words = [verb, "--task", "heart", "--protection", "encrypted", flag, value]
    with pytest.raises(SystemExit) as ended:
        main.main(words)
    lines = capfd.readouterr().err.splitlines()
    said = [line for line in lines if line.startswith(("error:", "hint:"))]
    assert ended.value.code == 3
    assert said == lines[-2:] and said[0].startswith(error)
    assert not any("loading heart" in line or "Traceback" in line for line in lines), lines
    assert list(folder.iterdir()) == []


def submitted(**changes):
    tables = wire_settings(build_job({"max_examples": 64, "rounds": 2, "range": 0.5, "bits": 16}))
    for section, values in changes.items():
        tables[section] |= values
    return tables


ROW = SiteRow(
    round=1, purpose="update", sites=4, here={"bench rows": 0.123}, alone={"bench rows": 0.456},
    everywhere_before={"bench rows": 0.75},
)  # fmt: skip


def site_job(folder, settings, link=None, context=None, **rules):
    policy = policy_of(len(SITES), **rules)
    return job_at_a_site(folder, settings, policy, ROW, link, **(context or {}))


def loaded(folder, settings, *messages, **rules):
    """A site's job after its survey and these messages. rules: of its operator's policy."""

    async def play():
        found = site_job(folder, settings, **{"public_metrics": True, **rules})
        await begin(found)
        for message in messages:
            await found.handle(MessageReceived(message))
        return found

    return asyncio.run(play())


async def released(found):
    """The site has applied the release of `certificate()`, and evaluates it."""
    state, step = found.job.state, PlannedRound("update", 1)
    event = await found.work.track(Track(step, {}, 4, state, certificate()))
    await found.handle(event)


def offered(folder, settings, plan_settings, **rules):
    """A site's job that was sent a plan which a coordinator made of other settings than the job's."""
    shape = loaded(folder / "first", settings, **rules).job.part.survey.shape
    plan = plan_of(build_job(plan_settings), shape, SITES, 64)
    message = job_messages.PlanOffer("job", canonical(plan.to_json()))
    return loaded(folder / "second", settings, message, **rules)


def coordinated(folder, plan=PUBLIC, here=()):
    settings = submitted(track={"reference": {"metric": "auc", "value": 0.9, "source": "us"}})
    journal = Journal.open(folder / "journal.sqlite", party="hub")
    pins = {name: IdentityKey().public for name in SITES}
    context = CoordinatorContext(
        "town",
        RosterFile(PinnedRoster(pins)),
        journal,
        Spool(folder / "spool"),
        None,
        folder,
        Limits(),
    )

    class Links:
        def connected(self):
            return here

        def say(self, *_):
            pass

    offer = job_messages.JobOffer("job", "t", "0" * 64, canonical(settings))
    journal.put("job", "offer", encode(offer))
    journal.put("job", "plan", canonical({"plan": plan.to_json(), "features": 0}))
    return JobRunner.stored(context, Links(), "job")


SITE_TOML = """
site = "va"
coordinator = "hub.example.org:7443"
kit = "kit"
identity = "keys/identity.pem"
roster = "/etc/fedcore/roster.toml"
folder = "state"
[tasks.heart]
task = "heart"
sha256 = "{}"
source = "data/va.csv"
""".format("0" * 64)
