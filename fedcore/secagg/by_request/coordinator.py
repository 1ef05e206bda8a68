"""The coordinator of a run whose engine takes requests and gives replies: key epochs and rounds, one after another.

A stage is one batch of requests. Replies are taken one by one, as they come, so one vector is in memory at a time;
uploads lie in a folder until their round is over. A site that does not answer in its stage is gone for it, and a
round goes on without it where at least t answered. Where the sites may have opened a sum already, they are asked
again a few times; then the run ends, because no other round may follow from that state (PROTOCOL H).

The rules are those of `protocol/round/coordinator` and `protocol/epoch`; the vector of a site is never opened here.
"""

from __future__ import annotations

import hashlib
import logging
import tempfile
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from fedcore.errors import (
    Abandoned,
    BadInput,
    ChunkRefused,
    FedcoreError,
    PeerRefused,
    Refused,
    RoundAbandoned,
    printable,
)
from fedcore.secagg.by_request.requests import Link, Request, SiteReply
from fedcore.secagg.by_request.terms import RunState, RunTerms, sum_from_bytes
from fedcore.secagg.crypto.identity_key import roster_digest
from fedcore.secagg.crypto.masking import mask_sum
from fedcore.secagg.encode.pack import Opened
from fedcore.secagg.plan import RoundHeader
from fedcore.secagg.protocol import effects, epoch, messages
from fedcore.secagg.protocol.moves import Tick
from fedcore.secagg.protocol.round import coordinator
from fedcore.secagg.protocol.schedule import PlannedRound
from fedcore.secagg.protocol.wire_form import encode
from fedcore.secagg.scheme import Scheme, layout_of, revealed
from fedcore.store import container
from fedcore.types import SiteId, WideVector
from fedcore.wire.frames import Record
from fedcore.wire.records import FROM_SITES, unpack_record

LOG = logging.getLogger("fedcore.coordinator")

ATTEMPTS = 3
"""How often the sites of an exposed stage are asked, and a key epoch is called."""

Outgoing = messages.CoordinatorMessage | epoch.CoordinatorEpochMessage


@dataclass(frozen=True)
class ReleasedRound:
    """One released round. mean: (d,) float64, the weighted mean update; empty where the round measured the range.
    upload_bytes: of one site's protected vector."""

    step: PlannedRound
    survivors: tuple[SiteId, ...]
    mean: WideVector
    opened: Opened
    upload_bytes: int


class Uploads:
    """The vectors of one round: in a folder, and in one running sum. sum: the container of the sum without masks."""

    def __init__(self, folder: Path, scheme: Scheme, slots: int, header: RoundHeader) -> None:
        self._folder, self._scheme, self._slots, self._header = folder, scheme, slots, header
        self._fold = scheme.fold(slots)
        self._folded: list[SiteId] | None = []
        """None: the running sum has a part of a vector that was refused, and is made again."""
        self.sum = b""

    def add(self, site: SiteId, body: bytes, chunks: Sequence[bytes]) -> None:
        """Keep a vector and fold it. Raises ChunkRefused."""
        (self._folder / str(self._header.place(site))).write_bytes(body)
        try:
            self._take(chunks)
        except ChunkRefused:
            self._folded = None
            raise
        if self._folded is not None:
            self._folded.append(site)

    def _take(self, chunks: Sequence[bytes]) -> None:
        for place, chunk in enumerate(chunks):
            self._fold.add(place, chunk)

    def total(self, asked: effects.RemoveMasks) -> coordinator.SumReady:
        """The sum of exactly these sites' vectors, with the masks taken off."""
        if self._folded is None or set(self._folded) != set(asked.survivors):
            self._fold = self._scheme.fold(self._slots)
            for site in asked.survivors:
                path = self._folder / str(self._header.place(site))
                self._take(container.from_bytes(path.read_bytes()))
        masks = revealed(asked.masks)
        if masks:
            bits = self._scheme.plan.packing.slot_bits
            self._fold.remove(mask_sum(masks, self._slots, bits))
        chunks = list(self._fold.total())
        self.sum = container.to_bytes(chunks)
        return coordinator.SumReady(container.vector_digest(chunks), sum(map(len, chunks)))


