#!/usr/bin/env python3
"""Record two rounds as the golden files of tests/vectors: python scripts/vectors/generate.py.

One is `masked`, one `encrypted` with the cipher `keystream`; each has four sites, t = 3, and one of them
gone before it submits. Both machines and both shells run as they are;
what the sites draw, and every ML-KEM encapsulation, is kept, so that the round can be played again.
Invariant: `play` with what a transcript holds gives the bytes of that transcript again.
The files are checked by `verify.py`, which shares nothing with this one; README.md has their format.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from fedcore.errors import SignatureRefused
from fedcore.learning.stopwatch import Stopwatch
from fedcore.secagg import in_process
from fedcore.secagg.crypto import shamir
from fedcore.secagg.crypto.entropy import Entropy, OsEntropy
from fedcore.secagg.crypto.hybrid import HybridKey, HybridPublic
from fedcore.secagg.crypto.identity_key import IdentityKey, roster_digest
from fedcore.secagg.crypto.masked import MaskedSealer
from fedcore.secagg.crypto.masking import mask_sum, stream_key
from fedcore.secagg.crypto.pairwise import MaskRoot, pair_secret
from fedcore.secagg.crypto.sumtag import GroupSecret, key_id, state_tag
from fedcore.secagg.encode.pack import Layout
from fedcore.secagg.in_process import _Exchange
from fedcore.secagg.packing import solve_packing
from fedcore.secagg.plan import (
    RangePlan,
    RoundHeader,
    RoundPlan,
    ServerPlan,
    TrainPlan,
    Wide,
    canonical,
)
from fedcore.secagg.protections import SCHEMES
from fedcore.secagg.protocol import messages
from fedcore.secagg.protocol.round import coordinator, site
from fedcore.secagg.protocol.round.site import SiteProgress
from fedcore.secagg.protocol.wire_form import digest, encode, type_name
from fedcore.secagg.scheme import EpochSecrets, Scheme
from fedcore.secagg.summing import RoundSum, one_by_one
from fedcore.types import Json, SiteId

FOLDER = Path(__file__).resolve().parents[2] / "tests" / "vectors"
FORMAT = "fedcore vectors 2"

# In no alphabetical order: signs follow the roster, pair seeds the ids. The dropout stands between two.
ROSTER = tuple(map(SiteId, ("south", "east", "north", "west")))
DROPPED = SiteId("east")
STATE, NEXT_STATE = b"the state before the round", b"the state the sum leads to"
COORDINATES = 2100  # a little more than one row of a block, so that a slot holds two of them


def to64(data: bytes) -> str:
    """Base64 with - and _, no padding: nothing in it looks like a path."""
    return base64.urlsafe_b64encode(data).decode().rstrip("=")


def from64(text: str) -> bytes:
    """The inverse of `to64`."""
    return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))


# ------------------------------------------------------------------------------------- entropy


@dataclass
class Recorder:
    """The operating system's randomness, and a note of all of it."""

    draws: list[bytes] = field(default_factory=list)
    encapsulations: list[tuple[bytes, bytes, bytes]] = field(default_factory=list)

    def draw(self, length: int) -> bytes:
        self.draws.append(OsEntropy().draw(length))
        return self.draws[-1]

    def encapsulate(self, mlkem_public: bytes) -> tuple[bytes, bytes]:
        shared, ciphertext = OsEntropy().encapsulate(mlkem_public)
        self.encapsulations.append((mlkem_public, shared, ciphertext))
        return shared, ciphertext


@dataclass
class Recorded:
    """What a transcript holds for one site, in its order; asking for anything else fails."""

    draws: Iterator[bytes]
    encapsulations: Iterator[tuple[bytes, bytes, bytes]]

    @classmethod
    def of(cls, entry: Json) -> Recorded:
        """entry: one of a transcript's sites."""
        taken = (
            (bytes.fromhex(e["to_key"]), bytes.fromhex(e["shared"]), from64(e["ciphertext"]))
            for e in entry["encapsulations"]
        )
        return cls((bytes.fromhex(each) for each in entry["draws"]), taken)

    def draw(self, length: int) -> bytes:
        drawn = next(self.draws)
        assert len(drawn) == length, f"asked for {length} bytes, recorded were {len(drawn)}"
        return drawn

    def encapsulate(self, mlkem_public: bytes) -> tuple[bytes, bytes]:
        to_key, shared, ciphertext = next(self.encapsulations)
        assert to_key == hashlib.sha256(mlkem_public).digest(), "another key than the recorded one"
        return shared, ciphertext


# ----------------------------------------------------------------------------------- the round


@dataclass(frozen=True)
class Sent:
    """One message, its sender, and the recipient's stage before it arrived."""

    sender: str
    to: str
    message: Any
    stage: Any


