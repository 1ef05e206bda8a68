"""Programs of `scripts/` as modules: they are in no package."""

from __future__ import annotations

import importlib.util
import sys
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"


def load_script(path: str) -> ModuleType:
    """The module of a file below `scripts/`, as `vectors/verify.py` or `wheelhouse`."""
    place = SCRIPTS / path
    name = f"script_{place.stem}"
    loader = SourceFileLoader(name, str(place))  # whatever the ending
    spec = importlib.util.spec_from_file_location(name, place, loader=loader)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their annotations up there
    spec.loader.exec_module(module)
    return module