class CoordinatorByRequest:
    """One run. pins: {site: public identity key}, in the roster's order."""

    def __init__(self, terms: RunTerms, pins: Mapping[SiteId, bytes], link: Link) -> None:
        self.terms, self.pins, self.link = terms, pins, link
        self.params = coordinator.CoordinatorParams(pins)
        self.scheme = Scheme.of(terms.plan)
        self.epoch: epoch.CoordinatorEpochStage = epoch.NoEpoch()
        self.stage: coordinator.CoordinatorStage = coordinator.Ready()
        self.state = RunState.initial(terms.plan)
        self.certificate: messages.Certificate | None = None
        self.nodes: dict[SiteId, Hashable] = {}
        """Where each site is: learnt from an epoch key under its pinned signature."""
        self._now = 0.0
        self._outbox: dict[SiteId, list[Outgoing]] = {}
        self._notices: dict[SiteId, list[Outgoing]] = {}
        self._given: dict[SiteId, SiteReply] = {}
        self._start: tuple[bytes, object] = b"", None
        """What the round is trained from: its digest, and what carries it."""
        self._uploads: Uploads | None = None

    # -------------------------------------------------------------------------------- key epochs

    def begin(self) -> None:
        """The sites' key epoch. Raises Refused where too few of them take part, with what they said."""
        plan = self.terms.plan
        header = epoch.EpochHeader(
            self.terms.federation, self.terms.job, self.epoch.epoch + 1, plan.sites,
            roster_digest(self.pins), plan.threshold, plan.digest, plan.sites[0],
        )  # fmt: skip
        self.epoch, _ = epoch.step_hub(self.params, self.epoch, epoch.StartEpoch(header), self._now)
        refusals = self._call()
        for _ in range(ATTEMPTS):
            self._exchange()
            if isinstance(self.epoch, epoch.Spreading):
                break
            self._now = getattr(self.epoch, "until", self._now)
            try:
                self._step_epoch(Tick())
            except PeerRefused as error:
                raise self._too_few(refusals, str(error)) from error
        if len(self._holders) < plan.threshold:
            raise self._too_few(
                refusals, f"key epoch: found {len(self._holders)} sites with its key"
            )

    def _too_few(self, refusals: list[str], otherwise: str) -> Refused:
        sites = (
            f"expected at least {self.terms.plan.threshold} of {len(self.pins)} sites to take part"
        )
        said = "; ".join(dict.fromkeys(refusals)) or otherwise
        remedy = "set these nodes up as docs/flower.md says, and start the run again"
        return Refused(f"run {self.terms.job}: {sites}, found: {said}", remedy=remedy)

    def _call(self) -> list[str]:
        """Call the nodes that are no known site to the key epoch; the lines of those that refuse."""
        assert isinstance(self.epoch, epoch.InEpoch)
        call = epoch.EpochCall(self.epoch.header)
        request = Request(terms=self.terms.to_bytes(), messages=[encode(call)])
        known, refusals = set(self.nodes.values()), []
        asked = {node: request for node in self.link.nodes() if node not in known}
        for node, reply in self.link.ask(asked):
            if reply is not None and reply.refused:
                refusals.append(printable(reply.refused))
                LOG.warning("%s", refusals[-1])
            elif reply is not None:
                self._meet(node, reply)
        return refusals

    def _meet(self, node: Hashable, reply: SiteReply) -> None:
        """A node is the site whose epoch key it sends, once the signature of that key holds."""
        for data in reply.messages:
            try:
                message = self._message(data, "a node")
                if isinstance(message, epoch.EpochKey):
                    self._step_epoch(epoch.FromSite(message.site, message))
                    self.nodes.setdefault(message.site, node)
            except PeerRefused as error:
                LOG.warning("a node that is no site of this run: %s", error)

    def _message(self, data: bytes, sender: str) -> messages.SiteMessage | epoch.SiteEpochMessage:
        record = Record(self.terms.job, data)
        return unpack_record(record, FROM_SITES, sender=sender, sites=len(self.pins))

    @property
    def _holders(self) -> tuple[SiteId, ...]:
        return self.epoch.holders if isinstance(self.epoch, epoch.Spreading) else ()

    def _step_epoch(self, event: epoch.CoordinatorEpochEvent) -> None:
        self.epoch, found = epoch.step_hub(self.params, self.epoch, event, self._now)
        for effect in found:
            if isinstance(effect, effects.Send):
                self._send(SiteId(effect.to), effect.message)

    # -------------------------------------------------------------------------------- exchanges

    def _send(self, site: SiteId, message: Outgoing) -> None:
        """With the next batch; a notice waits for a message that has an answer."""
        box = self._notices if isinstance(message, messages.Notice) else self._outbox
        box.setdefault(site, []).append(message)

    def _request(self, site: SiteId, sent: list[Outgoing]) -> Request:
        several = [*self._notices.pop(site, []), *sent]
        request = Request(messages=[encode(each) for each in several])
        for each in sent:
            match each:
                case messages.Announce():
                    last = encode(self.certificate) if self.certificate else b""
                    state = self.state.canonical() if last else b""
                    request = replace(request, model=self._start[0], certificate=last, state=state)
                case messages.Delivery():
                    request = replace(request, training=self._start[1])
                case messages.Aggregate():
                    request = replace(request, body=self._vectors.sum)
                case messages.Certificate(survivors=survivors):
                    request = replace(request, give=site == survivors[0])
        return request

    def _exchange(self) -> None:
        """Batches of requests, until no site has anything to be asked."""
        attempts = 0
        while self._outbox:
            batch, exposed = self._outbox, isinstance(self.stage, coordinator.stages.EXPOSED)
            requests = {
                self.nodes[site]: self._request(site, sent)
                for site, sent in batch.items()
                if site in self.nodes
            }
            self._outbox = {}
            sites = {node: site for site, node in self.nodes.items()}
            for node, reply in self.link.ask(requests):
                if reply is not None:
                    self._answered(sites[node], reply)
            attempts = attempts + 1 if exposed else 0
            self._without_the_silent(last=attempts >= ATTEMPTS)

    def _without_the_silent(self, *, last: bool) -> None:
        """Who is waited for and has nothing to answer is gone for this stage. last: for good."""
        while waited := [s for s in coordinator.waiting_for(self.stage) if s not in self._outbox]:
            before = self.stage
            for site in waited:
                if isinstance(self.stage, coordinator.InRound):
                    self._step(coordinator.Gone(site, for_good=last))
            if self.stage is before or coordinator.waiting_for(self.stage) == tuple(waited):
                for site in waited:  # an exposed stage needs them: ask once more
                    self._step(coordinator.SiteReconnected(site))
                return

    def _answered(self, site: SiteId, reply: SiteReply) -> None:
        if reply.refused:
            LOG.warning("%s", printable(reply.refused))
        if reply.state:
            self._given[site] = reply
        for data in reply.messages:
            try:
                message = self._message(data, site)
                if isinstance(message, messages.Submit):
                    self._uploaded(site, message, reply.body)
                elif isinstance(message, messages.SiteMessage):
                    if isinstance(self.stage, coordinator.InRound):
                        self._step(coordinator.MessageFromSite(site, message))
                else:
                    self._step_epoch(epoch.FromSite(site, message))
            except PeerRefused as error:
                LOG.warning("site %s: %s", site, error)
                if isinstance(self.stage, coordinator.InRound):
                    self._step(coordinator.Gone(site, for_good=True))

    # -------------------------------------------------------------------------------- rounds

    def round(self, step: PlannedRound, model: bytes, training: object) -> ReleasedRound:
        """One round, from its announcement to its release. model: 32-byte digest of what is trained from, which
        `training` carries there.

        Raises RoundAbandoned where too few sites answered and nothing was opened, and Abandoned where no other
        round may follow.
        """
        self._call()
        self._exchange()
        self._start, self._given = (model, training), {}
        header = self._header(step)
        layout = layout_of(self.terms.plan, 0, step.purpose)
        size = self.scheme.upload_bytes(layout)
        with tempfile.TemporaryDirectory(prefix="fedcore-round-") as folder:
            self._uploads = Uploads(Path(folder), self.scheme, layout.slots, header)
            self._step(coordinator.Start(header, size, self.terms.plan.salt_bytes))
            self._exchange()
        self._uploads = None
        ended = self.stage
        if isinstance(ended, coordinator.Failed):
            if ended.exposed:
                raise Abandoned(
                    f"round {header.training_round}: its sum may be known and cannot be released; no other "
                    "round may follow from the same model",
                    remedy="start a new run; see which sites stopped answering",
                )
            raise RoundAbandoned(ended.stage, ended.left, header.threshold)
        assert isinstance(ended, coordinator.Released)
        released = self._released(ended.certificate, size)
        if ended.refused:
            raise Abandoned(
                f"round {header.training_round}: release refused by {', '.join(ended.refused)}",
                remedy="the logs of these sites say why",
            )
        return released

    def _header(self, step: PlannedRound) -> RoundHeader:
        plan, there = self.terms.plan, set(self.link.nodes())
        cohort = tuple(s for s in plan.sites if s in self._holders and self.nodes[s] in there)
        if len(cohort) < plan.threshold:
            raise RoundAbandoned("keys", len(cohort), plan.threshold)
        assert isinstance(self.stage, coordinator.Between)
        return RoundHeader(
            self.terms.federation, self.terms.job, self.epoch.epoch, self.stage.round + 1,
            step.training_round, step.purpose, cohort, roster_digest(self.pins), plan.threshold,
            plan.protection, plan.digest, self.certificate.hash if self.certificate else "",
        )  # fmt: skip

    def _step(self, event: coordinator.CoordinatorEvent) -> None:
        self.stage, found = coordinator.step(self.params, self.stage, event, self._now)
        for effect in found:
            match effect:
                case effects.Send(to=to, message=message):
                    self._send(SiteId(to), message)
                case effects.RemoveMasks():
                    self._step(self._vectors.total(effect))
                case effects.Warn(text=text):
                    LOG.warning("%s", text)

    def _uploaded(self, site: SiteId, submit: messages.Submit, body: bytes) -> None:
        """Fold a whole vector of the announced digest; then it counts."""
        try:
            chunks = container.from_bytes(body)
        except BadInput as error:
            raise ChunkRefused(f"vector of site {site}: {error}") from error
        size = sum(map(len, chunks))
        event = coordinator.Uploaded(site, submit, container.vector_digest(chunks), size)
        after, _ = coordinator.step(self.params, self.stage, event, self._now)
        if after is self.stage:  # it came before
            return
        self._vectors.add(site, body, chunks)
        self._step(event)

    @property
    def _vectors(self) -> Uploads:
        assert self._uploads is not None
        return self._uploads

    # -------------------------------------------------------------------------------- releases

    def _released(self, certificate: messages.Certificate, size: int) -> ReleasedRound:
        """The released sum, as one site gives it: the state it leads to must be that of at least t sites."""
        header, plan = certificate.header, self.terms.plan
        for giver in certificate.survivors:
            if giver not in self._given or not self._given[giver].body:
                self._ask_for_the_sum(certificate, giver)
            given = self._given.get(giver)
            if given is None or not given.body:
                continue
            claims = Counter(r.state for s, r in self._given.items() if s in certificate.survivors)
            try:
                opened = sum_from_bytes(given.body, plan, header.purpose)
                state, mean = self.state.after(plan, header, opened, certificate.survivors)
            except FedcoreError as error:
                LOG.warning("site %s: the sum that it gave: %s", giver, error)
                continue
            if claims[hashlib.sha256(state.canonical()).digest()] >= plan.threshold:
                self.state, self.certificate = state, certificate
                step = PlannedRound(header.purpose, header.training_round)
                mean = mean if len(opened.coordinates) else mean[:0]
                return ReleasedRound(step, certificate.survivors, mean, opened, size)
        raise Abandoned(
            f"round {header.training_round}: found no sum that at least {plan.threshold} sites agree on, "
            "expected the released one",
            remedy="the logs of the sites say what they found",
        )

    def _ask_for_the_sum(self, certificate: messages.Certificate, giver: SiteId) -> None:
        """Ask the giver for the sum, and with it the survivors that have not said their state."""
        request = Request(messages=[encode(certificate)])
        silent = {s for s in certificate.survivors if s not in self._given}
        asked = {self.nodes[s]: replace(request, give=s == giver) for s in silent | {giver}}
        sites = {node: site for site, node in self.nodes.items()}
        for node, reply in self.link.ask(asked):
            if reply is not None and reply.state:
                self._given[sites[node]] = reply
