"""One look at a task on some rows of each site, before anything is trained.

What is certainly wrong is refused (BadInput, which names the site where it is about its rows); what is probably
wrong is a `Finding`, a warning with its remedy. One forward pass of up to 64 rows a site, and one look at targets
that are in memory.

Invariant: nothing here changes the model, its rows or a random stream that training uses.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from fedcore.errors import BadInput
from fedcore.learning.data.kinds import is_hugging_face
from fedcore.learning.data.rows import ArrayRows, DatasetRows, Rows, TableRows
from fedcore.learning.metrics import METRICS
from fedcore.learning.metrics.definition import class_labels
from fedcore.learning.metrics.values import ERROR_RANGE
from fedcore.learning.model import FlatModel, seeded
from fedcore.learning.scoring import has_loss
from fedcore.learning.task import Task
from fedcore.learning.training import place, predict, task_code
from fedcore.types import SiteId

ROWS = 64
"""Rows of a site that the model is evaluated on."""

ROWS_READ = 16
"""The same of a dataset, whose items may be slow to read."""

LARGE_INPUTS = 10.0
"""Root mean square of a column of the first layer's inputs above which they count as unscaled. Standardised ones
have 1, scaled by a public range less."""

SMALL_TARGETS, LARGE_TARGETS = 1e-3, 1000.0
"""Root mean square of a regression's targets outside of which a model that starts near 0 learns them slowly."""

SHARE = 0.01
"""Share of a site's values in a column that may lie outside what a table declares without a warning."""

FAR = 1.0
"""Widths of the public range that a single value may lie outside of it without a warning."""

PROBES, AMONG = 32, 1024
"""Rows of an array that near copies are looked for of, and rows that are looked through."""

MATES, JUMP = 32, 2.0
"""A row has near copies where one of its first 32 neighbours in distance is followed by one twice as far. Rows drawn
alike have jumps of 1.25 at most in 8 columns or more."""

STEEPER = 30.0
"""Factor on a model's parameters, with either sign, after which logits are no longer all in [0, 1]."""

_PROBABILITIES = {
    "SigmoidBackward": "Sigmoid",
    "SoftmaxBackward": "Softmax",
    "LogSigmoidBackward": "LogSigmoid",
}
_SHAPING = (
    "View", "Reshape", "UnsafeView", "Squeeze", "Unsqueeze", "Select", "Slice", "Alias", "Clone", "ToCopy",
    "Clamp", "Transpose", "T", "Permute", "Expand", "Index",
)  # fmt: skip
"""Operations after which the values of the model's last activation are still the values of its outputs."""


@dataclass(frozen=True)
class Finding:
    """A warning about one site. kind: the same for the same finding at another site. text: what was found and what
    is expected, without the site. remedy: the next step."""

    site: SiteId
    kind: str
    text: str
    remedy: str


@dataclass(frozen=True)
class Look:
    """What one look at a site found. adds_rows: whether the loss of a batch is the sum over its rows."""

    findings: Sequence[Finding]
    adds_rows: bool = False


def lines(findings: Iterable[Finding]) -> list[tuple[str, str]]:
    """(warning, hint) of each kind, with the first site's values and the number of the other sites."""
    kinds: dict[str, list[Finding]] = {}
    for finding in findings:
        kinds.setdefault(finding.kind, []).append(finding)
    found = []
    for first, *others in kinds.values():
        more = "" if not others else f" and {len(others)} more"
        found.append((f"site {first.site}{more}: {first.text}", first.remedy))
    return found


