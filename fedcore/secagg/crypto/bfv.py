"""BFV through TenSEAL's SEAL bindings, only for exact sums of slots under a key that the sites share.

Slots are polynomial coefficients (no batching: sums need none), the plain modulus is 2^slot_bits, the
ciphertext modulus one prime, and ciphertexts are symmetric and seeded: half of each is a 64-byte seed.
Invariant: decrypting the fold of n fresh ciphertexts gives the integer sum (the proof is in `packing.py`).
BFV: Fan & Vercauteren 2012 (ePrint 2012/144), section 4; seeded ciphertexts: SEAL's manual.

The SEAL bindings read and write file paths only, with zstd compression. Here the words are extracted from
those streams and packed to the modulus' own bits: 54-bit words, four of them in 27 bytes.
Secrets and public parameters are two types. `PublicContext` is public; the byte form of a `SecretContext` is
the payload of a key epoch, which is only sent sealed from site to site.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import struct
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedcore.errors import ChunkRefused, EnvelopeRefused, PlanRefused, Unavailable
from fedcore.secagg.crypto import check_removal
from fedcore.secagg.crypto.bfv_chunks import (
    FULL,
    SEED_BYTES,
    SEEDED,
    blocks_of,
    places,
    read_chunk,
    read_summed,
    seeds_are_shorter,
    write_chunk,
    write_summed,
)
from fedcore.secagg.crypto.secret import Secret
from fedcore.secagg.crypto.sumtag import GROUP_SECRET_BYTES, GroupSecret
from fedcore.secagg.encode.bitpack import Words
from fedcore.secagg.packing import RINGS, SEAL_PLAIN_MODULUS_BITS, Packing, Ring
from fedcore.types import Json, Slots

MOST_AHEAD = 1024
"""Encryptions of zero that a site makes ahead: 16 MiB of memory at N = 2048, the vector of four million parameters."""

MOST_LATER = 16
"""Seeds of a ciphertext that a fold keeps before it expands them: 1 KiB, so its memory does not grow with the sites."""

_SEAL_HEADER = struct.Struct("<HBBBBHQ")
_SEAL_MAGIC, _SEAL_HEADER_SIZE = 0xA15E, 16
_CIPHERTEXT_WORDS_AT = 97
"""Offset of the first word inside an uncompressed ciphertext stream, after its outer header."""
_CIPHERTEXT_SIZES = 73
"""Its first bytes: level, form, sizes and scale; SEAL's version comes after them."""
_SEED_BLOCK = 81
"""The seed of a seeded ciphertext: an inner header (16), the generator's type (1), the seed (64)."""


def load_seal() -> Any:
    """The module `tenseal.sealapi`, or Unavailable with one line if it is missing or broken."""
    try:
        from tenseal import sealapi
    except Exception as error:  # a broken wheel raises ImportError, OSError or worse
        reason = " ".join(f"{type(error).__name__}: {error}".split())  # loaders write several lines
        raise Unavailable(
            f"protections 'encrypted' and 'layered': tenseal cannot be used here ({reason})",
            remedy="install tenseal 0.3.16 or newer; `--protection masked` and `plain` run without it",
        ) from error
    return sealapi


