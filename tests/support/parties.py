"""A small federation in memory: real keys and both protocol machines, without any vector.

Digests and sizes stand for the bulk, and everything else is the real thing. Messages wait in one queue;
who pumps may choose the order between channels, drop sites, crash a party, or rewrite what goes over.
Every step is logged with its stages, so a test can ask about all of them afterwards.
"""

from __future__ import annotations

import hashlib
from collections import Counter, deque
from dataclasses import dataclass, fields, is_dataclass, replace

import pytest
from support.plans import round_plan

from fedcore.errors import PeerRefused, TagRefused
from fedcore.secagg.crypto.entropy import OsEntropy
from fedcore.secagg.crypto.identity_key import IdentityKey, roster_digest
from fedcore.secagg.crypto.secret import SecretBytes
from fedcore.secagg.in_process import ANSWERED_AT
from fedcore.secagg.plan import RoundHeader
from fedcore.secagg.protections import SCHEMES
from fedcore.secagg.protocol import effects, epoch, messages
from fedcore.secagg.protocol.absences import STAGES
from fedcore.secagg.protocol.job.coordinator.sent_ahead import SentAhead
from fedcore.secagg.protocol.round import coordinator, site
from fedcore.secagg.protocol.round.site import SiteProgress
from fedcore.secagg.protocol.wire_form import decode, encode

HUB = messages.COORDINATOR
FEDERATION, JOB, SIZE, KEY_ID = "trial", "job", 640, b"k" * 32
STATE = hashlib.sha256(b"state").digest()


def plan_of(n, threshold=0, scheme="masked", coordinates=6):
    """scheme: a protection, with its cipher where it is not `bfv`."""
    protection, cipher = SCHEMES[scheme]
    return round_plan(
        [f"s{k:02d}" for k in range(n)], protection, cipher=cipher, parameters=coordinates,
        fields=coordinates + 8, max_examples=1 << 10, threshold=threshold,
    )  # fmt: skip


def hashed(*parts):
    return hashlib.sha256(repr(parts).encode()).digest()


def recoded(message):
    """The message as it comes out of its bytes on another machine."""
    return decode(encode(message), type(message))


def net(vectors):
    """What many masks leave of each seed: {seed: sum of its signs}, without those that cancel."""
    found = Counter()
    for masks in vectors:
        for seed, sign in masks:
            found[seed.reveal()] += sign
    return {seed: count for seed, count in found.items() if count}


def secrets_in(value):
    """Every secret reachable from a record, a tuple or a list."""
    if isinstance(value, SecretBytes):
        return [value.reveal()]
    if isinstance(value, tuple | list):
        return [found for item in value for found in secrets_in(item)]
    if is_dataclass(value):
        return [found for f in fields(value) for found in secrets_in(getattr(value, f.name))]
    return []


@dataclass(frozen=True)
class Step:
    """One step of a machine. journalled: how many records its journal held afterwards."""

    who: str
    before: object
    event: object
    after: object
    effects: tuple
    journalled: int

    @property
    def kind(self):
        return kind_of(self.event)

    @property
    def sent(self):
        return [e.message for e in self.effects if isinstance(e, effects.Send)]


def kind_of(event):
    """What the tables of moves are keyed by."""
    return type(getattr(event, "message", event))


def leaves_when_restarted(stage):
    """Whether a new process of a site leaves the round from this stage (PROTOCOL V, D)."""
    if not isinstance(stage, site.IN_ROUND):
        return False
    before = stage.header.layers.masks and not isinstance(stage, site.EXPOSED)
    return before or isinstance(stage, site.Masking)


class Died(Exception):
    """A process ended after one effect and before the next."""


