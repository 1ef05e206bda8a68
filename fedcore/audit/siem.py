"""Lines of a trail for people and for log collectors: in words, as JSON lines, as syslog (RFC 5424), as CEF.

Invariant: one event is one line of output whatever its texts contain; number and hash of the line go with it, so that a
collector's copy shows later what the trail was.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from datetime import datetime

from fedcore.audit.lines import EVENTS, Fact, Line, line_hash, text_of

FORMATS = ("jsonl", "cef", "syslog")

_NOTICE, _WARNING, _ALERT = 5, 4, 1
"""Severities of RFC 5424, section 6.2.1; the facility is 13, log audit."""
_FACILITY = 13
_SEVERE = {"refused": _WARNING, "revoke": _WARNING, "torn": _ALERT}
_CEF_SEVERITY = {_NOTICE: 3, _WARNING: 6, _ALERT: 9}
"""0 to 10 (ArcSight, Common Event Format, revision 25)."""

_SD_ID = "fedcore@32473"
"""32473 is the enterprise number for examples (RFC 5612): this project has none."""

_CEF_KEYS = {
    "job": "cs1", "certificate": "cs2", "plan": "cs3", "purpose": "cs4", "reason": "reason", "bytes": "out",
}  # fmt: skip
"""Facts that have a key in CEF's dictionary; the others get one of their own."""

_LONG = {"key", "certificate", "header"}
"""Facts that no table shows."""


def exported(
    lines: Iterable[Line], form: str, party: str, host: str, version: str
) -> Iterator[str]:
    """The lines in one of `FORMATS`. party: whose trail it is; host: the machine's name;
    version: of the Fedcore that exports, for CEF's header."""
    for line in lines:
        if form == "jsonl":
            yield line.to_bytes().decode()
        elif form == "cef":
            yield _cef(line, party, host, version)
        else:
            yield _syslog(line, party, host)


def in_words(line: Line) -> str:
    """A line for a table: what it is about, then its facts; digests are cut to 16 digits."""
    facts = dict(line.facts)
    words = [text_of(facts.pop(name)) for name in ("word", "what", "call") if name in facts]
    if "purpose" in facts:
        words.append(f"of {text_of(facts.pop('purpose'))}, round {facts.pop('round', 0)}")
        facts.pop("number", None)
    shown = {n: text for n, v in facts.items() if n not in _LONG and (text := _short(n, v))}
    words += [f"{name.replace('_', ' ')} {text}" for name, text in shown.items()]
    text = f"{EVENTS.get(line.event, line.event)}: {', '.join(words)}"
    return "".join(c if c.isprintable() else "?" for c in text)


def _short(name: str, value: Fact) -> str:
    text = text_of(value)
    if re.fullmatch("[0-9a-f]{64}", text):
        return text[:16]
    return f"{value:,}" if name == "bytes" and isinstance(value, int) else text


def _about(line: Line) -> dict[str, str]:
    return {name: text_of(value) for name, value in line.facts.items()}


def _cef(line: Line, party: str, host: str, version: str) -> str:
    """`CEF:0|vendor|product|version|id|name|severity|extension`: in the header `\\` and `|` are escaped, in the
    extension `\\`, `=` and line breaks."""
    name, level = EVENTS.get(line.event, line.event), _SEVERE.get(line.event, _NOTICE)
    header = ("Fedcore", "fedcore", version, line.event, name, str(_CEF_SEVERITY[level]))
    head = "|".join(re.sub(r"([\\|])", r"\\\1", " ".join(part.split())) for part in header)
    when = round(datetime.fromisoformat(line.time).timestamp() * 1000)
    pairs = {
        "rt": str(when), "dvchost": host, "externalId": str(line.sequence), "fedcoreParty": party,
        "fedcoreLineHash": line_hash(line.to_bytes()),
    }  # fmt: skip
    for fact, value in _about(line).items():
        key = _CEF_KEYS.get(fact, f"fedcore{fact.replace('_', ' ').title().replace(' ', '')}")
        pairs[key] = value
        if key.startswith("cs"):
            pairs[f"{key}Label"] = fact
    return f"CEF:0|{head}|" + " ".join(f"{key}={_cef_value(value)}" for key, value in pairs.items())


def _cef_value(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace("=", "\\=")
    return re.sub("\r\n|[\n\r\x0b\x0c\x1c-\x1e\x85\u2028\u2029]", r"\\n", escaped)


def _syslog(line: Line, party: str, host: str) -> str:
    """RFC 5424: priority, version, time, host, program, process, message id, structured data, text."""
    priority = 8 * _FACILITY + _SEVERE.get(line.event, _NOTICE)
    about = {
        "line": str(line.sequence), "lineHash": line_hash(line.to_bytes()), "party": party,
    } | _about(line)  # fmt: skip
    pairs = " ".join(f'{name}="{_param(value)}"' for name, value in about.items())
    text = EVENTS.get(line.event, line.event)
    return (
        f"<{priority}>1 {line.time} {_name(host, 255)} fedcore - {_name(line.event, 32)} "
        f"[{_SD_ID} {pairs}] {text}"
    )


def _param(text: str) -> str:
    """A value of structured data: `"`, `\\` and `]` are escaped (section 6.3.3), control characters become spaces."""
    shown = "".join(c if c.isprintable() else " " for c in text)
    return re.sub(r'(["\\\]])', r"\\\1", shown)


def _name(text: str, most: int) -> str:
    """A name of printable ASCII (section 6); `-` for none."""
    return re.sub("[^!-~]", "", text)[:most] or "-"
