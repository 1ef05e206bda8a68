"""result.json and rounds.jsonl: read as they were written, today or before, and refused by name otherwise."""

from __future__ import annotations

import copy
import json
import re
import shutil

import pytest
from support.results import FIXTURES, result_of, stored, stored_rounds

import fedcore
from fedcore.cli.reproduce import reproduce
from fedcore.errors import BadInput
from fedcore.files import append_row, read_result, read_rounds
from fedcore.report import read, render
from fedcore.results import (
    ComparisonResult,
    JobEvent,
    JobRow,
    MetricsRow,
    RoundRow,
    RunResult,
    SiteRow,
    Spread,
)

NAMES = ["heart", "heart_warned", "heart_compare"]
_LATER = (
    "lower_is_better", "protected_metrics_bound", "protected_clipped", "protected_metrics_sites",
    "protected_metrics_abandoned", "drop", "dropout", "absences", "abandoned_rounds", "notes",
)  # fmt: skip
"""Keys that the first files of this schema did not have."""


def written(folder, found):
    (folder / "result.json").write_text(json.dumps(found))
    return folder


def holds(whole, part):
    """Whether every key of `part` is in `whole`, with the same value."""
    if isinstance(part, dict):
        return all(key in whole and holds(whole[key], value) for key, value in part.items())
    if isinstance(part, list):
        return len(whole) == len(part) and all(map(holds, whole, part))
    return whole == part


@pytest.mark.parametrize("name", NAMES)
def test_a_stored_result_is_read_and_written_without_loss(tmp_path, name):
    found = stored(name)
    result = read_result(written(tmp_path, found))
    again = result.to_json()
    assert holds(again, found)
    assert type(result).from_json(json.loads(json.dumps(again))) == result
    assert isinstance(result, ComparisonResult if name == "heart_compare" else RunResult)


def test_what_is_read_has_types():
    run, compared = result_of(stored("heart")), result_of(stored("heart_compare"))
    assert run.score("federated", "auc") == run.arms["federated"].metrics["auc"]
    assert run.per_site["va"].rows == 200 and run.site_score("va", "federated", "auc") > 0.5
    assert run.seen.parties["coordinator"].best.correlation is not None
    assert isinstance(compared.arms["federated"]["auc"], Spread)
    assert compared.score("federated", "auc") == compared.arms["federated"]["auc"].mean
    assert compared.cells[0].seed == 0 and compared.gap_of("total", "auc").n == 25


def test_a_result_reads_by_the_keys_of_its_file_as_well():
    result = result_of(stored("heart"))
    whole = result.to_json()
    assert [*result] == [*whole] and len(result) == len(whole)
    assert all(result[key] == value for key, value in whole.items())
    assert result["rounds"] == result.rounds
    assert result["arms"]["federated"]["auc"] == result.score("federated", "auc")
    assert result["per_site"]["va"]["rows"] == 200
    assert "stopped" in result and result.get("deployment") is None
    assert "metrics" not in result.arms["federated"] and "deployment" not in result
    with pytest.raises(KeyError, match="sitez"):
        result["sitez"]


def test_a_run_of_before_opens_reports_and_reproduces(tmp_path, no_drawings):
    out = tmp_path / "run"
    fedcore.simulate("heart", rounds=2, protection="plain", out=out)
    found = json.loads((out / "result.json").read_text())
    written(out, {key: value for key, value in found.items() if key not in _LATER})
    opened = fedcore.load(out)
    assert opened.gap["auc"].mean == found["gap"]["total"]["auc"]["mean"]
    assert opened.result.absences.abandoned == () and opened.result.protected.clipped is None
    assert "Lost" in opened.report().read_text()
    assert reproduce(out).same


@pytest.mark.parametrize("name", NAMES)
def test_the_stored_folders_of_before_report(tmp_path, name):
    shutil.copy(FIXTURES / f"{name}.json", tmp_path / "result.json")
    if stored_rounds(name):
        shutil.copy(FIXTURES / f"{name}.rounds.jsonl", tmp_path / "rounds.jsonl")
    assert "## Methods" in render([read(tmp_path)], "md")
    assert fedcore.load(tmp_path).rounds == stored_rounds(name)


def test_another_schema_is_refused_with_both_versions(tmp_path):
    folder = written(tmp_path, stored("heart") | {"schema": 2})
    for opened in (read_result, fedcore.load, read):
        with pytest.raises(BadInput, match="found schema 2, expected 1"):
            opened(folder)


