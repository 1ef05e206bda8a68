"""Honest sites, each the real machine with a real identity, and a coordinator that does as a test says.

`World` keeps a stage for every site and everything they sent; its methods are the coordinator's moves,
honest by default. Vectors are real: packed by `Layout`, tagged, masked; so a test can say what a
coordinator would have read. No message here passes through a coordinator machine.
"""

from __future__ import annotations

from copy import copy
from dataclasses import fields, is_dataclass, replace
from functools import cache

import numpy as np
import pytest
from support.plans import round_plan

from fedcore.secagg.crypto import shamir
from fedcore.secagg.crypto.entropy import OsEntropy
from fedcore.secagg.crypto.identity_key import IdentityKey, roster_digest
from fedcore.secagg.crypto.masking import add_masks, mask_sum
from fedcore.secagg.crypto.pairwise import (
    MaskRoot,
    open_offer,
    pair_secret,
    pair_seed,
    self_mask_seed,
)
from fedcore.secagg.crypto.secret import SecretBytes
from fedcore.secagg.crypto.sumtag import GroupSecret, SumTag, key_id, state_tag
from fedcore.secagg.encode.pack import Layout
from fedcore.secagg.plan import (
    RoundHeader,
    VectorSpec,
    Wide,
)
from fedcore.secagg.protocol import effects
from fedcore.secagg.protocol.messages import (
    COORDINATOR,
    LEFT,
    RELEASE_REFUSED,
    SELF_SEED,
    Aggregate,
    Announce,
    Certificate,
    Confirmations,
    Delivery,
    KeyBundle,
    Leave,
    Shares,
    SharesHead,
    SurvivorList,
    sign,
)
from fedcore.secagg.protocol.round import coordinator, site
from fedcore.secagg.protocol.round.site import SiteProgress
from fedcore.secagg.protocol.wire_form import digest, encode

NAMES = (
    "ann", "bob", "cat", "dan", "eve", "fay", "gus", "hal",
    "ida", "jim", "kay", "leo", "mia", "ned", "ola", "pam",
)  # fmt: skip
SPEC = VectorSpec("update", 12, (Wide("weight", 1, 12),))
STATE = b"the model everybody starts from"
STAGES = ("idle", "keys", "shares", "submit", "confirm", "unmask", "open", "state")


