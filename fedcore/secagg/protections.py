"""What a protection does, and what it requires of a plan: the one module with the names of protections.

All other code tests what a protection does (`masks`, `encrypts`) and never which one it is, so another
one is an entry here and, where it protects vectors in its own way, a `Scheme` of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fedcore.errors import PlanRefused, UnknownName

if TYPE_CHECKING:
    from fedcore.secagg.plan import RoundPlan
    from fedcore.secagg.scheme import Scheme

MIN_SITES = 3
"""With two sites each can compute the other's update from the sum."""

MAX_MASKED_SITES = 64
"""Every pair of sites shares a mask (complete graph): n^2 key agreements, so no more for now."""

RELEASES = ("sites", "coordinator")
"""Who gets the model: the sites alone, or, of a finished job, the coordinator too."""


@dataclass(frozen=True)
class Protection:
    """How vectors are protected on their way to the coordinator.

    masks: pairwise and self masks; the sites agree on keys before they send, and confirm the list of
    survivors before any mask is removed. encrypts: under a key that the sites share, so that the
    coordinator does not see a sum. scheme: what makes a plan's payloads, sealers and folds; None for
    `fedcore.secagg.scheme.Scheme`, which goes by the plan's cipher.
    """

    name: str
    masks: bool = False
    encrypts: bool = False
    scheme: Callable[[RoundPlan], Scheme] | None = None

    @classmethod
    def of(cls, name: str) -> Protection:
        """By its name; an unknown name, from a peer perhaps, protects nothing and is refused like `plain`."""
        return PROTECTIONS.get(name) or cls(name)

    @property
    def protects(self) -> bool:
        """Whether a round is a protocol between parties, with tags and certificates; else vectors are added."""
        return self.masks or self.encrypts

    @property
    def one_key_opens(self) -> bool:
        """Whether a site's key alone opens the vectors that the coordinator holds."""
        return self.encrypts and not self.masks


PROTECTIONS = {
    each.name: each
    for each in (
        Protection("plain"),
        Protection("encrypted", encrypts=True),
        Protection("masked", masks=True),
        Protection("layered", masks=True, encrypts=True),
    )
}
"""{name: protection}, weakest first; `layered` is the default everywhere."""

CIPHERS = ("bfv", "keystream")
"""What encrypts vectors: BFV (ring-LWE), or the words of an AES-256-CTR stream added in the slot ring."""

LATTICES = ("standard", "wide")
"""Rings that `bfv` may use: the cheapest that is proved, or degree 4096 only, far from the table's edge."""

SCHEMES = {
    name if cipher == "bfv" else f"{name}-{cipher}": (name, cipher)
    for name, protection in PROTECTIONS.items()
    for cipher in (CIPHERS if protection.encrypts else CIPHERS[:1])
}
"""Every protection with every cipher it takes: {the name in a benchmark's rows: (protection, cipher)}."""


def masking() -> list[str]:
    """The names of protections with masks."""
    return [each.name for each in PROTECTIONS.values() if each.masks]


def unprotected(protection: str) -> bool:
    """Whether a result's vectors were only added; False for a protection of another version."""
    return protection in PROTECTIONS and not PROTECTIONS[protection].protects


def refuse_unknown(protection: str) -> None:
    """Raise UnknownName for a name that no protection has."""
    if protection not in PROTECTIONS:
        raise UnknownName("protect.protection", protection, PROTECTIONS)


def has_lattice(protection: str, cipher: str) -> bool:
    """Whether vectors travel as BFV ciphertexts, so that sums need a ring and its headroom."""
    return Protection.of(protection).encrypts and cipher == "bfv"


