"""The list of records, `tests/vectors/records.json`: name, fields and bytes of one example each.

    python scripts/vectors/records.py            adds the records that are missing in the list
    python scripts/vectors/records.py --force    also replaces those that changed and drops those that went

What the list says is in journals and under signatures: a change of an entry is a change of the byte form.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterator
from importlib import import_module
from itertools import count
from pathlib import Path
from typing import Any, get_args, get_origin

from fedcore.secagg.crypto.secret import SecretBytes
from fedcore.secagg.protocol.wire_form import encode, fields_of, records, type_name
from fedcore.types import Json

ROOT = Path(__file__).resolve().parents[2]
FILE = ROOT / "tests" / "vectors" / "records.json"
PACKAGES = {"fedcore": "fedcore", "server": "fedcore_server", "clients": "fedcore_clients"}
"""{folder: the package it installs as}."""


def registered() -> dict[str, Json]:
    """{record name: its entry} of every record type in the source, in order of the names."""
    for folder, package in PACKAGES.items():
        for path in (ROOT / folder).rglob("*.py"):
            if re.search(r"^@?record\(", path.read_text(), re.MULTILINE):
                place = path.relative_to(ROOT / folder).with_suffix("").parts
                import_module(".".join((package, *place)))
    return {name: entry(kind) for name, kind in sorted(records().items())}


def entry(kind: type[Any]) -> Json:
    """What the list says of a record type."""
    listed = [f"{name}: {type_name(hint)}" for name, hint in fields_of(kind)]
    return {"fields": listed, "example": encode(example(kind, count(1))).hex()}


def example(hint: Any, number: Iterator[int]) -> Any:
    """A value of an annotated type: every leaf takes the next number, every list has one item."""
    hint = getattr(hint, "__supertype__", hint)  # NewType
    if hint in set(records().values()):
        return hint(*(example(each, number) for _, each in fields_of(hint)))
    if get_origin(hint) is tuple:
        return tuple(example(each, number) for each in get_args(hint) if each is not Ellipsis)
    if get_origin(hint):  # a union
        return example(get_args(hint)[0], number)
    made = bytes((next(number),))
    return {int: made[0], str: f"s{made[0]}", bytes: made, SecretBytes: SecretBytes(made)}[hint]


def main(args: list[str] | None = None) -> int:
    """Bring the list up to date."""
    options = argparse.ArgumentParser(description="Add new records to tests/vectors/records.json.")
    options.add_argument("--force", action="store_true", help="also change or drop what is listed")
    force = options.parse_args(args).force
    listed: dict[str, Json] = json.loads(FILE.read_text()) if FILE.exists() else {}
    found = registered()
    changed = [name for name in listed if listed[name] != found.get(name)]
    if changed and not force:
        print(
            f"found {', '.join(changed)} changed or gone, expected them as listed: journals and "
            "signatures hold them. With --force the list follows the source.",
            file=sys.stderr,
        )
        return 1
    lines = (f"{json.dumps(name)}: {json.dumps(about)}" for name, about in found.items())
    FILE.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    new = len(found.keys() - listed.keys())
    print(f"{FILE.name}: {len(found)} records, {new} new, {len(changed)} changed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
