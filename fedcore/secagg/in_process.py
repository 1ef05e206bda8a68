"""Sums with every role in this process: the full protocol (`InProcessFederation`), and plain adding (`PlainSum`).

The drivers do what an effect asks for, as the job runners do it over a network: a site packs, tags, masks and
encrypts its vector and opens sums; the coordinator folds, takes masks off and keeps the sealed checkpoint.
Only the wire is missing: messages go from one to the other as they are, and the clock stands still until a
stage has to time out. `plain` has no machine: it counts who is left (`protocol/absences.py`) and adds.

Invariant: the opened sum is compared with the plain integer sum of the survivors' slots, slot for slot,
in every round (`ProtectedTotal.twin`), so "protection costs no accuracy" is measured and never assumed.
"""

import gc
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import assert_never

from fedcore.errors import PeerRefused, RoundAbandoned
from fedcore.secagg.crypto import Sealer, UnmaskableFold
from fedcore.secagg.crypto.entropy import Entropy, OsEntropy
from fedcore.secagg.crypto.identity_key import IdentityKey, roster_digest
from fedcore.secagg.crypto.masking import mask_sum
from fedcore.secagg.crypto.secret import SecretBytes
from fedcore.secagg.crypto.shared_work import shared_work
from fedcore.secagg.grouped import GroupedSums
from fedcore.secagg.plan import RoundHeader, RoundPlan, VectorSpec
from fedcore.secagg.protocol import effects, epoch, messages
from fedcore.secagg.protocol.absences import ABANDONED_AT, gone
from fedcore.secagg.protocol.moves import Tick
from fedcore.secagg.protocol.round import coordinator, site
from fedcore.secagg.protocol.round.site import SiteProgress
from fedcore.secagg.scheme import EpochSecrets, Scheme, check_announced, revealed
from fedcore.secagg.summing import (
    ExactSum,
    PlainSum,
    ProtectedTotal,
    RoundSum,
    SumEngine,
    VectorEngine,
)
from fedcore.store.container import vector_digest
from fedcore.types import Contribution, SiteId


class SiteDriver:
    """One site: its machines, its secrets, and what they ask for."""

    def __init__(self, member: site.SiteParams, scheme: Scheme) -> None:
        self.member, self.scheme = member, scheme
        self.epoch: epoch.SiteEpochStage = epoch.NoKey()
        self.stage: site.SiteStage = site.Idle(SiteProgress(0, b""))
        self.journal: list[site.SiteEntry] = []
        self.held: EpochSecrets | None = None
        self.spool: list[bytes] = []

    def install(self, event: epoch.Install) -> None:
        assert isinstance(self.epoch, epoch.Holding)
        self.held = self.scheme.open_payload(event.payload.reveal(), self.epoch.header.maker)
        new = site.NewEpoch(event.epoch, event.key_id)
        self.stage, found = site.step(self.member, self.stage, new, 0.0)
        self.journal += [e.record for e in found if isinstance(e, effects.Persist)]

    @property
    def secrets(self) -> EpochSecrets:
        assert self.held is not None
        return self.held

    def make_vector(
        self, asked: effects.MakeVector, content: Contribution, current: RoundSum
    ) -> site.VectorMade:
        """Pack, tag, mask, encrypt, spool."""
        place, me = asked.header.place(self.member.id), self.member.id
        slots = current.pack(
            place, content, lambda slots: self.secrets.put_tag(slots, current.layout, asked, me)
        )
        with current.watch("protect"):
            self.spool, salt = self.secrets.protect(
                slots, current.layout, asked, me, self.member.entropy
            )
        stream = self.secrets.stream(asked.header, asked.state_tag, me, salt) if salt else None
        current.show(place, self.spool, revealed(asked.masks), (stream,) if stream else ())
        return site.VectorMade(vector_digest(self.spool), sum(map(len, self.spool)), salt)

    def open_sum(
        self, asked: effects.OpenSum, current: RoundSum, chunks: Sequence[bytes]
    ) -> site.SumOpened:
        """Decrypt, check the tag, and find the state the sum leads to.

        Raises TagRefused or ChunkRefused, also where this site's own marks are not in the sum, and whatever
        `lead` raises. In one process all sites hold the same key and were given the same chunks, so the
        first to open them opens them for all; every site signs for itself.
        """
        check_announced(chunks, asked)
        if current.opened is None:
            with current.watch("unprotect"):
                total, opened = self.secrets.open(chunks, current.layout, asked)
                current.open(total, opened, asked.survivors)
        assert current.opened is not None
        assert current.total is not None
        place = asked.header.place(self.member.id)
        current.layout.check_own(current.opened, current.marks[place], place)
        with current.watch("unprotect"):
            return site.SumOpened(
                self.secrets.sum_mac(asked.header, current.total),
                self.secrets.state_mac(asked.header, current.led_to),
            )


class CoordinatorDriver:
    """The coordinator: its machines, and what they ask for."""

    def __init__(self, pins: Mapping[SiteId, bytes], scheme: Scheme) -> None:
        self.hub, self.scheme = coordinator.CoordinatorParams(pins), scheme
        self.epoch: epoch.CoordinatorEpochStage = epoch.NoEpoch()
        self.stage: coordinator.CoordinatorStage = coordinator.Ready()
        self.journal: list[coordinator.CoordinatorEntry] = []
        self.submits: dict[SiteId, messages.Submit] = {}
        self.arrived: dict[SiteId, list[bytes]] = {}
        self.fold: UnmaskableFold | None = None
        self.released: list[bytes] = []

    def remove_masks(self, asked: effects.RemoveMasks, current: RoundSum) -> coordinator.SumReady:
        """One subtraction for all masks, then the chunks of the sum."""
        fold = self.fold
        assert fold is not None
        with current.watch("fold"):
            if asked.masks:
                masks = revealed(asked.masks)
                if current.witness is not None:
                    current.witness.rebuilt_masks = masks
                bits = self.scheme.plan.packing.slot_bits
                fold.remove(mask_sum(masks, current.layout.slots, bits))
            self.released = list(fold.total())
        current.bytes_down = sum(map(len, self.released))
        return coordinator.SumReady(vector_digest(self.released), current.bytes_down)


def sum_engine(job: str, plan: RoundPlan, *, exact: bool = False) -> SumEngine:
    """The engine of a plan's protection. job: its name in the headers of rounds. exact: without its cryptography."""
    if plan.server.groups is not None:
        return GroupedSums(job, plan, partial(sum_engine, exact=exact))
    if plan.layers.protects and not exact:
        return InProcessFederation(job, plan)
    # Of a plan without protection it is shown what each party holds, which takes vectors; of cohorts it is not.
    return ExactSum(plan) if plan.layers.protects or plan.server.cohort else PlainSum(plan)


@contextmanager
def _one_process() -> Iterator[None]:
    """What one process spares that plays all parties. The messages of a round between 64 sites are a million objects,
    none of them in a cycle, through which the garbage collector would go again and again."""
    collects = gc.isenabled()
    gc.disable()
    try:
        with shared_work():
            yield
    finally:
        if collects:
            gc.enable()


EpochMail = epoch.CoordinatorEpochEvent | tuple[SiteDriver, epoch.SiteEpochEvent]
Mail = messages.SiteMessage | tuple[SiteDriver, messages.CoordinatorMessage]
"""A message on its way: of a site to the coordinator, or to this site."""


