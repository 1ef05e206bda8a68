"""Settings that a comparison or a deployment does not have: one table, `config.unsupported`, with one line for each,
the same wherever a job is begun: the façade, the commands, the coordinator and the sites."""

import re
from pathlib import Path

import pytest
from fedcore_server import operators
from fedcore_server.config import LimitsSection
from fedcore_server.operators_api import check_settings

import fedcore
from fedcore.cli.main import main
from fedcore.cli.up import rehearse
from fedcore.config import KEYS, build_job, read_settings, wire_settings
from fedcore.config.unsupported import UNSUPPORTED, refuse_unsupported
from fedcore.errors import BadInput
from fedcore.secagg.plan import canonical

ASKED = {
    "initial": "runs/heart-plain-001",
    "device": "cuda",
    "sum": "exact",
    "executor": "batched",
    "round.cohort": 3,
    "round.validate": 0.2,
    "round.keep": "best",
    "round.patience": 3,
    "round.checkpoint_every": 2,
    "round.aggregate": "trimmed",
    "round.drop": ["3:submit:va"],
    "round.dropout": 0.1,
    "track.to": ["mlflow", "wandb"],
    "track.keep_scores": True,
}
TOGETHER = {"round.keep": {"validate": 0.2}, "round.patience": {"validate": 0.2}}
"""What these two are refused without, in any run."""

DEPLOYED = [limit for limit in UNSUPPORTED if limit.kind == "deployment"]
COMPARED = [limit for limit in UNSUPPORTED if limit.kind == "comparison"]


def named(limits):
    return pytest.mark.parametrize("limit", limits, ids=[limit.setting for limit in limits])


def refusal(call):
    """The line of a refusal and its hint."""
    with pytest.raises(BadInput) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value), caught.value.remedy


def job_asking(limit, *, alone=False):
    return {limit.setting: ASKED[limit.setting]} | (
        {} if alone else TOGETHER.get(limit.setting, {})
    )


def wire_form(setting):
    """Settings as another submitter could send them, with one that a deployment does not have."""
    settings = wire_settings(build_job({"max_examples": 64}))
    section, _, key = setting.rpartition(".")
    if not section:
        return settings | {key: ASKED[setting]}
    return settings | {section: settings[section] | {key: ASKED[setting]}}


def test_the_table_names_settings_that_exist_each_once_for_a_kind_with_a_reason_and_a_hint():
    assert {limit.setting for limit in UNSUPPORTED} == set(ASKED)
    places = [(limit.setting, limit.kind) for limit in UNSUPPORTED]
    assert len(set(places)) == len(places)
    for limit in UNSUPPORTED:
        section, _, key = limit.setting.rpartition(".")
        assert KEYS[key] == section
        assert limit.reason and limit.remedy


@named(UNSUPPORTED)
def test_what_a_job_has_by_default_asks_for_nothing(limit):
    section, _, key = limit.setting.rpartition(".")
    default = build_job().to_json()[section][key] if section else build_job().to_json()[key]
    for value in (default, limit.usual, None):
        refuse_unsupported({section: {key: value}} if section else {key: value}, limit.kind)


