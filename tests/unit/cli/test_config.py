"""One spelling per setting; unknown and wrong ones named with their path and the nearest key."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal, get_args, get_origin, get_type_hints

import pytest

from fedcore.cli.flags import FLAGS
from fedcore.config import KEYS, SECTIONS, Settings, build_job, parse_set, read_job_file
from fedcore.errors import BadInput, UnknownName
from fedcore.secagg.protections import PROTECTIONS

DOCS = Path(__file__).resolve().parents[3] / "docs"


def test_toml_flat_keywords_and_set_spell_the_same_setting():
    nested = build_job({"train": {"lr": 0.1}, "round": {"rounds": 3}})
    flat = build_job({"lr": 0.1, "rounds": 3})
    dotted = build_job(dict([parse_set("train.lr=0.1"), parse_set("round.rounds=3")]))
    assert nested == flat == dotted
    assert flat.train.lr == 0.1 and flat.round.rounds == 3


def test_later_layers_win_key_by_key():
    job = build_job({"lr": 0.1, "epochs": 2}, {"train": {"lr": 0.2}})
    assert (job.train.lr, job.train.epochs) == (0.2, 2)


def test_setting_names_are_unique_across_sections():
    names = [key for model in SECTIONS.values() for key in model.model_fields]
    assert sorted(names) == sorted(KEYS)


def test_the_keywords_of_simulate_are_the_keys_of_a_job_with_their_types():
    wanted = {
        key: field.annotation
        for model in SECTIONS.values()
        for key, field in model.model_fields.items()
    }
    found = get_type_hints(Settings)
    del wanted["task"]  # a parameter of its own, which takes an object too
    assert set(found) == {*wanted, *filter(None, SECTIONS), "task_settings"}
    from_words = {
        "arms",
        "drop",
        "reference",
        "initial",
        "to",
        "local_parameters",
        "frozen_parameters",
    }  # given in another form than the section keeps
    assert {k: found[k] for k in wanted if k not in from_words} == {
        k: wanted[k] for k in wanted if k not in from_words
    }


def test_a_flag_with_a_help_text_is_a_key_of_a_job_with_its_type():
    keys = {k: f.annotation for model in SECTIONS.values() for k, f in model.model_fields.items()}
    for flag in FLAGS.keys() - {"set", "drop"}:
        kind, _ = FLAGS[flag]
        assert kind in {keys[flag], *get_args(keys[flag])} or (
            get_origin(keys[flag]) is Literal and kind is str
        )
    assert FLAGS["drop"][0] == list[str] and keys["drop"] == tuple[str, ...]


@pytest.mark.parametrize(
    ("layer", "message", "remedy"),
    [
        ({"trian": {"lr": 1}}, "trian", ""),
        ({"train": {"learning_rate": 1}}, "train.learning_rate", ""),
        ({"lrr": 0.1}, "lrr", "did you mean 'lr'?"),
        ({"trian.lr": 0.1}, "trian.lr", "did you mean 'train.lr'?"),
        ({"train.rounds": 3}, "train.rounds", "round.rounds"),
    ],
)
def test_unknown_keys_are_named_with_the_nearest(layer, message, remedy):
    with pytest.raises(UnknownName, match=re.escape(message)) as caught:
        build_job(layer)
    assert remedy in caught.value.remedy


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        ({"lr": -1}, "train.lr: found -1, expected greater than 0"),
        ({"lr": "fast"}, "train.lr: found 'fast'"),
        ({"lr": float("nan")}, "train.lr: found nan"),
        ({"rounds": 0}, "round.rounds: found 0"),
        (
            {"optimiser": "lbfgs"},
            "train.optimiser: found 'lbfgs', expected 'sgd', 'adam' or 'adamw'",
        ),
        ({"fold": 5}, "fold: found 5, expected 0 to folds - 1 = 4"),
        ({"sites": ["a"]}, "sites: found list"),
        ({"train": 3}, "train: found int"),
        ({"threshold": "most"}, "protect.threshold: found 'most', expected"),
        ({"dropout": 1}, "round.dropout: found 1, expected less than 1"),
        ({"drop": 3}, "round.drop: found 3, expected"),
        ({"protection": "encripted"}, "'encripted', which is not known"),
        ({"arms": ""}, "track.arms: found"),
        ({"arms": []}, "track.arms: found"),
    ],
)
def test_wrong_values_are_one_line_with_the_path(layer, message):
    with pytest.raises(BadInput) as caught:
        build_job(layer)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_default_protection_is_the_strongest():
    assert build_job().protect.protection == "layered" == list(PROTECTIONS)[-1]
    for protection in PROTECTIONS:
        assert build_job({"protection": protection}).protect.protection == protection


@pytest.mark.parametrize(
    "value", ["3:submit:va,4:keys:va", " 3:submit:va , 4:keys:va,", ["3:submit:va", "4:keys:va"]]
)
def test_absences_are_words_or_a_list(value):
    job = build_job({"drop": value})
    assert job.round.drop == ("3:submit:va", "4:keys:va")
    # In a list a comma belongs to a site's name.
    assert build_job({"drop": ["3:submit:Bern, CH"]}).round.drop == ("3:submit:Bern, CH",)
    assert build_job(job.to_json()["round"]).round == job.round


def test_a_job_file_s_paths_count_from_its_folder(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.csv").write_text("x\n")
    (tmp_path / "job.toml").write_text('[sites]\na = "data/a.csv"\nb = "no-such-thing"\n')
    job = build_job(read_job_file(tmp_path))
    assert job.sites == {"a": str(tmp_path / "data" / "a.csv"), "b": "no-such-thing"}


@pytest.mark.parametrize("text", ["a = [", "\xff"])
def test_a_broken_job_file_is_named(tmp_path, text):
    (tmp_path / "job.toml").write_bytes(text.encode("latin-1"))
    with pytest.raises(BadInput, match=re.escape(str(tmp_path / "job.toml"))):
        read_job_file(tmp_path / "job.toml")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("train.lr=0.05", ("train.lr", 0.05)),
        ("task=heart", ("task", "heart")),
        ('arms=["federated"]', ("arms", ["federated"])),
        ("adaptive_range=false", ("adaptive_range", False)),
    ],
)
def test_set_values_are_toml_or_a_bare_word(text, expected):
    assert parse_set(text) == expected


@pytest.mark.parametrize("text", ["train.lr", "=3", ""])
def test_set_without_a_key_or_value_is_refused(text):
    with pytest.raises(BadInput, match="--set"):
        parse_set(text)


def test_the_page_lists_every_key_with_its_default():
    page = (DOCS / "jobs.md").read_text()
    listed = set(re.findall(r"`([a-z0-9_]+)`", "\n".join(r for r in page.splitlines() if "|" in r)))
    assert set(KEYS) <= listed
    for section, model in SECTIONS.items():
        for key, info in model.model_fields.items():
            if isinstance(info.default, int | float) and not isinstance(info.default, bool):
                row = next(r for r in page.splitlines() if r.startswith("|") and f"`{key}`" in r)
                assert f"{info.default:g}" in row, f"{section}.{key}"