class World:
    """n honest sites; `stages`, and by site what each sent: keys, shares, submits, confirms, answers,
    statements; `plain` and `masked` are their slots before and after the masks."""

    def __init__(self, n=5, threshold=0, protection="masked", cipher="bfv"):
        self.roster = NAMES[:n]
        self.plan = round_plan(
            self.roster, protection, cipher=cipher, parameters=SPEC.coordinates, most=max(8, n),
            max_examples=1000, threshold=threshold,
        )  # fmt: skip
        self.identities = {name: IdentityKey() for name in self.roster}
        self.pins = {name: key.public for name, key in self.identities.items()}
        self.group = GroupSecret()
        self.key_id = key_id(self.group.to_bytes())
        self.layout = Layout(SPEC, self.plan.packing, max(8, n))
        self.members = {
            name: site.SiteParams(
                name, self.identities[name], self.pins, self.plan, "clinics", "job", OsEntropy()
            )
            for name in self.roster
        }
        self.stages = {name: site.Idle(SiteProgress(1, self.key_id)) for name in self.roster}
        self.round_header = RoundHeader(
            "clinics", "job", 1, 1, 1, "update", self.roster, roster_digest(self.pins),
            self.plan.threshold, protection, self.plan.digest,
        )  # fmt: skip
        self.states = dict.fromkeys(self.roster, STATE)
        self.keys, self.shares, self.submits = {}, {}, {}
        self.confirms, self.answers, self.statements = {}, {}, {}
        self.plain, self.masked, self.masks = {}, {}, {}

    def copy(self):
        """Another world in the same situation; what is in it is never changed in place."""
        other = copy(self)
        for name, value in vars(self).items():
            if isinstance(value, dict):
                setattr(other, name, dict(value))
        return other

    @property
    def t(self):
        return self.plan.threshold

    @property
    def h(self):
        return self.round_header.digest

    # ------------------------------------------------------------------------------- driving a site

    def step(self, name, event, now=0.0):
        """One step of the real machine; returns its effects."""
        self.stages[name], found = site.step(self.members[name], self.stages[name], event, now)
        return found

    def receive(self, name, message):
        """A message of the coordinator, and what the site answers: the message of its one Send."""
        return answer_of(self.step(name, site.MessageFromCoordinator(message)))

    def tag(self, name):
        header = self.round_header
        return state_tag(self.group, header.job, header.round, self.states[name])

    def invitation(self, name, header=None):
        return site.Invited(Announce(header or self.round_header), self.tag(name))

    def make_vector(self, name, found):
        """What a site's shell does when asked for its vector; the answer goes into `submits`."""
        asked = next(e for e in found if isinstance(e, effects.MakeVector))
        place = self.roster.index(name)
        values = np.arange(SPEC.coordinates, dtype=np.uint64) * (place + 3) % 60000
        slots = self.layout.pack(values, {"weight": [100 + place]}, place)
        tag = SumTag(self.group, asked.header, asked.state_tag)
        self.layout.put_tag(slots, tag.tag(slots[: self.layout.tagged_slots], name))
        self.masks[name] = tuple((seed.reveal(), sign_) for seed, sign_ in asked.masks)
        self.plain[name], self.masked[name] = slots, slots.copy()
        add_masks(self.masked[name], self.masks[name], self.bits)
        body = self.masked[name].tobytes()
        self.submits[name] = answer_of(self.step(name, site.VectorMade(digest(body), len(body))))

    @property
    def bits(self):
        return self.plan.packing.slot_bits

    # ---------------------------------------------------------------------- the coordinator's moves

    def bundle(self, names=None, keys=None):
        chosen = {**self.keys, **(keys or {})}
        return KeyBundle(self.h, tuple(chosen[name] for name in names or sorted(self.keys)))

    def delivery(self, to, names=None, shares=None):
        chosen = {**self.shares, **(shares or {})}
        sent = [chosen[name] for name in names or sorted(self.shares)]
        parcels = tuple(p for each in sent for p in each.parcels if p.recipient == to)
        return Delivery(self.h, tuple(each.head for each in sent), parcels)

    def survivor_list(self, names=None, submits=None):
        chosen = {**self.submits, **(submits or {})}
        return SurvivorList(self.h, tuple(chosen[n] for n in names or sorted(self.submits)))

    def confirmations(self, names=None, confirms=None):
        chosen = {**self.confirms, **(confirms or {})}
        return Confirmations(self.h, tuple(chosen[n] for n in names or sorted(self.confirms)))

    def aggregate(self, names=None):
        submissions = tuple(self.submits[name] for name in names or sorted(self.submits))
        return Aggregate(self.h, submissions, b"s" * 32, 100)

    def certificate(self, signers=None, **changes):
        first = next(iter(self.statements.values()))
        survivors = tuple(sorted(self.submits))
        names = signers or survivors
        found = Certificate(
            self.round_header, survivors, first.sum_mac, first.state_mac,
            tuple((name, self.statements[name].signature) for name in names),
        )  # fmt: skip
        return replace(found, **changes)

    def advance(self, to, names=None, after="idle"):
        """Everybody (or `names`) honestly to a stage: 'keys' means that keys were sent, and so on."""
        names = names or self.roster
        masks = self.plan.protection != "encrypted"
        for stage in STAGES[STAGES.index(after) + 1 : STAGES.index(to) + 1]:
            if not masks and stage in {"shares", "confirm", "unmask"}:
                continue
            for name in names:
                getattr(self, f"_{stage}")(name, masks)
        return self

    def _keys(self, name, masks):
        found = self.step(name, self.invitation(name))
        if masks:
            self.keys[name] = answer_of(found)
        else:
            self.pending = {**getattr(self, "pending", {}), name: found}

    def _shares(self, name, _):
        self.shares[name] = self.receive(name, self.bundle())

    def _submit(self, name, masks):
        found = self.pending[name]
        if masks:
            found = self.step(name, site.MessageFromCoordinator(self.delivery(name)))
        self.make_vector(name, found)

    pending: dict = dict.fromkeys(NAMES)

    def _confirm(self, name, _):
        self.confirms[name] = self.receive(name, self.survivor_list())

    def _unmask(self, name, _):
        self.answers[name] = self.receive(name, self.confirmations())

    def _open(self, name, _):
        self.step(name, site.MessageFromCoordinator(self.aggregate()))

    def _state(self, name, _):
        self.statements[name] = answer_of(self.step(name, site.SumOpened(b"S" * 32, b"N" * 32)))

    # -------------------------------------------------------------------- what a coordinator can do

    def shares_held(self, answers, also=()):
        """{(site, kind): {x: share}} of unmask answers, and of what colluding sites hold."""
        found = {}
        for unmask in answers:
            for each in unmask.answers:
                x = self.roster.index(unmask.site) + 1
                found.setdefault((each.of, each.kind), {})[x] = each.share
        for name, held in also:
            for each in held:
                x = self.roster.index(name) + 1
                found.setdefault((each.of, SELF_SEED), {})[x] = each.self_share.reveal()
                found.setdefault((each.of, "mask root"), {})[x] = each.root_share.reveal()
        return found

    def rebuilt(self, found):
        """{(site, kind): secret} for all that has t shares."""
        t = self.round_header.threshold
        return {
            key: shamir.combine(points, t, owner=key[0])
            for key, points in found.items() if len(points) >= t
        }  # fmt: skip

    def self_mask(self, name, secret):
        tag = self.keys[name].state_tag
        return self_mask_seed(secret, site=name, header=self.h, state_tag=tag), 1

    def pair_mask(self, name, secret, peer):
        """The mask that `peer` has with `name`, from the root of `name`, as it stands in peer's vector."""
        root, tag = MaskRoot(secret), self.keys[peer].state_tag
        lower = self.roster.index(peer) < self.roster.index(name)
        if lower:
            offer = next(p.offer for p in self.shares[peer].parcels if p.recipient == name)
            offered = open_offer(root, offer, sender=peer, recipient=name, header=self.h)
        else:
            offered = pair_secret(root, sender=name, recipient=peer, header=self.h)
        seed = pair_seed(
            root, self.keys[peer].mask, offered, mine=name, theirs=peer, header=self.h,
            state_tag=tag,
        )  # fmt: skip
        return seed, 1 if lower else -1

    def open_sum_of(self, targets, secrets, known=()):
        """Try to take every mask off the sum of `targets`: self-seeds of each, and for every peer
        outside the root of either side. known: seeds that colluding sites hold. Returns the slots."""
        masks = []
        for name in targets:
            masks.append(self.self_mask(name, secrets[name, SELF_SEED]))
            for peer in self.roster:
                if peer in targets:
                    continue
                mine = [m for m in self.masks[name] if m[0] in known]
                theirs = self.masks.get(peer, ())
                shared = [m for m in mine if any(m[0] == seed for seed, _ in theirs)]
                if shared:
                    masks += shared
                elif (peer, "mask root") in secrets:
                    masks.append(self.pair_mask(peer, secrets[peer, "mask root"], name))
                else:
                    seed, sign_ = self.pair_mask(name, secrets[name, "mask root"], peer)
                    masks.append((seed, -sign_))
        return self.minus(targets, masks)

    def minus(self, targets, masks):
        total = sum(self.masked[name] for name in targets)
        return self.ring(total - mask_sum(masks, len(total), self.bits))

    def ring(self, slots):
        return slots & np.uint64((1 << self.bits) - 1)

    def plain_sum(self, targets):
        return self.ring(sum(self.plain[name] for name in targets))

    # --------------------------------------------------------------------------------- lying sites

    def signed(self, name, message, **changes):
        """A message of a lying site: changed, and signed anew under its own identity."""
        return sign(replace(message, **changes), self.identities[name])

    def lying_shares(self, liar, change):
        """The liar's shares with `change(parcel)` for every parcel, signed anew."""
        parcels = tuple(change(parcel) for parcel in self.shares[liar].parcels)
        listed = tuple((p.recipient, digest(p)) for p in parcels)
        head = self.signed(liar, SharesHead(self.h, liar, listed, b""))
        return Shares(head, parcels)

    # -------------------------------------------------------------------------- a coordinator machine

    def unmasking(self):
        """The real coordinator's stage once everybody confirmed, with the answers in `answers`."""
        return coordinator.Unmasking(
            self.round_header, tuple(self.keys.values()), tuple(self.shares.values()),
            tuple(self.submits[n] for n in sorted(self.submits)),
            tuple(self.confirms[n] for n in sorted(self.confirms)),
            tuple(self.answers[n] for n in sorted(self.answers)),
        )  # fmt: skip