class Parties:
    """n sites and their coordinator between rounds. Stages are replaced, never changed.

    cut: {who: how many more effects it carries out before its process ends}. ahead: whether sites send keys for the
    next round with their confirmation, and shares with their statement.
    """

    def __init__(self, n, threshold=0, protection="masked", ahead=False):
        self.ahead, self.sent = ahead, SentAhead()
        self.plan = plan_of(n, threshold, protection)
        self.sites = self.plan.sites
        identities = {name: IdentityKey() for name in self.sites}
        self.pins = {name: key.public for name, key in identities.items()}
        # A site outwaits the coordinator, which alone decides who is late.
        self.members = {
            name: site.SiteParams(
                name,
                key,
                self.pins,
                self.plan,
                FEDERATION,
                JOB,
                OsEntropy(),
                timeout=6000.0,
                ahead=ahead,
            )
            for name, key in identities.items()
        }
        self.hub = coordinator.CoordinatorParams(self.pins)
        self.first = {name: site.Idle(SiteProgress(1, KEY_ID)) for name in self.sites}
        self.first[HUB] = coordinator.Ready()
        self.stages = dict(self.first)
        self.journals = {who: [] for who in self.first}
        self.queue, self.log, self.refusals = deque(), [], []
        self.now, self.absences, self.wire = 0.0, {}, lambda message: message
        self.tags, self.refusers, self.contrary, self.cut = {}, set(), set(), {}
        self.made, self.removed, self.folded, self.vectors = {}, None, [], Counter()

    # ------------------------------------------------------------------------------ rounds

    def header(self, **changes):
        stage = self.stages[HUB]
        released = [s for s in self.log if isinstance(s.after, coordinator.Released)]
        last = released[-1].after.certificate.hash if released else ""
        plan = self.plan
        header = RoundHeader(
            FEDERATION, JOB, 1, stage.round + 1, stage.round + 1, "update", self.sites, roster_digest(self.pins),
            plan.threshold, plan.protection, plan.digest, last,
        )  # fmt: skip
        return replace(header, **changes)

    def begin(self, **absences):
        """Announce a round; nothing is delivered yet."""
        self.absences = absences
        self.made, self.removed, self.folded = {}, None, []
        header, salt = self.header(), self.plan.salt_bytes
        (keys, shares), self.sent = self.sent.for_round(self.hub, header), SentAhead()
        if not keys and self.ahead:  # the sites may have used this number up
            header = replace(header, round=header.round + 1)
        self.step(HUB, coordinator.Start(header, SIZE, salt, keys))
        for each in shares:
            self.deliver(HUB, coordinator.MessageFromSite(each.site, each))

    def play(self, choose=None, **absences):
        """One whole round; returns the coordinator's last stage."""
        self.begin(**absences)
        return self.finish(choose)

    def finish(self, choose=None):
        """Deliver what waits, and let time pass until the round has ended everywhere."""
        self.pump(choose)
        while not isinstance(self.stages[HUB], coordinator.Released | coordinator.Failed):
            stage = self.stages[HUB]
            self.now = max(self.now, stage.until)
            self.step(HUB, coordinator.Tick())
            self.pump(choose)
            if self.stages[HUB] is stage:
                self.come_back(choose)
        for name in self.sites:
            if isinstance(self.stages[name], site.Waiting):
                self.now = max(self.now, self.stages[name].until)
                self.step(name, site.Tick())
            elif isinstance(self.stages[name], site.IN_ROUND):  # it hears that the round is over
                self.step(name, site.Superseded())
        self.queue.clear()
        return self.stages[HUB]

    def come_back(self, choose=None):
        """A round that has to be released waits for them: whoever is away connects anew."""
        waited = coordinator.waiting_for(self.stages[HUB])
        assert waited, "something to wait for"
        self.absences = {n: s for n, s in self.absences.items() if n not in waited}
        for name in waited:
            self.step(HUB, coordinator.SiteReconnected(name))
            if isinstance(self.stages[name], site.IN_ROUND):
                self.step(name, site.SessionRestored())
            else:  # it says that it is in no round
                self.step(HUB, coordinator.Gone(name, for_good=True))
            if isinstance(self.stages[HUB], coordinator.Released | coordinator.Failed):
                break
        self.pump(choose)

    def taken(self, name):
        """Whether the coordinator has this site's vector of the round under way."""
        stage = self.stages[HUB]
        found = getattr(getattr(stage, "certificate", None), "survivors", None)
        return name in (found or {s.site for s in getattr(stage, "submissions", ())})

    def catch_up(self):
        """Sites that missed the last release take its certificate."""
        certificate = self.stages[HUB].certificate
        for name in self.sites:
            if self.stages[name].standing.certificate != certificate.hash:
                self.step(name, site.CaughtUp(certificate, certificate.state_mac))

    def pump(self, choose=None, until=lambda: False):
        """Deliver until nothing waits. choose(k): which of k waiting ones; channels keep their order."""
        while self.queue and not until():
            picked = self.queue[choose(len(self.queue)) if choose else 0]
            first = next(e for e in self.queue if e[:2] == picked[:2])
            self.queue.remove(first)
            self.deliver(first[1], first[2])

    def deliver(self, to, event):
        """As a shell does: what a machine refuses makes the site leave, and the coordinator go on."""
        if self.absent(to, event) or self.keeps(to, event):
            return
        try:
            self.step(to, event)
        except PeerRefused as error:
            self.refusals.append((to, event, error))
            if to == HUB:
                return
            if isinstance(self.stages[to], site.IN_ROUND):
                self.step(to, site.CheckFailed(error))
            elif isinstance(event, site.Invited):
                self.step(to, site.Declined(event.announce.header))

    def keeps(self, to, event):
        """Whether this is for a round that has not begun: the coordinator's shell keeps it."""
        found, stage = getattr(event, "message", None), self.stages[HUB]
        under_way = getattr(stage, "header", None)
        if to != HUB:
            return False
        match found:
            case messages.Keys() if found.header != under_way.digest:
                self.sent.keys[event.sender] = found
            case messages.Shares() if found.head.header != under_way.digest:
                self.sent.shares[event.sender] = found
            case messages.NextKeys():
                self.sent.announced[event.sender] = found
                unmasking = isinstance(stage, coordinator.Unmasking)
                bundle = self.sent.bundle(stage) if unmasking else None
                for keys in () if bundle is None else bundle.keys:
                    self.send(HUB, keys.site, self.wire(bundle))
            case _:
                return False
        return True

    def passed_on(self):
        """The bundles of keys for the next round that sites were sent: the coordinator's shell makes them."""
        found = (getattr(step.event, "message", None) for step in self.log)
        return [message for message in found if isinstance(message, messages.NextBundle)]

    def absent(self, to, event):
        message = getattr(event, "announce", getattr(event, "message", event))
        if to not in self.absences or type(message) not in ANSWERED_AT:
            return False
        answer = ANSWERED_AT[type(message)]
        if answer == "keys" and not self.plan.layers.masks:
            answer = "submit"
        return STAGES.index(self.absences[to]) <= STAGES.index(answer)

    # ------------------------------------------------------------------------------- steps

    def step(self, who, event):
        """One step, logged; raises what the machine raises. Its effects wait in the queue.

        Raises Died after the last effect that `cut` lets it carry out; only those done are logged.
        """
        before = self.stages[who]
        if who == HUB:
            after, found = coordinator.step(self.hub, before, event, self.now)
        else:
            after, found = site.step(self.members[who], before, event, self.now)
        self.stages[who] = after
        done = []
        try:
            for effect in found:
                self.act(who, effect)
                done.append(effect)
                self.count(who, effect)
        finally:
            self.log.append(Step(who, before, event, after, tuple(done), len(self.journals[who])))
        return found

    def count(self, who, effect):
        """One effect is done; raises Died if it was the last."""
        if who in self.cut:
            self.cut[who] -= 1
            if not self.cut[who]:
                del self.cut[who]
                raise Died(f"{who} after {type(effect).__name__}")

    def act(self, who, effect):
        match effect:
            case effects.Persist(record=record):
                self.journals[who].append((type(record), encode(record)))
            case effects.Send(message=messages.Submit()):
                pass  # arrives with the upload
            case effects.Send(to=to, message=message):
                self.send(who, to, self.wire(message))
            case effects.MakeVector(header=header, masks=masks):
                self.made[who] = masks
                self.vectors[who, header.round] += 1  # a second one would be another vector
                digest = hashed(who, header.round, self.vectors[who, header.round])
                salt = hashed("salt", digest)[: self.plan.salt_bytes]
                self.later(who, site.VectorMade(digest, SIZE, salt))
            case effects.Upload(submit=submit):
                event = coordinator.Uploaded(who, self.wire(submit), submit.digest, submit.size)
                self.queue.append((who, HUB, event))
            case effects.OpenSum(header=header, digest=digest):
                self.later(who, self.opened(who, header, digest))
            case effects.FoldUpload(submit=submit):
                self.folded.append(submit.site)
            case effects.Rebuild(submissions=submissions):
                self.folded = [submit.site for submit in submissions]
            case effects.RemoveMasks(header=header, masks=masks):
                self.removed = masks
                self.later(who, coordinator.SumReady(hashed("sum", header.round), SIZE))

    def opened(self, who, header, digest):
        if who in self.refusers:
            error = TagRefused("sum: found another tag, expected the survivors'")
            return site.CheckFailed(error, b"sealed cause")
        mine = who if who in self.contrary else ""
        macs = hashed("sum", digest, mine), hashed("new state", header.round, mine)
        return site.SumOpened(*macs, self.following(who, header, *macs))

    def following(self, who, header, *macs):
        if not self.ahead or not self.plan.layers.masks:
            return None
        survivors = messages.survivors_of(self.stages[who].submissions)
        certificate = messages.Certificate(header, survivors, *macs, ()).hash
        number = header.round + 1
        later = replace(
            header, round=number, training_round=number, roster=survivors, certificate=certificate
        )
        return site.Following(later, self.tags.get(who, STATE))

    def later(self, who, event):
        self.queue.append((who, who, event))

    def send(self, sender, to, message):
        if to == HUB:
            event = coordinator.MessageFromSite(sender, message)
        elif isinstance(message, messages.Announce):
            event = site.Invited(message, self.tags.get(to, STATE))
        else:
            event = site.MessageFromCoordinator(message)
        self.queue.append((sender, to, event))

    # ---------------------------------------------------------------------------- crashes

    def records(self, who, count=None):
        """The journal as it comes back from the disk."""
        return [decode(data, kind) for kind, data in self.journals[who][:count]]

    def replayed(self, who, count=None):
        machine = coordinator if who == HUB else site
        return machine.replay(self.first[who], self.records(who, count))

    def crash(self, who, heard=False):
        """The process dies: its stage comes from the journal, and its connections' messages are lost.

        heard: those it sent had arrived before.
        """
        kept = (e for e in self.queue if who not in e[:2] or (heard and who == e[0] != e[1]))
        self.queue = deque(kept)
        self.stages[who] = self.replayed(who)
        spooled = coordinator.Releasing | coordinator.Released
        if who == HUB and not isinstance(self.stages[who], spooled):
            self.folded = []  # the running sum was in memory; the finished one is spooled
        found = self.step(who, (coordinator if who == HUB else site).Restarted())
        for name in self.sites if who == HUB else [who]:
            if who == HUB:
                self.step(name, site.SessionRestored())
            else:
                self.step(HUB, coordinator.SiteReconnected(name))
        return found