class _Taped(_Exchange):
    """The shells' exchange, with a note of every message and every vector."""

    def __init__(self, parties: Any, current: Any) -> None:
        super().__init__(parties, current)
        self.tape: list[Sent] = []
        self.vectors: dict[SiteId, bytes] = {}

    def _absent(self, shell: in_process.SiteDriver, message: Any) -> bool:
        self.tape.append(Sent(messages.COORDINATOR, shell.member.id, message, shell.stage))
        return super()._absent(shell, message)

    def _to_hub(self, message: Any) -> None:
        sender = message.site
        self.tape.append(Sent(sender, messages.COORDINATOR, message, self.hub.stage))
        super()._to_hub(message)

    def _uploaded(self, name: SiteId) -> None:
        self.vectors.setdefault(name, b"".join(self.hub.arrived[name]))
        super()._uploaded(name)


@dataclass(frozen=True)
class Played:
    """One round that ran, and everybody in it."""

    header: RoundHeader
    layout: Layout
    plan: RoundPlan
    tape: tuple[Sent, ...]
    vectors: Mapping[SiteId, bytes]
    members: Mapping[SiteId, site.SiteParams]
    hub: in_process.CoordinatorDriver
    journals: Mapping[SiteId, list[Any]]
    total: Any
    chunks: bytes
    sealed_size: int
    group: GroupSecret


def plan_of_round(scheme: str = "masked") -> RoundPlan:
    """The plan of a recorded round: 16 bits, three fields in a slot of 54 bits, one block."""
    protection, cipher = SCHEMES[scheme]
    packing = solve_packing(16, len(ROSTER), protection, cipher=cipher)
    return RoundPlan(
        "vectors", hashlib.sha256(b"no task").hexdigest(), ROSTER, protection, packing,
        COORDINATES, 0, 1000, 1, TrainPlan(), ServerPlan(), RangePlan(start=1.0),
        (Wide("loss", 1, 40),), cipher=cipher,
    )  # fmt: skip


def play(
    identities: Mapping[SiteId, bytes],
    entropies: Mapping[SiteId, Entropy],
    group: bytes,
    contributions: Mapping[SiteId, Json],
    scheme: str = "masked",
) -> Played:
    """Run the round of a scheme.

    identities: {site: 32-byte Ed25519 seed}; contributions: {site: its coordinates and wide integers}.
    """
    plan = plan_of_round(scheme)
    keys = {name: IdentityKey(identities[name]) for name in ROSTER}
    pins = {name: key.public for name, key in keys.items()}
    scheme = Scheme(plan)
    parties = in_process.InProcessFederation("golden", plan)
    parties.hub = in_process.CoordinatorDriver(
        pins, scheme
    )  # everybody of the recorded round takes over
    for name in ROSTER:
        member = site.SiteParams(name, keys[name], pins, plan, "vectors", "golden", entropies[name])
        shell = parties.shells[name] = in_process.SiteDriver(member, scheme)
        shell.held = EpochSecrets(
            GroupSecret(group), MaskedSealer(plan.packing), streams=bool(plan.salt_bytes)
        )
        shell.stage = site.Idle(SiteProgress(1, key_id(group)))
    header = RoundHeader(
        "vectors", "golden", 1, 1, 1, plan.update_vector.purpose, ROSTER, roster_digest(pins),
        plan.threshold, plan.protection, plan.digest,
    )  # fmt: skip

    def contribute(index: int) -> Any:
        found = contributions[ROSTER[index]]
        return np.frombuffer(from64(found["coordinates"]), "<u2").astype(np.uint64), found["wides"]

    layout = Layout(plan.update_vector, plan.packing, len(ROSTER))
    current = RoundSum(
        layout, one_by_one(contribute), STATE, lambda opened, sites: NEXT_STATE,
        Stopwatch(), {DROPPED: "submit"}, None, range(len(ROSTER)),
    )  # fmt: skip
    current.tag = state_tag(GroupSecret(group), header.job, header.round, STATE)
    exchange = _Taped(parties, current)
    exchange.run(header)
    released = b"".join(parties.hub.released)
    exchange.end()
    if current.failure is not None:
        raise current.failure
    return Played(
        header, layout, plan, tuple(exchange.tape), exchange.vectors,
        {name: shell.member for name, shell in parties.shells.items()}, parties.hub,
        {name: shell.journal for name, shell in parties.shells.items()},
        current.total, released, current.bytes_up, GroupSecret(group),
    )  # fmt: skip


def replay(transcript: Json) -> Played:
    """The recorded round again, from what the transcript says was drawn."""
    entries = {SiteId(entry["id"]): entry for entry in transcript["sites"]}
    return play(
        {name: bytes.fromhex(entry["identity_seed"]) for name, entry in entries.items()},
        {name: Recorded.of(entry) for name, entry in entries.items()},
        bytes.fromhex(transcript["epoch"]["group_secret"]),
        {SiteId(name): found for name, found in transcript["contributions"].items()},
        transcript["scheme"],
    )


