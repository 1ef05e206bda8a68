"""Whole jobs without a loop: both job machines, with disks of dictionaries and time that waits for all work.

    world = Jobs(seed)
    world.play(die=("a", 40))      # site a's process ends before its 40th effect, and is started again

Whoever chooses the order is the seed: of the messages that wait, the work in the background and the uploads,
any may be next; only what one party says to another keeps its order. Vectors, sums and states are digests
and lists of names; keys, masks, signatures and key epochs are real.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections import deque
from dataclasses import dataclass
from types import SimpleNamespace

from fedcore_clients.job_runner import OF_A_ROUND
from support.deployed_jobs import plan_for
from support.policies import policy_of

from fedcore.results import JobRow
from fedcore.secagg.crypto.entropy import OsEntropy
from fedcore.secagg.crypto.identity_key import IdentityKey
from fedcore.secagg.crypto.secret import SecretBytes
from fedcore.secagg.crypto.sumtag import state_mac
from fedcore.secagg.plan import ModelShape, canonical
from fedcore.secagg.protocol import epoch, messages, schedule
from fedcore.secagg.protocol import job_messages as job
from fedcore.secagg.protocol.job import effects
from fedcore.secagg.protocol.job.coordinator import events
from fedcore.secagg.protocol.job.coordinator.facts import JobFacts, KeptFile, Limits, Moment
from fedcore.secagg.protocol.job.coordinator.machine import JobMachine
from fedcore.secagg.protocol.job.site import events as site_events
from fedcore.secagg.protocol.job.site.machine import JobEnd, Kept, SiteJob
from fedcore.secagg.protocol.job.site.participation import Agreed, JobParams, Participation
from fedcore.secagg.protocol.job.site.rounds import NOWHERE
from fedcore.secagg.protocol.job.site.states import led_to
from fedcore.secagg.protocol.messages import survivors_of
from fedcore.secagg.protocol.round import coordinator, site
from fedcore.secagg.protocol.wire_form import decode, encode
from fedcore.secagg.scheme import Scheme, vector_sizes

HUB, SITES = "coordinator", ("a", "b", "c", "d")
LIMITS = Limits(stage=600.0, gather=60.0, minimum=3, grace=60.0, enough=600.0)


def digest_of(*parts):
    return hashlib.sha256(repr(parts).encode()).digest()


class Died(Exception):
    """The process ended before this effect."""


@dataclass(frozen=True)
class History:
    """A state: which sums of whose vectors led to it, as ((purpose, round), survivors)."""

    sums: tuple = ()
    over = ""

    @property
    def done(self):
        return schedule.PlannedRound(*self.sums[-1][0]) if self.sums else None

    def canonical(self):
        return canonical(self.sums)

    to_bytes = canonical

    @classmethod
    def from_bytes(cls, data):
        sums = json.loads(data)
        return cls(tuple((tuple(step), tuple(names)) for step, names in sums))


class Ledger(set):
    """Rounds whose sums may be opened; on disk."""

    has = set.__contains__

    def rows_key(self, digest):
        return digest

    def jobs_over(self, _):
        return ()

    def statistics_only_with(self, *_):
        return None


class Party:
    """What both roles have: a disk, a machine, and how many effects its process still carries out."""

    def __init__(self, world, name):
        self.world, self.name, self.fuse = world, name, 0
        self.values, self.records, self.work = {}, [], []
        self.start()

    def live(self):
        """One effect more; raises Died before it where the process ends there."""
        self.world.obeyed += 1
        self.fuse -= 1
        if self.fuse == 0:
            raise Died(self.name)

    def write(self, records=(), values=None):
        """One commit, in the form of a journal."""
        self.records += [encode(record) for record in records]
        self.values |= values or {}

    def value(self, key, otherwise=None):
        return decode(self.values[key], object) if key in self.values else otherwise


class Hub(Party):
    """The coordinator."""

    spool = None

    def start(self):
        world, self.work = self.world, []
        self.spool = self.spool or {}
        self.checkpoints = getattr(self, "checkpoints", {})
        self.machine = JobMachine(JobFacts("clinics", world.offer, world.pins, world.limits))
        self.machine.facts.threshold = world.plan.threshold
        facts, stage = self.machine.facts, self.stage()
        facts.outcome = self.value("ended")
        if "plan" in self.values:
            facts.adopt(world.plan, 0, world.sizes)
            facts.epoch, facts.stage = self.value("epoch", epoch.NoEpoch()), stage
            facts.step, facts.certificate = self.value("step"), self.value("certificate")
            facts.withdrawn = frozenset(json.loads(self.values.get("withdrawn", b"[]")))
            rows = [v for k, v in sorted(self.values.items()) if k.startswith("row-")]
            facts.rounds.known[:] = [JobRow.from_json(json.loads(row)) for row in rows]
        kept = self.checkpoints.get(facts.checkpoint_name)
        announced = isinstance(stage, coordinator.Releasing)
        made = KeptFile(stage.aggregate.digest, stage.aggregate.size) if announced else None
        self.machine.restored(kept, made, self.moment(), model=False, restarted=bool(self.records))

    @property
    def outcome(self):
        return self.machine.facts.outcome

    def moment(self):
        return Moment(self.world.now, self.world.now, tuple(self.world.here))

    def tell(self, event):
        for effect in self.machine.step(event, self.moment()):
            self.live()
            self.obey(effect)

    def obey(self, effect):
        machine = self.machine
        match effect:
            case effects.PutValues(values):
                self.write(values=values)
            case effects.AppendRecords(records):
                self.write(records)
            case effects.CloseRound(values):
                self.write(values=values)
                self.records.clear()
            case effects.EndJob(ended):
                self.write(values={"ended": encode(ended)})
                self.records.clear()
                machine.ended(ended)
            case effects.Send(to=to, message=message):
                assert self.backed(message), f"sent before it is on disk: {message}"
                self.world.say(HUB, to, message)
            case effects.StartFold(name, _):
                self.tell(events.Folded(name))
            case effects.RemoveMasks(header, survivors):
                assert set(survivors) <= set(self.spool[header.digest])
                made = digest_of("sum", header.round, survivors)
                self.work.append(events.SumMade(header.digest, KeptFile(made, 640)))
            case effects.MakePlan():
                self.tell(events.PlanMade(self.world.plan, 0, self.world.sizes))
            case effects.KeepCheckpoint(name, header, found, file):
                if self.spool.get(header, {}).pop(name, None) is not None:
                    self.checkpoints[file] = KeptFile(found, 640)
                    self.tell(events.CheckpointKept(KeptFile(found, 640)))
            case effects.DropCheckpoint(file):
                self.checkpoints.pop(file, None)
            case effects.DiscardUploads(None):
                self.spool.clear()
            case effects.DiscardUploads(header):
                self.spool.pop(header, None)
            case effects.Warn(text):
                self.world.warnings.append(text)
            case _:
                assert isinstance(
                    effect, effects.Push | effects.OpenFold | effects.ShowRound | effects.Info
                ), effect

    def stage(self):
        """Of the round, as a new process would find it."""
        records = [decode(record, object) for record in self.records]
        return coordinator.replay(self.value("stage", coordinator.Ready()), records)

    def backed(self, message):
        """Whether a new process would stand by what is sent."""
        match message:
            case messages.Announce(header):
                return self.stage().header == header
            case messages.SurvivorList(submissions=listed):
                stage = self.stage()
                return isinstance(stage, coordinator.Confirming) and stage.submissions == listed
            case messages.Aggregate():
                return self.stage().aggregate == message
            case messages.Certificate():
                return self.value("certificate") == message
            case epoch.EpochCall(header):
                return self.value("epoch").header == header
            case job.PlanOffer() | job.JobEnded():
                return ("plan" if isinstance(message, job.PlanOffer) else "ended") in self.values
        return True

    def upload(self, name, header, found, size):
        """A whole upload of a site; False where none is expected."""
        if not self.machine.expects(name, header, size, 0):
            return False
        self.spool.setdefault(header, {})[name] = found
        self.tell(events.UploadArrived(name, header, KeptFile(found, size)))
        return True


class Site(Party):
    """One site."""

    def start(self):
        world, name = self.world, self.name
        self.ledger = getattr(self, "ledger", Ledger())
        self.work, self.file = [], getattr(self, "file", None)
        planner = SimpleNamespace(
            plan=lambda *_: world.plan, first_state=lambda *_: History(), scheme=Scheme
        )
        params = JobParams(
            "clinics", name, world.keys[name], world.pins, policy_of(4, {"t": "0" * 64}), self.ledger,
            planner, OsEntropy(), 3, 6000.0, 1e9,
        )  # fmt: skip
        part = Participation(params, "job", asks=name == "b")
        self.job = SiteJob(world.offer, part)
        if "ended" in self.values:
            self.job.end = JobEnd(self.value("ended"))
        if "plan" in self.values:
            self.restore()

    def restore(self):
        records = [decode(record, object) for record in self.records]
        stage = site.replay(self.value("stage", NOWHERE), records)
        state = self.values.get("state")
        marks = json.loads(self.values.get("marks", b"{}"))
        self.job.restored(
            Kept(
                Agreed(self.world.plan, 0, ()), "rows", stage,
                self.file if state is None else History.from_bytes(state),
                self.value("certificate"), self.value("epoch", epoch.NoKey()),
                json.loads(self.values.get("groups", b"{}")),
                (bytes.fromhex(marks.get("header", "")), marks.get("marks", {})), "",
            )
        )  # fmt: skip
        if isinstance(stage, site.Stated):
            said = stage.statement
            name = led_to(
                stage.header, survivors_of(stage.submissions), said.sum_mac, said.state_mac
            )
            of, data = self.value("candidate")
            assert of == name
            self.job.states.hold(name, History.from_bytes(data), data)

    def tell(self, event):
        self.perform(self.job.step(event, self.world.now))

    def perform(self, found):
        for effect in found:
            self.live()
            self.obey(effect)

    def obey(self, effect):
        match effect:
            case effects.AppendEntries(records, values):
                self.write(records, values)
            case effects.PutValues(values):
                self.write(values=values)
            case effects.EndJob(ended):
                self.write(values={"ended": encode(ended)})
            case effects.CloseRound(values):
                self.write(values=values)
                self.records.clear()
                for key in OF_A_ROUND:
                    self.values.pop(key, None)
            case effects.Expose(header):
                self.ledger.add(header.digest.hex())
            case effects.WriteState(state):
                self.file = state
            case effects.Send(message=message):
                assert self.backed(message), f"sent before it is on disk: {message}"
                self.world.say(self.name, HUB, message)
            case epoch.MakeSecrets():
                payload = self.job.parts.keys.scheme.make_payload()
                self.tell(epoch.SecretsMade(SecretBytes(payload)))
            case effects.StopMaking():
                self.work = [each for each in self.work if not isinstance(each, effects.MakeVector)]
            case effects.Warn(text):
                self.world.warnings.append(f"{self.name}: {text}")
            case (
                effects.AwaitApproval() | effects.LoadRows() | effects.MakeVector()
                | effects.Upload() | effects.OpenSum() | effects.SealCheckpoint() | effects.TakeCheckpoint()
            ):  # fmt: skip
                self.work.append(effect)

    def backed(self, message):
        """Whether a new process, and the ledger, would stand by what is sent."""
        kinds = [type(decode(record, object)) for record in self.records]
        match message:
            case messages.Confirm():
                return site.ListSigned in kinds
            case messages.Unmask(header=header):
                return site.UnmaskAnswered in kinds and header.hex() in self.ledger
            case messages.Statement():
                return site.SumStated in kinds and "candidate" in self.values
            case epoch.KeyHeld():
                return getattr(self.value("epoch"), "held", None) == message
        return True

    def do(self, work):
        """Background work; False where it has to wait for the coordinator."""
        hub, parts = self.world.parties[HUB], self.job.parts
        match work:
            case effects.AwaitApproval():
                self.tell(site_events.Approved())
            case effects.LoadRows():
                self.tell(site_events.RowsLoaded(self.world.survey))
            case effects.MakeVector(header) if self.world.fails(self.name, header):
                failed = RuntimeError("the share did not answer")
                self.tell(
                    site_events.WorkFailed(header.digest, failed, site_events.WITHHELD, job.UNABLE)
                )
            case effects.MakeVector(header):
                life = digest_of(self.name, header.round, self.world.obeyed)
                made = site.VectorMade(life, self.world.sizes[header.purpose])
                self.world.made.append((self.name, header.round))
                self.tell(site_events.VectorReady(header.digest, made, b"small", {}, b"{}"))
            case effects.Upload(submit) if parts.rounds.awaits_upload(submit.header):
                return hub.upload(self.name, submit.header, submit.digest, submit.size)
            case effects.OpenSum(header, survivors) if parts.rounds.awaits_sum(header.digest):
                self.open(header, survivors)
            case effects.OpenSum(header):
                self.tell(site_events.SumGone(header.digest))
            case effects.SealCheckpoint(certificate, group, state):
                found = digest_of("checkpoint", certificate.hash, self.name)
                self.world.sealed[found] = group, state
                header = certificate.header.digest
                if hub.upload(self.name, header, found, 640):
                    sealed = job.CheckpointSealed("job", self.name, certificate.hash, found, 640)
                    self.world.say(self.name, HUB, sealed)
            case effects.TakeCheckpoint(certificate, found):
                group, state = self.world.sealed[found]
                mac = state_mac(group, certificate.header.digest, state.canonical())
                ready = site_events.CheckpointReady(
                    certificate, group, mac, state, state.to_bytes()
                )
                self.tell(ready)
        return True

    def open(self, header, survivors):
        step = header.purpose, header.training_round
        state = History((*self.job.state.sums, (step, survivors)))
        group = self.job.parts.keys.secrets.group
        macs = (
            digest_of(header.round, survivors),
            state_mac(group, header.digest, state.canonical()),
        )
        name = led_to(header, survivors, *macs)
        opened = site.SumOpened(*macs)
        data = state.to_bytes()
        self.tell(
            site_events.CheckedSum(header.digest, opened, name, state, data, {}, len(survivors))
        )


class Jobs:
    """One job of four sites, in the order that a seed gives.

    flaky: the chance, before each of these, that some site has a new session and what was on its way is lost.
    failing: {(site, training round): how often its training fails there}. limits: of the coordinator.
    """

    def __init__(self, seed, protection="masked", rounds=2, flaky=0.0, failing=None, limits=LIMITS):
        self.failing, self.limits = dict(failing or {}), limits
        self.random, self.flaky = random.Random(seed), flaky
        self.keys = {name: IdentityKey() for name in SITES}
        self.pins = {name: key.public for name, key in self.keys.items()}
        self.plan = plan_for(protection, rounds=rounds)
        self.sizes = vector_sizes(self.plan, 0)
        self.offer = job.JobOffer("job", "t", "0" * 64, canonical({}))
        shape = ModelShape("t", "0" * 64, 5, 0, 0, "", self.plan.metric_sums)
        self.survey = SimpleNamespace(shape=shape, columns=(), initial=None, rows="rows")
        self.now, self.obeyed, self.here = 0.0, 0, {}
        self.made, self.sealed, self.warnings, self.deaths = [], {}, [], []
        self.channels = {}
        self.parties = {HUB: Hub(self, HUB)} | {name: Site(self, name) for name in SITES}

    def say(self, sender, to, message):
        """Into the session of this site, if it has one."""
        name = to if sender == HUB else sender
        if name in self.here:
            again = decode(encode(message), type(message))
            self.channels.setdefault((sender, to), deque()).append(again)

    def fails(self, name, header):
        """Whether this site's training of a round fails now."""
        key = name, header.training_round
        if header.purpose != "update" or not self.failing.get(key):
            return False
        self.failing[key] -= 1
        return True

    def cut(self, name):
        """The link of a site goes down, with all that is on its way; the coordinator finds it lost."""
        self.here.pop(name, None)
        for ends in ((HUB, name), (name, HUB)):
            self.channels.pop(ends, None)
        self.to_hub(events.SiteLeft(name))

    def connect(self, name):
        """A new session of a site; only so much of what was on its way in the old one arrives."""
        for ends in ((HUB, name), (name, HUB)):
            queue = self.channels.get(ends, ())
            for _ in range(self.random.randint(0, len(queue))):
                queue.pop()
        self.here = {each: None for each in SITES if each in self.here or each == name}
        self.to_hub(events.SiteConnected(name))
        self.safely(name, lambda: self.parties[name].tell(site_events.Connected()))

    def to_hub(self, event):
        self.safely(HUB, lambda: self.parties[HUB].tell(event))
        self.safely(HUB, lambda: self.parties[HUB].tell(events.Advance()))

    def safely(self, name, act):
        """Act for a party; whoever dies is started again from its disk, with new sessions."""
        try:
            return act()
        except Died as died:
            dead = self.parties[str(died)]
            self.deaths.append(dead.name)
            names = [dead.name] if dead.name != HUB else list(self.here)
            for each in names:
                self.here.pop(each, None)
                self.channels.pop((HUB, each) if dead.name == each else (each, HUB), None)
            dead.start()
            dead.tell(events.Resumed() if dead.name == HUB else site_events.Started())
            for each in names:
                self.connect(each)

    def play(self, die=None):
        """Until the job has ended everywhere. die: (party, number of its effect before which it ends)."""
        if die is not None:
            self.parties[die[0]].fuse = die[1]
        self.to_hub(events.Resumed())
        for name in SITES:
            self.safely(name, lambda name=name: self.parties[name].tell(site_events.Started()))
            self.connect(name)
        for _ in range(20_000):
            if self.parties[HUB].outcome and all(self.parties[n].job.ended for n in SITES):
                return
            self.once()
        raise AssertionError((self.now, self.parties[HUB].machine.facts, self.warnings[-5:]))

    def once(self):
        """One message, one piece of work, or else time; now and then a session is lost."""
        if self.random.random() < self.flaky:
            self.connect(self.random.choice(SITES))
        waiting = [(self.deliver, ends) for ends, queue in self.channels.items() if queue]
        waiting += [(self.labour, name) for name, each in self.parties.items() if each.work]
        if not waiting:
            self.pass_time()
            return
        act, about = self.random.choice(waiting)
        act(about)

    def deliver(self, ends):
        sender, to = ends
        message = self.channels[ends].popleft()
        if to == HUB:
            self.to_hub(events.MessageReceived(sender, message))
        else:
            self.safely(to, lambda: self.parties[to].tell(site_events.MessageReceived(message)))

    def labour(self, name):
        party = self.parties[name]
        work = party.work.pop(self.random.randrange(len(party.work)))
        if name == HUB:
            self.to_hub(work)
        elif self.safely(name, lambda: party.do(work)) is False:
            self.pass_time()
            party.work.append(work)
        else:
            self.to_hub(events.Advance())

    def pass_time(self):
        """To the next moment at which something is due."""
        self.now = max(self.now + 0.5, self.parties[HUB].machine.due)
        self.to_hub(events.TimePassed())
        for name in SITES:
            left = self.parties[name].job.deadline(self.now)
            if left is not None and (left <= 0 or self.parties[name].job.end.pending):
                self.safely(name, lambda name=name: self.parties[name].tell(site.Tick()))