# ------------------------------------------------------------------------------- key epochs

PAYLOAD = SecretBytes(b"secret key and group secret, " * 4)


class Epochs:
    """n sites, their coordinator, and what is on the wire between them."""

    def __init__(self, n=4):
        self.parties = Parties(n)
        self.sites, self.members = self.parties.sites, self.parties.members
        self.hub = coordinator.CoordinatorParams(self.parties.pins, timeout=100.0)
        self.stages = {name: epoch.NoKey() for name in self.sites}
        self.stages[HUB] = epoch.NoEpoch()
        self.queue, self.log, self.silent = deque(), [], set()
        self.installed, self.now, self.payload = {}, 0.0, PAYLOAD

    def header(self, number=1, maker="s00", **changes):
        plan = self.parties.plan
        header = epoch.EpochHeader(
            FEDERATION, JOB, number, self.sites, roster_digest(self.parties.pins), plan.threshold,
            plan.digest, maker,
        )  # fmt: skip
        return replace(header, **changes)

    def step(self, who, event):
        before = self.stages[who]
        if who == HUB:
            after, found = epoch.step_hub(self.hub, before, event, self.now)
        else:
            after, found = epoch.step_site(self.members[who], before, event)
        self.stages[who] = after
        persisted = False
        for effect in found:
            match effect:
                case effects.Persist(record=record):
                    persisted = True
                    assert encode(record) == encode(after)
                case effects.Send(to=to, message=message):
                    assert persisted or after == before, "on disk before it is said"
                    self.log.append(message)
                    self.queue.append((who, to, message))
                case epoch.MakeSecrets():
                    self.step(who, epoch.SecretsMade(self.payload))
                case epoch.Install():
                    self.installed.setdefault(who, []).append(effect)
        return found

    def pump(self, until=lambda to, message: False):
        while self.queue:
            sender, to, message = self.queue[0]
            if until(to, message):
                return message
            self.queue.popleft()
            if to not in self.silent:
                event = (
                    epoch.FromSite(sender, message) if to == HUB else epoch.FromCoordinator(message)
                )
                self.step(to, event)
        return None

    def begin(self, number=1, maker="s00"):
        self.step(HUB, epoch.StartEpoch(self.header(number, maker)))
        return self

    def until(self, kind, to):
        """Pump up to the first message of this type to `to`, and take it off the wire."""
        found = self.pump(lambda at, message: at == to and isinstance(message, kind))
        self.queue.popleft()
        return found

    def refused(self, who, event, error, match=None):
        """The event is refused with this error, nothing is said and no secret named: whose fault it is."""
        before, said = encode(self.stages[who]), len(self.log)
        with pytest.raises(error, match=match) as found:
            self.step(who, event)
        assert encode(self.stages[who]) == before and len(self.log) == said
        for secret in secrets_in(self.stages[who]):
            assert secret.hex() not in str(found.value) and repr(secret) not in str(found.value)
        return found.value.fault


def with_late_joiner():
    """s03 was away while s00 to s02 got the payload; the maker is gone now, s01 is asked."""
    epochs = Epochs(4)
    epochs.silent = {"s03"}
    epochs.begin().pump()
    epochs.now = 100.0
    epochs.step(HUB, coordinator.Tick())
    epochs.pump()
    assert epochs.stages[HUB].holders == ("s00", "s01", "s02")
    epochs.silent = set()
    epochs.step("s03", epoch.FromCoordinator(epoch.EpochCall(epochs.header())))
    return epochs


def granted_by(epochs, holder):
    """What s03 gets from this holder, as the coordinator hands it on."""
    epochs.pump(lambda to, message: isinstance(message, epoch.GrantRequest))
    _, _, request = epochs.queue.popleft()
    epochs.step(holder, epoch.FromCoordinator(request))
    return epochs.until(epoch.Granted, "s03")
