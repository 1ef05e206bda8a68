"""`fedcore bench flower`: how Flower's log is read, its processes, what is refused, and the apps that it runs.

Both engines run in the nightly workflow: a round of Flower's takes several seconds.
"""

import json
import os
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

pytest.importorskip("flwr")
from support.flower_apps import SERVER, flower_app

from fedcore.bench import two_engines
from fedcore.bench.engine import children_of
from fedcore.bench.flower_engine import SuperLink, process_of, program, run_app, watched
from fedcore.bench.flower_engine import _end as end
from fedcore.bench.flower_log import FlowerLog, plain
from fedcore.cli.main import main
from fedcore.errors import Abandoned, BadInput, TaskFailed
from fedcore.report.terminal import as_text

EXAMPLES = Path(__file__).resolve().parents[3] / "docs/examples"

CURRENT = """\
Using SuperLink: bench (127.0.0.1:28473)
Successfully started run 3883580078820697164
\x1b[92mINFO \x1b[0m:      Starting logstream for run_id `3883580078820697164`
\x1b[92mINFO \x1b[0m:      Starting FedAvg strategy:
\x1b[92mINFO \x1b[0m:      \t├── Number of rounds: 2
\x1b[92mINFO \x1b[0m:      \t├── ConfigRecord (train): {'lr': 0.2}
\x1b[92mINFO \x1b[0m:      [ROUND 1/2]
\x1b[92mINFO \x1b[0m:      configure_train: Sampled 4 nodes (out of 4)
\x1b[92mINFO \x1b[0m:      aggregate_train: Received 4 results and 0 failures
\x1b[92mINFO \x1b[0m:      \t└──> Aggregated MetricRecord: {'train_loss': 1.3886295044870478}
\x1b[92mINFO \x1b[0m:      configure_evaluate: Sampled 4 nodes (out of 4)
\x1b[92mINFO \x1b[0m:      aggregate_evaluate: Received 4 results and 0 failures
\x1b[92mINFO \x1b[0m:      \t└──> Aggregated MetricRecord: {'eval_loss': 1.06745543479919, 'eval_acc': 0.91944444444444}
\x1b[92mINFO \x1b[0m:      Global evaluation
\x1b[92mINFO \x1b[0m:      \t└──> MetricRecord: {'accuracy': 0.5}
\x1b[92mINFO \x1b[0m:      [ROUND 2/2]
\x1b[92mINFO \x1b[0m:      configure_train: Sampled 4 nodes (out of 4)
\x1b[92mINFO \x1b[0m:      aggregate_train: Received 4 results and 0 failures
\x1b[92mINFO \x1b[0m:      \t└──> Aggregated MetricRecord: {'train_loss': 0.593701840288765}
\x1b[92mINFO \x1b[0m:      configure_evaluate: Sampled 4 nodes (out of 4)
\x1b[92mINFO \x1b[0m:      aggregate_evaluate: Received 4 results and 0 failures
\x1b[92mINFO \x1b[0m:      \t└──> Aggregated MetricRecord: {'eval_loss': 1e-05, 'eval_acc': nan}
\x1b[92mINFO \x1b[0m:      Strategy execution finished in 37.52s
\x1b[92mINFO \x1b[0m:      Final results:
\x1b[92mINFO \x1b[0m:      \tAggregated ClientApp-side Evaluate Metrics:
\x1b[92mINFO \x1b[0m:      \t{ 1: {'eval_acc': '9.1944e-01', 'eval_loss': '1.0675e+00'},
"""
"""`flwr run --stream` of an app with Strategy.start; flwr 1.41 and 1.42 print the same."""

