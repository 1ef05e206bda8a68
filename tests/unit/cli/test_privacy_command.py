"""`fedcore privacy`: what a job with privacy promises, before it runs, and what it refuses."""

import json
from types import SimpleNamespace

import pytest

from fedcore.cli import main as commands
from fedcore.cli.up import require_equal
from fedcore.errors import TaskFailed
from fedcore.results.run_facts import DeployedRun

JOB = (
    "--epsilon",
    "3",
    "--max-examples",
    "320",
    "--rounds",
    "12",
    "--clip",
    "1.5",
    "--lr",
    "2",
    "--protection",
    "masked",
)


def ends(*arguments):
    with pytest.raises(SystemExit) as ended:
        commands.main(["privacy", *arguments])
    return ended.value.code


def test_statement_answers_each_question(capsys):
    assert ends(*JOB, "--sample-rate", "0.5") == 0
    said = " ".join(capsys.readouterr().out.split())
    for text in (
        "unit: record, one row among the training rows of one site; adjacency: add or remove one unit",
        "epsilon 2.99",
        "at delta 1e-05 for all 12 rounds (budget 3; privacy loss distribution;",
        "mechanism: discrete Gaussian noise inside the protected sum, multiplier",
        "a unit is in a round with probability 0.5; its own site alone knows it",
        "holds against: the coordinator, whoever gets the model, and up to 1 of the other sites together",
        "if: 2 sites of every sum draw their noise and keep it to themselves",
        "sees values without noise: each site its own rows; nobody a sum",
        "noise to signal: at least 0.",
        "noised: update public: weight, range absent: over_range",
    ):
        assert text in said, text


def test_json_has_the_same_numbers(capsys):
    assert ends(*JOB, "--json", "--noise", "site", "--protection", "plain") == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["unit"], found["delta"], found["noise"]) == ("record", 1e-5, "site")
    assert found["epsilon_spent"] <= found["epsilon"] == 3 < found["epsilon_by_renyi"]
    predicted = found["predicted"]
    sd = found["noise_multiplier"] * 1.5 * (1 + predicted["rounding"]) * 4**0.5
    assert predicted["noise_in_a_sum"] == pytest.approx(sd)
    assert predicted["noise_to_signal"] == pytest.approx(sd * 31**0.5 / (predicted["units"] * 1.5))
    assert found["assumes"] == "nothing of the other sites"


@pytest.mark.parametrize(
    ("given", "code", "found"),
    [
        (("--max-examples", "320"), 2, "privacy.epsilon: found none"),
        ((*JOB, "--epsilon", "0"), 2, "privacy.epsilon: found 0"),
        ((*JOB, "--clip", "0"), 2, "privacy.clip: found 0"),
        ((*JOB, "--sample-rate", "2"), 2, "privacy.sample_rate: found 2"),
        ((*JOB, "--delta", "0.01"), 3, "privacy.delta: found 0.01 for up to 1280 units"),
        ((*JOB, "--unit", "site"), 3, "privacy.unit: found 'site' for 4 sites, expected 100"),
        ((*JOB, "--unit", "column"), 2, "privacy.unit: found 'column', but the rows of site"),
        ((*JOB, "--protection", "plain"), 3, "protect.protection: found plain with privacy.epsilon"),
        (("--epsilon", "3"), 2, "protect.max_examples: found none with privacy.epsilon"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line_with_a_hint(given, code, found, capsys):
    assert ends(*given) == code
    said = capsys.readouterr()
    errors = [
        line
        for line in said.err.splitlines()
        if not line.startswith(("fedcore privacy", "loading"))
    ]
    assert len(errors) == 2 and errors[0].startswith(f"error: {found}"), errors
    assert errors[1].startswith("hint: ")
    assert said.out == ""


def rehearsed(private, **changes):
    """A run of `fedcore up` whose deployment has another model than the run in one process."""
    facts = {
        "job": "j", "model_sha256": "d" * 64, "sites": {"a": "d" * 64}, "seconds": 1.0, "round_seconds": (),
        "folder": "",
        "survivors": (), "processes": (), "equal": False, "simulated_sha256": "s" * 64,
    }  # fmt: skip
    plan = {"train": {"privacy": {"epsilon": 3}} if private else {}}
    result = SimpleNamespace(
        deployment=DeployedRun(**facts | changes), plan=plan, sites=("a",), model_sha256="s" * 64
    )
    return SimpleNamespace(result=result, directory="run")


def test_up_does_not_say_that_noise_was_repeated():
    said = require_equal(rehearsed(private=True))
    assert said.startswith(f"all sites of the deployment have one model, {'d' * 64}")
    assert "bit for bit" not in said
    assert "bit for bit" in require_equal(rehearsed(private=False, equal=True))
    with pytest.raises(TaskFailed, match="expected ssssssssssss as in one process"):
        require_equal(rehearsed(private=False))
    with pytest.raises(TaskFailed, match="sites with different models"):
        require_equal(rehearsed(private=True, model_sha256=None))
