"""A reader of Dockerfiles, and what an IT department refuses in one."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path

BUILD_TOOLS = re.compile(r"\b(?:apt|apt-get|apk|dnf|yum|gcc|make|git|curl|wget)\b|\bpip install\b")


@dataclass
class Stage:
    """One FROM and its instructions, as (keyword, text) with continued lines joined."""

    base: str
    name: str
    lines: list[tuple[str, str]] = field(default_factory=list)

    def last(self, keyword: str) -> str:
        return next((text for word, text in reversed(self.lines) if word == keyword), "")

    def all(self, keyword: str) -> list[str]:
        return [text for word, text in self.lines if word == keyword]


def read(text: str) -> tuple[dict[str, str], list[Stage]]:
    """({argument before the first FROM: default}, stages)."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    arguments: dict[str, str] = {}
    stages: list[Stage] = []
    for line in re.sub(r"\\\n\s*", "", "\n".join(lines)).splitlines():
        if not line.strip():
            continue
        keyword, _, rest = line.strip().partition(" ")
        if keyword == "FROM":
            base, _, name = rest.partition(" AS ")
            stages.append(Stage(base, name))
        elif stages:
            stages[-1].lines.append((keyword, rest.strip()))
        elif keyword == "ARG":
            name, _, default = rest.partition("=")
            arguments[name] = default
    return arguments, stages


def findings(text: str, context: Path) -> list[str]:
    """What is wrong with a Dockerfile; [] for nothing. context: the folder that COPY counts from."""
    arguments, stages = read(text)
    final, found = stages[-1], []
    for stage in stages:
        name = stage.base.removeprefix("${").removesuffix("}")
        if arguments.get(name) != "" and not re.search(r"@sha256:[0-9a-f]{64}$", stage.base):
            found.append(f"FROM {stage.base}: not pinned by digest")
        for copied in stage.all("COPY"):
            source = re.match(r"(?:--from=(\S+) )?(\S+)", copied)
            named = {each.name for each in stages} | {"wheelhouse"}
            if source[1] is None and not (context / source[2]).exists():
                found.append(f"COPY {source[2]}: not in the build context")
            if source[1] is not None and source[1] not in named:
                found.append(f"COPY --from={source[1]}: no such stage")
        safe = {"--require-hashes", "--no-index"}
        found += [
            "pip installs what has no hash, or from the network"
            for command in stage.all("RUN")
            if re.search(r"\binstall --", command) and not safe <= {*command.split()}
        ]
    if not re.fullmatch(r"[1-9]\d*:[1-9]\d*", final.last("USER")):
        found.append(f"USER {final.last('USER')!r}: not numeric, or root")
    words = [word for word, _ in final.lines]
    after = words[words.index("USER") :] if "USER" in words else []
    if {"RUN", "COPY"} & {*after}:
        found.append("USER: something is copied or run after it")
    found += [f"RUN {each}: a build tool" for each in final.all("RUN") if BUILD_TOOLS.search(each)]
    for keyword in ("ENTRYPOINT", "HEALTHCHECK", "VOLUME"):
        listed = final.last(keyword)
        if not re.search(r"\[.*\]$", listed):
            found.append(f"{keyword}: none in the form of a list")
    return found


def health_command(text: str) -> list[str]:
    """The words of the HEALTHCHECK of the final stage."""
    return json.loads(read(text)[1][-1].last("HEALTHCHECK").partition("CMD ")[2])