class Courier:
    """Reads and writes SEAL objects through one path, since its bindings accept paths only.

    The path is a memfd where the system has one, so that nothing is written to a disk. Elsewhere (macOS) it is
    a file of mode 0600 in a directory of mode 0700, emptied after every use and removed on `close`.
    For one process: a forked child would overwrite its parent's path. Its threads take turns: one may still open the
    sum of a round that was given up while another protects the next vector.
    """

    def __init__(self, *, force_file: bool = False) -> None:
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._pid, self._busy = os.getpid(), threading.Lock()
        if hasattr(os, "memfd_create") and Path("/proc/self/fd").is_dir() and not force_file:
            self._fd = os.memfd_create("fedcore", os.MFD_CLOEXEC)
            self._path = f"/proc/self/fd/{self._fd}"
        else:
            self._folder = tempfile.TemporaryDirectory(prefix="fedcore-")
            self._path = str(Path(self._folder.name) / "seal")
            self._fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)

    @property
    def kind(self) -> str:
        return "memfd" if self._folder is None else "private temporary file"

    def close(self) -> None:
        """Release the path. Idempotent."""
        if self._fd < 0:
            return
        if os.getpid() == self._pid:  # a forked child must not touch its parent's path
            os.ftruncate(self._fd, 0)
            if self._folder is not None:
                self._folder.cleanup()
        os.close(self._fd)
        self._fd = -1

    def __del__(self, ending: Callable[[], bool] = sys.is_finalizing) -> None:
        # At interpreter exit modules may be unloaded already, and the system closes open files.
        if getattr(self, "_fd", -1) >= 0 and not ending():
            self.close()

    def take(self, seal_object: Any) -> bytes:
        """The uncompressed bytes that `seal_object.save` writes, without the outer header."""
        from backports import zstd

        self.refuse_forked()
        with self._busy:
            try:
                seal_object.save(self._path)
                saved = os.pread(self._fd, os.fstat(self._fd).st_size, 0)
            finally:
                os.ftruncate(self._fd, 0)
        return zstd.ZstdDecompressor().decompress(saved[_SEAL_HEADER_SIZE:])

    def give(self, seal_object: Any, context: Any, body: bytes) -> Any:
        """Load an uncompressed stream into `seal_object`; SEAL validates it against `context`."""
        self.refuse_forked()
        with self._busy:
            try:
                os.pwrite(self._fd, _seal_header(_SEAL_HEADER_SIZE + len(body)) + body, 0)
                seal_object.load(context, self._path)
            finally:
                os.ftruncate(self._fd, 0)
        return seal_object

    def refuse_forked(self) -> None:
        """Raise Unavailable in another process than that which made it."""
        if os.getpid() != self._pid:
            raise Unavailable(
                f"ciphertext path: found process {os.getpid()}, expected {self._pid}, which opened it",
                remedy="start workers by spawn, or make the sealer after the fork",
            )


def _seal_header(size: int) -> bytes:
    """SEAL's 16-byte header of an uncompressed stream of `size` bytes, itself included."""
    return _SEAL_HEADER.pack(_SEAL_MAGIC, _SEAL_HEADER_SIZE, 4, 3, 0, 0, size)


class PublicContext:
    """Ring and plain modulus: all that the coordinator has. The only context with a byte form."""

    def __init__(self, ring: Ring, slot_bits: int) -> None:
        if not 1 <= slot_bits < SEAL_PLAIN_MODULUS_BITS:
            raise PlanRefused(
                f"plain modulus: found 2^{slot_bits}, expected at most 2^{SEAL_PLAIN_MODULUS_BITS - 1}"
            )
        self.ring, self.slot_bits = ring, slot_bits
        sealapi = load_seal()
        parameters = sealapi.EncryptionParameters(sealapi.SCHEME_TYPE.BFV)
        parameters.set_poly_modulus_degree(ring.degree)
        try:
            parameters.set_coeff_modulus([sealapi.Modulus(ring.modulus)])
        except (RuntimeError, ValueError) as error:
            raise PlanRefused(f"ring: SEAL refuses its modulus: {error}") from error
        parameters.set_plain_modulus(1 << slot_bits)
        self.seal = sealapi.SEALContext(parameters, False, sealapi.SEC_LEVEL_TYPE.TC128)
        if not self.seal.parameters_set():
            raise PlanRefused(f"ring: SEAL refuses it: {self.seal.parameters_error_message()}")
        self.api = sealapi

    @classmethod
    def of(cls, packing: Packing) -> PublicContext:
        """The context of a solved packing; PlanRefused under `plain`, which has no ring."""
        if packing.ring is None:
            raise PlanRefused(
                "packing: found no ring, expected one: the plan's protection is `plain`"
            )
        return cls(packing.ring, packing.slot_bits)

    def to_bytes(self) -> bytes:
        """16 bytes: degree, plain modulus bits, modulus."""
        return struct.pack("<IIQ", self.ring.degree, self.slot_bits, self.ring.modulus)

    @classmethod
    def from_bytes(cls, data: bytes) -> PublicContext:
        """The inverse of `to_bytes`; raises ChunkRefused on another length, PlanRefused on bad values."""
        if len(data) != 16:
            raise ChunkRefused(f"public context: found {len(data)} bytes, expected 16")
        degree, slot_bits, modulus = struct.unpack("<IIQ", data)
        return cls(Ring(degree, modulus), slot_bits)

    @cached_property
    def digest(self) -> bytes:
        """8 bytes in every chunk, so that chunks under other parameters are refused with this reason."""
        return hashlib.sha256(b"fedcore bfv" + self.to_bytes()).digest()[:8]

    @cached_property
    def prefixes(self) -> dict[int, bytes]:
        """The bytes before the words of a ciphertext that carries one (seeded) or two polynomials, by kind."""
        level = struct.pack("<4Q", *self.seal.first_parms_id())
        sizes = struct.pack("<BQQQdQ", 0, 2, self.ring.degree, 1, 1.0, 1)
        words = {kind: kind * self.ring.degree for kind in (SEEDED, FULL)}
        return {
            kind: level + sizes + _seal_header(24 + 8 * count) + struct.pack("<Q", count)
            for kind, count in words.items()
        }

    def __reduce__(self) -> tuple[Any, ...]:
        return PublicContext.from_bytes, (self.to_bytes(),)