def joined(tape: tuple[Sent, ...]) -> list[tuple[Sent, ...]]:
    """Messages in order; equal bytes from one sender to several recipients in a row are one entry."""
    found: list[list[Sent]] = []
    for each in tape:
        last = found[-1] if found else []
        if last and (each.sender, each.message) == (last[0].sender, last[0].message):
            last.append(each)
        else:
            found.append([each])
    return [tuple(entry) for entry in found]


def message_list(played: Played) -> list[Json]:
    """The `messages` of a transcript."""
    return [
        {
            "from": entry[0].sender,
            "to": [each.to for each in entry],
            "kind": type_name(type(entry[0].message)),
            "bytes": to64(encode(entry[0].message)),
        }
        for entry in joined(played.tape)
    ]


# ------------------------------------------------------------------------------ the transcript


def transcript_of(
    played: Played,
    identities: Mapping[SiteId, bytes],
    recorders: Mapping[SiteId, Recorder],
    group: bytes,
    contributions: Mapping[SiteId, Json],
) -> Json:
    """Everything a verifier needs, and every value in between that helps to find a difference."""
    header, layout, hub = played.header, played.layout, played.hub
    tag = state_tag(GroupSecret(group), header.job, header.round, STATE)
    rebuilt = [r.masks for r in hub.journal if isinstance(r, coordinator.MasksRebuilt)]
    taken = rebuilt[0] if rebuilt else ()
    certificate = hub.stage.certificate
    opened = layout.unpack(played.total, [header.place(name) for name in certificate.survivors])
    return {
        "format": FORMAT,
        "scheme": next(
            n for n, s in SCHEMES.items() if s == (played.plan.protection, played.plan.cipher)
        ),
        "plan": canonical(played.plan.to_json()).decode(),
        "header": canonical(header_json(header)).decode(),
        "h": header.digest.hex(),
        "dropped": DROPPED,
        "epoch": {
            "group_secret": group.hex(),
            "key_id": key_id(group).hex(),
            "state": STATE.decode(),
            "state_tag": tag.hex(),
            "next_state": NEXT_STATE.decode(),
        },
        "layout": {
            "slots": layout.slots,
            "tagged_slots": layout.tagged_slots,
            "slot_bits": played.plan.packing.slot_bits,
            "wides": [[w.name, w.count, w.bits] for w in layout.spec.wides],
        },
        "sites": [
            (_salted_json if played.plan.salt_bytes else _site_json)(
                played, name, identities[name], recorders[name]
            )
            for name in ROSTER
        ],
        "contributions": dict(contributions),
        "vectors": {name: to64(data) for name, data in played.vectors.items()},
        "rebuilt_masks": [[seed.reveal().hex(), sign] for seed, sign in taken],
        "sum": {
            "bytes": to64(played.chunks),
            "tag": layout.read_tag(played.total),
            "coordinates": to64(opened.coordinates.astype("<u4").tobytes()),
            "wides": {name: list(values) for name, values in opened.wides.items()},
        },
        "certificate": {
            "hash": certificate.hash,
            "sum_mac": certificate.sum_mac.hex(),
            "state_mac": certificate.state_mac.hex(),
        },
        "messages": message_list(played),
    }


def header_json(header: RoundHeader) -> Json:
    """The header as its digest sees it."""
    found = {each.name: getattr(header, each.name) for each in fields(header)}
    return {**found, "roster": list(header.roster)}


def _salted_json(played: Played, name: SiteId, identity: bytes, recorder: Recorder) -> Json:
    """A site of a round without masks: its only draw is the salt of its keystream."""
    found: Json = {
        "id": name,
        "identity_seed": identity.hex(),
        "identity_public": played.members[name].identity.public.hex(),
        "draws": [each.hex() for each in recorder.draws],
        "encapsulations": [],
    }
    if recorder.draws:
        header, group = played.header, played.group
        tag = state_tag(group, header.job, header.round, STATE)
        key = stream_key(group, header.digest, tag, name, recorder.draws[0])
        first = mask_sum([(key, 1)], played.layout.slots, played.plan.packing.slot_bits)[:3]
        found["stream"] = {"key": key.hex(), "first_slots": [int(slot) for slot in first]}
    return found


