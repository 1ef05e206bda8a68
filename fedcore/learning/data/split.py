"""Which rows of a site train and which test, and which of too many take part: the site decides (PROTOCOL J, U).

`HashSplit` is what a deployed site has: a keyed hash of each row's content. Whatever a job asks for, the
same rows train, so the difference of two jobs holds none of them; a row stays on its side when others are
added, and identical rows are on one side. `FoldSplit` is the stratified deal of `simulate`, for rehearsals.

Invariant: nothing here depends on a job but the public cap on rows, and two caps choose unrelated subsets,
so their difference is of many rows.
"""

import hashlib
import hmac
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedcore.errors import BadInput
from fedcore.learning.data.groups import codes_of, labels_of
from fedcore.learning.data.rows import Rows
from fedcore.seeds import generator
from fedcore.types import Json

KEY_BYTES = 32

_SIDE, _PICK = b"fedcore split\x00", b"fedcore subsample\x00"
_GROUP = b"fedcore split of groups\x00"


@dataclass(frozen=True)
class FoldSplit:
    """The deal of `simulate`: `folds` stratified folds, of which `fold` is tested on. It follows from a seed
    that is public, so it hides nothing: for trial deployments.

    It depends on the seed, the site and the labels alone, so every arm of a comparison trains on the same rows
    and is tested on the same others.
    """

    seed: int = 0
    fold: int = 0
    folds: int = 5

    def divide(self, rows: Rows, site: str) -> tuple[Rows, Rows]:
        """Deal the rows class by class. Folds are disjoint, cover the rows, and differ by at most one row in size
        and per class. With fewer rows than folds some test parts are empty; a single row is always a training
        row. Raises BadInput for `fold` outside 0..folds-1."""
        if self.folds < 2 or not 0 <= self.fold < self.folds:
            raise BadInput(
                f"fold: found {self.fold} of {self.folds}, expected 0 <= fold < folds and folds >= 2",
                remedy="fold 0 of 5 is the default; a (train, test) pair from task.data needs no folds",
            )
        n, labels = len(rows), rows.labels()
        deal = generator(self.seed, 0, site, "split")
        if rows.groups is not None:
            of_group = self._of_group(codes := codes_of(rows.groups), labels, deal)
            return _parted(rows, (of_group[codes] == self.fold) & (len(of_group) > 1))
        of_row = np.empty(n, dtype=np.int64)
        dealt = 0
        for label in [None] if labels is None else np.unique(labels).tolist():
            members = np.arange(n) if labels is None else np.flatnonzero(labels == label)
            # Continue where the last class stopped; else every remainder would be in fold 0.
            of_row[deal.permutation(members)] = (np.arange(len(members)) + dealt) % self.folds
            dealt += len(members)
        return _parted(rows, (of_row == self.fold) & (n > 1))

    def _of_group(
        self, codes: NDArray[np.int64], labels: NDArray[np.int64] | None, deal: np.random.Generator
    ) -> NDArray[np.int64]:
        """The fold of each group: class by class, the large ones first, each into the fold with the fewest rows of
        its class, of equals the fewest rows."""
        sizes, classes = np.bincount(codes), labels_of(codes, labels)
        found, rows = np.empty(len(sizes), dtype=np.int64), np.zeros(self.folds, dtype=np.int64)
        for label in np.unique(classes):
            of_class = np.zeros(self.folds, dtype=np.int64)
            members = deal.permutation(np.flatnonzero(classes == label))
            for group in members[np.argsort(-sizes[members], kind="stable")]:
                fold = int(np.lexsort((rows, of_class))[0])
                found[group] = fold
                of_class[fold] += sizes[group]
                rows[fold] += sizes[group]
        return found

    def ranks(self, rows: Rows, site: str, cap: int) -> list[bytes]:
        """By position: the rows of a rehearsal are files that do not grow."""
        key = hashlib.sha256(f"fedcore rehearsal {self.seed} {site}".encode()).digest()
        return [_picked(key, cap, index.to_bytes(8, "big")) for index in range(len(rows))]

    def to_json(self) -> Json:
        return {"method": "folds", "seed": self.seed, "fold": self.fold, "folds": self.folds}


@dataclass(frozen=True)
class HashSplit:
    """HMAC-SHA256 of each row's canonical bytes under a key of the site. test: the share to test on."""

    key: bytes = field(repr=False)
    test: float

    def __post_init__(self) -> None:
        if len(self.key) != KEY_BYTES or not 0 < self.test < 1:
            raise BadInput(
                f"split: found a key of {len(self.key)} bytes and test = {self.test}, expected "
                f"{KEY_BYTES} bytes and a share between 0 and 1"
            )

    def divide(self, rows: Rows, site: str) -> tuple[Rows, Rows]:
        """Rows of one group go by the hash of its id. Where every row would be tested on, the ones with the least
        hash train. Raises BadInput for rows without a canonical form."""
        if rows.groups is None:
            sides = [hmac.digest(self.key, _SIDE + each, "sha256") for each in _digests(rows, site)]
        else:
            keyed = {
                group: hmac.digest(self.key, _GROUP + group, "sha256")
                for group in set(rows.groups.tolist())
            }
            sides = [keyed[group] for group in rows.groups.tolist()]
        limit = int(self.test * 2.0**64).to_bytes(9, "big")[1:]
        tested = np.array([side[:8] < limit for side in sides], dtype=bool)
        if tested.all():
            least = min(sides)
            tested = np.array([side != least for side in sides], dtype=bool)
        return _parted(rows, tested)

    def ranks(self, rows: Rows, site: str, cap: int) -> list[bytes]:
        """By content, and for identical rows by how many came before."""
        seen: defaultdict[bytes, Iterator[int]] = defaultdict(count)
        return [
            _picked(self.key, cap, each + next(seen[each]).to_bytes(8, "big"))
            for each in _digests(rows, site)
        ]

    def to_json(self) -> Json:
        return {"method": "hash", "key": self.key.hex(), "test": self.test}


