"""A coordinator that lies: the real `fed-coordinator serve`, with some of its decisions turned.

    patches = {HUB: hostile(folder)}             # Python that the process runs before its command
    attack(folder, leave_out=["a", "b"], abandon=True)
    job = fed.submit(...)
    sums(folder, job)                            # what this coordinator opened

gRPC, TLS, journal, spool, fold and both machines are the product's own: what is replaced are decisions
that a coordinator takes alone (whom it offers what, which cohort it announces, whose vector it drops, when
it gives a round up), and it writes down every sum it can open: under `masked` each of them, under `layered`
those for which a colluding site gave it the key.

Each job reads the attack once, when it is submitted, so tests of one deployment follow one another.
"""

from __future__ import annotations

import asyncio
import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
ATTACK, SUMS, ANSWERS, CAUGHT = "attack.json", "sums.jsonl", "answers.jsonl", "caught.jsonl"


@dataclass(frozen=True)
class Attack:
    """What the coordinator does in one job.

    offers: site -> {setting: value} that this site alone is offered. leave_out: the site whose vector it
    drops in its first, second, ... round; null for none. abandon: it keeps the sums of these rounds and
    gives each round up instead of releasing it. cohort: it announces rounds to these sites only and waits
    for nobody else. header: fields of the round header that it announces otherwise. key: the file with
    the payload of a colluding site, for sums that are encrypted. forge: it makes each release that of
    its own model, all parameters this value, by a checkpoint sealed under that site's G. survey: it
    offers the job, writes down what the sites answer, and stops. stop_after: it stops after this many
    rounds. gather: seconds that it waits for absent sites;
    null for what federation.toml says.
    """

    offers: dict = field(default_factory=dict)
    leave_out: list = field(default_factory=list)
    abandon: bool = False
    cohort: list = field(default_factory=list)
    header: dict = field(default_factory=dict)
    key: str = ""
    forge: float | None = None
    survey: bool = False
    stop_after: int = 0
    gather: float | None = None


def hostile(folder):
    """What the coordinator's process runs first."""
    return (
        f"import sys; sys.path.insert(0, {str(TESTS)!r})\n"
        f"from support.hostile_coordinator import install; install({str(folder)!r})\n"
    )


def attack(folder, **what):
    """The attack of the next job; none without arguments."""
    (Path(folder) / ATTACK).write_text(json.dumps(asdict(Attack(**what))))


def sums(folder, job, purpose=None):
    """The sums of this job that the coordinator opened, in order, each a dict:

    purpose, round (of training), number, survivors, wides (name -> integers), coordinates (integers).
    """
    return [r for r in rows_of(folder, SUMS, job) if purpose in {None, r["purpose"]}]


def answers(folder, job):
    """site -> what it answered to the offer: the word that says why it cannot take part, or "able"."""
    return {row["site"]: row["said"] for row in rows_of(folder, ANSWERS, job)}


def rows_of(folder, name, job):
    """The rows of a job in a file of this folder."""
    path = Path(folder) / name
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [row for row in rows if row["job"] == job]


def add_row(folder, name, row):
    """One row more."""
    with (Path(folder) / name).open("a") as out:
        out.write(json.dumps(row) + "\n")


# ------------------------------------------------------------------------- inside the coordinator


class Offers:
    """The sessions, through which some sites are offered another job, and the plan that follows from it."""

    def __init__(self, job, links):
        self._job, self._links = job, links

    def __getattr__(self, name):
        return getattr(self._links, name)

    def say(self, site, job, message):
        from fedcore.secagg.plan import canonical
        from fedcore.secagg.protocol.job_messages import JobOffer, PlanOffer

        if site in self._job.attack.offers:
            if isinstance(message, JobOffer):
                message = replace(message, settings=canonical(self.settings(site)))
            elif isinstance(message, PlanOffer):
                message = replace(message, plan=canonical(self.plan(site).to_json()))
        self._links.say(site, job, message)

    def settings(self, site):
        """The tables that this site is offered."""
        settings = json.loads(self._job.offer.settings)
        for key, value in self._job.attack.offers.get(site, {}).items():
            section, _, name = key.rpartition(".")
            (settings[section] if section else settings)[name] = value
        return settings

    def plan(self, site):
        """The plan that it finds itself."""
        from fedcore.config import build_job, plan_of

        job, complete = self._job, build_job(self.settings(site))
        shape, cap = job.facts.sites[site].shape, complete.protect.max_examples
        return plan_of(complete, shape, tuple(job.roster.sites), cap)


