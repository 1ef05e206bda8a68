"""`fedcore attack`: rows from gradients, as each party of a real recorded round sees them.

The control of every "nothing" is the same attack on the same rounds where nothing is hidden.
"""

from __future__ import annotations

import base64
import io
import json
import re
from dataclasses import replace
from functools import cache
from types import SimpleNamespace

import matplotlib.image
import numpy as np
import pytest
import torch
from support.small_tasks import tiny

from fedcore.cli import main as commands
from fedcore.errors import UnknownName
from fedcore.experiment.attacks.intervals import least_non_members, share_interval
from fedcore.experiment.attacks.likeness import MOST_PSNR, Likeness, similarity
from fedcore.experiment.attacks.reconstruction import analytic, inversion
from fedcore.experiment.attacks.registry import run_attacks
from fedcore.experiment.attacks.scene import Effort, Scene
from fedcore.experiment.attacks.suite import ATTACKED_TASKS, AttackedTask, run_suite
from fedcore.experiment.prepare import job_for, prepare
from fedcore.learning import gradient_matching
from fedcore.learning.gradient_matching import Prior, Search
from fedcore.report.attack_page import picture_uri, write_page
from fedcore.results import AttackResult, RocCurve


@cache
def attacked(name, protection):
    return run_attacks(*job_for(None, {"task": "digits", "protect.protection": protection}), [name])


def row(found, protection, party, view="the upload", batch=1):
    (one,) = [
        each
        for each in found.rows
        if (each.protection, each.party, each.view, each.setting)
        == (protection, party, view, f"batch {batch}")
    ]
    return one


# ------------------------------------------------------------------------------------ from real rounds


def test_under_plain_the_coordinator_reads_a_single_row_nearly_exactly():
    found = row(attacked("analytic", "layered"), "plain", "coordinator")
    assert found.value == 1.0
    assert found.samples == 16
    assert found.low > 0.75
    assert found.more["psnr_lowest_db"] > 30
    assert found.more["ssim"] > 0.95
    assert found.beyond_chance


def test_of_four_rows_some_are_read_under_plain():
    found = row(attacked("analytic", "layered"), "plain", "coordinator", batch=4)
    assert found.beyond_chance
    assert 0.0 < found.value < 1.0


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("party", ["coordinator", "both together"])
def test_under_layered_the_upload_is_chance(party, batch):
    """Keys are new each time: `beyond_chance` is wrong once in a thousand runs, 1 dB more is beyond all."""
    found = row(attacked("analytic", "layered"), "layered", party, batch=batch)
    assert found.more["psnr_db"] < found.more["chance_psnr_highest_db"] + 1
    assert found.value < 0.5


def test_under_encrypted_the_coordinator_needs_one_site_to_read_it():
    found = attacked("analytic", "encrypted")
    alone = row(found, "encrypted", "coordinator")
    assert alone.more["psnr_db"] < alone.more["chance_psnr_highest_db"] + 1
    assert row(found, "encrypted", "both together").value == 1.0


def test_a_sum_of_few_rows_is_a_batch_of_few_rows_to_whoever_has_it():
    found = attacked("analytic", "layered")
    layered, plain = (row(found, each, "another site", "the sum") for each in ("layered", "plain"))
    assert (
        layered.value == plain.value > 0.0
    )  # the sum is exact, so encryption changes nothing of it
    assert layered.more == plain.more


def test_a_search_finds_a_single_row_under_plain_and_nothing_under_layered():
    job = job_for(None, {"task": "digits", "protect.protection": "layered"})
    effort = Effort((1,), searched_rows=4, search=Search(steps=80, starts=1))
    found = SimpleNamespace(rows=[r for r in inversion(Scene(*job, effort)) if "chance" in r])
    plain, hidden = (row(found, each, "coordinator") for each in ("plain", "layered"))
    assert plain.beyond_chance
    assert plain.value == 1.0
    assert plain.more["psnr_db"] > 20
    assert hidden.more["psnr_db"] < 12


