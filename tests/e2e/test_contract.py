"""The commands as a newcomer types them: real processes, real files, exit codes and what is printed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from support.preloaded import preloaded
from support.reports import no_reports

from fedcore import simulate

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT)}
COMPARE = "fedcore compare --task heart --seeds 5 --folds 5"
"""The command of docs/benchmarks.md, whose result is held against the contract here."""


def fedcore(*arguments, cwd, timeout=300, env=None):
    return subprocess.run(
        [preloaded().python, "-m", "fedcore.cli.main", *map(str, arguments)],
        cwd=cwd, env=env or ENVIRONMENT, capture_output=True, text=True, timeout=timeout,
    )  # fmt: skip


IN_TURN = """
import contextlib, io, json, sys
from fedcore.cli import main as cli
found = []
for line in json.load(sys.stdin):
    out, err, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            cli.main(line)
        except SystemExit as ended:
            code = ended.code or 0
    found.append((code, out.getvalue(), err.getvalue()))
print(json.dumps(found))
"""


def in_turn(*lines, cwd, env=None):
    """(exit code, stdout, stderr) of each command line, one after the other in one process: torch, which
    takes seconds to load, is loaded once. Words are separated by spaces."""
    python = preloaded().python if env is None else sys.executable
    done = subprocess.run(
        [python, "-c", IN_TURN], input=json.dumps([line.split() for line in lines]), cwd=cwd,
        env=env or ENVIRONMENT, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


SCHEMES = {
    "plain": {"protection": "plain"},
    "encrypted": {"protection": "encrypted"},
    "encrypted-keystream": {"protection": "encrypted", "cipher": "keystream"},
    "masked": {"protection": "masked"},
    "layered": {"protection": "layered"},
    "layered-keystream": {"protection": "layered", "cipher": "keystream"},
}
PROTECTIONS = tuple(SCHEMES)
DROPS = {
    "drop": [
        "3:submit:va", "5:unmask:hungary", "7:keys:va", "7:shares:hungary", "9:unmask:va", "9:unmask:cleveland",
    ],
    "dropout": 0.03,
}  # fmt: skip


@pytest.fixture(scope="module")
def heart(tmp_path_factory):
    """name -> (result, folder) of the runs of 12 rounds compared below.

    "again" is the command, whose process shows what is printed; the others run here, without a report.
    """
    folder = tmp_path_factory.mktemp("heart")
    line = "simulate --task heart --rounds 12 --seed 0 --out again --json"
    done = fedcore(*line.split(), cwd=folder)
    assert done.returncode == 0, done.stderr
    results = {"again": (json.loads(done.stdout), folder / "again")}
    wanted = {name: {"seed": 0, **scheme} for name, scheme in SCHEMES.items()}
    wanted |= {f"{name} with absences": {**wanted[name], **DROPS} for name in PROTECTIONS}
    wanted["other"] = {"protection": "plain", "seed": 1}
    for name, settings in wanted.items():
        # The other arms are trained without any protection: that they are the same is seen once.
        arms = {} if name in {"plain", "layered"} else {"arms": "federated"}
        with no_reports():
            run = simulate("heart", rounds=12, out=folder / name, **settings, **arms)
        results[name] = (json.loads((run.directory / "result.json").read_text()), run.directory)
    return results


def test_one_json_object_on_stdout_the_same_as_the_file(heart):
    printed, directory = heart["again"]
    assert printed == json.loads((directory / "result.json").read_text())
    assert set(printed) >= {
        "schema", "task", "protection", "seed", "rounds", "sites", "model_sha256", "arms", "gap", "per_site",
        "bytes_up_per_site_round", "bytes_down_per_site_round", "seconds", "clipped_fraction", "label",
    }  # fmt: skip
    assert (printed["schema"], printed["task"], printed["protection"]) == (1, "heart", "layered")
    assert (printed["seed"], printed["rounds"]) == (0, 12)
    assert printed["sites"] == ["cleveland", "hungary", "switzerland", "va"]
    assert set(printed["arms"]) == {"centralised", "local_only", "federated_float", "federated"}
    for arm in printed["arms"].values():
        assert 0.5 < arm["accuracy"] < 1 and 0.5 < arm["auc"] < 1
    for part in ("total", "federation", "quantisation", "protection"):
        for metric in ("auc", "accuracy"):
            assert set(printed["gap"][part][metric]) == {"mean", "low", "high", "method", "n"}
    for site, rows in {"cleveland": 303, "hungary": 294, "switzerland": 123, "va": 200}.items():
        assert printed["per_site"][site]["rows"] == rows
        assert set(printed["per_site"][site]) >= {"local_only", "federated"}
    assert set(printed["seconds"]) == {
        "train",
        "encode",
        "protect",
        "fold",
        "unprotect",
        "evaluate",
    }
    assert all(value > 0 for value in printed["seconds"].values())
    assert printed["label"].startswith("Protects against")


def test_the_model_is_the_same_under_every_protection_and_twice(heart):
    hashes = {name: result["model_sha256"] for name, (result, _) in heart.items()}
    assert len({hashes[name] for name in (*PROTECTIONS, "again")}) == 1
    assert hashes["again"] != hashes["other"]


def test_the_model_with_absences_is_that_of_plain_with_the_same(heart):
    plain, directory = heart["plain with absences"]
    assert [row["round"] for row in plain["abandoned_rounds"]] == [7]
    survivors = survivors_of(directory)
    everybody = plain["sites"]
    assert survivors[3] == everybody[:3] and survivors[7] == []
    assert survivors[5] == survivors[12] == everybody  # who left at unmask is in the sum
    # Cleveland's absence by chance comes before the one that is named; without va's answer two of the three
    # that are needed are left, and the round waits for it: its sum may be known.
    assert plain["plan"]["threshold"] == 3 and survivors[9] == everybody[1:]
    assert plain["absences"] > 6  # chance added to the six that are named
    assert plain["model_sha256"] != heart["plain"][0]["model_sha256"]
    for protection in PROTECTIONS[1:]:
        found, directory = heart[f"{protection} with absences"]
        assert found["model_sha256"] == plain["model_sha256"]
        assert survivors_of(directory) == survivors
        assert found["absences"] == plain["absences"]
        assert [row["round"] for row in found["abandoned_rounds"]] == [7]


def survivors_of(directory):
    rows = map(json.loads, (directory / "rounds.jsonl").read_text().splitlines())
    return {row["round"]: row["survivors"] for row in rows if row["arm"] == "federated"}


def test_protection_costs_exactly_nothing(heart):
    for name, (result, _) in heart.items():
        assert result["unequal_rounds"] == 0
        for metric in ("auc", "accuracy"):
            gap = result["gap"]["protection"][metric]
            assert (gap["mean"], gap["low"], gap["high"]) == (0, 0, 0), name


@pytest.mark.parametrize("protection", PROTECTIONS)
def test_the_forecast_of_the_plan_is_what_was_sent(heart, protection):
    result, directory = heart[protection]
    plan = json.loads((directory / "plan.json").read_text())
    assert plan["bytes_up"] == result["bytes_up_per_site_round"]
    assert plan["bytes_down"] == result["bytes_down_per_site_round"]


def test_the_screen_tells_what_a_person_asks(tmp_path):
    done = fedcore("simulate", "--rounds", 3, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines()[0] == "fedcore simulate: task heart"
    said = " ".join(done.stderr.split())
    for part in (
        "4 sites",
        "920 rows",
        "layered",
        "runs/heart-layered-001",
        "Protects against",
        "round 3/3",
    ):
        assert part in said, part
    shown = " ".join(done.stdout.split())
    for part in (
        "centralised", "local only", "federated", "points lost", "protection", "cleveland",
        "3.92 kB per site and round (one ciphertext", "report.html", "fedcore reproduce runs/heart-layered-001",
    ):  # fmt: skip
        assert part in shown, part


def test_help_loads_nothing_heavy():
    code = (
        "import sys; from fedcore.cli import main as cli\n"
        "try: cli.main(['--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'numpy', 'pydantic', 'pandas', 'matplotlib', 'tenseal', 'sklearn'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=ENVIRONMENT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_a_plain_script_without_a_main_guard_and_with_lambdas(tmp_path):
    (tmp_path / "script.py").write_text(
        textwrap.dedent(
            """
            import numpy as np, torch, fedcore
            rng = lambda s: np.random.default_rng(s)
            task = fedcore.Task(
                "lambdas",
                data=lambda s: (rng(s).normal(size=(50, 3)).astype("f4"), rng(s).integers(0, 2, 50)),
                model=lambda: torch.nn.Linear(3, 2),
                loss=lambda o, t: torch.nn.functional.cross_entropy(o, t),
            )
            run = fedcore.simulate(task, sites={"a": 1, "b": 2, "c": 3}, rounds=4, seed=0)
            print(run)
            print(run.gap["accuracy"].mean, len(run.rounds), type(run.model).__name__, run.report().name)
            """
        )
    )
    done = subprocess.run(
        [sys.executable, "script.py"], cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "16 Linear report.html" in done.stdout


def test_the_notebook_in_the_docs_runs(tmp_path, monkeypatch):
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.delenv("MPLBACKEND", raising=False)  # the notebook's own backend shows figures
    notebook = nbformat.read(ROOT / "docs" / "examples" / "notebook.ipynb", as_version=4)
    client = nbclient.NotebookClient(
        notebook,
        timeout=300,
        kernel_name="python3",
        resources={"metadata": {"path": str(tmp_path)}},
    )
    client.execute()
    texts = [str(o) for cell in notebook.cells for o in cell.get("outputs", [])]
    assert any("points" in text for text in texts)
    assert any("image/png" in text for text in texts)
    assert (tmp_path / "runs" / "notebook-layered-001" / "report.html").is_file()


def test_ctrl_c_prints_how_to_resume_and_resume_works(tmp_path):
    command = [
        sys.executable,
        "-m",
        "fedcore.cli.main",
        "simulate",
        "--rounds",
        "30",
        "--lr",
        "0.1",
    ]
    process = subprocess.Popen(
        command,
        cwd=tmp_path,
        env=ENVIRONMENT,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    directory = tmp_path / "runs" / "heart-layered-001"
    for _ in range(3000):
        if (directory / "checkpoint.pt").is_file() or process.poll() is not None:
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=300)
    assert process.returncode == 130, said
    assert "resume: fedcore simulate --resume runs/heart-layered-001" in said
    assert "Traceback" not in said and said.splitlines()[-1] == "interrupted"
    done = fedcore("simulate", "--resume", "runs/heart-layered-001", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    settings = {"rounds": 30, "lr": 0.1, "protection": "plain", "arms": "federated"}
    with no_reports():
        whole = simulate("heart", **settings, out=tmp_path / "whole")
    assert json.loads(done.stdout)["model_sha256"] == whole.result["model_sha256"]


def test_a_broken_tenseal_disables_ciphertexts_with_one_line_and_masks_still_run(tmp_path):
    (tmp_path / "broken" / "tenseal").mkdir(parents=True)
    (tmp_path / "broken" / "tenseal" / "__init__.py").write_text(
        "raise ImportError('libseal is gone')"
    )
    env = ENVIRONMENT | {"PYTHONPATH": f"{tmp_path / 'broken'}{os.pathsep}{ROOT}"}
    refused = "simulate --rounds 2"
    runs = [
        f"{refused} --protection {name} --drop 1:submit:va --json" for name in ("plain", "masked")
    ]
    *found, doctor = in_turn(
        refused, f"{refused} --protection encrypted", *runs, "doctor", cwd=tmp_path, env=env
    )
    for code, _, said in found[:2]:
        assert code == 3
        lines = said.splitlines()
        assert "tenseal cannot be used here (ImportError: libseal is gone)" in lines[-2]
        assert lines[-1].startswith("hint:") and "--protection masked" in lines[-1]
    assert [code for code, _, _ in found[2:]] == [0, 0], found
    assert len({json.loads(printed)["model_sha256"] for _, printed, _ in found[2:]}) == 1
    assert not list((tmp_path / "runs").glob("*encrypted*"))
    assert not list((tmp_path / "runs").glob("*layered*"))
    assert doctor[0] == 3 and "FAIL  SEAL" in doctor[1]


def test_new_check_plan_simulate_report_runs_reproduce(tmp_path):
    """The tour a newcomer takes; README's own commands run as processes of their own (test_readme.py)."""
    new, checked, planned, *simulated, listed = in_turn(
        "new mine", "check mine/job.toml", "plan mine --json", "simulate mine --rounds 2",
        "simulate mine/job.toml --rounds 2 --seed 1", "runs", cwd=tmp_path,
    )  # fmt: skip
    assert (new[0], checked[0], [each[0] for each in simulated]) == (0, 0, [0, 0]), checked
    for part in (
        "north",
        "loss of one step",
        "no buffers",
        "headroom",
        "4.19 kB up",
        "Protects against",
    ):
        assert part in checked[1], part
    assert json.loads(planned[1])["headroom"]["bound"] == 43 * 3 + 1
    first, second = [line.split()[0] for line in listed[1].splitlines() if line.startswith("runs/")]
    markdown, latex, both, same, plan, jump = in_turn(
        f"report {first} --format md", f"report {first} --format latex", f"report {first} {second}",
        f"reproduce {first}", f"plan {first}", "plan --bits 16", cwd=tmp_path,
    )  # fmt: skip
    assert "| arm" in markdown[1] and "\\begin{tabular}" in latex[1]
    assert both[0] == 0 and (tmp_path / both[1].strip()).is_file()
    assert same[0] == 0 and same[1].startswith("same bits: model ")
    assert any(line.startswith("round ") for line in same[2].splitlines())
    assert "Protects against" in plan[1]
    rows = [line.split() for line in jump[1].splitlines() if " to " in line]
    assert ["3", "to", "32", "2", "2048", "3.375"] in rows, "the jump of the price"


@pytest.mark.slow
def test_compare_reaches_the_contract(tmp_path):
    """That command without protection, and a seed of it as it stands there: the same splits to the bit."""
    # Without the two arms that no line below looks at: no arm depends on which others run.
    words = [*COMPARE.split()[1:], "--set", "track.arms=centralised,federated"]
    runs = []
    for more in (("--protection", "plain"), ("--seeds", "1")):
        done = fedcore(*words, *more, "--json", cwd=tmp_path, timeout=1800)
        assert done.returncode == 0, done.stderr
        runs.append(json.loads(done.stdout))
    result, protected = runs
    arms, gap = result["arms"], result["gap"]["total"]["auc"]
    assert arms["centralised"]["accuracy"]["mean"] >= 0.80
    assert arms["centralised"]["auc"]["mean"] >= 0.88
    assert abs(gap["mean"]) <= 0.003
    assert gap["low"] <= gap["mean"] <= gap["high"]
    assert len(result["cells"]) == 25
    assert protected["protection"] == "layered" and protected["unequal_rounds"] == 0
    assert protected["gap"]["protection"]["auc"]["mean"] == 0
    assert protected["cells"] == result["cells"][:5]
