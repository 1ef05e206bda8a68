"""What a torch module keeps beside the values of its parameters and buffers: taken once, restored before each use.

One module serves every site and arm of a simulation, and every round at a deployed site. Whatever training leaves
on it beside those values (attributes, gradients, hooks, a replaced layer) would reach the next one, and a process
that restarts would not have it. So it is restored, and a round's result depends on its model alone.

Invariant: after `restore`, the module, its registered submodules, parameters and buffers have the attributes, hooks
and flags that they had at the start; the values of parameters and buffers are the caller's. Attributes that cannot
be copied (an open file, a lock) stay as they are, and so does what is no part of the module: globals and class
attributes of the task.
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import is_
from types import BuiltinFunctionType, CellType, FunctionType, ModuleType
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

_Attributes: TypeAlias = dict[str, Any]
_Pairs: TypeAlias = dict[tuple[int, int], tuple[Any, Any]]
"""Pairs of objects by their two ids, which are free for others once an object is gone: so they are kept."""

_REGISTRIES = frozenset(n for n, v in vars(nn.Module()).items() if isinstance(v, dict | set))
"""The tables that torch keeps in a module: parameters, buffers, submodules, hooks."""

_ATOMS = (
    type(None), bool, int, float, complex, str, bytes, type, torch.dtype, torch.device, torch.Size,
    FunctionType, BuiltinFunctionType, ModuleType,
)  # fmt: skip
"""Of values that never change, or are no state of a module: code."""


@dataclass(frozen=True)
class _Owner:
    """The attributes of a module, parameter or buffer. fixed: those that need no copy; copied: copies of the others;
    tables: torch's own, each with what was in it."""

    of: nn.Module | Tensor
    kind: type
    fixed: _Attributes
    copied: _Attributes
    tables: tuple[tuple[str, Any, Any], ...]

    @property
    def before(self) -> Mapping[str, Any]:
        return self.fixed | self.copied

    def rewind(self) -> bool:
        """Restore all but the copies; returns whether one of these is needed."""
        if type(self.of) is not self.kind:  # a parametrization gives a module a class of its own
            self.of.__class__ = self.kind
        now = vars(self.of)
        now.update(self.fixed)
        for name, table, entries in self.tables:
            if now.get(name) is not table:
                now[name] = table
            if (table or entries) and not _same_entries(table, entries):
                table.clear()
                table.update(entries)
        if len(now) > len(self.fixed) + len(self.copied) + len(self.tables):
            known = {*self.fixed, *self.copied, *(name for name, *_ in self.tables)}
            for name in now.keys() - known:
                del now[name]
        return bool(self.copied) and any(
            name not in now or not _same(now[name], value, {})
            for name, value in self.copied.items()
        )


@dataclass(frozen=True)
class _Leaf:
    """A parameter or buffer: its flags and hooks."""

    tensor: Tensor
    requires_grad: bool
    form: tuple[torch.dtype, torch.device, torch.Size]
    hooks: tuple[Mapping[int, Any], Mapping[int, Any]]

    def rewind(self) -> None:
        tensor = self.tensor
        if _form(tensor) != self.form:  # `module.half()` and the like; the caller fills it
            dtype, device, shape = self.form
            tensor.data = torch.empty(shape, dtype=dtype, device=device)
        tensor.grad = None
        if tensor.requires_grad is not self.requires_grad:
            tensor.requires_grad_(self.requires_grad)
        for now, before in zip(_hooks(tensor), self.hooks, strict=True):
            if now and not _same_entries(now, before):
                now.clear()
                now.update(before)


_ABSENT = object()


