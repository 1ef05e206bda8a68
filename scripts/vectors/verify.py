#!/usr/bin/env python3
"""Check the golden files without Fedcore: python scripts/vectors/verify.py [folder].

From what the sites drew, every other value of the recorded round is derived again, and compared.
Invariant: nothing here comes from `fedcore` or NumPy; of `cryptography` only Ed25519, X25519,
ML-KEM-768, ChaCha20-Poly1305 and AES are used. HKDF, the message bytes, Shamir, packing and the sum tag
are written anew from docs/protocol.md and README.md, in plain Python.
Prints one line per section; exits with 1 and the first difference otherwise.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import struct
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

from cryptography.exceptions import InvalidSignature, InvalidTag
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

FOLDER = Path(__file__).resolve().parents[2] / "tests" / "vectors"
FORMAT = "fedcore vectors 2"

Json = dict[str, Any]
Value = Any
"""A message's value: None, int, bytes, str, list, or a record: {"_": name, field: value}."""


class Differs(Exception):
    """Something is not what it follows from the rest."""


def same(what: str, found: object, expected: object) -> None:
    """Raise Differs unless both are equal, and say where they part."""
    if found == expected:
        return
    if isinstance(found, bytes) and isinstance(expected, bytes):
        if len(found) != len(expected):
            raise Differs(f"{what}: found {len(found)} bytes, expected {len(expected)}")
        at = next(i for i, (a, b) in enumerate(zip(found, expected, strict=True)) if a != b)
        raise Differs(f"{what}: byte {at}: found {found[at]:02x}, expected {expected[at]:02x}")
    raise Differs(f"{what}: found {str(found)[:80]!r}, expected {str(expected)[:80]!r}")


def from64(text: str) -> bytes:
    """Base64 with - and _, no padding; only the one spelling of the bytes is taken."""
    data = base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))
    if base64.urlsafe_b64encode(data).decode().rstrip("=") != text:
        raise Differs("base64: found a second spelling, expected the shortest")
    return data


def sha256(*parts: bytes) -> bytes:
    """SHA-256 of the parts joined."""
    return hashlib.sha256(b"".join(parts)).digest()


# ------------------------------------------------------------------------------- message bytes

# Fields in order. B bytes, S text, I integer; [x] a list of x; (x y) a pair; anything else a record.
RECORDS = {
    "RoundHeader": (
        "federation:S job:S epoch:I round:I training_round:I purpose:S roster:[S] pins:S threshold:I "
        "protection:S plan_digest:S certificate:S version:I"
    ),
    "HybridPublic": "x25519:B mlkem:B",
    "Keys": (
        "header:B site:S channel:HybridPublic mask:HybridPublic self_seed_hash:B state_tag:B key_id:B "
        "signature:B"
    ),
    "Parcel": (
        "sender:S recipient:S envelope:B offer:B self_share_digest:B root_share_digest:B"
    ),
    "SharesHead": "header:B site:S parcels:[(S,B)] signature:B",
    "Shares": "head:SharesHead parcels:[Parcel]",
    "Submit": "header:B site:S digest:B size:I state_tag:B key_id:B salt:B signature:B",
    "Confirm": "header:B site:S bundle:B cohort:B survivors:[(S,B)] next:B signature:B",
    "NextKeys": "header:B site:S channel:HybridPublic mask:HybridPublic self_seed_hash:B",
    "Answer": "of:S kind:S share:B",
    "Unmask": "header:B site:S answers:[Answer]",
    "Statement": "header:B site:S survivors:B sum_mac:B state_mac:B signature:B",
    "Announce": "header:RoundHeader keys:[Keys]",
    "KeyBundle": "header:B keys:[Keys]",
    "Delivery": "header:B heads:[SharesHead] parcels:[Parcel]",
    "SurvivorList": "header:B submissions:[Submit]",
    "Confirmations": "header:B confirms:[Confirm]",
    "NextBundle": "header:B keys:[NextKeys]",
    "Aggregate": "header:B submissions:[Submit] digest:B size:I",
    "Abandon": "header:B stage:S",
    "Certificate": (
        "header:RoundHeader survivors:[S] sum_mac:B state_mac:B signatures:[(S,B)]"
    ),
}  # fmt: skip
FIELDS = {name: [tuple(each.split(":")) for each in text.split()] for name, text in RECORDS.items()}


def record(name: str, *values: Value) -> Json:
    """A record's values, in the order of its fields."""
    names = [field for field, _ in FIELDS[name]]
    return {"_": name, **dict(zip(names, values, strict=True))}


def encode(value: Value) -> bytes:
    """The byte form."""
    if value is None:
        return b"N"
    if isinstance(value, int):
        return b"I" + value.to_bytes(8, "big", signed=True)
    if isinstance(value, bytes):
        return b"B" + len(value).to_bytes(4, "big") + value
    if isinstance(value, str):
        data = value.encode()
        return b"S" + len(data).to_bytes(4, "big") + data
    if isinstance(value, list):
        return b"L" + len(value).to_bytes(4, "big") + b"".join(map(encode, value))
    return (
        b"R" + encode(value["_"]) + b"".join(encode(value[name]) for name, _ in FIELDS[value["_"]])
    )


def decode(data: bytes, expected: str) -> Value:
    """The record of this name that the bytes are, or Differs."""
    value, rest = _decode(data)
    same("bytes behind the message", len(rest), 0)
    _check(value, expected)
    return value


def _take(data: bytes, size: int) -> tuple[bytes, bytes]:
    if len(data) < size:
        raise Differs(f"message: found {len(data)} bytes, expected {size}")
    return data[:size], data[size:]