class SecretContext(Secret):
    """The sites' secrets of one key epoch: the BFV secret key and the group secret G.

    One site draws it; the others make it from the payload. Prints redacted, cannot be pickled or compared.
    """

    def __init__(
        self, public: PublicContext, key: Any = None, group: GroupSecret | None = None
    ) -> None:
        # Both come from the operating system: SEAL's default generator is seeded from it (PROTOCOL Z).
        self.public = public
        self.group = GroupSecret() if group is None else group
        self._key = public.api.KeyGenerator(public.seal).secret_key() if key is None else key
        self.encryptor = public.api.Encryptor(public.seal, self._key)
        self.decryptor = public.api.Decryptor(public.seal, self._key)

    def to_payload(self) -> bytes:
        """The N words of the key in SEAL's form, then G: 8 N + 32 bytes (PROTOCOL E)."""
        with contextlib.closing(Courier()) as courier:
            body = courier.take(self._key)
        prefix = _key_prefix(self.public)
        if body[: len(prefix)] != prefix:
            raise Unavailable(
                "tenseal: its SEAL writes keys in a layout unknown here",
                remedy="install the tenseal that constraints.txt pins",
            )
        return body[len(prefix) :] + self.group.to_bytes()

    @classmethod
    def from_payload(
        cls, public: PublicContext, payload: bytes, *, sender: str = "this site"
    ) -> SecretContext:
        """The inverse of `to_payload`, under the same parameters.

        Raises EnvelopeRefused on another length or a word that is no coefficient, before SEAL reads it.
        sender: the party at fault; omitted for the site's own journal.
        """
        size = 8 * public.ring.degree
        if len(payload) != size + GROUP_SECRET_BYTES:
            expected = size + GROUP_SECRET_BYTES
            raise EnvelopeRefused("key epoch", f"{len(payload)} bytes", expected, sender)
        words = np.frombuffer(payload, "<u8", public.ring.degree)
        if (words >= public.ring.modulus).any() or not words.any():
            found = "words that are no key of this ring"
            raise EnvelopeRefused("key epoch", found, "a secret key", sender)
        group = GroupSecret.from_bytes(payload[size:], sender=sender)
        with contextlib.closing(Courier()) as courier:
            key = courier.give(
                public.api.SecretKey(), public.seal, _key_prefix(public) + payload[:size]
            )
        return cls(public, key, group)


def _key_prefix(public: PublicContext) -> bytes:
    """The bytes that SEAL writes before the N words of a secret key: a plaintext in transformed form."""
    degree = public.ring.degree
    level = struct.pack("<4Q", *public.seal.key_parms_id())
    sizes = struct.pack("<Qd", degree, 1.0)
    return level + sizes + _seal_header(24 + 8 * degree) + struct.pack("<Q", degree)