class ModuleState:
    """The state of one module, at the moment this object is made."""

    def __init__(self, module: nn.Module) -> None:
        modules = list(module.modules())
        tensors = list({id(t): t for t in [*module.parameters(), *module.buffers()]}.values())
        parts: list[nn.Module | Tensor] = [*modules, *tensors]
        self._parts = {id(part): part for part in parts}
        """What copies of attributes refer to as it is: a list of layers is one of these same layers."""
        self._leaves = [_Leaf(t, t.requires_grad, _form(t), _copied_hooks(t)) for t in tensors]
        memo: dict[int, Any] = dict(self._parts)
        self._owners = [_owner(part, memo) for part in parts]

    def restore(self) -> None:
        """Bring everything but the values of parameters and buffers back."""
        changed = [owner.rewind() for owner in self._owners]  # all of them: no shortcut
        if any(changed):
            memo: dict[int, Any] = dict(self._parts)  # one for all: what was shared stays shared
            for owner in self._owners:
                vars(owner.of).update(copy.deepcopy(owner.copied, memo))
        for leaf in self._leaves:
            leaf.rewind()

    def changes(self) -> list[_Attributes]:
        """The attributes of each module, parameter and buffer that are not what they were, as they are now."""
        return [
            {
                name: value
                for name, value in vars(owner.of).items()
                if name not in _REGISTRIES and not _same(value, owner.before.get(name, _ABSENT), {})
            }
            for owner in self._owners
        ]

    def change(self, changes: Sequence[_Attributes]) -> None:
        """The inverse of `changes`, on a module of the same form."""
        for owner, attributes in zip(self._owners, changes, strict=False):
            vars(owner.of).update(attributes)


def attribute_that_differs(one: nn.Module, other: nn.Module) -> str | None:
    """The path of the first layer or attribute, such as `block.order`, that two modules from two calls of one function
    differ in beside the values of parameters and buffers; None where they are equal, as far as can be told."""
    mine, theirs = dict(one.named_modules()), dict(other.named_modules())
    pairs: list[tuple[Any, Any]] = []
    for path in dict.fromkeys([*mine, *theirs]):
        pair = mine.get(path), theirs.get(path)
        if not _same_type(*map(type, pair)):
            return path or type(one).__name__
        pairs.append(pair)
    pairs += zip(one.parameters(), other.parameters(), strict=False)
    pairs += zip(one.buffers(), other.buffers(), strict=False)
    twins: _Pairs = {(id(part), id(twin)): (part, twin) for part, twin in pairs}
    for path, module in mine.items():
        values, others = vars(module), vars(theirs[path])
        for name in dict.fromkeys([*values, *others]):
            found, twin = values.get(name, _ABSENT), others.get(name, _ABSENT)
            if name not in _REGISTRIES and not _same(found, twin, twins, two_calls=True):
                return f"{path}.{name}".lstrip(".")
    return None


def is_plain(value: Any) -> bool:
    """Whether a value is numbers, text and tensors, in lists, tuples and dicts: all that a checkpoint can have."""
    if type(value) in {list, tuple}:
        return all(map(is_plain, value))
    if type(value) is dict:
        return all(is_plain(key) and is_plain(part) for key, part in value.items())
    return type(value) in {type(None), bool, int, float, str, Tensor}


def _owner(part: nn.Module | Tensor, memo: dict[int, Any]) -> _Owner:
    fixed: _Attributes = {}
    copied: _Attributes = {}
    tables = []
    for name, value in vars(part).items():
        if name in _REGISTRIES and isinstance(value, dict | set):
            tables.append((name, value, value.copy()))
        elif _never_changes(value):
            fixed[name] = value
        else:
            try:
                copied[name] = copy.deepcopy(value, memo)
            except Exception:  # noqa: BLE001 - of the task's own class, whose copying may raise anything
                fixed[name] = value
    return _Owner(part, type(part), fixed, copied, tuple(tables))


def _never_changes(value: Any) -> bool:
    if type(value) is tuple:
        return all(map(_never_changes, value))
    return isinstance(value, _ATOMS)


def _form(tensor: Tensor) -> tuple[torch.dtype, torch.device, torch.Size]:
    return tensor.dtype, tensor.device, tensor.shape


def _hooks(tensor: Tensor) -> tuple[dict[int, Any], dict[int, Any]]:
    """Of the gradient, and of the moment after it was added."""
    before, after = (
        getattr(tensor, name, None) for name in ("_backward_hooks", "_post_accumulate_grad_hooks")
    )
    return before or {}, after or {}