def look_at(
    task: Task,
    flat: FlatModel,
    site: SiteId,
    rows: Rows,
    parts: Sequence[Rows],
    seed: int,
    *,
    train_rows: int,
    scales: bool,
) -> Look:
    """What is probably wrong with a task at one site.

    flat: the untrained model. rows: some training rows as inputs. parts: the site's rows as they are. train_rows:
    how many it trains on. scales: whether the job finds a scale for the targets. Raises BadInput for what is
    certainly wrong, and TaskFailed where the task's code raises.
    """
    tables = [part for part in parts[:1] if isinstance(part, TableRows)]
    found = [each for part in parts[:1] for each in _of_ids(site, part)]
    found += [each for part in parts[:1] for each in _of_copies(site, part)]
    found += [each for table in tables for each in _of_table(site, table)]
    _refuse_no_batch(task, site, rows, train_rows)
    if not has_loss(task):
        return Look(found)
    flat.module.eval()
    code = task_code(site, None, "model, task.predict or task.loss")
    with seeded(seed, 0, site, "findings"), code, _first_inputs(flat.module) as inputs:
        outputs, targets = predict(task, flat.module, next(iter(rows.batches(ROWS, None))))
    _refuse_not_tensors(site, outputs, targets)
    activation, outputs = _activation(outputs), outputs.detach()
    known = [METRICS[name] for name in task.metrics if name in METRICS and task.evaluate is None]
    if known:
        metrics = [metric.name for metric in known if not metric.of_values]
        if metrics:
            _refuse_probabilities(task, flat, rows, outputs, activation, metrics)
            _refuse_labels(task, site, outputs, targets, parts)
        else:
            found += _of_regression(task, site, targets, scaled=scales or rows.scale is not None)
    with seeded(seed, 0, site, "findings"), task_code(site, None, "loss"), torch.no_grad():
        scaled = rows.scale.to_model(targets) if rows.scale else targets
        _refuse_loss(task, site, outputs, scaled)
        adds_rows = _adds_rows(task.loss, outputs, scaled)
    for metric in known:  # refuses shapes that it does not read, and top-k of too few classes
        metric.sums(_array(outputs.double()), _array(targets))
    return Look(found + _of_inputs(site, rows, inputs), adds_rows)


def _refuse_no_batch(task: Task, site: SiteId, rows: Rows, train_rows: int) -> None:
    """Refuse a site all of whose training rows an incomplete batch would be, where such a batch is left out."""
    if task.train is None and isinstance(rows, DatasetRows) and rows.drop_last:
        size = rows.batch_size or 1
        if train_rows < size:
            raise BadInput(
                f"{place(site, None)}: found {train_rows} training rows and a DataLoader with drop_last=True and "
                f"batch_size={size}, expected at least one whole batch",
                remedy="a smaller batch_size, or drop_last=False",
            )


def _refuse_not_tensors(site: SiteId, outputs: object, targets: object) -> None:
    for name, value in (("outputs", outputs), ("targets", targets)):
        if not isinstance(value, Tensor):
            raise BadInput(
                f"{place(site, None)}: found {name} of type {type(value).__name__}, expected a tensor",
                remedy="give the task a predict(model, batch) that returns two tensors (outputs, targets)",
            )


def _refuse_labels(
    task: Task, site: SiteId, outputs: Tensor, targets: Tensor, parts: Sequence[Rows]
) -> None:
    """All labels where they are in memory and go to the loss as they are, else those of the batch."""
    labels = [targets]
    if task.predict is None and not any(isinstance(part, DatasetRows) for part in parts):
        labels = [part.y for part in parts if not isinstance(part, DatasetRows)]
    columns = outputs.shape[1] if outputs.ndim == 2 else 1
    for each in labels:
        class_labels(_array(each), max(2, columns), f"site {site}: ")


def _array(tensor: Tensor) -> NDArray[Any]:
    return np.asarray(tensor.detach().cpu().numpy())


@contextmanager
def _first_inputs(module: nn.Module) -> Iterator[list[Tensor]]:
    """What reaches the first linear or convolutional layer, as the one entry of a list; empty without such a layer."""
    found: list[Tensor] = []

    def keep(_: nn.Module, arguments: tuple[object, ...]) -> None:
        first = arguments[0] if arguments else None
        if not found and isinstance(first, Tensor) and first.is_floating_point():
            found.append(first.detach())

    layers = [each for each in module.modules() if isinstance(each, (nn.Linear, _ConvNd))]
    hooks = [each.register_forward_pre_hook(keep) for each in layers]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def _of_inputs(site: SiteId, rows: Rows, inputs: Sequence[Tensor]) -> list[Finding]:
    """Inputs of the first layer that are far from the scale at which initial parameters and rates are made."""
    if not inputs or not inputs[0].numel():
        return []
    values = inputs[0].double().cpu().numpy()
    flat = values if values.ndim == 2 else values.reshape(-1, 1)
    sizes = np.sqrt((flat**2).mean(axis=0))
    worst = int(sizes.argmax())
    if not sizes[worst] > LARGE_INPUTS:
        return []
    named = isinstance(rows, ArrayRows) and tuple(rows.x.shape[1:]) == values.shape[1:]
    where = f" in column {worst}" if named and values.ndim == 2 else ""
    column = flat[:, worst]
    return [
        Finding(
            site, "inputs",
            f"found inputs from {column.min():.4g} to {column.max():.4g}{where}, expected about -3 to 3",
            "scale them: Task(statistics=((low, high), ...)) with one public range per column of an array, "
            "fedcore.table(...) for tables, a division in task.predict for images",
        )
    ]  # fmt: skip


