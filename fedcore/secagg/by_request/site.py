"""A site that lives for one request at a time: read from its memory, stepped, written back.

The memory has the stages of both machines whole, not the records that led to them, so that a secret is gone from
it once the machine has dropped it. Invariant (PROTOCOL D): an engine may lose the memory, or keep an older one, but
the count of replies is on disk before a reply leaves: a site whose memory is not the one of its last reply takes no
further part in the run.

The rules are those of `protocol/round/site` and `protocol/epoch`. Only requests move a site: it has no clock.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

from fedcore.errors import (
    BadInput,
    DataLost,
    FedcoreError,
    PeerRefused,
    PolicyRefused,
    ReleaseRefused,
    with_hint,
)
from fedcore.secagg.by_request.requests import Request, SiteReply
from fedcore.secagg.by_request.terms import RunState, RunTerms, Trained, sum_to_bytes
from fedcore.secagg.crypto.entropy import Entropy, OsEntropy
from fedcore.secagg.crypto.identity_key import IdentityKey
from fedcore.secagg.crypto.secret import SecretBytes
from fedcore.secagg.plan import canonical
from fedcore.secagg.protocol import effects, epoch, messages, schedule
from fedcore.secagg.protocol.messages import COORDINATOR
from fedcore.secagg.protocol.round import site
from fedcore.secagg.protocol.wire_form import decode, encode
from fedcore.secagg.scheme import EpochSecrets, Scheme, check_announced, layout_of
from fedcore.store import container
from fedcore.types import SiteId
from fedcore.wire.frames import Record
from fedcore.wire.records import FROM_COORDINATOR, unpack_record

LOG = logging.getLogger("fedcore.site")

Train = Callable[[], Trained]
"""The training function of a round: from what the request carries to an update."""

Incoming = messages.CoordinatorMessage | epoch.CoordinatorEpochMessage

WITHHELD = "it cannot take part"
"""What other sites read of a training function that failed: its text may name rows."""


@dataclass(frozen=True)
class Membership:
    """Who this site is, and what its operator allows. pins: {site: public identity key}, in the roster's order.

    protections: names of those it takes part under. minimum: the fewest sites of a sum with its vector.
    """

    federation: str
    site: SiteId
    identity: IdentityKey
    pins: Mapping[SiteId, bytes]
    protections: tuple[str, ...] = ("layered", "masked")
    minimum: int = 3

    def check(self, terms: RunTerms) -> None:
        """Raise PolicyRefused for terms that this site takes no part under."""
        plan = terms.plan
        for what, found, expected in (
            ("federation", terms.federation, self.federation),
            ("sites", ", ".join(plan.sites), ", ".join(self.pins)),
        ):
            if found != expected:
                raise _policy(what, found, expected)
        if plan.protection not in self.protections:
            raise _policy("protection", plan.protection, " or ".join(self.protections))
        if plan.threshold < self.minimum:
            raise _policy("threshold", str(plan.threshold), f"at least {self.minimum}")


def _policy(what: str, found: str, expected: str) -> PolicyRefused:
    remedy = "the file of this site's identity says what it allows"
    return PolicyRefused(
        f"{what}: found {found}, expected {expected}", word="policy", remedy=remedy
    )


class ReplyCount(Protocol):
    """How many requests of this run the site has answered, on disk."""

    def count(self) -> int:
        """0 before the first. Raises FedcoreError."""

    def write(self, count: int) -> None:
        """Flushed to disk when it returns. Raises FedcoreError."""


class SiteByRequest:
    """One site in one run. job: the run's name, as the engine knows it. memory: {name: bytes} that lasts from one
    request to the next, and never leaves this site. answered: the count of replies, on a disk of the site.
    """

    def __init__(
        self,
        job: str,
        about: Membership,
        memory: MutableMapping[str, bytes],
        train: Train,
        answered: ReplyCount,
        entropy: Entropy | None = None,
    ) -> None:
        self.job, self.about, self.memory, self.train = job, about, memory, train
        self.answered = answered
        self.entropy = entropy or OsEntropy()
        self.request, self.reply = Request(), SiteReply()

    def answer(self, request: Request) -> SiteReply:
        """The one reply to one request. Never raises what the other side is at fault for."""
        self.request, self.reply = request, SiteReply()
        try:
            count = int(self.memory.get("answered", b"0"))
            if self.answered.count() != count:
                raise DataLost(
                    f"run {self.job}: this site's memory is not that of its last reply; it takes no further part",
                    remedy="the run goes on without it; it takes part in the next one",
                )
            self._agree(request)
            self._read()
        except FedcoreError as error:
            self._refuse(error)
            return self.reply
        try:
            for data in request.messages:
                record = Record(self.terms.job, data)
                self._take(unpack_record(record, FROM_COORDINATOR, sender=COORDINATOR))
        except FedcoreError as error:
            self._refuse(error)
        self.memory["stage"], self.memory["epoch"] = encode(self.stage), encode(self.epoch)
        self.answered.write(count + 1)
        self.memory["answered"] = str(count + 1).encode()
        return self.reply

    def _refuse(self, error: FedcoreError) -> None:
        self.reply.refused = f"site {self.about.site}: {with_hint(error)}"
        LOG.warning("%s", self.reply.refused)

    def _agree(self, request: Request) -> None:
        """The terms count once, at the first request."""
        known = self.memory.get("terms")
        if known is not None:
            if request.terms not in {b"", known}:
                raise PolicyRefused(
                    "terms of the run: found others than at its beginning, expected the same",
                    word="policy",
                    remedy="start a new run for other terms",
                )
            return
        terms = RunTerms.from_bytes(request.terms)
        self.about.check(terms)
        if terms.job != self.job:
            raise BadInput(f"run: found the terms of {terms.job!r}, expected those of {self.job!r}")
        self.memory["terms"] = request.terms
        self.memory["state"] = RunState.initial(terms.plan).canonical()

    def _read(self) -> None:
        self.terms = RunTerms.from_bytes(self.memory["terms"])
        self.member = site.SiteParams(
            self.about.site, self.about.identity, self.about.pins, self.terms.plan,
            self.terms.federation, self.terms.job, self.entropy, self.about.minimum,
        )  # fmt: skip
        none, no_key = site.Idle(site.SiteProgress(0, b"")), epoch.NoKey()
        stage = decode(self.memory["stage"], object) if "stage" in self.memory else none
        keys = decode(self.memory["epoch"], object) if "epoch" in self.memory else no_key
        assert isinstance(stage, site.SiteStage)
        assert isinstance(keys, epoch.SiteEpochStage)
        self.stage: site.SiteStage = stage
        self.epoch: epoch.SiteEpochStage = keys
        self.state = RunState.from_bytes(self.memory["state"])
        self.__dict__.pop("secrets", None)

    @cached_property
    def secrets(self) -> EpochSecrets | None:
        """Of the key epoch that this site holds."""
        if not isinstance(self.epoch, epoch.Holding):
            return None
        scheme = Scheme.of(self.terms.plan)
        return scheme.open_payload(self.epoch.payload.reveal(), self.epoch.header.maker)

    def _held(self) -> EpochSecrets:
        if self.secrets is None:
            raise BadInput(
                "round: found no key epoch at this site, expected one before the first round"
            )
        return self.secrets

    def _say(self, message: messages.SiteMessage | epoch.SiteEpochMessage) -> None:
        self.reply.messages.append(encode(message))

    def _take(self, message: Incoming) -> None:
        match message:
            case messages.Announce():
                self._invited(message)
            case messages.Certificate():
                self._certified(message)
            case epoch.EpochCall() | epoch.EpochKeys() | epoch.Granted() | epoch.GrantRequest():
                self._step_epoch(epoch.FromCoordinator(message))
            case _:
                self._step(site.MessageFromCoordinator(message))

    # ------------------------------------------------------------------------------ key epochs

    def _step_epoch(self, event: epoch.SiteEpochEvent) -> None:
        self.epoch, found = epoch.step_site(self.member, self.epoch, event)
        for effect in found:
            match effect:
                case effects.Persist():
                    pass  # the stage is written whole, with the reply
                case effects.Send(message=message):
                    self._say(message)
                case epoch.MakeSecrets():
                    made = Scheme.of(self.terms.plan).make_payload()
                    self._step_epoch(epoch.SecretsMade(SecretBytes(made)))
                case epoch.Install(number, key_id):
                    self.__dict__.pop("secrets", None)
                    new = site.NewEpoch(number, key_id)
                    self.stage, _ = site.step(self.member, self.stage, new, 0.0)

    # ------------------------------------------------------------------------------ rounds

    def _invited(self, announce: messages.Announce) -> None:
        header, request = announce.header, self.request
        try:
            self._catch_up()
            if isinstance(self.stage, site.Waiting) and header.round > self.stage.header.round:
                self._step(site.Superseded())
            if len(request.model) != 32:
                raise BadInput("round: found no digest of the model, expected 32 bytes")
            if isinstance(self.stage, site.Idle):
                schedule.check_step(self.terms.plan, 0, self.state.step, header)
            tag = self._held().tag(header, self.state.canonical() + request.model)
            self.stage, found = site.step(self.member, self.stage, site.Invited(announce, tag), 0.0)
            self.memory["model"] = request.model
            self._carry_out(found)
        except FedcoreError as error:
            self._note(error)
            if isinstance(self.stage, site.BETWEEN):
                self._step(site.Declined(header))
            else:
                self._say(messages.Leave(header.digest, self.about.site, messages.LEFT))

    def _catch_up(self) -> None:
        """Take over the last release, if this site missed it: its certificate proves the state that came with it."""
        if not self.request.certificate:
            return
        found = decode(self.request.certificate, messages.Certificate, sender=COORDINATOR)
        if found.hash == self.stage.standing.certificate:
            return
        if (
            not isinstance(self.stage, site.Idle | site.Halted)
            and self.stage.header == found.header
        ):
            self._step(site.Superseded())
        site.check_missed(self.member, self.stage.standing, found)
        state = RunState.from_bytes(self.request.state)
        mac = self._held().state_mac(found.header, self.request.state)
        caught_up = site.CaughtUp(found, mac)
        self.stage, what_follows = site.step(self.member, self.stage, caught_up, 0.0)
        self._hold(state, b"")
        self._carry_out(what_follows)

    def _certified(self, certificate: messages.Certificate) -> None:
        """Apply a release; then say which state it led to, and give the sum where that is asked."""
        self._step(site.MessageFromCoordinator(certificate))
        if self.stage.standing.certificate != certificate.hash:
            return
        self.reply.state = hashlib.sha256(self.state.canonical()).digest()
        if self.request.give:
            self.reply.body = self.memory.get("sum", b"")

    def _step(self, event: site.SiteEvent) -> None:
        """Step the round's machine; what it refuses makes this site leave the round."""
        try:
            self.stage, found = site.step(self.member, self.stage, event, 0.0)
        except PeerRefused as error:
            if isinstance(self.stage, site.BETWEEN):
                raise
            self._leave(error, str(error))
            return
        self._carry_out(found)

    def _leave(self, error: Exception, told: str) -> None:
        """A check failed. told: what the other sites read of it, sealed."""
        self._note(error)
        assert not isinstance(self.stage, site.Idle | site.Halted)
        sealed = self._held().seal_cause(told, self.stage.header, self.about.site, self.entropy)
        failed = site.CheckFailed(error, sealed)
        self.stage, found = site.step(self.member, self.stage, failed, 0.0)
        self._carry_out(found)

    def _note(self, error: Exception) -> None:
        """Into this site's own log; an error of the training function with its traceback, from its first frame on."""
        if isinstance(error, FedcoreError):
            LOG.warning("site %s: %s", self.about.site, with_hint(error))
            return
        trace = error.__traceback__
        while trace and trace.tb_frame.f_globals.get("__name__", "").startswith("fedcore"):
            trace = trace.tb_next
        info = type(error), error, trace
        LOG.warning("site %s: %s: %s", self.about.site, type(error).__name__, error, exc_info=info)

    def _carry_out(self, found: tuple[site.SiteEffect, ...]) -> None:
        for effect in found:
            match effect:
                case effects.Send(message=message):
                    self._say(message)
                case effects.MakeVector():
                    self._make_vector(effect)
                case effects.OpenSum():
                    self._open_sum(effect)
                case effects.Apply(certificate):
                    self._apply(certificate)
                case effects.Erase():
                    for name in ("marks", "model"):
                        self.memory.pop(name, None)
                case effects.Warn(text):
                    LOG.warning("site %s: %s", self.about.site, text)
                case effects.ShowNotice(notice):
                    cause = self._held().read_notice(notice)
                    LOG.warning("site %s refused: %s", notice.site, cause)
                case effects.Persist() | effects.Upload():
                    pass  # the stage is written whole; the vector is in the reply already

    def _make_vector(self, asked: effects.MakeVector) -> None:
        """Train; then quantise, pack, tag, mask and encrypt into the reply. Every failure looks alike from outside."""
        header, terms, secrets = asked.header, self.terms, self._held()
        try:
            if self.request.model != self.memory["model"]:
                raise ReleaseRefused(
                    "model",
                    "another than the one that the round began with",
                    "the same",
                    COORDINATOR,
                )
            content = terms.contribution(self.state, header, self.about.site, self.train())
            layout = layout_of(terms.plan, 0, header.purpose)
            self.memory["marks"] = canonical(layout.own_marks(content[1]))
            slots = layout.pack(*content, header.place(self.about.site))
            secrets.put_tag(slots, layout, asked, self.about.site)
            chunks, salt = secrets.protect(slots, layout, asked, self.about.site, self.entropy)
        except Exception as error:  # noqa: BLE001 - it is the user's function
            self._leave(error, str(error) if isinstance(error, PeerRefused) else WITHHELD)
            return
        self.reply.body = container.to_bytes(chunks)
        size = sum(map(len, chunks))
        self._step(site.VectorMade(container.vector_digest(chunks), size, salt))

    def _open_sum(self, asked: effects.OpenSum) -> None:
        """Decrypt, check the tag, find the next state. Whatever fails in it is one refusal (PROTOCOL R)."""
        header, secrets, plan = asked.header, self._held(), self.terms.plan
        try:
            chunks = container.from_bytes(self.request.body)
            check_announced(chunks, asked)
            layout = layout_of(plan, 0, header.purpose)
            total, opened = secrets.open(chunks, layout, asked)
            layout.check_own(
                opened, json.loads(self.memory["marks"]), header.place(self.about.site)
            )
            state, _ = self.state.after(plan, header, opened, asked.survivors)
        except Exception as error:  # noqa: BLE001 - one uniform refusal
            self._leave(error, str(error))
            return
        self._hold(state, sum_to_bytes(opened))
        macs = secrets.sum_mac(header, total), secrets.state_mac(header, state.canonical())
        self._step(site.SumOpened(*macs))

    def _hold(self, state: RunState, data: bytes) -> None:
        """Keep a state that no certificate is of yet, and the sum it comes from."""
        self.memory["next"], self.memory["next sum"] = state.canonical(), data

    def _apply(self, certificate: messages.Certificate) -> None:
        """Make the certified state this site's own: its HMAC is computed again."""
        state = self.memory.pop("next")
        if self._held().state_mac(certificate.header, state) != certificate.state_mac:
            raise ReleaseRefused("state", "another one", "the certified one", COORDINATOR)
        self.memory["state"], self.memory["sum"] = state, self.memory.pop("next sum")
        self.state = RunState.from_bytes(state)