class EncryptedSealer:
    """The site's side of `encrypted` and `layered`: fresh seeded ciphertexts up, decrypted sums down.

    Under `layered` the given slots have masks already, so they may be any residues.
    """

    def __init__(self, secret: SecretContext, courier: Courier | None = None) -> None:
        self._secret, self._public = secret, secret.public
        self._courier = courier or Courier()
        self._zero = self._public.api.Plaintext("0")
        self._ahead: list[tuple[Words, bytes]] = []
        """Encryptions of zero that no vector was added to yet."""

    def prepare(self, slots: int, most: int = MOST_AHEAD) -> None:
        """Encrypt zeros for a vector of so many slots, `most` ciphertexts in all, while nothing else is to be done:
        `protect` adds the slots to them. Each is used for one ciphertext of one vector."""
        blocks = min(blocks_of(self._public.ring, slots), most)
        while len(self._ahead) < blocks:
            self._ahead.append(self._encrypted_zero())

    def protect(self, slots: Slots) -> Iterator[bytes]:
        """(s,) uint64 below 2^slot_bits, s a multiple of 8, to chunks of up to 64 ciphertexts.

        Raises Unavailable in a forked child: with the encryptions of zero that its parent has too, the difference of
        two ciphertexts would be that of two plaintexts.
        """
        self._courier.refuse_forked()
        degree = self._public.ring.degree
        for place in places(self._public.ring, len(slots)):
            words = np.empty((1, place.count, degree), dtype=np.uint64)
            seeds = []
            for row in words[0]:
                row[:], seed = self._ahead.pop() if self._ahead else self._encrypted_zero()
                seeds.append(seed)
            start = place.first * degree
            used = words.reshape(-1)[: place.slots]
            _add(self._public, used, _scaled(self._public, slots[start : start + place.slots]))
            yield write_chunk(self._public, SEEDED, place, seeds, words)

    def _encrypted_zero(self) -> tuple[Words, bytes]:
        """The words of the first polynomial, and the seed of the second, of a fresh encryption of zero."""
        body = self._courier.take(self._secret.encryptor.encrypt_symmetric(self._zero))
        return _words_of(self._public, SEEDED, body), body[-SEED_BYTES:]

    def open(
        self, chunks: Iterable[bytes], slots: int, each: Callable[[Slots], None] = lambda _: None
    ) -> Slots:
        """each: called with the slots of every chunk, in order, before the next chunk is asked for."""
        awaited, received = places(self._public.ring, slots), 0
        blocks, degree = blocks_of(self._public.ring, slots), self._public.ring.degree
        rows = np.zeros((blocks, degree), dtype=np.uint64)
        for received, chunk in enumerate(chunks, start=1):
            if received > len(awaited):
                raise ChunkRefused(f"sum: found more than the expected {len(awaited)} chunks")
            place = awaited[received - 1]
            summed = read_summed(self._public, chunk, place) if len(awaited) == 1 else None
            if summed is not None:
                for row, (seeds, polynomial) in enumerate(zip(*summed, strict=True)):
                    self._decrypt(self._summed(seeds, polynomial), rows[row])
                each(rows.reshape(-1)[:slots])
                continue
            _, (seconds, firsts) = read_chunk(self._public, FULL, chunk, place)
            for row, both in enumerate(zip(firsts, seconds, strict=True), start=place.first):
                tail = np.concatenate(both).astype("<u8").tobytes()
                self._decrypt(_load(self._courier, self._public, FULL, tail), rows[row])
            start = place.first * degree
            each(rows.reshape(-1)[start : start + place.slots])
        if received != len(awaited):
            raise ChunkRefused(f"sum: found {received} chunks, expected {len(awaited)}")
        return rows.reshape(-1)[:slots]

    def _summed(self, seeds: NDArray[np.uint8], words: Words) -> Any:
        """The sum of ciphertexts: the words of its first polynomial, and the sum of what the seeds expand to."""
        first, *others = (each.tobytes() for each in seeds)
        total = _load_seeded(self._courier, self._public, words, first)
        none, evaluator = np.zeros_like(words), self._public.api.Evaluator(self._public.seal)
        for seed in others:
            other = _load_seeded(self._courier, self._public, none, seed)
            evaluator.add_inplace(total, other)
        return total

    def _decrypt(self, ciphertext: Any, out: Slots) -> None:
        plain = self._public.api.Plaintext()
        self._secret.decryptor.decrypt(ciphertext, plain)
        # SEAL drops leading zeros, so the stream may have fewer than N coefficients.
        count = plain.coeff_count()
        if count:
            out[:count] = np.frombuffer(self._courier.take(plain), "<u8")[-count:]


def _scaled(public: PublicContext, slots: Slots) -> Words:
    """Plaintexts as SEAL adds them to and subtracts them from a ciphertext: round(q m / t), below q. (s,) uint64.

    With q = 2^B - c and t = 2^b, floor((q m + t/2) / t) is 2^(B-b) m less floor((c m + t/2 - 1) / t); c m may have more
    than 64 bits, so it is shifted in two parts.
    """
    ring, bits = public.ring, public.slot_bits
    short = np.uint64((1 << ring.modulus_bits) - ring.modulus)
    high = slots >> np.uint64(16)
    low = (slots & np.uint64(0xFFFF)) * short + np.uint64((1 << bits >> 1) - 1)
    part = min(bits, 16)  # below 16 bits there is no high part
    less = (high * short + (low >> np.uint64(part))) >> np.uint64(bits - part)
    return (slots << np.uint64(ring.modulus_bits - bits)) - less


