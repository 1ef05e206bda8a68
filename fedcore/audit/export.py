"""Lines of a trail for people and for log collectors: in words, as JSON lines, as syslog (RFC 5424), as CEF.

Invariant: one event is one line of output whatever its texts contain; number and hash of the line go with it, so that a
collector's copy shows later what the trail was.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence

from fedcore import __version__
from fedcore.audit.lines import EVENTS, Fact, Line, line_hash

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
    "job": "cs1",
    "certificate": "cs2",
    "plan": "cs3",
    "purpose": "cs4",
    "reason": "reason",
    "bytes": "out",
}


def exported(lines: Sequence[Line], form: str, host: str = "-") -> Iterator[str]:
    """The lines in one of `FORMATS`. host: the machine's name, for syslog."""
    party = ""
    for line in lines:
        if line.event == "opened":
            party = str(line.facts.get("party", ""))
        if form == "jsonl":
            yield line.to_bytes().decode()
        elif form == "cef":
            yield _cef(line, party)
        else:
            yield _syslog(line, party, host)


def in_words(line: Line) -> str:
    """The facts of a line for a table."""
    shown = {
        name: value for name, value in line.facts.items() if name not in ("key", "certificate")
    }
    text = ", ".join(f"{name} {_short(name, value)}" for name, value in shown.items())
    return "".join(c if c.isprintable() else "?" for c in text)


def text_of(value: Fact) -> str:
    """A fact as one text."""
    if isinstance(value, str):
        return value
    return str(value) if isinstance(value, int) else ",".join(value)


def _short(name: str, value: Fact) -> str:
    text = text_of(value)
    if re.fullmatch("[0-9a-f]{64}", text):
        return text[:16]
    return f"{value:,}" if name == "bytes" and isinstance(value, int) else text


def _about(line: Line, party: str) -> Mapping[str, str]:
    facts = {name: text_of(value) for name, value in line.facts.items()}
    return {
        "number": str(line.sequence),
        "hash": line_hash(line.to_bytes()),
        "party": party,
        **facts,
    }


def _cef(line: Line, party: str) -> str:
    """`CEF:0|vendor|product|version|id|name|severity|extension`: in the header `\\` and `|` are escaped, in the
    extension `\\`, `=` and line breaks."""
    level = _CEF_SEVERITY[_SEVERE.get(line.event, _NOTICE)]
    header = (
        "Fedcore",
        "fedcore",
        __version__,
        line.event,
        EVENTS.get(line.event, line.event),
        str(level),
    )
    head = "|".join(re.sub(r"([\\|])", r"\\\1", " ".join(part.split())) for part in header)
    pairs = {"rt": line.time, "externalId": str(line.sequence), "dvchost": party}
    for name, value in _about(line, party).items():
        if name in ("number", "party"):
            continue
        key = _CEF_KEYS.get(name, f"fedcore{name.replace('_', ' ').title().replace(' ', '')}")
        pairs[key] = value
        if key.startswith("cs"):
            pairs[f"{key}Label"] = name
    return f"CEF:0|{head}|" + " ".join(f"{key}={_cef_value(value)}" for key, value in pairs.items())


def _cef_value(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace("=", "\\=")
    return re.sub("\r\n|[\n\r\x0b\x0c\x1c-\x1e\x85\u2028\u2029]", r"\\n", escaped)


def _syslog(line: Line, party: str, host: str) -> str:
    """RFC 5424: priority, version, time, host, program, process, message id, structured data, text."""
    priority = 8 * _FACILITY + _SEVERE.get(line.event, _NOTICE)
    pairs = " ".join(f'{name}="{_param(value)}"' for name, value in _about(line, party).items())
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
