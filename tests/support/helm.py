"""A renderer for the small part of Helm's templates that deploy/helm uses; whatever else is refused.

Fields of .Values, .Release and .Chart, `quote`, `toYaml`, `nindent`, and `if` ... `else` ... `end`. A field that the
values lack is an error here, where Helm would print nothing.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import yaml

ACTION = re.compile(r"(?P<left>\{\{-?)\s*(?P<code>.*?)\s*(?P<right>-?\}\})", re.DOTALL)


def values_of(chart: Path, given: dict) -> dict:
    """values.yaml with some of them replaced, as `helm install -f` merges."""
    return merged(yaml.safe_load((chart / "values.yaml").read_text()), given)


def merged(below: dict, above: dict) -> dict:
    found = dict(below)
    for key, value in above.items():
        both = isinstance(value, dict) and isinstance(found.get(key), dict)
        found[key] = merged(found[key], value) if both else value
    return found


def render(chart: Path, given: dict, release: str = "fl") -> list[dict]:
    """The documents of a chart's templates."""
    about = yaml.safe_load((chart / "Chart.yaml").read_text())
    names = {key[0].upper() + key[1:]: value for key, value in about.items()}
    scope = {"Values": values_of(chart, given), "Release": {"Name": release}, "Chart": names}
    found = []
    for path in sorted((chart / "templates").glob("*.yaml")):
        found += [each for each in yaml.safe_load_all(rendered(path.read_text(), scope)) if each]
    return found


def rendered(text: str, scope: dict) -> str:
    """A template with its actions carried out."""
    out, place, shown = "", 0, [True]
    for action in ACTION.finditer(text):
        before = text[place : action.start()]
        out = trimmed(out + before if all(shown) else out, action["left"])
        place = action.end()
        if action["right"] == "-}}":
            place += len(text[place:]) - len(text[place:].lstrip())
        word, _, rest = action["code"].partition(" ")
        if word == "if":
            shown.append(all(shown) and bool(looked_up(rest, scope)))
        elif action["code"] == "else":
            last = shown.pop()
            shown.append(all(shown) and not last)
        elif action["code"] == "end":
            shown.pop()
        elif all(shown):
            out += evaluated(action["code"], scope)
    assert shown == [True], "an `if` without its `end`"
    return out + text[place:]


def trimmed(text: str, left: str) -> str:
    return text.rstrip() if left == "{{-" else text


def looked_up(path: str, scope: dict):
    found = scope
    for name in path.removeprefix(".").split("."):
        found = found[name]
    return found


def evaluated(code: str, scope: dict) -> str:
    first, *rest = (each.strip() for each in code.split("|"))
    if first.startswith("toYaml "):
        value = yaml.safe_dump(
            looked_up(first.removeprefix("toYaml "), scope), sort_keys=False
        ).rstrip()
    else:
        value = looked_up(first, scope)
    for function in rest:
        name, _, argument = function.partition(" ")
        if name == "quote":
            value = json.dumps(str(value))
        elif name == "nindent":
            value = "".join(f"\n{' ' * int(argument)}{line}" for line in value.splitlines())
        else:
            raise NotImplementedError(function)
    return str(value)