def _of_ids(site: SiteId, rows: Rows) -> list[Finding]:
    """Columns with ids of persons, some of them in several rows, that are no group."""
    if isinstance(rows, ArrayRows):
        return []
    way = 'fedcore.table(..., group="{}")'
    if isinstance(rows, DatasetRows):
        column = 'dataset["{}"]' if is_hugging_face(rows.dataset) else 'lambda item: item["{}"]'
        way = f"fedcore.grouped(dataset, {column})"
    return [
        Finding(
            site, f"ids {name}",
            f"found {ids} different values of {name!r} in {len(rows)} rows, and rows of one may be on both "
            "sides of a split: then a model recognises them, and every score is too high",
            f"{way.format(name)} keeps rows with one value together",
        )
        for name, ids in rows.ids.items()
    ]  # fmt: skip


def _of_copies(site: SiteId, rows: Rows) -> list[Finding]:
    """Rows in memory that come in small sets of near copies, as several scans of one person do, and are no groups.
    Exact copies are left out: in coded columns they are common."""
    if not isinstance(rows, ArrayRows) or rows.groups is not None or len(rows) < 2 * MATES:
        return []
    some = rows.x[:AMONG].reshape(min(len(rows), AMONG), -1).float()
    spread = some.std(dim=0)
    some = some[:, spread > 0] / spread[spread > 0]
    if some.shape[1] < 8:  # in few columns jumps are common
        return []
    probes = torch.linspace(0, len(some) - 1, PROBES).long()
    exact = "donot_use_mm_for_euclid_dist"
    away = torch.cdist(some[probes], some, compute_mode=exact).sort(dim=1).values[:, 1 : MATES + 2]
    jumps = (away[:, 1:] / away[:, :-1]).where(away[:, :-1] > 0, 0.0).max(dim=1)
    near = jumps.values >= JUMP
    if near.double().mean() < 0.5:  # NaN of a value that is none too
        return []
    mates = int(jumps.indices[near].double().median()) + 1
    return [
        Finding(
            site, "near copies",
            f"found rows that have about {mates} near copies each, like scans of one person, and no groups: a model "
            "recognises a person on both sides of a split, and every score is too high",
            "fedcore.grouped((X, y), ids), with one id for each row, keeps a person's rows together",
        )
    ]  # fmt: skip


def _of_table(site: SiteId, rows: TableRows) -> list[Finding]:
    """Values of a table outside what it declares."""
    found, count = [], len(rows)
    for name, other in rows.unknown.items():
        if other > SHARE * count:
            found.append(Finding(
                site, f"other {name}",
                f"found {other} of {count} values of {name!r} that are not declared, expected the declared ones",
                f"they all count as `other`: look for another spelling, or add them to category(...) of {name!r}",
            ))  # fmt: skip
    for index, (name, (low, high)) in enumerate(
        zip(rows.layout.names, rows.layout.ranges, strict=True)
    ):
        column = rows.features[:, index]
        values = column[~np.isnan(column)]
        outside = values[(values < low) | (values > high)]
        if not len(outside):
            continue
        apart = np.maximum(low - outside, outside - high)
        farthest = float(outside[apart.argmax()])
        if len(outside) > SHARE * len(values) or apart.max() > FAR * (high - low):
            found.append(Finding(
                site, f"outside {name}",
                f"found {len(outside)} of {len(values)} values of {name!r} outside {low:g} to {high:g}, such as "
                f"{farthest:g}",
                "declare the range that the values have, in their unit; number(..., missing=(CODE,)) for codes "
                "that mean that nothing was measured",
            ))  # fmt: skip
    return found


