"""`fedcore bench simulate`: what is compared before anything is timed, in which order, and what is left out.

The engines themselves run in the benchmark: they need environments of their own.
"""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from fedcore.bench import simulate
from fedcore.bench.simulate import CHECKED, COMPARED, ENGINES, EngineProcess, checked, timed
from fedcore.errors import Abandoned, BadInput, UnknownName
from fedcore.report.terminal import as_text

MODEL = np.linspace(-1, 1, 650, dtype=np.float32)


class Engine:
    """An engine with a given model, which records its rounds."""

    def __init__(self, name: str, model: np.ndarray, calls: list[str]) -> None:
        self.name, self._model, self._calls = name, model, calls
        self.facts = {"parameters": len(model), "about": {}, "versions": {}}

    def round(self) -> tuple[float, float]:
        self._calls.append(self.name)
        return float(len(self._calls)), 0.5

    def model(self) -> np.ndarray:
        return self._model


def test_another_model_is_refused_before_anything_is_timed() -> None:
    calls: list[str] = []
    wrong = MODEL.copy()
    wrong[3] += 1e-3
    with pytest.raises(Abandoned, match=r"logreg, b: found a model that differs by 0\.001"):
        checked([Engine("a", MODEL, calls), Engine("b", wrong, calls)], MODEL, "logreg")
    assert calls == ["a"] * CHECKED + ["b"] * CHECKED


@pytest.mark.parametrize("model", [MODEL[:-1], np.full_like(MODEL, np.nan)])
def test_a_model_of_another_length_or_of_nan_is_refused(model: np.ndarray) -> None:
    with pytest.raises(Abandoned):
        checked([Engine("a", model, [])], MODEL, "logreg")


def test_rounding_is_no_other_model() -> None:
    found = checked([Engine("a", MODEL + np.float32(1e-6), [])], MODEL, "logreg")
    assert found["a"] == pytest.approx(1e-6, rel=0.1)


def test_engines_are_timed_in_turn_and_each_begins_as_often() -> None:
    calls: list[str] = []
    engines = [Engine(name, MODEL, calls) for name in "abc"]
    seconds, cpu = timed(engines, 3)
    assert "".join(calls) == "abcbcacab"
    assert {name: len(found) for name, found in seconds.items()} == {"a": 3, "b": 3, "c": 3}
    assert cpu["a"] == [0.5] * 3


def _process(code: str, folder: Path) -> EngineProcess:
    log = folder / "engine.log"
    line = [sys.executable, "-c", "from driver import Driver\n" + code]
    with log.open("ab") as file:
        process = subprocess.Popen(
            line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=file, text=True,
            env={"PYTHONPATH": str(ENGINES), "PYTHONDONTWRITEBYTECODE": "1"},
        )  # fmt: skip
    return EngineProcess(COMPARED[0], process, log)


def test_an_engine_is_driven_through_its_input_whatever_a_library_prints(tmp_path: Path) -> None:
    engine = _process(
        "import numpy as np\nd = Driver(); d.say(parameters=3)\n"
        "for _ in d.rounds(lambda: np.arange(3)): print('noise')",
        tmp_path,
    )
    engine.ready()
    seconds, cpu = engine.round()
    assert seconds >= 0
    assert cpu >= 0
    assert engine.facts == {"parameters": 3}
    assert engine.model().tolist() == [0, 1, 2]
    engine.end()
    assert engine._process.wait(60) == 0
    assert "noise" in (tmp_path / "engine.log").read_text()


def test_an_engine_that_ends_abandons_the_benchmark_with_its_last_line(tmp_path: Path) -> None:
    engine = _process("Driver().say(parameters=3)\nraise SystemExit('no memory')", tmp_path)
    engine.ready()
    with pytest.raises(Abandoned, match=r"batched: found the end of its process.*no memory"):
        engine.round()


def test_an_engine_without_its_environment_is_left_out_with_the_reason(tmp_path: Path) -> None:
    chosen, left_out = simulate._chosen("", tmp_path)
    assert [each.name for each in chosen] == ["batched", "batched-2", "sequential", "sequential-2"]
    assert set(left_out) == {"pfl"}
    assert "scripts/bench/simulate-peers" in left_out["pfl"]
    with pytest.raises(BadInput, match="found none that can be measured"):
        simulate._chosen("pfl", None)


def test_unknown_workloads_and_engines_are_refused() -> None:
    with pytest.raises(UnknownName, match="lstm"):
        simulate.run("lstm")
    with pytest.raises(UnknownName, match="flwr"):
        simulate.run("mlp", engines="flwr")
    with pytest.raises(BadInput, match="--rounds"):
        simulate.run("mlp", rounds=0)


def test_ratios_are_those_of_the_engines_in_the_same_run() -> None:
    def row(engine: str, ms: float) -> dict:
        return {
            "workload": "mlp", "engine": engine, "processes": 1, "parameters": 50_826, "ms": ms, "cpu_ms": ms,
            "all_ms": [ms], "difference": 1e-8, "about": {},
        }  # fmt: skip

    found = {
        "clients": 1000, "cohort": 100, "rounds": 1, "checked_rounds": 2, "versions": {"pfl": "0.6.0"},
        "left_out": {"another": "no environment"}, "rows": [row("batched", 50.0), row("pfl", 200.0)],
        "environment": {"python": "3.11", "cores": 2, "cpu": "a CPU"},
    }  # fmt: skip
    text = as_text(simulate.page(json.loads(json.dumps(found))))
    line = next(line for line in text.splitlines() if "batched" in line)
    assert line.split()[-2:] == ["4.0", "1e-08"]
    assert "another is left out: no environment" in text


def test_an_engine_that_does_not_answer_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(simulate, "SILENT_SECONDS", 0.05)
    engine = _process("import sys\nsys.stdin.read()", tmp_path)
    with pytest.raises(Abandoned, match="batched: found no answer after 0 s"):
        engine.ready()
    engine.end()
    assert engine._process.wait(60) == 0
