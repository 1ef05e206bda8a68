"""Any torch module as one flat float32 vector, and back.

Invariant: `write(read())` changes nothing, and the order is the module's own: trainable parameters in
`named_parameters` order (a tied parameter once), then floating buffers in `named_buffers` order.
Buffers policy `average`: floating buffers (BatchNorm's running statistics) travel and are averaged like
parameters; `initial`: they keep their initial values from the seed; `local`: as `average`, but the statistics of
normalisation layers are each site's own (`own_statistics.py`). Integer buffers and frozen parameters always
keep their initial values, which every site makes from the same seed. Whatever else a module keeps is restored by
`write` (`module_state.py`), so that what one site trained leaves nothing for the next.
"""

from __future__ import annotations

import ctypes
import hashlib
import random
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from types import MethodType
from typing import Any
from weakref import WeakSet

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parameter import is_lazy

from fedcore.errors import BadInput, UnknownName
from fedcore.learning.module_state import ModuleState
from fedcore.secagg.plan import INITIAL_PARTS
from fedcore.seeds import derive_seed
from fedcore.types import FloatVector

BUFFER_POLICIES = ("average", "initial", "local")

_HANDED_OUT: WeakSet[nn.Module] = WeakSet()


@contextmanager
def single_thread() -> Iterator[None]:
    """Use one torch thread inside and restore the number afterwards: convolutions differ in the last bits
    between one and two threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def seeded(seed: int, round_: int, site: str, purpose: str) -> Iterator[None]:
    """Seed the global generators of torch, NumPy and Python from the four arguments inside; restore them
    afterwards."""
    value = derive_seed(seed, round_, site, purpose)
    numpy_state = _NumpyState()
    python_state = random.getstate()
    with torch.random.fork_rng(devices=[]):
        _seed(value)
        np.random.seed(value % (1 << 32))  # noqa: NPY002
        random.seed(value)
        try:
            yield
        finally:
            random.setstate(python_state)
            numpy_state.restore()


class _NumpyState:
    """The state of NumPy's global generator, which a task may draw from.

    `get_state` and `set_state` turn its 624 words into numbers one by one, 0.1 ms each time. This copies the memory
    of the generator (struct mt19937_state: 624 words of 4 bytes and a position) instead.
    """

    _BYTES = 624 * 4 + ctypes.sizeof(ctypes.c_int)

    def __init__(self) -> None:
        self._bits = np.random.mtrand.get_bit_generator()
        if type(self._bits) is not np.random.MT19937:
            kind = type(self._bits).__name__
            raise TypeError(
                f"np.random.set_bit_generator: found {kind}, expected NumPy's own, MT19937"
            )
        self._words = self._read()
        # Normal values are made in pairs: a kept one is given without a step of the generator.
        value = np.random.standard_normal()  # noqa: NPY002
        self._kept = value if self._read() == self._words else None

    def _read(self) -> bytes:
        return ctypes.string_at(self._bits.ctypes.state_address, self._BYTES)

    def restore(self) -> None:
        np.random.seed(0)  # noqa: NPY002 - keeps no value
        ctypes.memmove(self._bits.ctypes.state_address, self._words, self._BYTES)
        if self._kept is not None:
            state = np.random.get_state(legacy=False)  # noqa: NPY002
            np.random.set_state({**state, "has_gauss": 1, "gauss": self._kept})  # noqa: NPY002


@cache
def _accelerated() -> bool:
    return torch.accelerator.is_available()


def _seed(value: int) -> None:
    """As `torch.manual_seed`, without its overhead on a machine without accelerator, where it records its call
    stack for each kind of device that may be added later: a fifth of the time of a comparison of small models."""
    if _accelerated():
        torch.manual_seed(value)
    else:
        torch.default_generator.manual_seed(value)


class FlatModel:
    """A module, and a flat view of its shared parameters and buffers.

    untrained: (d,) float32, what the seed made where the module was filled from a released model, else None.
    local_parameters: names, or patterns of `fnmatch`, of parameters and buffers that stay at a site: they are no part
    of the vector, and `write` fills them from a vector of their own. frozen_parameters: the same of those that are
    neither trained nor a part of any vector (`_freeze`). Raises BadInput for one that nothing has.
    """

    def __init__(
        self,
        module: nn.Module,
        buffers: str = "average",
        untrained: FloatVector | None = None,
        local_parameters: Sequence[str] = (),
        frozen_parameters: Sequence[str] = (),
    ) -> None:
        if buffers not in BUFFER_POLICIES:
            raise UnknownName("round.buffers", buffers, BUFFER_POLICIES)
        self.module = module
        self.untrained = untrained
        fixed = _freeze(module, frozen_parameters)
        shared = [(n, p) for n, p in module.named_parameters() if p.requires_grad]
        floating = [(n, b) for n, b in _floating(module) if n not in fixed]
        local = _matching("local_parameters", [*shared, *floating], local_parameters)
        shared = [(n, p) for n, p in shared if n not in local]
        floating = [(n, b) for n, b in floating if n not in local]
        self._local = [_TensorPlace.of(module, name, tensor) for name, tensor in local.items()]
        stay = set(norm_statistics(module)) - fixed.keys() if buffers == "local" else set()
        travelling = [(n, b) for n, b in floating if n not in stay] if buffers != "initial" else []
        self._shared = [
            _TensorPlace.of(module, name, tensor) for name, tensor in shared + travelling
        ]
        self.parameters = sum(p.numel() for _, p in shared)
        self.buffer_coordinates = sum(b.numel() for _, b in travelling)
        own = [tensor for tensor in local.values() if isinstance(tensor, nn.Parameter)]
        frozen = sum(p.numel() for p in module.parameters() if not p.requires_grad)
        moving = {name for name, _ in travelling}
        # Training changes these in place (a task's own loop may change frozen layers); every write restores
        # them, so that no site's values remain.
        still = [b for n, b in module.named_buffers() if n not in moving]
        still += [p for p in module.parameters() if not p.requires_grad] + own
        self._kept: list[tuple[Tensor, Tensor]] = [(t, t.detach().clone()) for t in still]
        self._state = ModuleState(module)
        self.policy = _describe_buffers(
            module, len(travelling), buffers, frozen, len(stay), fixed.keys()
        )
        if local:
            self.policy += f"; {sum(t.numel() for t in local.values())} values of {', '.join(local)} stay at each site"
        if self.parameters == 0:
            raise BadInput(
                "model: found no trainable parameter, expected at least one",
                remedy="return a torch.nn.Module whose parameters have requires_grad=True",
            )
        for name, tensor in shared:
            if not tensor.is_floating_point():
                raise BadInput(
                    f"model: found {tensor.dtype} in {name}, expected a real floating type"
                )

    def digests(self) -> tuple[str, ...]:
        """SHA-256 of names, types and values, hex, of each of INITIAL_PARTS: what travels, the frozen parameters,
        and the buffers that stay."""
        travelling = {id(place.tensor) for place in self._shared}
        frozen = {id(p) for p in self.module.parameters() if not p.requires_grad}
        hashes = [hashlib.sha256() for _ in INITIAL_PARTS]
        for name, tensor in [*self.module.named_parameters(), *self.module.named_buffers()]:
            part = 0 if id(tensor) in travelling else 1 if id(tensor) in frozen else 2
            form = f"{name} {tensor.dtype} {tuple(tensor.shape)}\n"
            hashes[part].update(form.encode() + _bytes_of(tensor))
        return tuple(each.hexdigest() for each in hashes)

    @property
    def coordinates(self) -> int:
        """d: parameters and shared buffers."""
        return self.parameters + self.buffer_coordinates

    @property
    def local_names(self) -> list[str]:
        """Of the parameters and buffers that stay at a site."""
        return [place.name for place in self._local]

    def read(self) -> FloatVector:
        """(d,) float32 copy. Raises BadInput where training removed a parameter or gave it another shape."""
        return _joined(self._shared)

    def read_local(self) -> FloatVector:
        """The same of what stays at the site."""
        return _joined(self._local)

    @torch.no_grad()
    def write(self, vector: FloatVector, local: FloatVector | None = None) -> None:
        """Copy (d,) float32 into the module in place; frozen parameters, unshared buffers and everything else
        become what they were at the start, and what stays at a site as well without `local`, as `read_local` has it.
        Raises BadInput on another length."""
        if len(vector) != self.coordinates:
            raise BadInput(f"model: found {len(vector)} coordinates, expected {self.coordinates}")
        self._state.restore()
        _fill(self._shared, vector)
        for tensor, initial in self._kept:
            tensor.copy_(initial)
        if local is not None:
            _fill(self._local, local)


@torch.no_grad()
def _joined(places: Sequence[_TensorPlace]) -> FloatVector:
    flat = [place.read().detach().reshape(-1).to(torch.float32) for place in places]
    return torch.cat(flat).cpu().numpy().copy() if flat else np.empty(0, dtype=np.float32)


@torch.no_grad()
def _fill(places: Sequence[_TensorPlace], vector: FloatVector) -> None:
    source = torch.from_numpy(np.ascontiguousarray(vector, dtype=np.float32))
    source = source.to(places[0].tensor.device)
    done = 0
    for tensor in (place.tensor for place in places):
        size = tensor.numel()
        tensor.copy_(source[done : done + size].view(tensor.shape))
        done += size


_NAME_LESS = {
    "local_parameters": ("is averaged", "name the head, or the normalisation layers"),
    "frozen_parameters": ("is trained", "name the layers before the head"),
}
"""{setting: (what the parameters do that it does not name, what to name)}."""


def _matching(
    setting: str, named: Sequence[tuple[str, Tensor]], patterns: Sequence[str]
) -> dict[str, Tensor]:
    """{name: tensor} of those that a pattern names. Raises UnknownName for a pattern that names none, and BadInput
    where no parameter is left."""
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name, _ in named):
            raise UnknownName(f"train.{setting}", pattern, [name for name, _ in named])
    found = {n: t for n, t in named if any(fnmatchcase(n, pattern) for pattern in patterns)}
    if found and all(n in found for n, t in named if isinstance(t, nn.Parameter)):
        does, remedy = _NAME_LESS[setting]
        raise BadInput(
            f"train.{setting}: found all parameters of the model in {', '.join(patterns)}, expected at least one that "
            f"{does}",
            remedy=remedy,
        )
    return found


def _floating(module: nn.Module) -> list[tuple[str, Tensor]]:
    return [(n, b) for n, b in module.named_buffers() if b.is_floating_point()]


def _freeze(module: nn.Module, patterns: Sequence[str]) -> dict[str, Tensor]:
    """Freeze the parameters and floating buffers that a pattern names; returns them by name. Normalisation layers with
    frozen statistics stay in evaluation mode, in training too: else the layers behind them would be trained on
    activations that they never see again. Raises as `_matching`."""
    found = _matching(
        "frozen_parameters", [*module.named_parameters(), *_floating(module)], patterns
    )
    for tensor in found.values():
        tensor.requires_grad_(False)
    for path, layer in module.named_modules():
        if isinstance(layer, _NormBase) and f"{path}.running_mean".lstrip(".") in found:
            layer.train(False)
            vars(layer)["train"] = MethodType(_remain, layer)
    return found


def _remain(layer: nn.Module, mode: bool = True) -> nn.Module:  # noqa: ARG001 - as `train` has it
    """In place of the `train` of a layer that stays in evaluation mode."""
    return layer


@dataclass(frozen=True)
class _TensorPlace:
    """Where a module has a parameter or buffer. Code may put another tensor there: `self.mean = 0.9 * self.mean`
    in a module's `forward` does."""

    name: str
    table: Mapping[str, Tensor | None]
    key: str
    tensor: Tensor

    @classmethod
    def of(cls, module: nn.Module, name: str, tensor: Tensor) -> _TensorPlace:
        path, _, key = name.rpartition(".")
        of = vars(module.get_submodule(path))
        table = of["_parameters" if isinstance(tensor, nn.Parameter) else "_buffers"]
        return cls(name, table, key, tensor)

    def read(self) -> Tensor:
        found = self.table.get(self.key)
        if found is None or found.shape != self.tensor.shape:
            shape = None if found is None else tuple(found.shape)
            raise BadInput(
                f"model: found {self.name} {f'of shape {shape}' if shape else 'gone'} after training, expected "
                f"shape {tuple(self.tensor.shape)} as before",
                remedy="make layers in task.model; training changes their values only",
            )
        return found