def _of_regression(task: Task, site: SiteId, targets: Tensor, *, scaled: bool) -> list[Finding]:
    if tuple(targets.shape) not in ((len(targets),), (len(targets), 1)):
        raise BadInput(
            f"{place(site, None)}: targets: found rows of shape {tuple(targets.shape)}, expected one number per row",
            remedy="give the task its own evaluate(model, rows) -> {metric: (total, count)} for other shapes",
        )
    size = float(targets.double().square().mean().sqrt()) if targets.numel() else 0.0
    if scaled or task.train is not None or SMALL_TARGETS <= size <= LARGE_TARGETS or size == 0:
        return []
    remedy = (
        "Task(target_range=(low, high)) with a public range, or --set train.standardise=federated, scales them in "
        "training only"
    )
    if size > ERROR_RANGE:
        raise BadInput(
            f"{place(site, None)}: targets: found values of size {size:,.0f} without a scale, expected at most "
            f"{ERROR_RANGE:,}",
            remedy=remedy,
        )
    expected = f"{SMALL_TARGETS:g} to {LARGE_TARGETS:,.0f}"
    return [
        Finding(site, "targets", f"found targets of size {size:,.4g}, expected {expected}", remedy)
    ]


def _refuse_probabilities(
    task: Task,
    flat: FlatModel,
    rows: Rows,
    outputs: Tensor,
    name: str | None,
    metrics: Sequence[str],
) -> None:
    """Refuse a model whose outputs are probabilities, where the metrics read logits. name: of its last activation."""
    if name is None and not _in_unit_interval(outputs):
        return
    columns = outputs.shape[1] if outputs.ndim == 2 else 1
    if name is None:
        sums = outputs.sum(dim=1) if columns > 1 else torch.zeros(1)
        if bool((sums - 1).abs().max() < 1e-4):
            name = "Softmax"
        elif _stays_in_unit_interval(task, flat, rows):
            name = "Sigmoid"
        else:
            return
    low, high = float(outputs.min()), float(outputs.max())
    loss = "CrossEntropyLoss" if columns > 1 else "BCEWithLogitsLoss"
    what = "log-probabilities" if name == "LogSigmoid" else "probabilities"
    raise BadInput(
        f"task.model: found {what} as outputs ({name}: {low:.3f} to {high:.3f}), expected logits for "
        f"{', '.join(metrics)}",
        remedy=f"leave the {name} out and use torch.nn.{loss}; predict() gives probabilities then",
    )


def _activation(outputs: Tensor) -> str | None:
    """Which activation made the outputs, by the graph of their gradient; None for any other operation."""
    node: Any = outputs.grad_fn
    while node is not None:
        kind = type(node).__name__.rstrip("0123456789")
        if kind in _PROBABILITIES:
            return _PROBABILITIES[kind]
        if kind.removesuffix("Backward").removesuffix("Alias") not in _SHAPING:
            return None
        node = node.next_functions[0][0]
    return None


def _in_unit_interval(outputs: Tensor) -> bool:
    """Whether all are in [0, 1], and not all the same, as those of a model that begins with zeros are."""
    if not outputs.is_floating_point() or not outputs.numel():
        return False
    low, high = float(outputs.min()), float(outputs.max())
    return 0.0 <= low < high <= 1.0


def _stays_in_unit_interval(task: Task, flat: FlatModel, rows: Rows) -> bool:
    """Whether outputs are in [0, 1] whatever the parameters are, as those of a sigmoid written by hand. Logits near
    0 are there by chance; with other parameters they are not."""
    initial = flat.read()
    try:
        for factor in (STEEPER, -STEEPER):
            steeper = initial.copy()
            steeper[: flat.parameters] *= factor
            flat.write(steeper)
            with torch.no_grad():
                outputs, _ = predict(task, flat.module, next(iter(rows.batches(ROWS, None))))
            if not (float(outputs.min()) >= 0.0 and float(outputs.max()) <= 1.0):
                return False
    finally:
        flat.write(initial)
    return True


