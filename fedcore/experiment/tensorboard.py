"""TensorBoard events of a run, one folder per arm so that the arms lie over each other.

Nothing happens where tensorboard cannot be imported: rounds.jsonl holds the same numbers.
"""

import time
from pathlib import Path
from typing import Any

from fedcore.results import RoundRow


class Events:
    """Writes each numeric column of a row as a scalar under tensorboard/<arm>/."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._writers: dict[str, Any] | None
        try:
            from tensorboard.compat.proto.event_pb2 import Event
            from tensorboard.compat.proto.summary_pb2 import Summary
            from tensorboard.summary.writer.event_file_writer import EventFileWriter
        except Exception:  # noqa: BLE001 - absent, or broken: a protobuf that does not fit raises TypeError
            self._writers = None
            return
        self._event, self._summary, self._writer = Event, Summary, EventFileWriter
        self._writers = {}

    def row(self, row: RoundRow) -> None:
        """Add one row of rounds.jsonl."""
        if self._writers is None:
            return
        arm = row.arm
        if arm not in self._writers:
            self._writers[arm] = self._writer(str(self._directory / "tensorboard" / arm))
        values = [
            self._summary.Value(tag=name, simple_value=value)
            for name, value in row.items()
            if isinstance(value, int | float) and name != "round"
        ]
        event = self._event(
            wall_time=time.time(), step=row.round, summary=self._summary(value=values)
        )
        self._writers[arm].add_event(event)

    def close(self) -> None:
        """Flush and close; safe to call twice."""
        for writer in (self._writers or {}).values():
            writer.close()
        self._writers = None