OLDER = """\
\x1b[92mINFO \x1b[0m:      Starting Flower ServerApp, config: num_rounds=2, no round_timeout
\x1b[92mINFO \x1b[0m:      [INIT]
\x1b[92mINFO \x1b[0m:      Evaluation returned no results (`None`)
\x1b[92mINFO \x1b[0m:      [ROUND 1]
\x1b[92mINFO \x1b[0m:      configure_fit: strategy sampled 3 clients (out of 3)
\x1b[92mINFO \x1b[0m:      aggregate_fit: received 3 results and 0 failures
\x1b[93mWARNING \x1b[0m:   No fit_metrics_aggregation_fn provided
\x1b[92mINFO \x1b[0m:      configure_evaluate: strategy sampled 3 clients (out of 3)
\x1b[92mINFO \x1b[0m:      aggregate_evaluate: received 3 results and 0 failures
\x1b[92mINFO \x1b[0m:      [ROUND 2]
\x1b[92mINFO \x1b[0m:      configure_fit: strategy sampled 3 clients (out of 3)
\x1b[92mINFO \x1b[0m:      aggregate_fit: received 3 results and 0 failures
\x1b[92mINFO \x1b[0m:      configure_evaluate: strategy sampled 3 clients (out of 3)
\x1b[92mINFO \x1b[0m:      aggregate_evaluate: received 3 results and 0 failures
\x1b[92mINFO \x1b[0m:      [SUMMARY]
\x1b[92mINFO \x1b[0m:      Run finished 2 round(s) in 101.59s
\x1b[92mINFO \x1b[0m:      \tHistory (loss, distributed):
\x1b[92mINFO \x1b[0m:      \t\tround 1: 0.912775715192159
\x1b[92mINFO \x1b[0m:      \t\tround 2: 0.5812262892723083
\x1b[92mINFO \x1b[0m:      \tHistory (loss, centralized):
\x1b[92mINFO \x1b[0m:      \t\tround 2: 7.0
\x1b[92mINFO \x1b[0m:      \tHistory (metrics, distributed, fit):
\x1b[92mINFO \x1b[0m:      \t{'speed': [(1, 5.0), (2, 5.0)]}
\x1b[92mINFO \x1b[0m:      \tHistory (metrics, distributed, evaluate):
\x1b[92mINFO \x1b[0m:      \t{'accuracy': [(1, 0.9055555555555556), (2, 0.9138888888888889)],
\x1b[92mINFO \x1b[0m:      \t 'recall': [(1, np.float64(0.25)),
\x1b[92mINFO \x1b[0m:      \t            (2, np.float64(0.75))]}
\x1b[92mINFO \x1b[0m:      \tHistory (metrics, centralized):
\x1b[92mINFO \x1b[0m:      \t{'accuracy': [(2, 0.1)]}
"""
"""The same of an app with server_fn."""


def read(text):
    """A log of which every line comes a second after the one before."""
    log = FlowerLog()
    for when, line in enumerate(text.splitlines()):
        log.feed(line, float(when))
    return log


def at(text, part):
    return float(next(n for n, line in enumerate(text.splitlines()) if part in line))


def test_log_of_the_current_api_gives_rounds_phases_and_the_metrics_of_evaluation():
    log = read(CURRENT)
    second, end_ = at(CURRENT, "[ROUND 2/2]"), at(CURRENT, "finished in")
    assert log.began == {1: at(CURRENT, "[ROUND 1/2]"), 2: second}
    assert log.ended == {1: second, 2: end_}
    assert log.phases == {n: {"train": (4, 0), "evaluate": (4, 0)} for n in (1, 2)}
    assert log.metrics[1] == {"eval_loss": 1.06745543479919, "eval_acc": 0.91944444444444}
    assert log.metrics[2] == pytest.approx(
        {"eval_loss": 1e-05, "eval_acc": float("nan")}, nan_ok=True
    )
    assert log.finished
    assert log.total == 37.52


def test_log_of_the_older_api_gives_the_metrics_of_its_summary():
    log = read(OLDER)
    second, end_ = at(OLDER, "[ROUND 2]"), at(OLDER, "[SUMMARY]")
    assert log.ended == {1: second, 2: end_}
    assert log.phases == {n: {"train": (3, 0), "evaluate": (3, 0)} for n in (1, 2)}
    assert log.metrics == {
        1: {"loss": 0.912775715192159, "accuracy": 0.9055555555555556, "recall": 0.25},
        2: {"loss": 0.5812262892723083, "accuracy": 0.9138888888888889, "recall": 0.75},
    }
    assert log.finished
    assert log.total == 101.59


@pytest.mark.parametrize(("text", "round_"), [(CURRENT, "[ROUND 2/2]"), (OLDER, "[ROUND 2]")])
def test_run_that_was_cut_has_no_end_of_its_last_round(text, round_):
    log = read(text.partition(round_)[0] + round_)
    assert log.round == 2
    assert list(log.ended) == [1]
    assert not log.finished
    assert log.total is None


def test_log_without_evaluation_has_no_metrics():
    lines = [
        line for line in CURRENT.splitlines() if "evaluate:" not in line and "eval_loss" not in line
    ]
    log = read("\n".join(lines))
    assert log.finished
    assert not log.metrics
    assert log.phases == {n: {"train": (4, 0)} for n in (1, 2)}