def _bytes_of(tensor: Tensor) -> bytes:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""


def norm_statistics(module: nn.Module) -> list[str]:
    """Names of the running means and variances of normalisation layers."""
    return [
        f"{path}.{name}".lstrip(".")
        for path, layer in module.named_modules()
        if isinstance(layer, _NormBase)
        for name in ("running_mean", "running_var")
        if getattr(layer, name) is not None
    ]


def _describe_buffers(
    module: nn.Module, averaged: int, policy: str, frozen: int, stay: int, fixed: Collection[str]
) -> str:
    """fixed: names of what the job froze, which are buffers and parameters; frozen: parameters, by the task as well."""
    total = sum(1 for _ in module.buffers())
    still = sum(1 for name, _ in _floating(module) if name in fixed)
    parts = []
    if total == 0:
        parts.append("no buffers")
    elif policy == "initial":
        parts.append(f"{total} buffers keep their initial values")
    else:
        if stay:
            parts.append(f"{stay} statistics of normalisation layers are each site's own")
        if averaged or not stay:
            parts.append(f"{averaged} floating buffers averaged with the parameters")
        if still:
            parts.append(f"{still} buffers of frozen layers keep their initial values")
        if (integers := total - averaged - stay - still) > 0:
            parts.append(f"{integers} integer buffers keep their initial values")
    if frozen:
        parts.append(f"{frozen} frozen parameters stay at the seed's values")
    return "; ".join(parts)