def _site_json(played: Played, name: SiteId, identity: bytes, recorder: Recorder) -> Json:
    journal, header = played.journals[name], played.header
    joined_ = next(r for r in journal if isinstance(r, site.Joined))
    opened = [r for r in journal if isinstance(r, site.DeliveryOpened)]
    root, self_seed = joined_.secrets.root.reveal(), joined_.secrets.self_seed.reveal()
    again = iter(recorder.draws[4:])
    shares = [
        shamir.split(secret, header.threshold, len(ROSTER), lambda _: next(again))
        for secret in (self_seed, root)
    ]
    channel, mask = HybridKey.from_bytes(joined_.secrets.channel.reveal()), MaskRoot(root)
    later = ROSTER[header.place(name) + 1 :]
    slots, bits = played.layout.slots, played.plan.packing.slot_bits
    masks = [(seed.reveal(), sign) for seed, sign in opened[0].masks] if opened else []
    return {
        "id": name,
        "identity_seed": identity.hex(),
        "identity_public": played.members[name].identity.public.hex(),
        "draws": [each.hex() for each in recorder.draws],
        "encapsulations": [
            {
                "to_key": hashlib.sha256(public).hexdigest(),
                "shared": shared.hex(),
                "ciphertext": to64(ciphertext),
            }
            for public, shared, ciphertext in recorder.encapsulations
        ],
        "channel_x25519": channel.public.x25519.hex(),
        "channel_mlkem_sha256": hashlib.sha256(channel.public.mlkem).hexdigest(),
        "channel_mlkem_rejects_to": channel.decapsulate(bytes(1088), name).hex(),
        "mask_x25519": mask.keys.public.x25519.hex(),
        "mask_mlkem_sha256": hashlib.sha256(mask.keys.public.mlkem).hexdigest(),
        "self_seed_shares": [each.hex() for each in shares[0]],
        "mask_root_shares": [each.hex() for each in shares[1]],
        "offered": {
            peer: pair_secret(mask, sender=name, recipient=peer, header=header.digest).hex()
            for peer in later
        },
        "masks": [
            {
                "seed": seed.hex(),
                "sign": sign,
                "first_slots": [int(slot) for slot in mask_sum([(seed, 1)], slots, bits)[:3]],
            }
            for seed, sign in masks
        ],
    }


# ------------------------------------------------------------------------------ one-fault vectors

LOW_ORDER_8 = bytes.fromhex("e0eb7a7c3b41b8ae1656e3faf19fc46ada098deb9c32b1fd866205165f49b800")
"""A point of order 8 on Curve25519 (RFC 7748's curve; the list of D. J. Bernstein)."""


@dataclass(frozen=True)
class Fault:
    """What is sent instead of message `before`: message `base`, changed. Indices into `messages`."""

    name: str
    to: str
    before: int
    base: int
    change: Callable[[Any], Any]
    error: str
    fault: str
    sender: str = ""


def _at(items: tuple[Any, ...], index: int, item: Any) -> tuple[Any, ...]:
    return (*items[:index], item, *items[index + 1 :])


def _flip(data: bytes, at: int = 5) -> bytes:
    return _at_byte(data, at, data[at] ^ 1)


def _flip_signature(message: Any) -> Any:
    return replace(message, signature=_flip(message.signature))


def _at_byte(data: bytes, at: int, value: int) -> bytes:
    return data[:at] + bytes([value]) + data[at + 1 :]


