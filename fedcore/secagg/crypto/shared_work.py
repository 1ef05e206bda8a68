"""Pure computations that several parties of one process would repeat, made once.

In one process that plays all parties (`secagg/in_process.py`) every site checks the same signatures, both ends of
a pair agree on the same seed, and one party opens what another has just sealed: n^2 times a round what each
deployed site does n times. Inside `shared_work()` the result of such a computation is kept under what it depends
on and handed to the next party that asks; what was changed on the way is found under another key, so it is
computed, and refused, as ever.

Invariant: outside `shared_work()`, so at every deployed party, nothing is kept and nothing is looked up. Only
functions of their arguments alone are shared, and no refusal is kept. What is kept contains secrets of the
parties: it is in the memory of their one process, and gone with the block.
"""

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import wraps
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

_KEPT: ContextVar[dict[Hashable, Any] | None] = ContextVar("shared work", default=None)

_MISSING = object()


@contextmanager
def shared_work() -> Iterator[None]:
    """Share computations between all parties of this process inside the block; a block inside it shares them too."""
    if _KEPT.get() is not None:
        yield
        return
    token = _KEPT.set({})
    try:
        yield
    finally:
        _KEPT.reset(token)


def shared(key: Hashable, make: Callable[[], T]) -> T:
    """`make()`, once for each key inside `shared_work`. key: everything that the result depends on, public values
    in the place of the secrets that belong to them."""
    kept = _KEPT.get()
    if kept is None:
        return make()
    found: Any = kept.get(key, _MISSING)
    if found is _MISSING:
        kept[key] = found = make()
    result: T = found
    return result


def shared_of(subject: object, key: Hashable, make: Callable[[], T]) -> T:
    """`shared` of one object, such as a message that many parties were given, which is not compared but is the same.
    key: everything else that the result depends on."""
    kept = _KEPT.get()
    if kept is None:
        return make()
    place = (id(subject), key)  # the subject is kept, so no other gets its id
    found: Any = kept.get(place)
    if found is None:
        kept[place] = found = subject, make()
    result: T = found[1]
    return result


def keep(key: Hashable, value: object) -> None:
    """Keep what a later `shared` under this key would compute. Does nothing outside `shared_work`."""
    kept = _KEPT.get()
    if kept is not None:
        kept[key] = value


def once(function: Callable[P, T]) -> Callable[P, T]:
    """Share a pure function whose arguments are all hashable."""

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        if _KEPT.get() is None:
            return function(*args, **kwargs)
        key = (function, args, *kwargs.values())
        return shared(key, lambda: function(*args, **kwargs))

    return call