def build_model(
    make: Callable[[], Any], seed: int, first_pass: Callable[[nn.Module], Any]
) -> nn.Module:
    """A fresh module whose initial values come from the seed alone, never from a site.

    Lazy modules are materialised by `first_pass(module)` (one forward pass of one batch, in evaluation
    mode): it decides shapes only. Raises BadInput if `make` returns something else than a module.
    """
    with seeded(seed, 0, "", "initial model"), torch.no_grad():
        module = make()
        if not isinstance(module, nn.Module):
            found, remedy = "it returned", ""
            if hasattr(module, "fit") and hasattr(module, "get_params"):
                found = "found the scikit-learn estimator"
                remedy = "fedcore.linear(features, classes) is the linear model in torch"
            raise BadInput(
                f"task.model: {found} {type(module).__name__}, expected a torch.nn.Module",
                remedy=remedy,
            )
        parts = {m: m.parameters(recurse=False) for m in module.modules()}
        layers = [m for m, own in parts.items() if any(p.requires_grad for p in own)]
        if not _HANDED_OUT.isdisjoint(layers):
            raise BadInput(
                f"task.model: found layers of a {type(module).__name__} that it returned before, expected new ones",
                remedy="make them inside the function: what one run trained would be where the next begins",
            )
        _HANDED_OUT.update(layers)
        if any(is_lazy(p) for p in module.parameters()):
            module.eval()
            first_pass(module)
            module.train()
    return module


def first_difference(one: nn.Module, other: nn.Module) -> str | None:
    """The name of the first parameter or buffer, frozen ones too, that two modules of one kind differ in; None where
    they are equal, NaN being equal to NaN."""
    mine, theirs = (_saved_and_other_values(each) for each in (one, other))
    for name, value in mine.items():
        if not isinstance(value, Tensor) or torch.equal(value, theirs[name]):
            continue
        if value.shape != theirs[name].shape or not torch.allclose(
            value, theirs[name], rtol=0, atol=0, equal_nan=True
        ):
            return name
    return None


def _saved_and_other_values(module: nn.Module) -> dict[str, Any]:
    """What `state_dict` has, and the buffers that it leaves out."""
    return dict(module.named_buffers()) | module.state_dict()


def model_summary(flat: FlatModel) -> str:
    """`Linear 20 -> 1`, or the class and size of anything larger."""
    children = [m for m in flat.module.modules() if not list(m.children())]
    if len(children) == 1 and isinstance(children[0], nn.Linear):
        layer = children[0]
        return f"Linear {layer.in_features} -> {layer.out_features}"
    return f"{type(flat.module).__name__}, {flat.coordinates:,} parameters"