def install(folder):
    """Turn the decisions of every job of this process."""
    import numpy as np
    from fedcore_server import coordinator as registry
    from fedcore_server import grpc_service, job_runner, operators_api, sessions, site_api
    from support.unguarded_site import SETTINGS, switches

    from fedcore.learning.state import JobState
    from fedcore.secagg.crypto.entropy import OsEntropy
    from fedcore.secagg.protocol import job_messages, messages
    from fedcore.secagg.protocol.effects import Send
    from fedcore.secagg.protocol.job import effects
    from fedcore.secagg.protocol.job.coordinator import events
    from fedcore.secagg.protocol.job.coordinator.facts import Moment
    from fedcore.secagg.protocol.job.coordinator.machine import JobMachine
    from fedcore.secagg.protocol.round import coordinator
    from fedcore.secagg.protocol.schedule import PlannedRound
    from fedcore.secagg.scheme import Scheme, layout_of

    folder = Path(folder)
    switches(folder, [SETTINGS])  # its plan is the one that its sites find

    class HostileMachine(JobMachine):
        """What it decides."""

        def __init__(self, facts):
            path = folder / ATTACK
            self.attack = Attack(**json.loads(path.read_text())) if path.exists() else Attack()
            if self.attack.gather is not None:
                facts.limits = replace(facts.limits, gather=self.attack.gather)
            super().__init__(facts)
            self.begun, self.forged = 0, False

        # what it hears before there is a plan

        def on_message(self, name, message):
            if isinstance(message, job_messages.SiteSurvey | job_messages.SiteUnavailable):
                said = getattr(message, "reason", "able")
                add_row(folder, ANSWERS, {"job": self.facts.id, "site": name, "said": said})
            agreed = isinstance(message, job_messages.PlanAgreed) and self.facts.plan is not None
            if agreed and name in self.attack.offers:  # to its own plan
                message = replace(message, plan_digest=self.facts.plan.digest)
            super().on_message(name, message)

        def make_plan(self):
            if not self.attack.survey:
                super().make_plan()
            elif all(view.shape or view.unable for view in self.facts.sites.values()):
                self.end("stopped", "it has what it wanted")

        # whom it invites, to what

        def gathered(self, present):
            if not self.attack.cohort:
                return super().gathered(present)
            return set(self.attack.cohort) <= set(present)

        def begin_round(self, step, roster):
            roster = tuple(n for n in roster if n in (self.attack.cohort or roster))
            self.begun, self.again = self.begun + 1, step
            super().begin_round(step, roster)

        def next_round(self):
            if 0 < self.attack.stop_after <= self.begun:
                self.end("stopped", "it has what it wanted")
                return
            if self.keeps and isinstance(self.facts.stage, coordinator.Failed):
                self.facts.step = self.again  # the product goes on to the next round of training
            super().next_round()

        def round_step(self, event):
            if isinstance(event, coordinator.Start):
                event = replace(event, header=replace(event.header, **self.attack.header))
            super().round_step(event)

        # whose vector is in the sum

        @property
        def left_out(self):
            """The site whose vector this round goes without; None for none."""
            rounds = self.attack.leave_out
            return rounds[self.begun - 1] if 0 < self.begun <= len(rounds) else None

        def take_upload(self, name):
            stage = self.facts.stage
            if name != self.left_out:
                super().take_upload(name)
            elif isinstance(stage, coordinator.Collecting) and name not in stage.gone:
                self.round_step(coordinator.Gone(name))

        # what becomes of the sum

        @property
        def keeps(self):
            """Whether this round ends without a release."""
            return self.attack.abandon and self.left_out is not None

        def give_up(self, at: Moment):
            """No site hears of the sum; the machine would rather release it, or end the job."""
            self._at, self._out = at, []
            header = self.facts.stage.header
            self.facts.stage = coordinator.Failed(header, "release", 0, ())
            over = messages.Abandon(header.digest, "release")
            self.close_round([Send(name, over) for name in header.roster])
            return self._out

        def close_round(self, found):
            super().close_round(found)
            if self.forged and isinstance(self.facts.stage, coordinator.Released):
                self.end("stopped", "it has what it wanted")

    class HostileJob(job_runner.JobRunner):
        """What it does with what it has."""

        def __init__(self, context, links, offer, submitter=""):
            super().__init__(context, Offers(self, links), offer, submitter)
            self.forged, self.late, self.stated = None, asyncio.Event(), []

        @property
        def attack(self):
            return self.machine.attack

        async def handle(self, event):
            stated = isinstance(getattr(event, "message", None), messages.Statement)
            if stated and self.forged is not None:
                await self.hear_all(event)
                return
            if isinstance(event, events.SumMade) and isinstance(
                self.facts.stage, coordinator.Summing
            ):
                self.write_down()
                if self.machine.keeps:
                    self.perform_all(self.machine.give_up(self.moment()))
                    return
            await super().handle(event)

        def perform(self, effect):
            super().perform(effect)
            if isinstance(effect, effects.OpenFold):
                self.offer_forged(effect.header)

        def write_down(self):
            """The sum, if it can be opened here."""
            from fedcore.secagg.crypto.masked import MaskedSealer
            from fedcore.store import container

            header, plan = self.facts.stage.header, self.facts.plan
            chunks = list(container.read(self.disk.sum.path))
            layout = layout_of(plan, self.facts.features, header.purpose)
            if plan.protection == "masked":
                sealer = MaskedSealer(plan.packing)
            elif self.attack.key:
                sealer = self.colluders().sealer
            else:
                return
            total = sealer.open(chunks, layout.slots)
            names = [each.site for each in self.facts.stage.submissions]
            opened = layout.unpack(total, [header.place(name) for name in names])
            row = {
                "job": self.id, "purpose": header.purpose, "round": header.training_round,
                "number": header.round, "survivors": names,
                "wides": {name: list(map(int, values)) for name, values in opened.wides.items()},
                "coordinates": [int(value) for value in opened.coordinates],
            }  # fmt: skip
            add_row(folder, SUMS, row)

        def colluders(self):
            """What a colluding site has of this key epoch."""
            payload = Path(self.attack.key, f"key-{self.id}").read_bytes()
            return Scheme(self.facts.plan).open_payload(payload, "x")

        # a state that nothing proves

        def offer_forged(self, header):
            """Before the round, a checkpoint of it with a certificate that no site signed."""
            if self.attack.forge is None or header.purpose != "update":
                return
            state = JobState.from_bytes(Path(self.attack.key, f"state-{self.id}").read_bytes())
            lie = np.full_like(state.server.parameters, self.attack.forge)
            done = PlannedRound(header.purpose, header.training_round)
            forged = replace(state, server=replace(state.server, parameters=lie), done=done)
            secrets = self.colluders()
            certificate = messages.Certificate(header, header.roster, b"x" * 32, b"y" * 32, ())
            data = secrets.group.to_bytes() + forged.to_bytes()
            sealed = secrets.seal_state(data, certificate, OsEntropy())
            self.forged = self.context.spool.put(self.id, "forged", [sealed])
            found = self.forged
            offer = job_messages.CheckpointOffer(self.id, certificate, found.digest, found.size)
            for name in header.roster:
                self.links.say(name, self.id, offer)

        async def hear_all(self, event):
            """Keep the statements back until every site has the forged checkpoint."""
            self.stated.append(event)
            roster = self.facts.stage.header.roster
            if len(self.stated) < len(roster):
                return
            self.late.set()
            self.machine.forged = True
            while self.not_yet(roster):  # noqa: ASYNC110 - other processes say so, in a file
                await asyncio.sleep(0.02)
            for each in self.stated:
                await super().handle(each)

        def not_yet(self, roster):
            """Whether some site is still at the forged checkpoint."""
            return not set(roster) <= {row["site"] for row in rows_of(folder, CAUGHT, self.id)}

        def download(self, name, what, digest):
            if self.forged is not None and self.forged.digest == digest:
                return self.forged
            return super().download(name, what, digest)

    class HostileTransfers(site_api.Transfers):
        async def download(self, peer, start):
            """A forged checkpoint comes late: when its round waits for its certificate."""
            found = self._hub.jobs.get(start.job)
            forged = getattr(found, "forged", None)
            if forged is not None and forged.digest == start.digest:
                await found.late.wait()
            async for part in super().download(peer, start):
                yield part

    job_runner.JobMachine = HostileMachine
    job_runner.JobRunner = registry.JobRunner = operators_api.JobRunner = HostileJob
    grpc_service.Transfers = HostileTransfers
    # Each frame in a message of its own: a site then begins with a checkpoint before it hears of the round.
    sessions.MOST_TOGETHER = 1