def test_of_several_local_steps_a_search_that_simulates_them_comes_closer():
    """The update of SGD with momentum and decay is what the simulation gives for the true row, to rounding."""
    layer = {
        "task": "digits",
        "protect.protection": "plain",
        "train.momentum": 0.5,
        "train.weight_decay": 0.01,
    }
    scene = Scene(*job_for(None, layer))
    (step,) = scene.steps("plain", 1, 1, 6)
    (view,) = [v for v in step.views if (v.party, v.source) == ("coordinator", "the upload")]
    flat = scene.prepared.flat
    flat.write(step.start)
    exactly = Prior(
        step.rows.x[0], torch.zeros(64, 64), scene.span
    )  # of candidates there is the true row alone

    def distance(local):
        return gradient_matching.match(
            scene.task, flat.module, view.gradient, view.exact, step.rows.y.numpy(), step.rows, None,
            exactly, Search(1, 1), seed=0, local=local,
        )[1]  # fmt: skip

    simulated = gradient_matching.LocalSteps(6, step.rate, 0.5, 0.01)
    assert distance(simulated) < 1e-4
    assert distance(replace(simulated, momentum=0.0)) > 10 * distance(simulated)
    assert distance(None) > 10 * distance(simulated)


def test_steps_with_momentum_count_more_than_once():
    assert gradient_matching.LocalSteps(3, momentum=0.0).gradients == 3
    assert gradient_matching.LocalSteps(3, momentum=0.5).gradients == 1 + 1.5 + 1.75


def test_pictures_are_the_task_s_rows_beside_their_reconstructions():
    found = attacked("analytic", "layered")
    ours = [
        each
        for each in found.reconstructions
        if (each.protection, each.party, each.view) == ("plain", "coordinator", "the upload")
    ]
    assert ours
    assert all(p.shape == (8, 8) and len(p.original) == len(p.reconstructed) == 64 for p in ours)
    single = [p for p in ours if p.setting == "batch 1"]
    assert all(np.abs(np.subtract(p.original, p.reconstructed)).max() <= 1 for p in single)


def test_the_result_is_the_same_again_and_survives_json():
    found = attacked("analytic", "layered")
    again = AttackResult.from_json(json.loads(json.dumps(found.to_json())))
    assert again.rows == found.rows
    assert all(r.samples > 0 and r.low <= r.value <= r.high and r.not_shown for r in found.rows)


# ------------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("more", "settings", "reason"),
    [
        ({}, {"train.optimiser": "adam"}, "not a multiple of the gradient"),
        ({"train": lambda model, rows, fit: None}, {}, "loops of its own"),
    ],
)
def test_a_job_whose_updates_are_no_gradients_has_a_row_with_the_reason(more, settings, reason):
    found = run_attacks(*job_for(tiny(**more), settings), ["analytic", "inversion"])
    assert [each.value for each in found.rows] == [None, None]
    assert all(reason in each.refused for each in found.rows)


def test_where_the_first_linear_layer_is():
    convolutions = [torch.nn.Conv2d(1, 4, 3), torch.nn.Flatten()]
    behind = torch.nn.Sequential(*convolutions, torch.nn.Linear(144, 2))
    assert gradient_matching.first_linear(behind, 64) is False
    assert gradient_matching.first_linear(torch.nn.Linear(64, 2), 64) is True
    assert gradient_matching.first_linear(torch.nn.Linear(64, 2, bias=False), 64) is None
    assert gradient_matching.first_linear(torch.nn.Sequential(*convolutions), 64) is None


def test_nothing_is_searched_behind_no_features():
    scene = Scene(*job_for(None, {"task": "digits", "protect.protection": "plain"}))
    nothing = np.zeros((0, 64), dtype=np.float32)
    made = gradient_matching.inputs_behind(
        scene.prepared.flat.module, nothing, (64,), scene.prior, Search(), seed=0
    )
    assert made.shape == (0, 64)