def _decode(data: bytes) -> tuple[Value, bytes]:
    kind, data = _take(data, 1)
    if kind == b"N":
        return None, data
    if kind == b"I":
        body, data = _take(data, 8)
        return int.from_bytes(body, "big", signed=True), data
    if kind in {b"B", b"S", b"L"}:
        head, data = _take(data, 4)
        size = int.from_bytes(head, "big")
        if kind == b"L":
            items = []
            for _ in range(size):
                item, data = _decode(data)
                items.append(item)
            return items, data
        body, data = _take(data, size)
        try:
            return (body if kind == b"B" else body.decode()), data
        except UnicodeDecodeError:
            raise Differs("message: found bytes that are not UTF-8") from None
    if kind == b"R":
        name, data = _decode(data)
        if name not in FIELDS:
            raise Differs("message: found an unknown record")
        value = {"_": name}
        for field, hint in FIELDS[name]:
            value[field], data = _decode(data)
            _check(value[field], hint)
        return value, data
    raise Differs(f"message: found the kind {kind!r}")


def _check(value: Value, hint: str) -> None:
    """Raise Differs for a value of another kind."""
    if hint.startswith("["):
        right = isinstance(value, list)
        for item in value if right else ():
            _check(item, hint[1:-1])
    elif hint.startswith("("):
        parts = hint[1:-1].split(",")
        right = isinstance(value, list) and len(value) == len(parts)
        for item, part in zip(value, parts, strict=True) if right else ():
            _check(item, part)
    elif hint in {"B", "S", "I"}:
        right = isinstance(value, {"B": bytes, "S": str, "I": int}[hint])
    else:
        right = isinstance(value, dict) and value["_"] == hint
    if not right:
        raise Differs(f"message: found {type(value).__name__}, expected {hint}")


def digest(value: Value) -> bytes:
    """SHA-256 of the byte form."""
    return sha256(encode(value))


def signed_bytes(message: Json) -> bytes:
    """What a signature covers."""
    label: bytes = message["_"].encode()
    return b"fedcore/1 " + label + b"\0" + encode({**message, "signature": b""})


# ------------------------------------------------------------------------------------- keys


def hkdf(secret: bytes, salt: bytes, info: bytes, length: int) -> bytes:
    """HKDF-SHA256 (RFC 5869)."""
    prk = hmac.digest(salt or bytes(32), secret, "sha256")
    out = block = b""
    counter = 1
    while len(out) < length:
        block = hmac.digest(prk, block + info + bytes([counter]), "sha256")
        out, counter = out + block, counter + 1
    return out[:length]


def framed(*parts: bytes) -> bytes:
    """Each part behind its length, 4 bytes little-endian."""
    return b"".join(struct.pack("<I", len(part)) + part for part in parts)


def derive(secret: bytes, label: str, *parts: bytes, salt: bytes = b"", length: int = 32) -> bytes:
    """HKDF with info = version, label and parts, framed."""
    return hkdf(secret, salt, framed(b"fedcore/1", label.encode(), *parts), length)


def group_derive(group: bytes, salt: bytes, info: bytes, length: int) -> bytes:
    """HKDF of the group secret."""
    return hkdf(group, salt, b"fedcore/1 " + info, length)


def authenticate(group: bytes, label: bytes, message: bytes) -> bytes:
    """HMAC-SHA256 under a key of the group secret."""
    return hmac.digest(group_derive(group, b"", b"hmac " + label, 32), message, "sha256")


class Pair:
    """X25519 and ML-KEM-768 secrets."""

    def __init__(self, x25519: bytes, mlkem: bytes) -> None:
        self._x25519 = X25519PrivateKey.from_private_bytes(x25519)
        self._mlkem = MLKEM768PrivateKey.from_seed_bytes(mlkem)
        self.x25519 = self._x25519.public_key().public_bytes_raw()
        self.mlkem = self._mlkem.public_key().public_bytes_raw()
        self.public = self.x25519 + self.mlkem
        self.record = record("HybridPublic", self.x25519, self.mlkem)

    def agree(self, other: bytes) -> bytes:
        """The X25519 shared secret."""
        return self._x25519.exchange(X25519PublicKey.from_public_bytes(other))

    def decapsulate(self, ciphertext: bytes) -> bytes:
        """The ML-KEM shared secret."""
        return self._mlkem.decapsulate(ciphertext)


def box(key: bytes, plaintext: bytes, context: bytes) -> bytes:
    """ChaCha20-Poly1305 with nonce 0."""
    return ChaCha20Poly1305(key).encrypt(bytes(12), plaintext, context)


def stream(key: bytes, count: int) -> list[int]:
    """`count` 64-bit words of AES-256-CTR from counter 0, little-endian."""
    made = Cipher(algorithms.AES256(key), modes.CTR(bytes(16))).encryptor()
    return list(struct.unpack(f"<{count}Q", made.update(bytes(8 * count))))


# ---------------------------------------------------------------------------------- Shamir

FIELD = 2**256 + 297


def cut(secret: bytes, coefficients: list[bytes], count: int) -> list[bytes]:
    """Shares 1 to `count`; the coefficients of x, x^2, ... as drawn."""
    poly = [int.from_bytes(each, "little") % FIELD for each in (secret, *coefficients)]
    values = [
        sum(c * pow(x, power, FIELD) for power, c in enumerate(poly)) for x in range(1, count + 1)
    ]
    return [(value % FIELD).to_bytes(33, "little") for value in values]


def rebuild(shares: dict[int, bytes]) -> bytes:
    """Lagrange at 0."""
    total = 0
    for x, share in shares.items():
        term = int.from_bytes(share, "little")
        for other in shares:
            if other != x:
                term = term * other * pow(other - x, -1, FIELD) % FIELD
        total += term
    return (total % FIELD).to_bytes(33, "little")[:32]


