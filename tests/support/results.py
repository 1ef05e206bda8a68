"""Results for tests: the stored ones of the fixtures, and small ones that say only what a test is about."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fedcore.results import ComparisonResult, RoundRow, RunResult

FIXTURES = Path(__file__).parents[1] / "unit" / "report" / "fixtures"

_BARE = {
    "task": "t", "protection": "encrypted", "rounds": 1, "sites": [], "metrics": [], "gap": {}, "per_site": {},
    "arms": {},
}  # fmt: skip


def stored(name: str) -> dict[str, Any]:
    """The JSON of a stored result: heart, heart_warned or heart_compare."""
    found: dict[str, Any] = json.loads((FIXTURES / f"{name}.json").read_text(encoding="utf-8"))
    return found


def stored_rounds(name: str) -> list[RoundRow]:
    """The rows beside it, none of a comparison."""
    path = FIXTURES / f"{name}.rounds.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    return [RoundRow(json.loads(line)) for line in lines]


def result_of(found: dict[str, Any] | None = None, **more: Any) -> RunResult | ComparisonResult:
    """The record of a result's JSON, with the least of what is missing."""
    whole = _BARE | (found or {}) | more
    if whole.get("kind") == "compare":
        return ComparisonResult.from_json({"seeds": 1, "folds": 1, "cells": []} | whole)
    return RunResult.from_json({"seed": 0} | whole)