def _add(public: PublicContext, words: Words, more: Words) -> None:
    """words += more mod q, in place, of words below q (`more` may be q)."""
    modulus = np.uint64(public.ring.modulus)
    words += more
    np.subtract(words, modulus, out=words, where=words >= modulus)


def _words_of(public: PublicContext, kind: int, body: bytes) -> Words:
    """The words of a ciphertext that SEAL has just written, at their offset in its layout. Raises Unavailable
    if the head of the stream differs from SEAL 4's: a later SEAL may change it."""
    expected = public.prefixes[kind]
    sizes, count = slice(_CIPHERTEXT_SIZES), slice(_CIPHERTEXT_WORDS_AT - 8, _CIPHERTEXT_WORDS_AT)
    if body[sizes] != expected[sizes] or body[count] != expected[count]:
        raise Unavailable(
            "tenseal: its SEAL writes ciphertexts in a layout unknown here",
            remedy="install the tenseal that constraints.txt pins",
        )
    return np.frombuffer(body, "<u8", kind * public.ring.degree, _CIPHERTEXT_WORDS_AT)


def _load(courier: Courier, public: PublicContext, kind: int, tail: bytes) -> Any:
    ciphertext = public.api.Ciphertext(public.seal)
    try:
        return courier.give(ciphertext, public.seal, public.prefixes[kind] + tail)
    except (RuntimeError, ValueError) as error:
        raise ChunkRefused(f"ciphertext: SEAL refuses it ({error})") from error


def _load_seeded(courier: Courier, public: PublicContext, words: Words, seed_block: bytes) -> Any:
    """A ciphertext of these words and what the seed expands to."""
    tail = words.astype("<u8").tobytes() + _seal_header(_SEED_BLOCK) + seed_block
    return _load(courier, public, SEEDED, tail)