@cache
def _built(stage, n, threshold, protection):
    if stage == "idle":
        return World(n, threshold, protection)
    before = STAGES[STAGES.index(stage) - 1]  # the same keys and vectors at every stage
    return _built(before, n, threshold, protection).copy().advance(stage, after=before)


def world_at(stage, n=5, threshold=0, protection="masked"):
    """A world whose sites have all honestly come to `stage`, the caller's to spoil."""
    return _built(stage, n, threshold, protection).copy()


def answer_of(found):
    """The message of the one Send among the effects; None if nothing was sent."""
    sent = [e.message for e in found if isinstance(e, effects.Send)]
    assert len(sent) <= 1
    return sent[0] if sent else None


def secrets_in(value):
    """Every SecretBytes below a stage, as bytes."""
    if isinstance(value, SecretBytes):
        return [value.reveal()]
    if isinstance(value, tuple):
        return [each for item in value for each in secrets_in(item)]
    if is_dataclass(value):
        return [each for f in fields(value) for each in secrets_in(getattr(value, f.name))]
    return []


def refuses(world, name, event, error, *, fault=COORDINATOR, found="", expected=""):
    """The site refuses `event` with this very error, stays as it was, and leaves without a word more.

    Returns the error. event: an event, or a message of the coordinator.
    """
    stage = world.stages[name]
    before = encode(stage)
    event = event if isinstance(event, site.SiteEvent) else site.MessageFromCoordinator(event)
    with pytest.raises(error) as refused:
        world.step(name, event)
    problem = refused.value
    assert type(problem) is error
    assert problem.fault == fault
    assert found in str(problem.found)
    assert expected in str(problem.expected)
    assert world.stages[name] is stage
    assert encode(stage) == before
    for secret in secrets_in(stage):
        assert secret.hex() not in str(problem) and repr(secret) not in str(problem)
    if isinstance(stage, site.IN_ROUND):
        leaves(world, name, problem)
    return problem


def leaves(world, name, problem):
    """What the shell does after a refusal: exactly one message goes out, and it says nothing."""
    stage = world.stages[name]
    releasing = isinstance(stage, site.Opening | site.Stated)
    after, found = site.step(world.members[name], stage, site.CheckFailed(problem), 0.0)
    code = RELEASE_REFUSED if releasing else LEFT
    told = Leave(world.h, name, code)
    assert [e for e in found if isinstance(e, effects.Send)] == [effects.Send(COORDINATOR, told)]
    kinds = {type(e) for e in found}
    assert kinds <= {effects.Send, effects.Persist, effects.Erase, effects.Warn}
    assert effects.Erase in kinds
    assert type(after) is (site.Halted if releasing else site.Idle)
    assert secrets_in(after) == []
    assert not any(secret in encode(told) for secret in secrets_in(stage))