class _Faults:
    """Builders of lies; a lying site signs with its own key, the coordinator with none."""

    def __init__(self, played: Played) -> None:
        self.played = played
        self.entries = joined(played.tape)

    def index(self, kind: type[Any], sender: str = "", to: str = "") -> int:
        return next(
            i for i, e in enumerate(self.entries)
            if type(e[0].message) is kind and (not sender or e[0].sender == sender)
            and (not to or to in [each.to for each in e])
        )  # fmt: skip

    def sign(self, message: Any) -> Any:
        return messages.sign(message, self.played.members[message.site].identity)

    def keys(self, place: int, change: Callable[[Any], Any], *, signed: bool) -> Any:
        def apply(bundle: messages.KeyBundle) -> messages.KeyBundle:
            keys = change(bundle.keys[place])
            return replace(
                bundle, keys=_at(bundle.keys, place, self.sign(keys) if signed else keys)
            )

        return apply

    def parcel(self, place: int, change: Callable[[Any], Any]) -> Any:
        """A parcel of a site that lies: changed, and its head signed again."""

        def apply(delivery: messages.Delivery) -> messages.Delivery:
            parcel, head = change(delivery.parcels[place]), delivery.heads[place]
            listed = tuple(
                (to, digest(parcel) if to == parcel.recipient else found)
                for to, found in head.parcels
            )
            return replace(
                delivery,
                heads=_at(delivery.heads, place, self.sign(replace(head, parcels=listed))),
                parcels=_at(delivery.parcels, place, parcel),
            )

        return apply

    def all(self) -> list[Fault]:
        m = messages
        i, sign = self.index, self.sign
        announce, bundle = i(m.Announce), i(m.KeyBundle)
        delivery, listing = i(m.Delivery, to="north"), i(m.SurvivorList)
        confirms, total, proof = i(m.Confirmations), i(m.Aggregate), i(m.Certificate)
        keys, shares = i(m.Keys, "north"), i(m.Shares, "north")
        submit, confirm = i(m.Submit, "north"), i(m.Confirm, "north")
        unmask, statement = i(m.Unmask, "north"), i(m.Statement, "north")
        others = tuple(reversed(self.entries[delivery][0].message.parcels[:1]))

        def header(**change: Any) -> Any:
            return lambda a: replace(a, header=replace(a.header, **change))

        def x25519(of: str, point: Callable[[Any], bytes]) -> Any:
            return lambda k: replace(k, **{of: replace(getattr(k, of), x25519=point(k))})

        def mlkem(k: m.Keys) -> m.Keys:
            return replace(k, mask=HybridPublic(k.mask.x25519, b"\xff" * 3 + k.mask.mlkem[3:]))

        def item(name: str, place: int, change: Callable[[Any], Any]) -> Any:
            return lambda a: replace(
                a, **{name: _at(getattr(a, name), place, change(getattr(a, name)[place]))}
            )

        other = b"\x11" * 32
        east = next(e[0].message for e in self.entries if e[0].sender == "east").state_tag
        ghost = sign(
            m.Submit(
                self.played.header.digest, DROPPED, other, self.played.sealed_size, east,
                self.entries[submit][0].message.key_id, b"", b"",
            )
        )  # fmt: skip
        lie_survivors = digest((SiteId("south"), SiteId("north")))

        def at_north(
            name: str, at: int, change: Any, error: str, fault: str, base: int = -1
        ) -> Fault:
            return Fault(name, "north", at, at if base < 0 else base, change, error, fault)

        def at_hub(
            name: str, at: int, change: Any, error: str, fault: str = "north", **more: Any
        ) -> Fault:
            return Fault(
                name, "coordinator", at, more.get("base", at), change, error, fault,
                more.get("sender", "north"),
            )  # fmt: skip

        c = m.COORDINATOR
        return [
            # announce
            at_north("a round number already used", announce, header(round=0), "HeaderRefused", c),
            at_north(
                "another plan digest", announce, header(plan_digest="0" * 64), "HeaderRefused", c
            ),
            at_north(
                "another certificate", announce, header(certificate="0" * 64), "HeaderRefused", c
            ),
            at_north("an old key epoch", announce, header(epoch=0), "StaleEpoch", c),
            at_north(
                "a threshold of half the roster",
                announce,
                header(threshold=2),
                "ThresholdRefused",
                c,
            ),
            at_north(
                "a roster with a site twice",
                announce,
                header(roster=(*ROSTER[:3], ROSTER[0])),
                "RosterRefused",
                c,
            ),
            at_north(
                "a roster with an unpinned site",
                announce,
                header(roster=(*ROSTER[:3], SiteId("ghost"))),
                "RosterRefused",
                c,
            ),
            # key bundle
            at_north(
                "a flipped bit in a keys signature",
                bundle,
                self.keys(0, _flip_signature, signed=False),
                "SignatureRefused",
                "south",
            ),
            at_north(
                "a flipped bit in a self-seed hash",
                bundle,
                self.keys(
                    0, lambda k: replace(k, self_seed_hash=_flip(k.self_seed_hash)), signed=False
                ),
                "SignatureRefused",
                "south",
            ),
            at_north(
                "a key of zero, signed",
                bundle,
                self.keys(3, x25519("channel", lambda k: bytes(32)), signed=True),
                "KeyRefused",
                "west",
            ),
            at_north(
                "a key of order 8, signed",
                bundle,
                self.keys(3, x25519("mask", lambda k: LOW_ORDER_8), signed=True),
                "KeyRefused",
                "west",
            ),
            at_north(
                "one key for channel and mask, signed",
                bundle,
                self.keys(3, x25519("mask", lambda k: k.channel.x25519), signed=True),
                "KeyRefused",
                "west",
            ),
            at_north(
                "an ML-KEM key that is not reduced, signed",
                bundle,
                self.keys(3, mlkem, signed=True),
                "KeyRefused",
                "west",
            ),
            at_north(
                "another state tag, signed",
                bundle,
                self.keys(3, lambda k: replace(k, state_tag=other), signed=True),
                "StateDiffers",
                "west",
            ),
            at_north(
                "another key id, signed",
                bundle,
                self.keys(3, lambda k: replace(k, key_id=other), signed=True),
                "StateDiffers",
                "west",
            ),
            at_north(
                "other keys for the recipient",
                bundle,
                self.keys(2, _flip_signature, signed=False),
                "KeyRefused",
                c,
            ),
            at_north(
                "a bundle of too few",
                bundle,
                lambda b: replace(b, keys=b.keys[1:3]),
                "ThresholdRefused",
                c,
            ),
            at_north(
                "a bundle in another order",
                bundle,
                lambda b: replace(b, keys=b.keys[::-1]),
                "ListRefused",
                c,
            ),
            at_north(
                "a bundle without the recipient",
                bundle,
                lambda b: replace(b, keys=(*b.keys[:2], b.keys[3])),
                "ListRefused",
                c,
            ),
            at_north(
                "a bundle of another round",
                bundle,
                lambda b: replace(b, header=other),
                "HeaderRefused",
                c,
            ),
            # delivery
            at_north(
                "a parcel for another recipient",
                delivery,
                item("parcels", 0, lambda p: replace(p, recipient=SiteId("west"))),
                "ShareRefused",
                c,
            ),
            at_north(
                "a flipped bit in a parcel",
                delivery,
                item("parcels", 0, lambda p: replace(p, envelope=_flip(p.envelope))),
                "ShareRefused",
                c,
            ),
            at_north(
                "a flipped bit in a head's signature",
                delivery,
                item("heads", 0, _flip_signature),
                "SignatureRefused",
                "south",
            ),
            at_north(
                "a flipped bit in an envelope, signed",
                delivery,
                self.parcel(0, lambda p: replace(p, envelope=_flip(p.envelope, -1))),
                "EnvelopeRefused",
                "south",
            ),
            at_north(
                "a flipped bit in an offer, signed",
                delivery,
                self.parcel(0, lambda p: replace(p, offer=_flip(p.offer, -1))),
                "EnvelopeRefused",
                "south",
            ),
            at_north(
                "another share digest, signed",
                delivery,
                self.parcel(0, lambda p: replace(p, root_share_digest=other)),
                "ShareRefused",
                "south",
            ),
            at_north(
                "an offer left out, signed",
                delivery,
                self.parcel(0, lambda p: replace(p, offer=b"")),
                "ShareRefused",
                "south",
            ),
            at_north(
                "one parcel too many",
                delivery,
                lambda d: replace(d, parcels=(*d.parcels, *others)),
                "ShareRefused",
                c,
            ),
            # survivor list
            at_north(
                "a list with a site twice",
                listing,
                lambda x: replace(x, submissions=(*x.submissions, x.submissions[0])),
                "ListRefused",
                c,
            ),
            at_north(
                "a list below the threshold",
                listing,
                lambda x: replace(x, submissions=x.submissions[:2]),
                "ThresholdRefused",
                c,
            ),
            at_north(
                "a list with the dropout for the recipient",
                listing,
                lambda x: replace(x, submissions=(x.submissions[0], ghost, x.submissions[2])),
                "ListRefused",
                c,
            ),
            at_north(
                "a submission with another digest",
                listing,
                item("submissions", 2, lambda s: replace(s, digest=other)),
                "SignatureRefused",
                "west",
            ),
            at_north(
                "a submission from another state, signed",
                listing,
                item("submissions", 2, lambda s: sign(replace(s, state_tag=other))),
                "StateDiffers",
                "west",
            ),
            at_north(
                "a submission with a salt, signed",
                listing,
                item("submissions", 2, lambda s: sign(replace(s, salt=other))),
                "VectorRefused",
                "west",
            ),
            at_north(
                "another submission of the recipient, signed",
                listing,
                item("submissions", 1, lambda s: sign(replace(s, digest=other))),
                "VectorRefused",
                c,
            ),
            # confirmations
            at_north(
                "a confirmation left out",
                confirms,
                lambda x: replace(x, confirms=x.confirms[:2]),
                "ThresholdRefused",
                c,
            ),
            at_north(
                "a confirmation twice",
                confirms,
                lambda x: replace(x, confirms=(*x.confirms[:2], x.confirms[1])),
                "ListRefused",
                c,
            ),
            at_north(
                "a confirmation of another list, signed",
                confirms,
                item("confirms", 2, lambda x: sign(replace(x, survivors=x.survivors[:2]))),
                "ListRefused",
                c,
            ),
            at_north(
                "a confirmation of another bundle, signed",
                confirms,
                item("confirms", 2, lambda x: sign(replace(x, bundle=other))),
                "ListRefused",
                c,
            ),
            at_north(
                "a flipped bit in a confirmation",
                confirms,
                item("confirms", 2, _flip_signature),
                "SignatureRefused",
                "west",
            ),
            at_north(
                "a second, different survivor list",
                confirms,
                lambda x: replace(x, submissions=(x.submissions[0], ghost, *x.submissions[1:])),
                "Conflicting",
                c,
                listing,
            ),
            # aggregate and certificate
            at_north(
                "a sum of another list",
                total,
                lambda x: replace(x, submissions=(x.submissions[0], ghost, *x.submissions[1:])),
                "ListRefused",
                c,
            ),
            at_north("a certificate before the sum", total, lambda x: x, "OutOfOrder", c, proof),
            at_north(
                "a certificate of too few",
                proof,
                lambda x: replace(x, signatures=x.signatures[:2]),
                "ThresholdRefused",
                c,
            ),
            at_north(
                "a certificate of another sum",
                proof,
                lambda x: replace(x, sum_mac=other),
                "SignatureRefused",
                "south",
            ),
            at_north(
                "a flipped bit in a certificate",
                proof,
                item("signatures", 2, lambda p: (p[0], _flip(p[1]))),
                "SignatureRefused",
                "west",
            ),
            # at the coordinator
            at_hub("a flipped bit in a site's keys", keys, _flip_signature, "SignatureRefused"),
            at_hub(
                "keys of a site from another",
                keys,
                lambda k: k,
                "RosterRefused",
                "west",
                sender="west",
            ),
            at_hub(
                "second, different keys",
                keys,
                lambda k: sign(replace(k, self_seed_hash=other)),
                "Conflicting",
                "south",
                base=i(m.Keys, "south"),
                sender="south",
            ),
            at_hub(
                "keys of another round, signed",
                keys,
                lambda k: sign(replace(k, header=other)),
                "HeaderRefused",
            ),
            at_hub(
                "a parcel that is not the signed one",
                shares,
                item("parcels", 0, lambda p: replace(p, self_share_digest=other)),
                "ShareRefused",
            ),
            at_hub(
                "a vector of another size, signed",
                submit,
                lambda s: sign(replace(s, size=s.size + 1)),
                "VectorRefused",
            ),
            at_hub(
                "a vector with another digest, signed",
                submit,
                lambda s: sign(replace(s, digest=other)),
                "VectorRefused",
            ),
            at_hub(
                "a vector with a salt, signed",
                submit,
                lambda s: sign(replace(s, salt=other)),
                "VectorRefused",
            ),
            at_hub(
                "a confirmation of another cohort, signed",
                confirm,
                lambda x: sign(replace(x, cohort=other)),
                "ListRefused",
            ),
            at_hub(
                "the other share of a survivor",
                unmask,
                item("answers", 0, lambda a: replace(a, kind=m.MASK_ROOT)),
                "ShareRefused",
            ),
            at_hub(
                "a flipped bit in a key share",
                unmask,
                item("answers", 0, lambda a: replace(a, share=_flip(a.share))),
                "ShareRefused",
            ),
            at_hub(
                "a key share left out",
                unmask,
                lambda u: replace(u, answers=u.answers[1:]),
                "ShareRefused",
            ),
            at_hub(
                "a statement on another list, signed",
                statement,
                lambda s: sign(replace(s, survivors=lie_survivors)),
                "ListRefused",
            ),
            at_hub(
                "a flipped bit in the signature of shares",
                shares,
                lambda x: replace(x, head=_flip_signature(x.head)),
                "SignatureRefused",
            ),
            at_hub("a flipped bit in a submission", submit, _flip_signature, "SignatureRefused"),
            at_hub("a flipped bit in a statement", statement, _flip_signature, "SignatureRefused"),
            at_hub(
                "a flipped bit in a confirmation, at the coordinator",
                confirm,
                _flip_signature,
                "SignatureRefused",
            ),
            at_hub(
                "key shares of another round",
                unmask,
                lambda u: replace(u, header=other),
                "HeaderRefused",
            ),
            at_hub(
                "a submission of another round, signed",
                submit,
                lambda s: sign(replace(s, header=other)),
                "HeaderRefused",
            ),
            at_hub(
                "a statement of another round, signed",
                statement,
                lambda s: sign(replace(s, header=other)),
                "HeaderRefused",
            ),
            # bytes
            at_north(
                "a message cut short", bundle, lambda x: encode(x)[:-1], "MalformedMessage", c
            ),
            at_north(
                "a byte behind a message",
                listing,
                lambda x: encode(x) + b"\0",
                "MalformedMessage",
                c,
            ),
            at_north(
                "a record nobody knows",
                listing,
                lambda x: encode(x).replace(b"SurvivorList", b"SurvivorLost", 1),
                "MalformedMessage",
                c,
            ),
            at_north(
                "bytes marked as a secret",
                bundle,
                lambda x: encode(x).replace(b"B\0\0\0\x20", b"X\0\0\0\x20", 1),
                "MalformedMessage",
                c,
            ),
            at_north(
                "a length beyond the message",
                confirms,
                lambda x: encode(x).replace(b"B\0\0\0\x20", b"B\x7f\xff\xff\xff", 1),
                "MalformedMessage",
                c,
            ),
            at_hub(
                "text that is not UTF-8",
                keys,
                lambda x: encode(x).replace(b"north", b"n\xffrth", 1),
                "MalformedMessage",
            ),
        ]


