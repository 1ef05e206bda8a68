"""Programs of `scripts/` as modules: they are in no package."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"


def load_script(path: str) -> ModuleType:
    """The module of a file below `scripts/`, as `vectors/verify.py`."""
    place = SCRIPTS / path
    spec = importlib.util.spec_from_file_location(f"script_{place.stem}", place)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their annotations up there
    spec.loader.exec_module(module)
    return module