def test_a_picture_of_clothes_is_found_behind_two_convolutions():
    layer = {"task": "fashion", "sites.rows": 1400, "sites.n": 3, "protect.protection": "plain"}
    scene = Scene(*job_for(None, layer), Effort((1,), searched_rows=1, behind=Search(200, 2)))
    found = [each for each in analytic(scene) if "chance" in each]
    upload = next(r for r in found if (r.party, r.view) == ("coordinator", "the upload"))
    assert upload.value == 1.0
    assert upload.more["psnr_db"] > upload.more["chance_psnr_highest_db"] + 1


def test_pictures_of_clothes_are_read_exactly_from_a_linear_layer():
    scene = Scene(
        *ATTACKED_TASKS[0].of({"protect.protection": "plain"}), Effort((1,), analytic_rows=4)
    )
    found = [each for each in analytic(scene) if each.view == "the upload"]
    rows = [each for each in found if "chance" in each]
    assert [each.value for each in rows] == [1.0, 1.0]
    assert all(each.more["psnr_lowest_db"] > 40 for each in rows)
    assert all(each.ssim > 0.99 for each in found if "ssim" in each)


def test_without_a_task_each_attack_has_a_task_of_its_own():
    parts = [
        AttackedTask(("lying-site",), {"task": "digits"}),
        AttackedTask(("audit-training",), {"task": "heart"}),
    ]
    found = run_suite(parts=parts)
    assert [(each.attack, each.task) for each in found.rows] == [
        ("lying-site", "digits"), ("audit-training", "heart"),
    ]  # fmt: skip
    assert found.task == "digits, heart"
    with pytest.raises(UnknownName, match="lying-site"):
        run_suite(["lying-sites"], parts=parts)


@pytest.mark.parametrize(
    "part", ATTACKED_TASKS, ids=lambda part: f"{part.layer['task']} {part.attacks[0]}"
)
def test_the_job_of_each_part_can_run(part):
    task, job = part.of()
    assert prepare(task, job).plan.rounds > 0


def test_what_was_clipped_is_not_taken_for_the_gradient():
    """Gradients beyond the range arrive as its ends: a row is read from the entries that are not."""
    torch.manual_seed(0)
    model, wide = torch.nn.Linear(16, 8), torch.rand(1, 16)
    torch.nn.functional.cross_entropy(model(wide), torch.tensor([3])).backward()
    gradient = torch.cat([p.grad.reshape(-1) for p in model.parameters()]).double().numpy()
    most = np.abs(gradient).max() / 2
    clipped = gradient.clip(-most, most)
    assert (clipped != gradient).any()
    read = gradient_matching.linear_inputs(model, clipped, (1e-9, 0.999 * most), 1, (0.0, 1.0))
    np.testing.assert_allclose(read[0], wide[0].numpy(), atol=1e-6)
    naive = gradient_matching.linear_inputs(model, clipped, (1e-9, np.inf), 1, (0.0, 1.0))
    assert np.abs(naive[0] - wide[0].numpy()).max() > 0.01


def test_lying_sites_ask_for_ages_of_patients():
    (found,) = run_attacks(*job_for(tiny(), {}), ["lying-site"]).rows
    assert "found task 'tiny'" in found.refused


def test_an_attack_of_another_name_is_refused():
    with pytest.raises(UnknownName, match="analytic"):
        run_attacks(*job_for(tiny(), {}), ["analitic"])


def test_the_page_has_the_pictures_and_loads_nothing(tmp_path):
    found = attacked("analytic", "layered")
    said = replace(
        found, task="<script>x</script>", curves=(RocCurve("m", "plain", (0.01, 1.0), (0.1, 1.0)),)
    )
    page = write_page(said, tmp_path / "new").read_text()
    assert "<script" not in page
    assert page.count("data:image/png;base64,") >= 2
    assert 'd="M102.9 68.6L240.0 0.0"' in page
    assert page.count("<h2>Identified among 100</h2>") == 1
    assert not re.findall(r'(?:src|href)="(?!data:|attack.json)', page)
    assert json.loads((tmp_path / "new" / "attack.json").read_text())["kind"] == "attack"