def _refuse_loss(task: Task, site: SiteId, outputs: Tensor, targets: Tensor) -> None:
    where = place(site, None)
    try:
        with warnings.catch_warnings(action="ignore"):  # of torch, on shapes that are refused below
            loss = task.loss(outputs, targets)
            pairs = _pairs_all(task.loss, outputs, targets)
    except (RuntimeError, ValueError, TypeError) as error:
        if (cause := _dtype_cause(outputs, targets, str(error))) is None:
            raise
        found, remedy = cause
        raise BadInput(f"{where}: task.loss: {found}", remedy=remedy) from error
    value = torch.as_tensor(loss)
    if value.numel() != 1:
        raise BadInput(
            f"{where}: task.loss: found a tensor of shape {tuple(value.shape)}, expected one number",
            remedy='reduction="mean" gives the mean over the rows of a batch',
        )
    if not bool(torch.isfinite(value)):
        raise BadInput(
            f"{where}: task.loss: found {float(value)} on {len(targets)} rows before any training, expected a "
            "finite number",
            remedy="look for inputs or targets that are not scaled, and for log(0) or a division by 0 in the loss",
        )
    if pairs:
        raise BadInput(
            f"{where}: task.loss: found outputs of shape {tuple(outputs.shape)} and targets of shape "
            f"{tuple(targets.shape)}, which it broadcasts to every pair of two rows, expected one shape",
            remedy="outputs.squeeze(1) in the loss, or targets.unsqueeze(1)"
            if outputs.shape != targets.shape
            else "the loss reshapes one of them: squeeze both, or neither",
        )


def _adds_rows(loss: Callable[[Any, Any], Any], outputs: Tensor, targets: Tensor) -> bool:
    """Whether twice the rows have twice the loss, and not the same."""
    try:
        once = float(loss(outputs, targets))
        twice = float(loss(torch.cat([outputs, outputs]), torch.cat([targets, targets])))
    except (RuntimeError, ValueError, TypeError, IndexError):  # a loss with needs of its own
        return False
    return once != 0 and abs(twice - 2 * once) < 1e-3 * abs(once)


def _dtype_cause(outputs: Tensor, targets: Tensor, said: str) -> tuple[str, str] | None:
    """(what was found and expected, remedy) where targets have a dtype that the loss does not take."""
    dtype = str(targets.dtype).removeprefix("torch.")
    if "type" not in said.lower():
        return None
    if (
        targets.is_floating_point()
        and targets.ndim == 1
        and outputs.ndim == 2
        and outputs.shape[1] > 1
    ):
        return (
            f"found {dtype} targets for {outputs.shape[1]} outputs a row, expected int64 class indices",
            'y.astype("int64") in task.data',
        )
    if not targets.is_floating_point() and outputs.numel() == targets.numel():
        return (
            f"found {dtype} targets for one output a row, expected {str(outputs.dtype).removeprefix('torch.')}",
            "targets.float() in the loss",
        )
    return None


def _pairs_all(loss: Callable[[Any, Any], Any], outputs: Tensor, targets: Tensor) -> bool:
    """Whether (n, 1) meets (n,), here or inside a loss, so that it compares every output with every target: it is
    then the same however the targets are ordered, though not whatever they are, and the sum or a mean over pairs."""
    rows = len(targets)
    columns = {(rows,), (rows, 1)}
    if not {tuple(outputs.shape), tuple(targets.shape)} <= columns or rows < 2:
        return False
    ordered = targets.reshape(-1).sort().values.reshape(targets.shape)
    if bool(ordered[0] == ordered[-1]):
        return False
    same = ordered.to(torch.float64).reshape(outputs.shape)
    floating = ordered.to(torch.float64) if targets.is_floating_point() else ordered
    others = (floating, floating.flip(0), floating[:1].expand_as(floating))
    ends = same[[0, -1]], floating[[0, -1]]
    try:
        here, turned, constant = (float(loss(same, each)) for each in others)
        pairs = sum(float(loss(o[None], t[None])) for o in ends[0] for t in ends[1])
        both = float(loss(*ends))
    except (RuntimeError, ValueError, TypeError, IndexError):  # a loss with needs of its own
        return False
    close = 1e-9 * max(abs(here), abs(turned))
    over_pairs = min(abs(both - pairs / share) for share in (1, 2, 4)) <= 1e-6 * abs(pairs)
    return over_pairs and abs(here - turned) <= close < abs(here - constant)