def negatives_of(played: Played) -> list[Json]:
    """Every one-fault vector, as a change of bytes to a recorded message."""
    faults = _Faults(played)
    pins = {name: member.identity.public for name, member in played.members.items()}
    found = []
    for each in faults.all():
        base = faults.entries[each.base][0].message
        changed = each.change(base)
        before, after = encode(base), changed if isinstance(changed, bytes) else encode(changed)
        head = _common(before, after)
        tail = _common(before[head:][::-1], after[head:][::-1])
        well_formed = not isinstance(changed, bytes)
        target = next(s for s in faults.entries[each.before] if s.to == each.to)
        found.append(
            {
                "name": each.name,
                "to": each.to,
                "stage": type_name(type(target.stage)),
                "sender": each.sender or messages.COORDINATOR,
                "before": each.before,
                "base": each.base,
                "at": head,
                "cut": len(before) - head - tail,
                "put": to64(after[head : len(after) - tail]),
                "changes": sorted(_differences(base, changed)) if well_formed else None,
                "unverified": sorted(_unverified(changed, pins)) if well_formed else None,
                "error": each.error,
                "fault": each.fault,
            }
        )
    return found


def _common(a: bytes, b: bytes) -> int:
    """Bytes at the beginning that are the same."""
    return next(
        (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b))
    )


