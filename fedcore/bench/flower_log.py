"""What `flwr run --stream` prints of a run: when each round began and ended, and the metrics of its evaluation.

Both APIs of flwr 1.41 and 1.42: `Strategy.start` (`[ROUND 1/3]`, a MetricRecord after every phase) and `server_fn`
(`[ROUND 1]`, and all metrics in a History at the end). A line carries no time, so it is timed when it is read.
"""

import re
from collections import defaultdict
from dataclasses import dataclass, field

_NUMBER = r"(?:np\.\w+\()?([-+]?(?:\d+\.?\d*(?:e[-+]?\d+)?|nan|inf))\)?"
_DECORATION = re.compile(r"\x1b\[[0-9;]*m|^\s*(?:INFO|WARNING|ERROR|DEBUG)\s*:\s*")
_ROUND = re.compile(r"^\[ROUND (\d+)(?:/\d+)?\]")
_END = re.compile(r"^(?:\[SUMMARY\]|Strategy execution finished)")
_TOTAL = re.compile(r"^(?:Strategy execution|Run) finished.* in ([\d.]+)s$")
_PHASE = re.compile(r"^aggregate_(\w+): received (\d+) results and (\d+) failures", re.IGNORECASE)
_RECORD = re.compile(r"Aggregated MetricRecord: \{(.*)\}")
_METRIC = re.compile(rf"'([^']+)': {_NUMBER}(?=[,}}]|$)")
_HISTORY = re.compile(r"^History \((.*)\):")
_LOSS = re.compile(rf"^round (\d+): {_NUMBER}$")
_NAME = re.compile(r"'([^']+)': \[")
_POINT = re.compile(rf"\((\d+), {_NUMBER}\)")

PHASES = {"fit": "train"}
"""Phases of the older API by the names of the current one."""


@dataclass
class FlowerLog:
    """Fed with one line after the other, with the time of each in seconds.

    began, ended: of each round. phases: {round: {phase: (results, failures)}}. metrics: of each round's evaluation
    over the clients. finished: whether the last round ended. total: seconds of all rounds, as Flower counts them.
    """

    began: dict[int, float] = field(default_factory=dict)
    ended: dict[int, float] = field(default_factory=dict)
    phases: dict[int, dict[str, tuple[int, int]]] = field(default_factory=dict)
    metrics: dict[int, dict[str, float]] = field(default_factory=lambda: defaultdict(dict))
    finished: bool = False
    total: float | None = None
    _section: str = ""
    _name: str = ""

    def feed(self, line: str, when: float) -> None:
        text = plain(line)
        if found := _TOTAL.match(text):
            self.total = float(found[1])
        if found := _ROUND.match(text):
            self._end(when)
            self.began[int(found[1])] = when
            self.phases[int(found[1])] = {}
        elif _END.match(text):
            self._end(when)
            self.finished = True
        elif found := _HISTORY.match(text):
            self._section = found[1]
        elif self.finished:
            self._summarise(text)
        elif self.began:
            self._progress(text)

    @property
    def round(self) -> int:
        """The last round that began; 0 before the first."""
        return max(self.began, default=0)

    def _end(self, when: float) -> None:
        if self.round and self.round not in self.ended:
            self.ended[self.round] = when

    def _progress(self, text: str) -> None:
        phases = self.phases[self.round]
        if found := _PHASE.match(text):
            phases[PHASES.get(found[1], found[1])] = (int(found[2]), int(found[3]))
        elif (found := _RECORD.search(text)) and next(reversed(phases), "") == "evaluate":
            self.metrics[self.round] = {
                name: float(value) for name, value in _METRIC.findall(found[1])
            }

    def _summarise(self, text: str) -> None:
        if self._section == "loss, distributed":
            if found := _LOSS.match(text):
                self.metrics[int(found[1])]["loss"] = float(found[2])
        elif self._section == "metrics, distributed, evaluate":
            if found := _NAME.search(text):
                self._name = found[1]
            for number, value in _POINT.findall(text):
                self.metrics[int(number)][self._name] = float(value)


def plain(line: str) -> str:
    """A line without colours, level and the spaces around it."""
    return _DECORATION.sub("", _DECORATION.sub("", line)).strip()