def test_each_kind_opens_as_its_own(tmp_path):
    folder = written(tmp_path, stored("heart_compare"))
    with pytest.raises(BadInput, match="found a result of kind 'compare', expected 'run'"):
        fedcore.Run(folder)
    with pytest.raises(BadInput, match="found a result of kind 'sweep'"):
        read_result(written(tmp_path, stored("heart") | {"kind": "sweep"}))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda r: r.pop("task"), "task"),
        (lambda r: r.update(sites="cleveland"), "sites: found str"),
        (lambda r: r["gap"].update(total=[]), "gap.total: found list"),
        (lambda r: r["arms"]["federated"].update(auc="high"), "auc: found str"),
        (lambda r: r["per_site"]["va"].update(rows=None, test_rows=[1]), "test_rows: found list"),
        (lambda r: r["seen"]["parties"]["coordinator"].update(best=3), "best: found int"),
    ],
)
def test_a_result_of_another_shape_is_refused_by_the_field(tmp_path, change, said):
    found = copy.deepcopy(stored("heart"))
    change(found)
    with pytest.raises(BadInput, match=re.escape(said)) as refused:
        read_result(written(tmp_path, found))
    assert "result.json" in str(refused.value)


def test_a_row_is_a_table_row_with_its_fixed_columns_as_attributes():
    row = RoundRow(
        {"arm": "federated", "round": 3, "auc": 0.9, "survivors": ["a"], "seed": 1, "fold": 0}
    )
    assert (row.arm, row.round, row.survivors, row.abandoned) == ("federated", 3, ["a"], "")
    assert row.number("auc") == row["auc"] == 0.9
    assert row.number("mse") is None and row.number("arm") is None
    assert row.split == (1, 0) and json.loads(json.dumps(row)) == row


def test_rows_end_where_a_crash_cut_the_last_one_off(tmp_path):
    (tmp_path / "rounds.jsonl").write_text('{"arm": "federated", "round": 1}\n{"arm": "fed')
    assert read_rounds(tmp_path) == [{"arm": "federated", "round": 1}]
    assert read_rounds(tmp_path / "nowhere") == []


# --------------------------------------------------------------------------------- deployed jobs

RELEASED = {
    "round": 3, "purpose": "update", "number": 7, "seconds": 0.25, "survivors": ["a", "b"],
    "roster": ["a", "b", "c"], "seconds_by_stage": {"collecting": 0.1}, "restarted": True,
    "bytes_up": 13_900, "bytes_down": 1_200_000,
}  # fmt: skip
ABANDONED = {
    "round": 3, "purpose": "update", "number": 7, "seconds": 0.25, "survivors": [],
    "roster": ["a", "b", "c"], "seconds_by_stage": {},
    "abandoned": {"stage": "unmask", "left": 1, "needed": 3, "exposed": ["a"]},
}  # fmt: skip
METRICS = {
    "round": 2, "number": 7, "sites": 3, "metrics": {"auc": 0.8, "accuracy": None},
    "reference": {"metric": "auc", "value": 0.9, "source": "a registry", "gap": None},
}  # fmt: skip
TRACKED = {
    "round": 2, "purpose": "update", "sites": 3, "here": {"auc": None}, "alone": {"auc": 0.7},
    "gained": {"auc": None}, "everywhere_before": {"auc": 0.8},
}  # fmt: skip
EVENT = {
    "job": "heart-1", "task": "heart", "protection": "layered", "state": "running", "text": "",
    "stage": "collecting", "step": ["update", 4], "rounds": 20, "rounds_done": 3,
    "waiting_for": ["a"], "waiting_until": 17.5,
    "waiting": {
        "for": {"a": {"doing": "training", "last_seen": None}, "b": None}, "of": 4, "until": 900,
        "then": 0, "least": 3, "in_round": True,
    },
    "public_metrics": True, "model": False, "metrics": METRICS, "roster": 0,
    "sites": {
        "a": {
            "connected": True, "evicted": False, "since": 1.0, "last_seen": 2.0, "doing": "", "unable": "",
            "second": "", "roster": "",
        }
    },
    "new_rounds": [RELEASED, ABANDONED], "new_metrics": [METRICS],
}  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "found"),
    [
        (JobRow, RELEASED), (JobRow, ABANDONED), (MetricsRow, METRICS), (SiteRow, TRACKED),
        (JobEvent, EVENT), (JobEvent, EVENT | {"step": None, "waiting": None, "metrics": None}),
    ],
)  # fmt: skip
def test_a_record_of_a_deployed_job_is_read_and_written_without_loss(kind, found):
    record = kind.from_json(json.loads(json.dumps(found)))
    assert record.to_json() == found and kind.from_json(record.to_json()) == record


def test_a_watch_event_of_another_shape_is_refused_by_the_field():
    with pytest.raises(TypeError, match="abandoned: found str"):
        JobEvent.from_json(EVENT | {"new_rounds": [RELEASED | {"abandoned": "submit"}]})
    with pytest.raises(TypeError, match="step: found float"):
        JobEvent.from_json(EVENT | {"step": ["update", 1.5]})


def test_the_row_of_a_deployed_round_reads_like_one_of_a_simulation(tmp_path):
    released, abandoned = JobRow.from_json(RELEASED), JobRow.from_json(ABANDONED)
    row = released.as_round()
    assert (row.arm, row.round, row.survivors, row.abandoned) == ("federated", 3, ["a", "b"], "")
    assert abandoned.as_round().abandoned == "at unmask: 1 sites stayed, 3 needed"
    append_row(tmp_path, abandoned)
    assert json.loads((tmp_path / "rounds.jsonl").read_text()) == ABANDONED
