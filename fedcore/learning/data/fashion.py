"""Built-in task `fashion`: Fashion-MNIST, 70,000 pictures of clothes in ten classes, dealt to n sites.

Source and licence are in fashion.PROVENANCE.md beside the file. 1,400 pictures come with Fedcore, the whole data set
does not (docs/tasks.md).

Invariant: the partition is a function of (n, by, alpha, seed, rows); a picture of the data set's own test part is a
test row at whichever site it comes to. Pixels are scaled by the public maximum 255, so no statistics need to travel.
"""

import gzip
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from fedcore.errors import BadInput
from fedcore.learning.data.data_files import find, folder, verified
from fedcore.learning.data.partition import split_places
from fedcore.learning.task import Task

FILE = Path(__file__).with_name("fashion.gz")
"""One byte for each label, then 784 for each picture: the first 1,200 of the training part, the first 200 of the test
part."""

SHA256 = "c06757d6f9f92c409346573f61c0ad96ad77701695bb597f0fd8729b7ac2ac62"

WHOLE = {
    "train-labels-idx1-ubyte.gz": "0ae29f65d86684f32d1b9c85147786c547b9c6aebcaf235f0400a0cce308b056",
    "train-images-idx3-ubyte.gz": "b0564c3eedabfbf835052cff8503ea422014ce006caf5b757f851416ee8300c7",
    "t10k-labels-idx1-ubyte.gz": "8d3605d196f4be44669e46906da9733c8131fef761fdbfec72c424d5222f1a05",
    "t10k-images-idx3-ubyte.gz": "cc1d090a38ace84dfa1aa66e3ada7c336ef481a96936906477e6dd344da56eaa",
}
"""The files of the whole data set, and the SHA-256 of each."""

DEBIAN = Path("/usr/share/datasets/fashion-mnist")
"""Where Debian's package dataset-fashion-mnist has them."""

ALL_ROWS, ROWS_HERE = 70_000, 1_400

PIXEL_MAXIMUM, SIDE = 255.0, 28

_REMEDY = (
    "`apt-get install dataset-fashion-mnist`, or `scripts/fetch-data fashion` without root; "
    f"--sites.rows {ROWS_HERE} takes the pictures that come with Fedcore"
)


def sites(
    n: int = 10,
    by: str = "iid",
    alpha: float | None = None,
    seed: int = 0,
    rows: int | None = None,
) -> dict[str, Any]:
    """`{"site-01": ((X, y), (X, y)), ...}`: train and test part of each site; X (rows, 1, 28, 28) float32 in [0, 1],
    y (rows,) int64.

    rows: the first so many pictures, six sevenths of them for training, as in the whole; None: all 70,000.
    Raises BadInput where the files are missing or changed, and for a site without a picture to train on.
    """
    x, y, training = _pictures(ALL_ROWS if rows is None else rows)
    found = {}
    for name, places in split_places((x, y), n, by, alpha, seed).items():
        train, test = places[places < training], places[places >= training]
        if not len(train):
            raise BadInput(
                f"task fashion: found no picture to train on at {name}, expected some",
                remedy="another sites.seed, more rows, or a larger sites.alpha",
            )
        found[name] = (x[train], y[train]), (x[test], y[test])
    return found


def _pictures(rows: int) -> tuple[NDArray[np.float32], NDArray[np.int64], int]:
    """The first pictures of the training part, then those of the test part, and how many are the former's."""
    if not 7 <= rows <= ALL_ROWS:
        raise BadInput(f"sites.rows: found {rows}, expected 7 to {ALL_ROWS:,}")
    of_train, of_test, images, labels = _here() if rows <= ROWS_HERE else _whole()
    test = rows // 7
    picked = np.r_[0 : rows - test, of_train : of_train + test]
    assert of_test >= test
    x = images[picked].reshape(-1, 1, SIDE, SIDE).astype(np.float32) / np.float32(PIXEL_MAXIMUM)
    return x, labels[picked].astype(np.int64), rows - test


_Parts = tuple[int, int, NDArray[np.uint8], NDArray[np.uint8]]
"""How many pictures are of the training part and of the test part; pixels (rows, 784), labels (rows,)."""


def _here() -> _Parts:
    raw = gzip.decompress(
        verified(FILE, SHA256, "the vendored data was changed; reinstall fedcore")
    )
    every = np.frombuffer(raw, np.uint8)
    return 1_200, 200, every[ROWS_HERE:].reshape(ROWS_HERE, -1), every[:ROWS_HERE]


@cache  # the splits of a comparison are dealt from the same pictures
def _whole() -> _Parts:
    return read_whole([folder(), DEBIAN])


def read_whole(places: Sequence[Path]) -> _Parts:
    """The whole data set, from the first of these folders that has a file. Raises BadInput where none has one, and for
    a file that is another one."""
    parts = []  # idx: 8 bytes before the labels, 16 before the pixels
    for name, sha256 in WHOLE.items():
        raw = verified(find("fashion", name, places, _REMEDY), sha256, _REMEDY)
        parts.append(
            np.frombuffer(gzip.decompress(raw), np.uint8, offset=8 if "labels" in name else 16)
        )
    labels, images = np.concatenate(parts[::2]), np.concatenate(parts[1::2])
    return 60_000, 10_000, images.reshape(ALL_ROWS, -1), labels


def data(source: Any) -> Any:
    """One part of the partition, as it is."""
    return source


def model(network: str = "convolutional") -> nn.Module:
    """network: `convolutional`, two convolutions with ReLU and pooling, then 800 -> 64 -> 10: 56,714 parameters; or
    `dense`, as `dense_model`. Raises BadInput for another word."""
    if network == "dense":
        return dense_model()
    if network != "convolutional":
        raise BadInput(
            f"task.network: found {network!r}, expected 'convolutional' or 'dense'",
            remedy="`dense` is the one that trains faster",
        )
    return nn.Sequential(
        nn.Conv2d(1, 16, 3), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(800, 64), nn.ReLU(), nn.Linear(64, 10),
    )  # fmt: skip


def dense_model() -> nn.Module:
    """784 -> 64 -> 10 with ReLU, linear over the pixels: 50,890 parameters."""
    return nn.Sequential(nn.Flatten(), nn.Linear(SIDE**2, 64), nn.ReLU(), nn.Linear(64, 10))


task = Task(
    name="fashion",
    data=data,
    model=model,
    loss=nn.CrossEntropyLoss(),
    metrics=("accuracy",),
    sites=sites,
    settings={"network": "convolutional"},
    defaults={"train.lr": 0.05, "train.momentum": 0.9, "train.batch_size": 64, "round.rounds": 20},
)