# -------------------------------------------------------------------------------- the vectors


def pack_words(words: list[int], bits: int) -> bytes:
    """Words in groups that fill whole bytes, lane by lane; README.md, "Words"."""
    group = next(g for g in (1, 2, 4, 8) if g * bits % 8 == 0)
    columns = len(words) // group
    size = group * bits // 8
    groups = [
        sum(words[place * columns + column] << (place * bits) for place in range(group)).to_bytes(
            size, "little"
        )
        for column in range(columns)
    ]
    return b"".join(g[at : at + 8] for at in range(0, size, 8) for g in groups)


def limbs(value: int, wide_bits: int, bits: int) -> list[int]:
    """ceil(wide_bits / bits) limbs, least significant first."""
    return [(value >> at) & ((1 << bits) - 1) for at in range(0, wide_bits, bits)]


# ------------------------------------------------------------------------------- the recorded round


class Site:
    """One site's secrets, from its draws in their order."""

    def __init__(self, entry: Json, threshold: int, count: int, masks: bool) -> None:
        self.entry, self.id = entry, str(entry["id"])
        self.identity = Ed25519PrivateKey.from_private_bytes(bytes.fromhex(entry["identity_seed"]))
        self.identity_public = self.identity.public_key().public_bytes_raw()
        draws = [bytes.fromhex(each) for each in entry["draws"]]
        lengths = [32, 32, 32, 64] + [48] * (2 * (threshold - 1))
        if not masks:  # the salt of its keystream, if it made a vector
            lengths = [32] * bool(draws)
        same(f"{self.id}: lengths of draws", [len(each) for each in draws], lengths)
        self.salt = draws[0] if draws and not masks else b""
        if not masks:
            return
        self.root, self.self_seed = draws[:2]
        self.channel = Pair(draws[2], draws[3])
        self.mask = Pair(
            derive(self.root, "mask x25519"), derive(self.root, "mask mlkem", length=64)
        )
        self.rho = derive(self.root, "offer root")
        middle = 4 + threshold - 1
        self.self_shares = cut(self.self_seed, draws[4:middle], count)
        self.root_shares = cut(self.root, draws[middle:], count)

    def sign(self, message: Json) -> Json:
        """The message with its signature."""
        return {**message, "signature": self.identity.sign(signed_bytes(message))}