class EncryptedFold:
    """The coordinator's side of `encrypted` and `layered`: one running sum of ciphertexts.

    Memory is one sum of `slots` slots, for any number of sites. It has public parameters only.
    The words of first polynomials are added as they come. What the seeds of the second ones expand to takes SEAL ten
    times longer and is refused no more, so it is added later: by `expand_ahead`, or when the sum is asked for.
    With `first_chunk` it is the fold of a part: `slots` slots from that chunk on.
    seeds: whether `total` gives the summands' seeds in place of the second polynomial's words, where these are longer:
    for a vector of one chunk, whose transfer takes longer than a site takes to expand them.
    """

    def __init__(
        self,
        public: PublicContext,
        slots: int,
        courier: Courier | None = None,
        *,
        first_chunk: int = 0,
        seeds: bool = False,
    ) -> None:
        self._public, self._slots, self._first_chunk = public, slots, first_chunk
        self._courier = courier or Courier()
        self._places = places(public.ring, slots, first_chunk)
        self._evaluator = public.api.Evaluator(public.seal)
        shape = blocks_of(public.ring, slots), public.ring.degree
        self._firsts, self._seconds = np.zeros(shape, np.uint64), np.zeros(shape, np.uint64)
        self._summands = [0] * len(self._firsts)
        self._later: list[list[bytes]] = [[] for _ in self._summands]
        """For each ciphertext, seeds that are not expanded yet."""
        self._expanded: list[Any] = [None] * len(self._summands)
        """For each ciphertext, what seeds expanded to that is not in `_seconds` yet: a ciphertext of SEAL's."""
        self._keeps_seeds, self._removed = seeds, False

    @property
    def _first(self) -> int:
        """The vector's ciphertext with which this part begins."""
        return self._places[0].first

    def add(self, index: int, chunk: bytes) -> None:
        if self._removed:
            raise ChunkRefused(f"chunk {index}: the masks are already off this sum")
        lowest, count = self._first_chunk, len(self._places)
        if not lowest <= index < lowest + count:
            raise ChunkRefused(f"chunk {index}: expected chunks {lowest} to {lowest + count - 1}")
        place = self._places[index - lowest]
        seeds, (words,) = read_chunk(self._public, SEEDED, chunk, place)
        self._accumulate(place.first - self._first, words, [[each.tobytes()] for each in seeds])

    def merge(self, other: EncryptedFold) -> None:
        """Add another fold's sum of the same part; the other must not be used afterwards. Raises ChunkRefused
        after `remove`, or if the other has gaps."""
        other._refuse_gaps()
        if self._removed or other._removed:
            raise ChunkRefused("sum: the masks are already off")
        self._accumulate(0, other._firsts, other._later)
        _add(self._public, self._seconds, other._seconds)
        for place, found in enumerate(other._expanded):
            self._summands[place] += other._summands[place] - len(other._later[place])
            if found is not None:
                self._add_expanded(place, found)

    def _accumulate(self, first: int, words: Words, seeds: Sequence[Sequence[bytes]]) -> None:
        """Add ciphertexts to those of the sum from index `first` on: the words of their first polynomials, and the
        seeds of each."""
        _add(self._public, self._firsts[first : first + len(words)], words)
        for place, more in enumerate(seeds, start=first):
            self._summands[place] += len(more)
            self._later[place].extend(more)
            if len(self._later[place]) > MOST_LATER and not self._keeps_seeds:
                self._expand(place)

    def _expand(self, place: int) -> None:
        """Expand the seeds of a ciphertext, and add them up."""
        none = np.zeros(self._public.ring.degree, np.uint64)
        for seed in self._later[place]:
            self._add_expanded(place, _load_seeded(self._courier, self._public, none, seed))
        self._later[place] = []

    def _add_expanded(self, place: int, found: Any) -> None:
        if self._expanded[place] is None:
            self._expanded[place] = found
        else:
            self._evaluator.add_inplace(self._expanded[place], found)

    def _read(self, place: int) -> Words:
        """The words of the second polynomial of a ciphertext of the sum."""
        self._expand(place)
        seconds: Words = self._seconds[place]
        if (found := self._expanded[place]) is not None:
            words = _words_of(self._public, FULL, self._courier.take(found))
            _add(self._public, seconds, words[self._public.ring.degree :])
            self._expanded[place] = None
        return seconds

    def expand_ahead(self) -> bool:
        """Expand the seeds of one ciphertext, as `total` would; whether there were any."""
        place = next((at for at, each in enumerate(self._later) if each), None)
        if place is None or self._keeps_seeds:
            return False
        self._expand(place)
        return True

    def read_ahead(self) -> bool:
        """Read what the seeds of one ciphertext expanded to, as `total` would; whether there was one. Best once no more
        vectors are expected: each that comes later has to be read again."""
        place = next((at for at, each in enumerate(self._expanded) if each is not None), None)
        if place is None:
            return False
        self._read(place)
        return True

    def remove(self, mask: Slots) -> None:
        """One plaintext subtraction a ciphertext; `packing.py` includes its rounding in the headroom."""
        check_removal(mask, self._slots, removed=self._removed)
        self._refuse_gaps()
        self._removed = True
        residues = mask & np.uint64((1 << self._public.slot_bits) - 1)
        used = self._firsts.reshape(-1)[: self._slots]
        _add(
            self._public,
            used,
            np.uint64(self._public.ring.modulus) - _scaled(self._public, residues),
        )

    def _refuse_gaps(self) -> None:
        for place, summands in enumerate(self._summands):
            if not summands:
                raise ChunkRefused(f"sum: ciphertext {self._first + place} was never added")

    def total(self) -> Iterator[bytes]:
        self._refuse_gaps()
        degree, summands = self._public.ring.degree, set(self._summands)
        if self._keeps_seeds and seeds_are_shorter(self._public.ring, max(summands)):
            if len(summands) > 1:
                raise ChunkRefused("sum: its ciphertexts are of different numbers of vectors")
            in_order = list(map(sorted, self._later))  # the same bytes, whatever was folded first
            (place,) = self._places
            yield write_summed(self._public, place, in_order, self._firsts)
            return
        for place in self._places:
            first = place.first - self._first
            words = np.empty((2, place.count, degree), dtype=np.uint64)
            words[1] = self._firsts[first : first + place.count]
            for row in range(place.count):
                words[0, row] = self._read(first + row)
            yield write_chunk(self._public, FULL, place, [], words)


def self_test() -> Json:
    """A SEAL self-test for `fedcore doctor`: three encrypted vectors, their sum exact or not."""
    public = PublicContext(RINGS[0], 40)
    courier = Courier()
    sealer = EncryptedSealer(SecretContext(public), courier)
    fold = EncryptedFold(public, 2048)
    rows = [np.full(2048, value, dtype=np.uint64) for value in (1, 2, 1 << 38)]
    for row in rows:
        for index, chunk in enumerate(sealer.protect(row)):
            fold.add(index, chunk)
    exact = bool((sealer.open(fold.total(), 2048) == sum(rows)).all())
    return {"exact": exact, "path": courier.kind}