def test_pictures_of_the_page_are_the_pixels():
    shown = base64.b64decode(picture_uri((0, 255, 128, 7), (2, 2)).partition(",")[2])
    read = matplotlib.image.imread(io.BytesIO(shown), format="png")
    assert (read * 255).round().astype(int).tolist() == [[0, 255], [128, 7]]


def test_a_folder_that_exists_is_refused_before_anything_runs(tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        commands.main(["attack", "--task", "heart", "--out", str(tmp_path)])
    assert ended.value.code == 2
    assert "expected a new folder" in capsys.readouterr().err


def test_the_command_prints_one_json_document(capsys):
    call = ["attack", "--task", "heart", "--protection", "masked", "--attack", "analytic", "--json"]
    with pytest.raises(SystemExit) as ended:
        commands.main(call)
    assert ended.value.code == 0
    found = json.loads(capsys.readouterr().out)
    assert found["protection"] == "masked"
    assert {each["protection"] for each in found["rows"]} == {"plain", "masked"}
    assert found["label"].startswith("Protects against: the coordinator")


# ------------------------------------------------------------------------------------ how it is counted


def test_reconstructions_are_assigned_before_they_are_scored():
    rng = np.random.default_rng(0)
    truth, others = rng.random((4, 64)), rng.random((200, 64))
    score = Likeness()
    pairs = score.add(truth[[2, 0, 3, 1]], truth, others, (8, 8), 1.0, rng)
    assert dict(pairs) == {2: 0, 0: 1, 3: 2, 1: 3}
    assert score.psnr == [MOST_PSNR] * 4
    assert score.identified == [True] * 4
    assert score.ssim == pytest.approx([1.0] * 4)


def test_random_guesses_are_beyond_chance_as_rarely_as_said():
    """200 adversaries without information: about one in a thousand is above all 999 draws."""
    rng, beyond = np.random.default_rng(1), 0
    others = rng.random((1500, 16))
    for _ in range(200):
        score = Likeness()
        score.add(rng.random((1, 16)), rng.random((1, 16)), others, None, 1.0, rng)
        beyond += np.mean(score.psnr) > score.chance.max()
    assert beyond <= 2  # more has a probability of 1e-3, and the draws are the same each time


def test_too_few_guesses_are_filled_with_what_needs_no_view():
    rng = np.random.default_rng(2)
    truth, others = rng.random((3, 16)), rng.random((200, 16))
    score = Likeness()
    assert [row for row, _ in score.add(truth[:1], truth, others, None, 1.0, rng)] == [0]
    assert len(score.psnr) == 3
    assert sum(score.identified) == 1


def test_similarity_falls_with_noise_and_is_one_for_equal_pictures():
    rng = np.random.default_rng(3)
    picture = rng.random(28 * 28)
    noisy = [
        similarity(picture, picture + s * rng.normal(size=784), (28, 28), 1.0)
        for s in (0, 0.1, 0.5)
    ]
    assert noisy[0] == pytest.approx(1.0)
    assert noisy[0] > noisy[1] > noisy[2]


def test_intervals_are_those_of_clopper_and_pearson():
    assert share_interval(0, 10) == (0.0, pytest.approx(1 - 0.025 ** (1 / 10)))
    assert share_interval(10, 10) == (pytest.approx(0.025 ** (1 / 10)), 1.0)
    assert share_interval(5, 20) == (
        pytest.approx(0.0866, abs=1e-4),
        pytest.approx(0.4910, abs=1e-4),
    )
    assert share_interval(0, 0) == (0.0, 1.0)


def test_a_rate_takes_as_many_rows_as_show_it():
    assert least_non_members(0.01) == 299
    assert least_non_members(0.001) == 2995
    assert 0.99**299 < 0.05 <= 0.99**298
