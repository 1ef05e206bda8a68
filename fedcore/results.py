"""What a run found, as its folder keeps it: `result.json` and `rounds.jsonl`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from fedcore.errors import BadInput
from fedcore.files import read_json

if TYPE_CHECKING:  # it imports numpy, which the terminal does without
    from fedcore.types import Json

SCHEMA = 1
"""Version of both files. A result of another one is refused."""

RESULT_FILE, ROUNDS_FILE = "result.json", "rounds.jsonl"


def read_result(directory: Path) -> Json:
    """The result of a finished run or comparison.

    Raises BadInput for a file that is missing, unreadable or of another schema.
    """
    result = read_json(directory / RESULT_FILE)
    if result.get("schema") != SCHEMA:
        raise BadInput(
            f"{directory / RESULT_FILE}: found schema {result.get('schema')!r}, expected {SCHEMA}"
        )
    return result


def read_rounds(directory: Path) -> list[Json]:
    """The rows of rounds.jsonl; a last line cut off by a crash is left out."""
    rows: list[Json] = []
    path = directory / ROUNDS_FILE
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows
