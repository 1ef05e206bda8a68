"""Records without the bytes that they keep: see `wire_form.encode`."""

from dataclasses import fields, is_dataclass
from typing import Any


def forgetful(value: Any) -> Any:
    """An equal value, all the way down, of which nothing is kept."""
    if isinstance(value, tuple):
        return tuple(forgetful(each) for each in value)
    if not is_dataclass(value):
        return value
    found = {each.name: forgetful(getattr(value, each.name)) for each in fields(value)}
    return type(value)(**found)  # type: ignore[operator]