def refuse_cipher(protection: str, cipher: str, lattice: str = "standard") -> None:
    """Raise PlanRefused for a keystream where nothing is encrypted, or a wide lattice where there is none;
    UnknownName for another word."""
    if cipher not in CIPHERS:
        raise UnknownName("protect.cipher", cipher, CIPHERS)
    if lattice not in LATTICES:
        raise UnknownName("protect.lattice", lattice, LATTICES)
    encrypts = Protection.of(protection).encrypts
    if cipher == "keystream" and not encrypts:
        takers = (each.name for each in PROTECTIONS.values() if each.encrypts)
        raise PlanRefused(
            f"protect.cipher: found 'keystream' under {protection!r}, expected it under "
            f"{' or '.join(takers)}: nothing else is encrypted",
            remedy="use `--protection layered`, or leave cipher out",
        )
    if lattice == "wide" and not has_lattice(protection, cipher):
        under = f"the cipher {cipher!r}" if encrypts else repr(protection)
        raise PlanRefused(
            f"protect.lattice: found 'wide' under {under}, expected 'standard': only the cipher 'bfv' "
            "has a lattice",
            remedy="leave lattice out, or use cipher 'bfv' with `--protection layered`",
        )


def refuse_roster(sites: int, protection: str) -> None:
    """Raise PlanRefused for fewer than 3 sites under anything but `plain`, and for more than 64
    under a protection with masks."""
    found = Protection.of(protection)
    if found.masks and sites > MAX_MASKED_SITES:
        raise PlanRefused(
            f"sites: found {sites} under {protection!r}, expected at most {MAX_MASKED_SITES}: every "
            "pair of sites agrees on a mask, and sparser graphs are not in this version",
            remedy="use `--protection encrypted`, or group the sites (`sites.n`)",
        )
    if found.protects and sites < MIN_SITES:
        raise PlanRefused(
            f"sites: found {sites} under {protection!r}, expected at least {MIN_SITES}: "
            "with fewer, the sum shows each site the others' update",
            remedy="add sites, or use `--protection plain` for a trial on one machine",
        )


def refuse_plain(protection: str) -> None:
    """Raise PlanRefused for `plain` in a deployment, where parties are not one process."""
    if not Protection.of(protection).protects:
        raise PlanRefused(
            f"protect.protection: found {protection!r}, expected layered, masked or encrypted",
            remedy="`plain` exists inside one process only: `fedcore simulate --protection plain`",
        )


def refuse_public_metrics(protection: str) -> None:
    """Raise PlanRefused for public metrics under `encrypted` (PROTOCOL R).

    There one key opens every site's own upload, and the sites confirm no list before they open a sum: the
    coordinator must not be answered with anything that was decrypted.
    """
    if Protection.of(protection).one_key_opens:
        raise PlanRefused(
            f"track.public_metrics: found true under {protection!r}, expected false: nothing that was "
            "decrypted goes back to a coordinator that has every site's own ciphertext",
            remedy="use `--protection layered`, or leave public_metrics out: each site still has the "
            "metrics in its own record",
        )


def refuse_release(release: str, protection: str) -> None:
    """Raise PlanRefused for a model that goes to the coordinator under `encrypted` (PROTOCOL R), for the
    reason of `refuse_public_metrics`; UnknownName for another word."""
    if release not in RELEASES:
        raise UnknownName("protect.release", release, RELEASES)
    if release == "coordinator" and Protection.of(protection).one_key_opens:
        raise PlanRefused(
            f"protect.release: found 'coordinator' under {protection!r}, expected 'sites': nothing that "
            "was decrypted goes back to a coordinator that has every site's own ciphertext",
            remedy="use `--protection layered`, or take the model from a site: `fed-site model`",
        )


def refuse_judge(protection: str, *, ends: bool) -> None:
    """Raise PlanRefused for training that may end early under `encrypted` (PROTOCOL R), for the reason of
    `refuse_public_metrics`: when it ends follows from what was decrypted."""
    if ends and Protection.of(protection).one_key_opens:
        raise PlanRefused(
            f"round.judge: found patience or veto under {protection!r}, expected keep alone: the coordinator learns "
            "when training ends, and nothing that was decrypted goes back to one that has every site's own ciphertext",
            remedy='use `--protection layered`, or keep = "best" alone: all rounds are run',
        )