def patched(base: bytes, entry: Json) -> bytes:
    """The bytes of a one-fault vector."""
    at = entry["at"]
    return base[:at] + from64(entry["put"]) + base[at + entry["cut"] :]


def _differences(old: Any, new: Any, path: str = "") -> Iterator[str]:
    """Paths of the leaves that differ; of a list, where its length differs."""
    if is_dataclass(old) and not isinstance(old, type):
        for each in fields(old):
            name = f"{path}.{each.name}" if path else each.name
            yield from _differences(getattr(old, each.name), getattr(new, each.name), name)
    elif isinstance(old, tuple) and len(old) == len(new):
        for index, (a, b) in enumerate(zip(old, new, strict=True)):
            yield from _differences(a, b, f"{path}[{index}]")
    elif old != new:
        yield path


def _unverified(value: Any, pins: Mapping[SiteId, bytes], path: str = "") -> Iterator[str]:
    """Paths of the signatures that do not verify."""
    if isinstance(value, messages.Certificate):
        for index, (name, signature) in enumerate(value.signatures):
            if not _verifies(value.statement(name, signature), pins):
                yield f"signatures[{index}][1]"
    elif isinstance(value, tuple):
        for index, item in enumerate(value):
            yield from _unverified(item, pins, f"{path}[{index}]")
    elif is_dataclass(value):
        if hasattr(value, "signature") and not _verifies(value, pins):
            yield f"{path}.signature".lstrip(".")
        for each in fields(value):
            yield from _unverified(
                getattr(value, each.name), pins, f"{path}.{each.name}".lstrip(".")
            )


