"""The training process of a site tells its log how far reading a dataset item by item has come."""

from __future__ import annotations

import re

import pytest
from fedcore_clients import worker

from fedcore.config import build_job
from fedcore.learning.data import reading
from fedcore.learning.data.split import KEY_BYTES, FoldSplit, HashSplit
from fedcore.learning.task import load_task

TASK = """
import numpy as np
import torch
import fedcore

class Items(torch.utils.data.Dataset):
    def __len__(self):
        return 20

    def __getitem__(self, index):
        return torch.full((2,), float(index)), index % 2

def data(source):
    x = np.arange(40, dtype="f4").reshape(20, 2)
    return Items() if source == "items" else (x, np.arange(20) % 2)

task = fedcore.Task("items", data, lambda: torch.nn.Linear(2, 2), torch.nn.functional.cross_entropy)
"""


@pytest.mark.parametrize(
    "split", [FoldSplit(0, 0, 5), HashSplit(b"k" * KEY_BYTES, 0.2)], ids=["labels", "digests"]
)
@pytest.mark.parametrize(
    ("source", "pause", "said"), [("items", 0, True), ("items", 60, False), ("arrays", 0, False)]
)
def test_only_a_long_pass_over_items_is_logged(
    tmp_path, monkeypatch, capsys, split, source, pause, said
):
    (tmp_path / "task.py").write_text(TASK)
    monkeypatch.setattr(reading, "REPORT_SECONDS", 0)
    monkeypatch.setattr(worker, "READING_SECONDS", pause)
    job = build_job({"protect": {"max_examples": 64}})
    head, _ = worker.Worker().answer(
        {
            "do": "load", "job": "j", "task": "task.py", "base": str(tmp_path), "site": "a", "source": source,
            "digest": load_task(str(tmp_path / "task.py")).digest(), "settings": job.to_json(),
            "split": split.to_json(),
        }, [],
    )  # fmt: skip
    assert "shape" in head, head
    out, err = capsys.readouterr()
    assert not out, "the frames of the answers"
    lines = re.findall(r"^site a: reading rows, (\d+)/20 rows done$", err, re.MULTILINE)
    assert (lines[:20] == [str(row) for row in range(1, 21)]) if said else not lines