def _copied_hooks(tensor: Tensor) -> tuple[dict[int, Any], dict[int, Any]]:
    first, second = _hooks(tensor)
    return dict(first), dict(second)


def _same_entries(table: Any, entries: Any) -> bool:
    """Whether two tables have the same objects under the same names in the same order, or two sets are equal."""
    if isinstance(table, set):
        return bool(table == entries)
    return list(table) == list(entries) and all(map(is_, table.values(), entries.values()))


def _same(found: Any, before: Any, seen: _Pairs, *, two_calls: bool = False) -> bool:
    """Whether a value and the copy of what it was are equal all the way down; False where that cannot be told.

    seen: the pairs compared so far, since objects may refer to each other in a circle. two_calls: the values are of
    two calls of one function; then classes and functions that it defines anew are equal where their names or their
    code are, NaN equals NaN, and what cannot be told counts as equal.
    """
    if found is before or (id(found), id(before)) in seen:
        return True
    if type(found) is not type(before) and not (
        two_calls and _same_type(type(found), type(before))
    ):
        return False
    if isinstance(found, _ATOMS):
        return bool(found == before) or (two_calls and _same_atom(found, before, seen))
    seen[id(found), id(before)] = found, before
    if isinstance(found, Tensor):
        return (
            found.requires_grad is before.requires_grad
            and _form(found) == _form(before)
            and (torch.equal(found, before) or (two_calls and _same_with_nan(found, before)))
            and _same(found.grad, before.grad, seen, two_calls=two_calls)
        )
    if isinstance(found, np.ndarray) and not found.dtype.hasobject:
        return (found.dtype, found.shape) == (before.dtype, before.shape) and bool(
            found.tobytes() == before.tobytes()
        )
    if isinstance(found, list | tuple | deque):
        return _same_items(found, before, seen, two_calls=two_calls)
    if isinstance(found, dict):
        entries = [*found.items()], [*before.items()]
        return _same_items(*entries, seen, two_calls=two_calls)
    if isinstance(found, set | frozenset):
        known = all(isinstance(each, _ATOMS) for each in found | before)
        return bool(found == before) or (two_calls and not known)
    try:
        parts = found.__reduce_ex__(4), before.__reduce_ex__(4)
        return _same(*parts, seen, two_calls=two_calls)
    except Exception:  # noqa: BLE001 - of the task's own class, which may raise anything
        return two_calls


def _same_type(one: type, other: type) -> bool:
    """Whether two classes are one, or of one name, as a class that a function defines is at each call."""
    names = [(each.__module__, each.__qualname__) for each in (one, other)]
    return one is other or names[0] == names[1]


def _same_atom(found: Any, other: Any, seen: _Pairs) -> bool:
    """Whether two unequal atoms of two calls mean the same."""
    if isinstance(found, type):
        return _same_type(found, other)
    if isinstance(found, BuiltinFunctionType):  # such as a method of a generator
        bound = found.__self__, other.__self__
        return found.__name__ == other.__name__ and _same(*bound, seen, two_calls=True)
    if not isinstance(found, FunctionType):
        return bool(found != found and other != other)  # noqa: PLR0124 - NaN
    mine, theirs = (
        (each.__defaults__, each.__kwdefaults__, _captured(each)) for each in (found, other)
    )
    seen[id(found), id(other)] = found, other  # a function may call itself
    return found.__code__ == other.__code__ and _same(mine, theirs, seen, two_calls=True)


def _captured(function: FunctionType) -> list[Any]:
    return [_content(cell) for cell in function.__closure__ or ()]


def _content(cell: CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not set yet
        return _ABSENT


def _same_with_nan(found: Tensor, other: Tensor) -> bool:
    return found.is_floating_point() and torch.allclose(
        found, other, rtol=0, atol=0, equal_nan=True
    )


def _same_items(
    found: Sequence[Any], before: Sequence[Any], seen: _Pairs, *, two_calls: bool
) -> bool:
    return len(found) == len(before) and all(
        _same(a, b, seen, two_calls=two_calls) for a, b in zip(found, before, strict=True)
    )