def test_lines_of_a_file_are_seen_whole_while_a_process_writes_it(tmp_path):
    file = tmp_path / "lines"
    code = (
        "import time\nfor part in ('one\\ntw', 'o\\n', 'rest'):\n"
        "    print(part, end='', flush=True); time.sleep(0.05)"
    )
    with process_of([sys.executable, "-c", code], file) as process:
        seen = list(watched(process, lambda: file if file.exists() else None, 0.001, lambda: "x"))
    assert [text for _, text in seen] == ["one", "two"]
    assert seen[0][0] <= seen[1][0] <= time.monotonic()


def test_process_that_is_silent_for_too_long_is_given_up(tmp_path):
    line = [sys.executable, "-c", "import time; time.sleep(600)"]
    with (
        pytest.raises(Abandoned, match=r"app on Flower: found no line for"),
        process_of(line, tmp_path / "log") as process,
    ):
        list(watched(process, lambda: None, 0.01, lambda: "app on Flower", stalled=0.05))
    assert process.poll() is not None


def test_processes_that_started_others_in_groups_of_their_own_leave_none(tmp_path):
    """As a SuperLink does, which starts a SuperExec so."""
    ready = tmp_path / "ready"
    inner = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
    code = (
        "import subprocess, sys, pathlib, time\n"
        f"child = subprocess.Popen([sys.executable, '-c', {inner!r}], start_new_session=True)\n"
        f"pathlib.Path({str(ready)!r}).write_text(str(child.pid)); time.sleep(600)"
    )
    outer = subprocess.Popen([sys.executable, "-c", code], start_new_session=True)
    while not (ready.is_file() and ready.read_text()):
        time.sleep(0.005)
    child = int(ready.read_text())
    assert children_of(outer.pid) == [child]
    end({"outer": outer})
    assert outer.returncode is not None
    with suppress(FileNotFoundError):
        while (
            Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
        ):  # until it is read by init
            time.sleep(0.005)


def test_process_of_flower_that_ended_is_named_with_its_last_line_and_its_log(tmp_path):
    link = SuperLink(tmp_path, dict(os.environ), 0)
    link.start("superlink", "sh", "-c", "echo Address already in use >&2; exit 3")
    link.processes["superlink"].wait()
    with pytest.raises(
        BadInput, match="Flower's superlink: its process ended with code 3: Address already in use"
    ) as found:
        link.wait("its SuperLink", lambda: False)
    assert found.value.remedy == f"its log: {tmp_path / 'superlink.log'}"


@pytest.fixture
def flwr(tmp_path):
    """A SuperLink whose `flwr` prints a given log."""

    def printing(text):
        (tmp_path / "said").write_text(text)
        file = tmp_path / "bin" / "flwr"
        file.parent.mkdir()
        file.write_text(f"#!/bin/sh\ncat '{tmp_path / 'said'}'\n")
        file.chmod(0o755)
        path = os.pathsep.join((str(file.parent), os.environ["PATH"]))
        return SuperLink(tmp_path, {**os.environ, "PATH": path}, 0)

    return printing


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            CURRENT.replace("Received 4 results and 0", "Received 3 results and 1"),
            "app on Flower: found 3 results and 1 failures in train of round 1, expected 4 results",
        ),
        (
            CURRENT.partition("Strategy execution")[0] + "\nERROR :  ServerApp thread raised\n",
            "app on Flower: found the end of its log in round 2",
        ),
        ("Loading project\nModuleNotFoundError: no torch\n", "found the end of its log in round 0"),
    ],
)
def test_app_that_fails_on_flower_is_shown_with_its_last_lines(flwr, text, message):
    link = flwr(text)
    with pytest.raises(TaskFailed, match=message) as found:
        run_app(link, Path("app"), "app", 4, "")
    shown = found.value.user_traceback.splitlines()
    assert 0 < len(shown) <= 12
    assert shown[-1] == plain(text.splitlines()[-1])
    assert not any("\x1b" in line or line.startswith("INFO") for line in shown)
    assert found.value.remedy == f"the logs: {link.folder}"


def test_rounds_of_a_share_of_the_sites_are_refused(flwr):
    """As a strategy's fraction_train asks for: on Fedcore every site takes part in every round."""
    link = flwr(CURRENT.replace("Received 4 results", "Received 2 results"))
    where = "found 2 of 4 sites in train of round 1, expected all"
    with pytest.raises(BadInput, match=where) as found:
        run_app(link, Path("app"), "app", 4, "")
    assert found.value.remedy.startswith("fraction_train and fraction_evaluate")


def test_app_that_finishes_on_flower_is_timed_from_its_submission(flwr):
    link = flwr(CURRENT)
    before = time.monotonic()
    log, began = run_app(link, Path("app"), "app", 4, "num-server-rounds=2")
    assert before <= began <= log.began[1] <= log.ended[2] <= time.monotonic()
    assert log.metrics[1]["eval_acc"] == 0.91944444444444