@dataclass
class Round:
    """The transcript, and what follows from it."""

    golden: Json

    @cached_property
    def header(self) -> Json:
        """The header as JSON."""
        found: Json = json.loads(self.golden["header"])
        return found

    @cached_property
    def h(self) -> bytes:
        """Its digest."""
        return sha256(self.golden["header"].encode())

    @cached_property
    def header_record(self) -> Json:
        """The header as a record."""
        return {"_": "RoundHeader", **self.header}

    @cached_property
    def plan(self) -> Json:
        """The plan as JSON."""
        found: Json = json.loads(self.golden["plan"])
        return found

    @cached_property
    def roster(self) -> list[str]:
        """The sites, in order."""
        return list(self.header["roster"])

    @cached_property
    def survivors(self) -> list[str]:
        """U3."""
        return [name for name in self.roster if name != self.golden["dropped"]]

    @cached_property
    def threshold(self) -> int:
        """The round's t."""
        return int(self.header["threshold"])

    @cached_property
    def sites(self) -> dict[str, Site]:
        """Everybody's secrets."""
        entries = self.golden["sites"]
        same("sites", [entry["id"] for entry in entries], self.roster)
        count = len(self.roster)
        masks = self.masking
        return {entry["id"]: Site(entry, self.threshold, count, masks) for entry in entries}

    @cached_property
    def masking(self) -> bool:
        """Whether vectors carry masks; if not, they carry a keystream."""
        return self.header["protection"] == "masked"

    @cached_property
    def group(self) -> bytes:
        """G."""
        return bytes.fromhex(self.golden["epoch"]["group_secret"])

    @cached_property
    def key_id(self) -> bytes:
        """Of the key epoch."""
        return sha256(b"key id", self.group)

    @cached_property
    def state_tag(self) -> bytes:
        """HMAC under G of the state."""
        job = self.header["job"]
        head = f"{len(job)}:{job}:{self.header['round']}:".encode()
        return authenticate(self.group, b"state", head + self.golden["epoch"]["state"].encode())

    def pairs(self) -> Iterator[tuple[Site, Site]]:
        """Every ordered pair of sites: by sender, then by recipient."""
        for sender in self.sites.values():
            for recipient in self.sites.values():
                if sender is not recipient:
                    yield sender, recipient

    def before(self, first: Site, second: Site) -> bool:
        """Whether the first stands before the second in the roster."""
        return self.roster.index(first.id) < self.roster.index(second.id)

    @cached_property
    def encapsulations(self) -> dict[tuple[str, str, str], tuple[bytes, bytes]]:
        """{(sender, recipient, "envelope" | "offer"): (shared secret, ciphertext)}, in drawing order."""
        found = {}
        taken = {name: iter(site.entry["encapsulations"]) for name, site in self.sites.items()}
        for sender, recipient in self.pairs():
            uses = [("envelope", recipient.channel)]
            uses += [("offer", recipient.mask)] if self.before(sender, recipient) else []
            for use, pair in uses:
                entry, what = next(taken[sender.id]), f"{use} {sender.id} to {recipient.id}"
                shared, ciphertext = bytes.fromhex(entry["shared"]), from64(entry["ciphertext"])
                same(f"{what}: key", entry["to_key"], sha256(pair.mlkem).hex())
                same(f"{what}: shared secret", shared, pair.decapsulate(ciphertext))
                found[sender.id, recipient.id, use] = shared, ciphertext
        left = [name for name, rest in taken.items() if next(rest, None) is not None]
        same("sites with encapsulations left over", left, [])
        return found

    def offered(self, first: Site, second: Site) -> bytes:
        """r of a pair, made by the first of it in the roster."""
        return derive(
            first.rho, "offered value", first.id.encode(), second.id.encode(), salt=self.h
        )

    def pair_seed(self, one: Site, other: Site) -> bytes:
        """k of a pair; agreed with the secrets of `one`."""
        first, second = (one, other) if self.before(one, other) else (other, one)
        a, b = sorted((one, other), key=lambda site: site.id)
        return derive(
            one.mask.agree(other.mask.x25519) + self.offered(first, second),
            "pair seed", a.id.encode(), b.id.encode(), a.mask.public, b.mask.public, self.state_tag,
            salt=self.h,
        )  # fmt: skip

    def self_mask(self, site: Site) -> bytes:
        """The seed of a site's self mask."""
        return derive(site.self_seed, "self mask", site.id.encode(), self.state_tag, salt=self.h)

    def masks(self, site: Site) -> list[tuple[bytes, int]]:
        """(seed, sign) of every mask of a site's vector: its own, then by roster; or its keystream."""
        if not self.masking:
            return [(self.stream_key(site), 1)]
        found = [(self.self_mask(site), 1)]
        for other in self.sites.values():
            if other is not site:
                sign = 1 if self.before(site, other) else -1
                found.append((self.pair_seed(site, other), sign))
        return found

    def stream_key(self, site: Site) -> bytes:
        """The key of the keystream over a site's vector, from G and its salt."""
        return derive(
            self.group, "keystream", site.id.encode(), self.state_tag, site.salt, salt=self.h
        )

    # ------------------------------------------------------------------------------- vectors

    @cached_property
    def bits(self) -> int:
        """Of a slot."""
        packing = self.plan["packing"]
        width = packing["bits"] + (packing["max_sites"] - 1).bit_length()
        return int(width * packing["fields_per_slot"])

    @cached_property
    def wides(self) -> list[tuple[str, int, int]]:
        """(name, count, bits) of the wide integers of an update."""
        plan = self.plan
        count = max(1, (plan["parameters"] + plan["buffer_coordinates"]).bit_length())
        own = [("weight", 1, plan["max_examples"].bit_length())]
        own += [("over_range", 1, count), ("over_half_range", 1, count)]
        return own + [(w["name"], w["count"], w["bits"]) for w in plan["metric_sums"]]

    @cached_property
    def slots(self) -> int:
        """As few as hold the data with one canary, and the tag, rounded up to a multiple of 8: one block holds them."""
        packing, sites = self.plan["packing"], len(self.roster)
        bits, rows = packing["bits"], packing["fields_per_slot"]
        wide = sum(count * len(limbs(0, most, bits)) for _, count, most in self.wides)
        fields = self.plan["parameters"] + wide + 2 * sites + 1
        needed = -(-fields // rows) + len(limbs(0, 61, bits))
        return -(-needed // 8) * 8

    @cached_property
    def tagged(self) -> int:
        """Slots before the tag's limbs."""
        return self.slots - len(limbs(0, 61, self.plan["packing"]["bits"]))

    def contribution(self, name: str) -> list[int]:
        """A site's coordinates."""
        data = from64(self.golden["contributions"][name]["coordinates"])
        same(f"{name}: bytes of coordinates", len(data), 2 * self.plan["parameters"])
        return list(struct.unpack(f"<{len(data) // 2}H", data))

    def pack(self, name: str) -> list[int]:
        """A site's slots with its tag, before any mask."""
        packing = self.plan["packing"]
        bits, rows = packing["bits"], packing["fields_per_slot"]
        width = self.bits // rows
        data = self.contribution(name)
        for wide, count, wide_bits in self.wides:
            values = self.golden["contributions"][name]["wides"][wide]
            same(f"{name}: {wide}", len(values), count)
            for value in values:
                data += limbs(value, wide_bits, bits)
        exceeds = self.golden["contributions"][name]["wides"]["exceeds"]
        same(f"{name}: exceeds", len(exceeds), 1)
        data += [exceeds[0] * int(name == each) for each in self.roster]
        data += [int(name == each) for each in self.roster]
        slots = [(1 << bits) - 1] + [0] * (self.slots - 1)
        rest = iter(data)
        for row in range(rows):
            for at in range(1 if row == 0 else 0, self.tagged):
                slots[at] |= next(rest, 0) << (row * width)
        same(f"{name}: fields left over", next(rest, None), None)
        slots[self.tagged :] = limbs(self.tag(slots[: self.tagged], [name]), 61, bits)
        return slots

    def tag(self, slots: list[int], sites: list[str]) -> int:
        """The sum tag of slots under the pads of these sites."""
        prime = 2**61 - 1

        def key(info: bytes, length: int) -> bytes:
            return group_derive(self.group, self.h, info + b"\0" + self.state_tag, length)

        factors = stream(key(b"sum tag coefficients", 32), len(slots))
        total = sum((factor >> 3) * slot for factor, slot in zip(factors, slots, strict=True))
        for name in sites:
            total += int.from_bytes(key(b"sum tag pad " + name.encode(), 24), "little") % prime
        return total % prime

    @cached_property
    def packed(self) -> dict[str, list[int]]:
        """Every survivor's slots before any mask."""
        return {name: self.pack(name) for name in self.survivors}

    def under(self, slots: list[int], masks: list[tuple[bytes, int]]) -> list[int]:
        """Slots plus masks, in the ring."""
        for seed, sign in masks:
            words = stream(seed, len(slots))
            slots = [slot + sign * word for slot, word in zip(slots, words, strict=True)]
        return [slot % (1 << self.bits) for slot in slots]

    @cached_property
    def masked(self) -> dict[str, list[int]]:
        """Every survivor's vector as it travels."""
        return {
            name: self.under(slots, self.masks(self.sites[name]))
            for name, slots in self.packed.items()
        }

    @cached_property
    def vectors(self) -> dict[str, bytes]:
        """Its bytes: one chunk."""
        return {name: pack_words(slots, self.bits) for name, slots in self.masked.items()}

    @cached_property
    def rebuilt(self) -> list[tuple[bytes, int]]:
        """The masks left in the sum of the masked vectors, in roster order of whose secret is rebuilt."""
        found: list[tuple[bytes, int]] = []
        if not self.masking:
            return found
        gone = self.sites[self.golden["dropped"]]
        for site in self.sites.values():
            if site is not gone:
                found.append((self.self_mask(site), 1))
                continue
            for name in self.survivors:
                other = self.sites[name]
                found.append((self.pair_seed(gone, other), 1 if self.before(other, gone) else -1))
        return found

    @cached_property
    def total(self) -> list[int]:
        """The sum of the masked vectors, and the rebuilt masks taken off: what the sites get."""
        added = [sum(column) for column in zip(*self.masked.values(), strict=True)]
        return self.under(added, [(seed, -sign) for seed, sign in self.rebuilt])

    @cached_property
    def opened(self) -> list[int]:
        """What a site opens it to: the survivors' keystreams taken off."""
        if self.masking:
            return self.total
        keys = [self.stream_key(self.sites[name]) for name in self.survivors]
        return self.under(self.total, [(key, -1) for key in keys])

    # ------------------------------------------------------------------------------ messages

    def keys(self, site: Site) -> Json:
        """What a site joins with."""
        return site.sign(
            record(
                "Keys", self.h, site.id, site.channel.record, site.mask.record,
                sha256(site.self_seed), self.state_tag, self.key_id, b"",
            )
        )  # fmt: skip

    def share_digest(self, of: Site, holder: Site, kind: str) -> bytes:
        """What the owner signs of a share."""
        return digest([self.h, of.id, holder.id, kind, self.share(of, holder, kind)])

    def share(self, of: Site, holder: Site, kind: str) -> bytes:
        """One key share."""
        shares = of.self_shares if kind == "self-seed" else of.root_shares
        return shares[self.roster.index(holder.id)]

    def parcel(self, sender: Site, recipient: Site) -> Json:
        """What a site has for another, or for itself."""
        kinds = ("self-seed", "mask root")
        digests = [self.share_digest(sender, recipient, kind) for kind in kinds]
        if sender is recipient:
            return record("Parcel", sender.id, recipient.id, b"", b"", *digests)
        shared, ciphertext = self.encapsulations[sender.id, recipient.id, "envelope"]
        context = encode(["fedcore/1 shares", self.h, sender.id, recipient.id])
        key = derive(
            sender.channel.agree(recipient.channel.x25519) + shared, "envelope",
            sender.channel.public, recipient.channel.public, ciphertext, salt=sha256(context),
        )  # fmt: skip
        plaintext = b"".join(self.share(sender, recipient, kind) for kind in kinds)
        envelope = ciphertext + box(key, plaintext, context)
        offer = b""
        if self.before(sender, recipient):
            shared, ciphertext = self.encapsulations[sender.id, recipient.id, "offer"]
            ids = sender.id.encode(), recipient.id.encode()
            key = derive(shared, "offer box", *ids, recipient.mask.mlkem, ciphertext, salt=self.h)
            offer = ciphertext + box(key, self.offered(sender, recipient), b"")
        return record("Parcel", sender.id, recipient.id, envelope, offer, *digests)

    @cached_property
    def shares(self) -> dict[str, Json]:
        """Every site's shares."""
        found = {}
        for sender in self.sites.values():
            parcels = [self.parcel(sender, recipient) for recipient in self.sites.values()]
            listed = [[parcel["recipient"], digest(parcel)] for parcel in parcels]
            head = sender.sign(record("SharesHead", self.h, sender.id, listed, b""))
            found[sender.id] = record("Shares", head, parcels)
        return found

    @cached_property
    def submits(self) -> list[Json]:
        """Every survivor's signed submission."""
        return [
            self.sites[name].sign(
                record(
                    "Submit", self.h, name, sha256(sha256(data)), len(data), self.state_tag,
                    self.key_id, self.sites[name].salt, b"",
                )
            )
            for name, data in self.vectors.items()
        ]  # fmt: skip

    @cached_property
    def sum_mac(self) -> bytes:
        """HMAC under G of the opened sum."""
        data = struct.pack(f"<{len(self.opened)}Q", *self.opened)
        return authenticate(self.group, b"sum", self.h + data)

    @cached_property
    def state_mac(self) -> bytes:
        """HMAC under G of the state it leads to."""
        state = self.golden["epoch"]["next_state"].encode()
        return authenticate(self.group, b"new state", self.h + state)

    @cached_property
    def certificate(self) -> Json:
        """The release certificate."""
        signatures = [[s["site"], s["signature"]] for s in self.statements]
        return record(
            "Certificate",
            self.header_record,
            self.survivors,
            self.sum_mac,
            self.state_mac,
            signatures,
        )

    @cached_property
    def statements(self) -> list[Json]:
        """Every survivor's."""
        head = digest(self.survivors)
        return [
            self.sites[name].sign(
                record("Statement", self.h, name, head, self.sum_mac, self.state_mac, b"")
            )
            for name in self.survivors
        ]

    def unmask(self, name: str) -> Json:
        """One survivor's key shares."""
        answers = []
        for of in self.sites.values():
            kind = "self-seed" if of.id in self.survivors else "mask root"
            answers.append(record("Answer", of.id, kind, self.share(of, self.sites[name], kind)))
        return record("Unmask", self.h, name, answers)

    def expected_messages(self) -> Iterator[tuple[str, list[str], Json]]:
        """(sender, recipients, message) of the whole round, in order."""
        hub, everybody, left = "coordinator", self.roster, self.survivors
        data = pack_words(self.total, self.bits)
        aggregate = record("Aggregate", self.h, self.submits, sha256(sha256(data)), len(data))
        gone = [name for name in everybody if name not in left]
        if not self.masking:
            yield hub, everybody, record("Announce", self.header_record, [])
            yield from ((each["site"], [hub], each) for each in self.submits)
            yield hub, left, aggregate
            yield from ((each["site"], [hub], each) for each in self.statements)
            yield hub, left, self.certificate
            yield hub, gone, record("Abandon", self.h, "submit")
            return
        keys = [self.keys(site) for site in self.sites.values()]
        yield hub, everybody, record("Announce", self.header_record, [])
        yield from ((each["site"], [hub], each) for each in keys)
        yield hub, everybody, record("KeyBundle", self.h, keys)
        yield from ((name, [hub], shares) for name, shares in self.shares.items())
        heads = [shares["head"] for shares in self.shares.values()]
        for place, name in enumerate(everybody):
            parcels = [shares["parcels"][place] for shares in self.shares.values()]
            yield hub, [name], record("Delivery", self.h, heads, parcels)
        yield from ((each["site"], [hub], each) for each in self.submits)
        yield hub, left, record("SurvivorList", self.h, self.submits)
        listed = [[each["site"], digest({**each, "signature": b""})] for each in self.submits]
        confirms = [
            self.sites[name].sign(
                record("Confirm", self.h, name, digest(keys), digest(everybody), listed, b"", b"")
            )
            for name in left
        ]
        yield from ((each["site"], [hub], each) for each in confirms)
        yield hub, left, record("Confirmations", self.h, confirms)
        yield from ((name, [hub], self.unmask(name)) for name in left)
        yield hub, left, aggregate
        yield from ((each["site"], [hub], each) for each in self.statements)
        yield hub, left, self.certificate
        yield hub, gone, record("Abandon", self.h, "submit")  # the round is over for it too


# --------------------------------------------------------------------------------- the sections


def check_header(r: Round) -> str:
    """Plan, pins, header, h."""
    golden, header = r.golden, r.header
    for name in ("plan", "header"):
        canonical = json.dumps(json.loads(golden[name]), sort_keys=True, separators=(",", ":"))
        same(f"canonical {name}", golden[name], canonical)
    same("h", golden["h"], r.h.hex())
    same("plan digest", header["plan_digest"], sha256(golden["plan"].encode()).hex())
    same("roster", header["roster"], r.plan["sites"])
    same("threshold", (header["threshold"], r.plan["threshold"]), (3, 2 * len(r.roster) // 3 + 1))
    protection, cipher = SCHEMES[golden["scheme"]]
    same("protection", (header["protection"], r.plan["protection"]), (protection, protection))
    same("cipher", r.plan.get("cipher"), cipher)
    pins = [p for site in r.sites.values() for p in (site.id.encode(), site.identity_public)]
    same("pins", header["pins"], sha256(framed(b"fedcore/1 roster", *pins)).hex())
    same("dropped", golden["dropped"] in r.roster, True)
    return f"{len(r.roster)} sites, t = {r.threshold}, {golden['dropped']} drops out"


def check_epoch(r: Round) -> str:
    """Key id and state tag under G."""
    same("key id", r.golden["epoch"]["key_id"], r.key_id.hex())
    same("state tag", r.golden["epoch"]["state_tag"], r.state_tag.hex())
    return "key id, state tag"


def check_keys(r: Round) -> str:
    """Public keys, from the draws."""
    for name, site in r.sites.items():
        found = site.entry
        for what, value in (
            ("identity_public", site.identity_public),
            ("channel_x25519", site.channel.x25519),
            ("channel_mlkem_sha256", sha256(site.channel.mlkem)),
            # Half of a seed shows only in what a foreign ciphertext gives (FIPS 203, algorithm 18).
            ("channel_mlkem_rejects_to", site.channel.decapsulate(bytes(1088))),
            ("mask_x25519", site.mask.x25519),
            ("mask_mlkem_sha256", sha256(site.mask.mlkem)),
        ):
            same(f"{name}: {what}", found[what], value.hex())
    return f"{5 * len(r.sites)} public keys, and what a foreign ciphertext gives"


def check_encapsulations(r: Round) -> str:
    """Recorded encapsulations, decapsulated."""
    return f"{len(r.encapsulations)} encapsulations open to the recorded secrets"


def check_shares(r: Round) -> str:
    """Key shares; any t of them rebuild the secret."""
    for name, site in r.sites.items():
        for what, shares, secret in (
            ("self_seed_shares", site.self_shares, site.self_seed),
            ("mask_root_shares", site.root_shares, site.root),
        ):
            same(f"{name}: {what}", site.entry[what], [each.hex() for each in shares])
            for start in range(len(shares) - r.threshold + 1):
                points = range(start, start + r.threshold)
                same(f"{name}: rebuilt", rebuild({x + 1: shares[x] for x in points}), secret)
    return f"{2 * len(r.sites) ** 2} key shares; any {r.threshold} in a row rebuild the secret"


def check_seeds(r: Round) -> str:
    """Offered secrets, pair seeds, self masks, and the first slots of every mask."""
    count = 0
    for name, site in r.sites.items():
        later = [other for other in r.sites.values() if r.before(site, other)]
        offered = {other.id: r.offered(site, other).hex() for other in later}
        same(f"{name}: offered", site.entry["offered"], offered)
        for other in r.sites.values():
            if other is not site:
                same(
                    f"pair seed {name}, {other.id}",
                    r.pair_seed(site, other),
                    r.pair_seed(other, site),
                )
        masks = [
            {"seed": seed.hex(), "sign": sign, "first_slots": r.under([0] * 3, [(seed, 1)])}
            for seed, sign in (r.masks(site) if name in r.survivors else [])
        ]
        same(f"{name}: masks", site.entry["masks"], masks)
        count += len(masks)
    return f"{count} masks at the survivors, both sides of a pair agree"


def check_streams(r: Round) -> str:
    """Salts, stream keys, and the first slots of every keystream."""
    made = [name for name, site in r.sites.items() if site.salt]
    same("sites with a salt", made, r.survivors)
    for name, site in r.sites.items():
        same(f"{name}: identity", site.entry["identity_public"], site.identity_public.hex())
        same(f"{name}: encapsulations", site.entry["encapsulations"], [])
        if name not in r.survivors:
            continue
        key = r.stream_key(site)
        found = {"key": key.hex(), "first_slots": r.under([0] * 3, [(key, 1)])}
        same(f"{name}: stream", site.entry["stream"], found)
    return f"{len(made)} keystreams from G and the salts"


def check_vectors(r: Round) -> str:
    """Layout, packing, tags, masked vectors."""
    golden = r.golden["layout"]
    same("slots", golden["slots"], r.slots)
    same("tagged slots", golden["tagged_slots"], r.tagged)
    same("slot bits", golden["slot_bits"], r.bits)
    same("wides", golden["wides"], [list(each) for each in r.wides])
    same("contributions", list(r.golden["contributions"]), r.survivors)
    same("vectors", list(r.golden["vectors"]), r.survivors)
    for name, data in r.vectors.items():
        same(f"{name}: masked vector", from64(r.golden["vectors"][name]), data)
    return f"{len(r.vectors)} vectors of {len(data)} bytes packed, tagged and masked"


def check_sum(r: Round) -> str:
    """Masks from the recorded answers, the sum, its tag, what it opens to."""
    golden, answers = r.golden, r.golden["rebuilt_masks"]
    same("rebuilt masks", answers, [[seed.hex(), sign] for seed, sign in r.rebuilt])
    # With Lagrange from what the answers hold, not from what was drawn.
    decoded = [
        decode(from64(m["bytes"]), "Unmask") for m in golden["messages"] if m["kind"] == "Unmask"
    ]
    for place, of in enumerate(r.sites.values() if r.masking else ()):
        points = {
            r.roster.index(each["site"]) + 1: each["answers"][place]["share"] for each in decoded
        }
        secret = of.self_seed if of.id in r.survivors else of.root
        same(f"{of.id}: secret rebuilt from the answers", rebuild(points), secret)
    plain = [sum(column) for column in zip(*r.packed.values(), strict=True)]
    same("sum without masks", r.opened, plain)
    same("sum", from64(golden["sum"]["bytes"]), pack_words(r.total, r.bits))
    bits = r.plan["packing"]["bits"]
    tag = sum(limb << (place * bits) for place, limb in enumerate(r.opened[r.tagged :]))
    same("sum of tags", golden["sum"]["tag"], tag)
    same("sum tag", tag % (2**61 - 1), r.tag(r.opened[: r.tagged], r.survivors))
    columns = zip(*map(r.contribution, r.survivors), strict=True)
    added = [sum(column) for column in columns]
    same(
        "coordinates", from64(golden["sum"]["coordinates"]), struct.pack(f"<{len(added)}I", *added)
    )
    for name, count, _ in r.wides:
        each = [golden["contributions"][site]["wides"][name] for site in r.survivors]
        same(name, golden["sum"]["wides"][name], [sum(v[i] for v in each) for i in range(count)])
    marks = {each: golden["contributions"][each]["wides"]["exceeds"][0] for each in r.survivors}
    same("exceeds", golden["sum"]["wides"]["exceeds"], [marks.get(each, 0) for each in r.roster])
    return f"{len(answers)} masks rebuilt; the sum is exact and its tag holds"


def check_certificate(r: Round) -> str:
    """The values that a release certificate certifies."""
    golden = r.golden["certificate"]
    same("sum mac", golden["sum_mac"], r.sum_mac.hex())
    same("state mac", golden["state_mac"], r.state_mac.hex())
    certified = [r.header_record, r.survivors, r.sum_mac, r.state_mac]
    same("certificate", golden["hash"], digest(certified).hex())
    return f"{len(r.statements)} statements"


def check_messages(r: Round) -> str:
    """Every message, byte for byte and in order; every signature in it."""
    expected, found = list(r.expected_messages()), r.golden["messages"]
    pins = {name: site.identity_public for name, site in r.sites.items()}
    size = 0
    for place, (entry, (sender, to, message)) in enumerate(zip(found, expected, strict=False)):
        what = f"message {place}"
        same(what, (entry["from"], entry["to"], entry["kind"]), (sender, to, message["_"]))
        data = from64(entry["bytes"])
        same(f"{what} ({entry['kind']} of {sender})", data, encode(message))
        decoded = decode(data, entry["kind"])
        same(f"{what}, read", decoded, message)
        same(f"{what}: signatures that do not verify", list(unverified(decoded, pins)), [])
        size += len(data)
    same("messages", len(found), len(expected))
    return f"{len(found)} messages, {size} bytes"


# ------------------------------------------------------------------------------ one-fault vectors


def check_negative(r: Round, negative: Json) -> str:
    """Each changes what it says of a recorded message, and spoils the signatures it says."""
    same("format", negative["format"], FORMAT)
    recorded = r.golden["messages"]
    pins = {name: site.identity_public for name, site in r.sites.items()}
    names = [entry["name"] for entry in negative["vectors"]]
    same("names", len(set(names)), len(names))
    for entry in negative["vectors"]:
        name = entry["name"]
        if entry["to"] not in recorded[entry["before"]]["to"]:
            raise Differs(f"{name}: message {entry['before']} does not go to {entry['to']}")
        base, kind = from64(recorded[entry["base"]]["bytes"]), recorded[entry["base"]]["kind"]
        at, put = entry["at"], from64(entry["put"])
        data = base[:at] + put + base[at + entry["cut"] :]
        if entry["changes"] is None:
            same(f"{name}: error", entry["error"], "MalformedMessage")
            try:
                decode(data, kind)
            except Differs:
                continue
            raise Differs(f"{name}: found bytes that can be read, expected none")
        message = decode(data, kind)
        same(f"{name}: byte form", encode(message), data)
        found = sorted(differences(decode(base, kind), message))
        same(f"{name}: changes", found, entry["changes"])
        bad = sorted(unverified(message, pins))
        same(f"{name}: signatures that do not verify", bad, entry["unverified"])
        if entry["error"] == "SignatureRefused" and not bad:
            raise Differs(f"{name}: found signatures that verify, expected one that does not")
    return f"{len(names)} one-fault vectors have their fault where they say"


def differences(old: Value, new: Value, path: str = "") -> Iterator[str]:
    """Paths of the leaves that differ; of a list, where its length differs."""
    if isinstance(old, dict) and isinstance(new, dict):
        for name, _ in FIELDS[old["_"]]:
            yield from differences(old[name], new[name], f"{path}.{name}".lstrip("."))
    elif isinstance(old, list) and len(old) == len(new):
        for place, (a, b) in enumerate(zip(old, new, strict=True)):
            yield from differences(a, b, f"{path}[{place}]")
    elif old != new:
        yield path


def unverified(value: Value, pins: dict[str, bytes], path: str = "") -> Iterator[str]:
    """Paths of the signatures that do not verify."""
    if isinstance(value, list):
        for place, item in enumerate(value):
            yield from unverified(item, pins, f"{path}[{place}]")
    if not isinstance(value, dict):
        return
    if value["_"] == "Certificate":
        for place, (name, signature) in enumerate(value["signatures"]):
            h = header_digest(value["header"])
            body = (h, name, digest(value["survivors"]), value["sum_mac"], value["state_mac"])
            if not verifies(record("Statement", *body, signature), pins):
                yield f"signatures[{place}][1]"
        return
    if "signature" in value and not verifies(value, pins):
        yield f"{path}.signature".lstrip(".")
    for name, _ in FIELDS[value["_"]]:
        yield from unverified(value[name], pins, f"{path}.{name}".lstrip("."))


def header_digest(header: Json) -> bytes:
    """h of a header record."""
    plain = {name: value for name, value in header.items() if name != "_"}
    return sha256(json.dumps(plain, sort_keys=True, separators=(",", ":")).encode())


def verifies(message: Json, pins: dict[str, bytes]) -> bool:
    """Whether a message is signed by the site it names."""
    key = Ed25519PublicKey.from_public_bytes(pins[message["site"]])
    try:
        key.verify(message["signature"], signed_bytes(message))
    except InvalidSignature:
        return False
    return True


SECTIONS: tuple[tuple[str, Callable[[Round], str]], ...] = (
    ("header", check_header),
    ("key epoch", check_epoch),
    ("keys", check_keys),
    ("encapsulations", check_encapsulations),
    ("key shares", check_shares),
    ("seeds", check_seeds),
    ("vectors", check_vectors),
    ("sum", check_sum),
    ("certificate", check_certificate),
    ("messages", check_messages),
)


STREAM_SECTIONS = (
    SECTIONS[0],
    SECTIONS[1],
    ("streams", check_streams),
    *(each for each in SECTIONS if each[0] in {"vectors", "sum", "certificate", "messages"}),
)
"""Those of a round without masks: no keys of a round, no shares, no seeds."""

SCHEMES = {"masked": ("masked", None), "encrypted-keystream": ("encrypted", "keystream")}
"""{the scheme of a file: its protection, and the cipher of its plan}."""


def verify(golden: Json, negative: Json | None = None) -> Iterator[str]:
    """One line per section. Raises Differs with the section's name and the first difference."""
    r = Round(golden)
    sections = list(SECTIONS if golden["scheme"] == "masked" else STREAM_SECTIONS)
    if negative is not None:
        sections.append(("one fault", lambda r: check_negative(r, negative)))
    for name, check in sections:
        try:
            same("format", golden["format"], FORMAT)
            yield f"{name}: {check(r)}"
        except Differs as error:
            raise Differs(f"{name}: {error}") from error
        # What a spoiled file can make of the libraries underneath.
        except (LookupError, TypeError, ValueError, AttributeError, OverflowError, struct.error,
                InvalidTag) as error:  # fmt: skip
            raise Differs(f"{name}: {type(error).__name__}: {error}") from error


def main(arguments: list[str]) -> int:
    """Verify the files in a folder."""
    folder = Path(arguments[0]) if arguments else FOLDER
    golden, negative, stream = (
        json.loads((folder / name).read_text())
        for name in ("masked_round.json", "negative.json", "keystream_round.json")
    )
    try:
        for line in chain(verify(golden, negative), verify(stream)):
            print(line)
    except Differs as error:
        print(f"DIFFERS in {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