@named(DEPLOYED)
def test_a_deployment_refuses_it_with_one_text_at_every_party(limit, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "job.toml"
    file.write_text('task = "heart"\n[protect]\nmax_examples = 512\n')
    sent = wire_form(limit.setting)
    at_submit = refusal(lambda: operators.prepare(file, {}, job_asking(limit)))
    at_coordinator = refusal(lambda: check_settings(sent, 4, LimitsSection()))
    at_site = refusal(lambda: read_settings(canonical(sent)))
    assert at_coordinator == at_site
    text, hint = at_site
    assert text.startswith(f"{limit.setting}: found ")
    assert text.endswith(f" in a deployment: {limit.reason}")
    assert hint == limit.remedy
    if limit.setting not in TOGETHER and limit.setting != "initial":  # whose path is made absolute
        assert at_submit == at_site


@named(DEPLOYED)
def test_fedcore_up_refuses_what_its_deployment_lacks_and_keeps_a_record_of_its_own_run(
    limit, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    layers = [{"task": "heart", "protection": "plain"}, job_asking(limit)]
    record = limit.setting in {"track.to", "track.keep_scores"}
    with pytest.raises(fedcore.FedcoreError) as caught:
        rehearse(layers, None)
    # `plain` is refused after the settings of the table.
    assert str(caught.value).startswith(
        "protect.protection:" if record else f"{limit.setting}:"
    ) or (limit.setting in TOGETHER and str(caught.value).startswith("round.validate:"))
    assert not list(tmp_path.iterdir())


@named(COMPARED)
def test_a_comparison_refuses_it_in_python_and_on_the_command_line(
    limit, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    value = ASKED[limit.setting]
    key = limit.setting.rpartition(".")[2]
    text, hint = refusal(lambda: fedcore.compare("heart", seeds=1, **{key: value}))
    assert text.endswith(f" in a comparison: {limit.reason}")
    assert hint == limit.remedy
    given = ",".join(value) if isinstance(value, list) else str(value).lower()
    with pytest.raises(SystemExit) as ended:
        main(["compare", f"--{key.replace('_', '-')}", given])
    assert ended.value.code == 2
    assert capsys.readouterr().err.endswith(f"error: {text}\nhint: {hint}\n")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("value", ["7", "0"])
@pytest.mark.parametrize(
    ("key", "given"), [("seed", "--seed"), ("fold", "--fold"), ("seed", "--set=seed=")]
)
def test_a_comparison_takes_no_seed_or_fold_of_one_run_as_a_flag(
    key, given, value, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    flags = [given + value] if given.endswith("=") else [given, value]
    with pytest.raises(SystemExit) as ended:
        main(["compare", *flags])
    assert ended.value.code == 2
    error, hint = capsys.readouterr().err.splitlines()[-2:]
    assert (
        error
        == f"error: {key}: found {value}, expected none in a comparison: it runs several {key}s"
    )
    assert hint.startswith(f"hint: `--{key}s 5` ")
    assert hint.endswith(f"`fedcore simulate --{key} {value}`")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("key", ["seed", "fold"])
def test_a_comparison_takes_none_as_a_keyword_and_leaves_that_of_a_job_to_simulations(key):
    with pytest.raises(BadInput, match=f"^{key}: found 2, expected none in a comparison"):
        fedcore.compare("heart", **{key: 2})
    with pytest.raises(BadInput, match="seeds: found none"):  # refused later, for something else
        fedcore.compare("heart", job=[{key: 2}], seeds=[])


def test_values_are_shown_as_a_job_file_has_them():
    shown = {
        "track.to": "mlflow, wandb", "track.keep_scores": "true", "round.keep": "'best'",
        "round.validate": "0.2", "round.drop": "3:submit:va",
    }  # fmt: skip
    for setting, text in shown.items():
        section, _, key = setting.rpartition(".")
        with pytest.raises(BadInput, match=f"^{setting}: found {re.escape(text)}, expected "):
            refuse_unsupported({section: {key: ASKED[setting]}}, "deployment")


@pytest.mark.parametrize("settings", [{"round": 3}, {"track": None}, {"round": {}}, {}])
def test_settings_of_another_party_that_are_no_tables_are_left_to_the_job(settings):
    refuse_unsupported(settings, "deployment")


def test_the_page_about_jobs_has_the_table():
    page = (Path(__file__).parents[3] / "docs/jobs.md").read_text()
    part = page.partition("## Settings that not every run has")[2].partition("\n## ")[0]
    rows = [line for line in part.splitlines() if line.startswith("| `")]
    kinds, settings = (
        ("comparison", "deployment"),
        dict.fromkeys(each.setting for each in UNSUPPORTED),
    )
    cells = {(setting, kind): "yes" for setting in settings for kind in kinds}
    for limit in UNSUPPORTED:
        setting, value = limit.but_with or ("", "")
        but = f'with `{setting.partition(".")[2]} = "{value}"` only' if setting else "no"
        cells[limit.setting, limit.kind] = f"{but}: {limit.reason}"
    assert rows == [
        f"| `{name}` | " + " | ".join(cells[name, kind] for kind in kinds) + " |"
        for name in settings
    ]


def test_a_deployment_keeps_its_best_model_and_ends_early_by_released_metrics():
    settings = {"judge": "released", "keep": "best", "patience": 3, "max_examples": 64}
    job = build_job(settings)
    assert build_job(read_settings(canonical(wire_settings(job)))).round == job.round