class InProcessFederation(VectorEngine):
    """All parties of one job in this process, from their key epoch to the last round.

    entropy: where the protocol's keys, shares and encapsulations come from; tests may record it.
    as_deployed: every party computes all that it would compute in a process of its own, to measure it; else what
    several parties would compute alike is computed once (`crypto/shared_work.py`). The messages are the same.
    tap: called with (recipient, message) for every message of a round, to count or to record.
    warnings: what the parties' own logs would say, each with its party's name.
    """

    def __init__(
        self,
        job: str,
        plan: RoundPlan,
        entropy: Entropy | None = None,
        *,
        as_deployed: bool = False,
    ) -> None:
        self.job, self.plan, self.as_deployed = job, plan, as_deployed
        self.now = 0.0
        self.certificate: messages.Certificate | None = None
        self.tap: Callable[[str, messages.RoundMessage], None] | None = None
        self.warnings: list[str] = []
        identities = {name: IdentityKey() for name in plan.sites}
        self.pins = {name: key.public for name, key in identities.items()}
        scheme = Scheme.of(plan)
        self.hub = CoordinatorDriver(self.pins, scheme)
        about = plan, FEDERATION, job, entropy or OsEntropy()
        self.shells = {
            name: SiteDriver(site.SiteParams(name, key, self.pins, *about), scheme)
            for name, key in identities.items()
        }
        self.start_epoch()

    @property
    def sealer(self) -> Sealer:
        """A site's sealer, to see what it can open."""
        return self.shells[self.plan.sites[0]].secrets.sealer

    def start_epoch(self) -> None:
        """A new key epoch of all sites: a new random key and a new group secret."""
        roster = self.plan.sites
        header = epoch.EpochHeader(
            FEDERATION, self.job, self.hub.epoch.epoch + 1, roster, roster_digest(self.pins),
            self.plan.threshold, self.plan.digest, epoch.first_maker(roster, roster),
        )  # fmt: skip
        waiting: deque[EpochMail] = deque([epoch.StartEpoch(header)])
        with self._shared_work():
            while waiting:
                each = waiting.popleft()
                waiting += self._at_site(*each) if isinstance(each, tuple) else self._at_hub(each)

    def _shared_work(self) -> AbstractContextManager[None]:
        return nullcontext() if self.as_deployed else _one_process()

    def _at_hub(self, event: epoch.CoordinatorEpochEvent) -> Iterator[EpochMail]:
        hub = self.hub
        hub.epoch, found = epoch.step_hub(hub.hub, hub.epoch, event, self.now)
        for effect in found:
            if isinstance(effect, effects.Send):
                yield self.shells[SiteId(effect.to)], epoch.FromCoordinator(effect.message)

    def _at_site(self, shell: SiteDriver, event: epoch.SiteEpochEvent) -> Iterator[EpochMail]:
        shell.epoch, found = epoch.step_site(shell.member, shell.epoch, event)
        for effect in found:
            match effect:
                case effects.Persist():
                    pass  # a key epoch ends with this process
                case effects.Send(message=message):
                    yield epoch.FromSite(message.site, message)
                case epoch.MakeSecrets():
                    yield shell, epoch.SecretsMade(SecretBytes(shell.scheme.make_payload()))
                case epoch.Install():
                    shell.install(effect)
                case _:
                    assert_never(effect)

    def _total(self, current: RoundSum, training_round: int) -> ProtectedTotal:
        header = self._header(current.layout.spec, training_round)
        with current.watch("protect"):
            current.tag = self.shells[self.plan.sites[0]].secrets.tag(header, current.state)
        exchange = _Exchange(self, current)
        with self._shared_work():
            try:
                exchange.run(header)
            finally:
                exchange.end()
        stage = self.hub.stage
        if isinstance(stage, coordinator.Released):
            self._catch_up(current, stage.certificate)
            return current.finish(tuple(map(header.place, stage.certificate.survivors)))
        if current.failure is not None:
            raise current.failure
        assert isinstance(stage, coordinator.Failed)
        raise RoundAbandoned(stage.stage, stage.left, header.threshold)

    def _header(self, spec: VectorSpec, training_round: int) -> RoundHeader:
        plan, last = self.plan, self.hub.stage
        assert isinstance(last, coordinator.Between)
        return RoundHeader(
            FEDERATION, self.job, self.hub.epoch.epoch, last.round + 1, training_round,
            spec.purpose, plan.sites, roster_digest(self.pins), plan.threshold, plan.protection,
            plan.digest, self.certificate.hash if self.certificate else "",
        )  # fmt: skip

    def _catch_up(self, current: RoundSum, certificate: messages.Certificate) -> None:
        """Sites that missed the release take the state that a survivor seals, if the certificate bears it out."""
        self.certificate = certificate
        shells = self.shells.values()
        there = [s for s in shells if s.stage.standing.certificate == certificate.hash]
        late = [s for s in shells if s not in there]
        if not late:
            return
        giver = there[0]
        sealed = giver.secrets.seal_state(current.led_to, certificate, giver.member.entropy)
        for shell in late:
            if isinstance(shell.stage, site.Halted):
                continue
            state = shell.secrets.open_state(sealed, certificate)
            state_mac = shell.secrets.state_mac(certificate.header, state)
            event = site.CaughtUp(certificate, state_mac)
            shell.stage, _ = site.step(shell.member, shell.stage, event, self.now)


FEDERATION = "simulation"
"""The name in the headers of rounds that run in one process."""

ANSWERED_AT = {
    messages.Announce: "keys",
    messages.KeyBundle: "shares",
    messages.Delivery: "submit",
    messages.SurvivorList: "confirm",
    messages.Confirmations: "unmask",
    messages.Aggregate: "release",
    messages.Certificate: "release",
    messages.Abandon: "release",
}
"""The stage at which a site answers a message: who is absent from it on has not even heard it."""