def _verifies(message: Any, pins: Mapping[SiteId, bytes]) -> bool:
    try:
        messages.check_signature(message, pins)
    except SignatureRefused:
        return False
    return True


def main() -> int:
    """Write all files anew."""
    FOLDER.mkdir(exist_ok=True)
    masked, golden = record("masked")
    _write(FOLDER / "masked_round.json", golden)
    _write(FOLDER / "negative.json", {"format": FORMAT, "vectors": negatives_of(masked)})
    _write(FOLDER / "keystream_round.json", record("encrypted-keystream")[1])
    return 0


def record(scheme: str) -> tuple[Played, Json]:
    """One new round of a scheme, and its transcript."""
    random = np.random.default_rng()
    contributions: dict[SiteId, Json] = {
        name: {
            "coordinates": to64(random.integers(0, 1 << 16, COORDINATES).astype("<u2").tobytes()),
            "wides": {
                "weight": [100 + place],
                "over_range": [3 * place],
                "over_half_range": [40 + place],
                "exceeds": [place % 2],
                "loss": [(1 << 39) + 12345 * place],
            },
        }
        for place, name in enumerate(ROSTER)
        if name != DROPPED
    }
    identities = {name: os.urandom(32) for name in ROSTER}
    recorders = {name: Recorder() for name in ROSTER}
    group = os.urandom(32)
    played = play(identities, recorders, group, contributions, scheme)
    return played, transcript_of(played, identities, recorders, group, contributions)


def _write(path: Path, value: Json) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n")
    print(f"{path.name}: {path.stat().st_size} bytes")


if __name__ == "__main__":
    sys.exit(main())
