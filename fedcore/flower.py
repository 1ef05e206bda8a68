"""Protected aggregation inside Flower: `SecureAggregation` for a ServerApp, `secure_mod` for a ClientApp.

Needs the extra `flower`. Loaded when first used: a ClientApp does not load what a ServerApp needs. The guide is
docs/flower.md.
"""

from importlib import import_module
from typing import Any

_HOMES = {
    "SecureAggregation": "fedcore_server.flower_strategy",
    "RoundReport": "fedcore_server.flower_strategy",
    "secure_mod": "fedcore_clients.flower_mod",
    "write_identities": "fedcore_clients.flower_identities",
}

__all__ = list(_HOMES)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'fedcore.flower' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