def test_missing_program_is_named_with_what_installs_it(tmp_path):
    where = f"flower-superlink: found no program of that name in {tmp_path}, expected it"
    with pytest.raises(BadInput, match=where) as found:
        program("flower-superlink", str(tmp_path))
    assert found.value.remedy == "pip install 'fedcore-fl[flower]'"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["no/such/app"],
            "no/such/app: found no pyproject.toml in it, expected the folder of a Flower app",
        ),
        (["APP", "no/such/app"], "no/such/app: found no pyproject.toml"),
        (
            ["APP", "--rounds", "1"],
            "--rounds: found 1, expected at least 2: the first is not timed",
        ),
        (["APP", "--sites", "2"], "--sites: found 2, expected at least 3"),
        (["WAITS"], "sites.n: found 4, expected 9 or more"),
        (["ROBUST"], "strategy Krum: found it in Flower app tinyapp"),
        (["FIXED"], "its number of rounds: found 1, expected at least 2"),
        ([], "Missing argument"),
    ],
)
def test_bad_input_is_one_line_before_anything_is_started(tmp_path, arguments, message, capsys):
    servers = {
        "APP": SERVER,
        "WAITS": SERVER.replace("FedAvg()", "FedAvg(min_available_nodes=9)"),
        "ROBUST": SERVER.replace("FedAvg()", "Krum()"),
        "FIXED": SERVER.replace('context.run_config["num-server-rounds"]', "1"),
    }
    given = [
        str(flower_app(tmp_path / name, server=servers[name]))
        if (name := each) in servers
        else each
        for each in arguments
    ]
    with pytest.raises(SystemExit) as ended:
        main(["bench", "flower", *given])
    said = capsys.readouterr()
    assert ended.value.code in (2, 3)
    assert said.out == ""
    errors = [line for line in said.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert message in errors[0]
    assert "Traceback" not in said.err


FOUND = {
    "flwr": "1.42.0", "sites": 4, "protection": "layered", "tls": {"flower": False, "fedcore": True},
    "environment": {"fedcore": "0.1.0", "python": "3.11.7", "cores": 2},
    "rows": [{
        "app": "digits", "rounds": 3, "test_rows": 360, "factor": 62.6,
        "flower": {
            "seconds_to_first_end": 86.6, "seconds_of_later_rounds": [54.41], "seconds_per_round": 54.41,
            "load": 9.4, "evaluates": True,
        },
        "fedcore": {
            "seconds_to_first_end": 13.8, "seconds_of_later_rounds": [0.869], "seconds_per_round": 0.869,
            "load": 13.7,
        },
        "metrics": {"accuracy": {"flower": 0.9694, "fedcore": 0.9667, "difference": -0.0027}},
    }],
}  # fmt: skip


def test_screen_has_both_engines_side_by_side_and_what_differs_between_them():
    words = as_text(two_engines.page(FOUND), 110)
    assert ["digits", "3", "86.6", "13.8", "54.41", "0.869", "63"] in [
        line.split() for line in words.splitlines()
    ]
    assert ["digits", "accuracy", "0.9694", "0.9667", "-0.0027", "360"] in [
        line.split() for line in words.splitlines()
    ]
    for part in (
        "flwr 1.42.0",
        "Python 3.11.7",
        "2 cores",
        "load 9.4 to 13.7",
        "without TLS",
        "mutual TLS",
    ):
        assert part in words
    assert "no evaluation on Flower" not in words


def test_difference_that_is_none_has_no_minus_sign():
    found = json.loads(json.dumps(FOUND))
    found["rows"][0]["metrics"]["accuracy"]["difference"] = -1.1e-16
    assert "+0.0000" in as_text(two_engines.page(found), 110)


def test_screen_says_where_flower_does_not_evaluate():
    found = json.loads(json.dumps(FOUND))
    found["rows"][0]["flower"]["evaluates"] = False
    assert "digits: no evaluation on Flower, as its strategy says" in as_text(
        two_engines.page(found), 110
    )


@pytest.mark.parametrize("app", ["flower-digits-numpyclient", "flower-digits-sklearn"])
def test_app_of_the_examples_learns(app, tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        main(
            ["simulate", "--flower-app", str(EXAMPLES / app), "--sites", "3", "-c", "num-server-rounds=2",
             "--protection", "masked", "--out", str(tmp_path / "run"), "--json"]
        )  # fmt: skip
    assert ended.value.code == 0
    result = json.loads(capsys.readouterr().out)
    assert result["rounds"] == 2
    assert result["arms"]["federated"]["accuracy"] > 0.85
