"""Replace a function of a protocol machine in its package and every module of it that uses it."""

from __future__ import annotations

import sys


def patch_machine(monkeypatch, machine, name, other):
    """machine: the package `round.site`, `round.coordinator` or `epoch`. Fails where nothing uses `name`."""
    parts = [
        module
        for path, module in sys.modules.items()
        if f"{path}.".startswith(f"{machine.__name__}.") and hasattr(module, name)
    ]
    assert parts, f"{machine.__name__} has no {name}"
    for part in parts:
        monkeypatch.setattr(part, name, other)