class _Exchange:
    """One round's messages between the shells, until the coordinator's machine has ended it."""

    def __init__(self, parties: InProcessFederation, current: RoundSum) -> None:
        self.parties, self.current, self.hub = parties, current, parties.hub
        self.queue: deque[Mail] = deque()
        self.making: dict[int, tuple[SiteDriver, effects.MakeVector]] = {}
        """By roster index: vectors that are made together, once every site has the messages before."""

    def run(self, header: RoundHeader) -> None:
        """Deliver everything; where sites stay silent, let time pass."""
        hub = self.hub
        hub.submits, hub.arrived, hub.journal = {}, {}, []
        hub.fold = hub.scheme.fold(self.current.layout.slots)
        for shell in self.parties.shells.values():
            shell.journal = []
        size = hub.scheme.upload_bytes(self.current.layout)
        self._hub_step(coordinator.Start(header, size, self.parties.plan.salt_bytes))
        self._deliver()
        while isinstance(stage := hub.stage, coordinator.Waiting):
            self.parties.now = max(self.parties.now, stage.until)
            self._hub_step(Tick())
            self._deliver()
            if hub.stage is stage:  # its sum may be known: it waits until enough are back
                self._come_back()

    def _come_back(self) -> None:
        """Whoever is absent from `unmask` or `release` on is there again, and says what is asked."""
        away = self.current.absences
        late = [name for name, stage in away.items() if stage not in ABANDONED_AT]
        self.current.absences = {n: stage for n, stage in away.items() if n not in late}
        for name in late:
            self._hub_step(coordinator.SiteReconnected(SiteId(name)))
        if not late:  # nothing more will come
            for name in coordinator.waiting_for(self.hub.stage):
                self._hub_step(coordinator.Gone(name, for_good=True))
        self._deliver()

    def _post(self, message: messages.SiteMessage) -> None:
        if self.parties.tap is not None:
            self.parties.tap(messages.COORDINATOR, message)
        self.queue.append(message)

    def _post_to(self, shell: SiteDriver, message: messages.CoordinatorMessage) -> None:
        if self.parties.tap is not None:
            self.parties.tap(shell.member.id, message)
        self.queue.append((shell, message))

    def _deliver(self) -> None:
        while self.queue or self.making:
            if not self.queue:
                self._make_vectors()
                continue
            each = self.queue.popleft()
            if not isinstance(each, tuple):
                self._to_hub(each)
            elif not self._absent(*each):
                self._to_site(*each)

    def _make_vectors(self) -> None:
        making, self.making = self.making, {}
        for index, content in self.current.contribute(tuple(making)):
            shell, asked = making[index]
            try:
                made = shell.make_vector(asked, content, self.current)
            except PeerRefused as error:
                self._leave(shell, error)
            else:
                self._site_step(shell, made)

    def _absent(self, shell: SiteDriver, message: messages.CoordinatorMessage) -> bool:
        """Whether the site is gone before it would answer this message."""
        absent_from = self.current.absences.get(shell.member.id)
        if absent_from is None:
            return False
        answer = ANSWERED_AT[type(message)]
        if isinstance(message, messages.Announce) and not message.header.layers.masks:
            answer = "submit"
        return gone(absent_from, answer)

    def _to_site(self, shell: SiteDriver, message: messages.CoordinatorMessage) -> None:
        if isinstance(message, messages.Announce):
            self._site_step(shell, site.Invited(message, self.current.tag))
        else:
            self._site_step(shell, site.MessageFromCoordinator(message))

    def _site_step(self, shell: SiteDriver, event: site.SiteEvent) -> None:
        """Step, and do what the machine asks for; what it refuses makes the site leave the round."""
        try:
            with self.current.watch("protect"):
                shell.stage, found = site.step(shell.member, shell.stage, event, self.parties.now)
            for effect in found:
                self._site_effect(shell, effect)
        except PeerRefused as error:
            if isinstance(event, site.Invited):
                self.current.failure = self.current.failure or error
                self._site_step(shell, site.Declined(event.announce.header))
            else:
                self._leave(shell, error)

    def _leave(self, shell: SiteDriver, error: Exception) -> None:
        """A check failed at this site: it leaves the round; the error is raised once the round is over."""
        self.current.failure = self.current.failure or error
        stage, me = shell.stage, shell.member
        if isinstance(stage, site.InRound):
            sealed = shell.secrets.seal_cause(error, stage.header, me.id, me.entropy)
            self._site_step(shell, site.CheckFailed(error, sealed))

    def _site_effect(self, shell: SiteDriver, effect: site.SiteEffect) -> None:
        match effect:
            case effects.Persist(record=record):
                shell.journal.append(record)
            case effects.Send(message=message):
                self._post(message)
            case effects.MakeVector():
                self.making[effect.header.place(shell.member.id)] = shell, effect
            case effects.Upload(submit=submit):
                self.hub.arrived[submit.site] = shell.spool
                self._uploaded(submit.site)
            case effects.OpenSum():
                self._open(shell, effect)
            case effects.Apply():
                pass  # `sum` gives its caller the sum, which makes the state of it
            case effects.Erase():
                shell.spool = []
            case effects.Warn(text=text):
                self.parties.warnings.append(f"{shell.member.id}: {text}")
            case effects.ShowNotice(notice=notice):
                self.parties.warnings.append(f"{notice.site}: {shell.secrets.read_notice(notice)}")
            case _:
                assert_never(effect)

    def _open(self, shell: SiteDriver, asked: effects.OpenSum) -> None:
        """Open a sum; whatever fails in it is the one uniform refusal (PROTOCOL R, U)."""
        try:
            opened = shell.open_sum(asked, self.current, self.hub.released)
        except Exception as error:  # noqa: BLE001 - raised again once the round is over
            self._leave(shell, error)
        else:
            self._site_step(shell, opened)

    def _to_hub(self, message: messages.SiteMessage) -> None:
        if isinstance(message, messages.Submit):
            self.hub.submits[message.site] = message
            self._uploaded(message.site)
        else:
            self._hub_step(coordinator.MessageFromSite(message.site, message))

    def _uploaded(self, name: SiteId) -> None:
        """Signed submission and chunks are both there."""
        hub = self.hub
        if name in hub.submits and name in hub.arrived:
            chunks, submit = hub.arrived[name], hub.submits[name]
            size = sum(map(len, chunks))
            self._hub_step(coordinator.Uploaded(name, submit, vector_digest(chunks), size))

    def _hub_step(self, event: coordinator.CoordinatorEvent) -> None:
        hub = self.hub
        with self.current.watch("fold"):
            try:
                hub.stage, found = coordinator.step(hub.hub, hub.stage, event, self.parties.now)
            except PeerRefused as error:
                self.current.failure = self.current.failure or error
                return
        for effect in found:
            match effect:
                case effects.Persist(record=record):
                    hub.journal.append(record)
                case effects.Send(to=to, message=message):
                    self._post_to(self.parties.shells[SiteId(to)], message)
                case effects.FoldUpload(submit=submit):
                    self._fold(submit.site)
                case effects.Rebuild(submissions=submissions):
                    hub.fold = hub.scheme.fold(self.current.layout.slots)
                    for submit in submissions:
                        self._fold(submit.site)
                case effects.Warn(text=text):
                    self.parties.warnings.append(f"{messages.COORDINATOR}: {text}")
                case effects.RemoveMasks():
                    if not hub.scheme.plan.layers.masks:
                        self._miss_the_sum()
                    self._hub_step(hub.remove_masks(effect, self.current))
                case effects.Discard():
                    pass  # `end` does
                case _:
                    assert_never(effect)

    def _miss_the_sum(self) -> None:
        """`encrypted` has no list to confirm: who is absent from `confirm` on has left when the sum is
        announced."""
        for name, stage in self.current.absences.items():
            if stage == "confirm":
                self._hub_step(coordinator.Gone(SiteId(name)))

    def _fold(self, name: SiteId) -> None:
        hub = self.hub
        assert hub.fold is not None
        with self.current.watch("fold"):
            for place, chunk in enumerate(hub.arrived[name]):
                hub.fold.add(place, chunk)

    def end(self) -> None:
        """Whoever still waits hears nothing more of this round and leaves it; so does everybody when
        the round broke off with an error."""
        hub = self.hub
        for shell in self.parties.shells.values():
            if isinstance(hub.stage, coordinator.InRound):
                gone = coordinator.Gone(shell.member.id, for_good=True)
                hub.stage, _ = coordinator.step(hub.hub, hub.stage, gone, self.parties.now)
            if isinstance(shell.stage, site.IN_ROUND):
                over = site.Superseded()
                shell.stage, _ = site.step(shell.member, shell.stage, over, self.parties.now)
            shell.spool = []
        hub.fold, hub.released, hub.arrived = None, [], {}