@dataclass(frozen=True)
class ValidationPart:
    """The share of a simulated site's training rows that no arm trains on, so that rounds, rates and stopping are
    chosen on rows that are neither trained nor tested on.

    Stratified as the folds are: of each class the share, rounded so that the whole part is off by at most half a
    row. It depends on the seed, the fold, the site and the labels alone. A site too small for one row of it has
    none, and at least one row trains.
    """

    share: float
    seed: int
    fold: int

    def divide(self, rows: Rows, site: str) -> tuple[Rows, Rows]:
        """(rows that train, rows of the validation part)."""
        n, labels = len(rows), rows.labels()
        deal = generator(self.seed, self.fold, site, "validation")
        if rows.groups is not None:
            return _parted(rows, self._groups_apart(codes_of(rows.groups), labels, deal))
        apart = np.zeros(n, dtype=bool)
        seen = taken = 0
        for label in [None] if labels is None else np.unique(labels).tolist():
            members = np.arange(n) if labels is None else np.flatnonzero(labels == label)
            seen += len(members)
            wanted = min(int(self.share * seen + 0.5), n - 1) - taken
            apart[deal.permutation(members)[:wanted]] = True
            taken += wanted
        return _parted(rows, apart)

    def _groups_apart(
        self, codes: NDArray[np.int64], labels: NDArray[np.int64] | None, deal: np.random.Generator
    ) -> NDArray[np.bool_]:
        """(rows,) whole groups, class by class, as long as more than half of the next one is still wanted."""
        sizes, classes = np.bincount(codes), labels_of(codes, labels)
        apart = np.zeros(len(sizes), dtype=bool)
        seen = taken = 0
        for label in np.unique(classes):
            members = deal.permutation(np.flatnonzero(classes == label))
            seen += int(sizes[members].sum())
            for group in members:
                if taken + sizes[group] / 2 < self.share * seen and apart.sum() + 1 < len(sizes):
                    apart[group] = True
                    taken += int(sizes[group])
        return apart[codes]


Split = FoldSplit | HashSplit
"""The rule by which one site splits its rows: `divide` gives (train, test) with at least one training row, `ranks`
a keyed number for each row, which the cap is part of. `to_json` has the key: for the site's own processes only."""


def capped(
    split: Split, rows: Rows, test: Rows | None, site: str, cap: int | None
) -> tuple[Rows, Rows | None]:
    """`subsample` where there is a cap."""
    return (rows, test) if cap is None else subsample(split, rows, test, site, cap)


def divided(
    split: Split, rows: Rows, test: Rows | None, site: str, validation: ValidationPart | None
) -> tuple[Rows, Rows, Rows | None]:
    """(rows that train, rows that test, rows of the validation part or None). test: a part that the task brought."""
    train, tested = (rows, test) if test is not None else split.divide(rows, site)
    if validation is None:
        return train, tested, None
    train, apart = validation.divide(train, site)
    return train, tested, apart


def split_from_json(value: Json) -> Split:
    """The inverse of `to_json`. Raises BadInput."""
    try:
        about = {key: part for key, part in value.items() if key != "method"}
        if value["method"] == "folds":
            return FoldSplit(**about)
        if value["method"] == "hash":
            return HashSplit(bytes.fromhex(about["key"]), float(about["test"]))
    except (KeyError, TypeError, ValueError) as error:
        raise BadInput(f"split: found {type(error).__name__} in its description") from error
    raise BadInput(f"split: found method {value['method']!r}, expected 'hash' or 'folds'")


def _parted(rows: Rows, tested: NDArray[np.bool_]) -> tuple[Rows, Rows]:
    """(train, test)."""
    train, test = (np.flatnonzero(chosen).astype(np.int64) for chosen in (~tested, tested))
    return rows.take(train), rows.take(test)


def _digests(rows: Rows, site: str) -> list[bytes]:
    try:
        return rows.digests()
    except BadInput as error:
        raise BadInput(f"site {site}: {error}", remedy=error.remedy) from error


def _picked(key: bytes, cap: int, row: bytes) -> bytes:
    return hmac.digest(key, _PICK + cap.to_bytes(8, "big") + row, "sha256")


def subsample(
    split: Split, rows: Rows, test: Rows | None, site: str, cap: int
) -> tuple[Rows, Rows | None]:
    """At most `cap` rows, the test rows that a task brought itself included, in their order.

    A site with more rows than the public cap takes part with a subset, without reporting it (PROTOCOL U).
    At least one training row is kept.
    """
    total = len(rows) + (0 if test is None else len(test))
    if total <= cap:
        return rows, test
    ranks = split.ranks(rows, site, cap)
    ranks += [] if test is None else split.ranks(test, f"{site} test", cap)
    order: list[Any] = sorted(range(total), key=ranks.__getitem__)
    picked = np.array(sorted(order[:cap]), dtype=np.int64)
    if picked[0] >= len(rows):  # only test rows: one of them gives way
        picked = np.array([min(range(len(rows)), key=ranks.__getitem__), *picked[1:]])
    kept = rows.take(picked[picked < len(rows)])
    return kept, None if test is None else test.take(picked[picked >= len(rows)] - len(rows))
