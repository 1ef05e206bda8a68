"""Benchmarks at small sizes: their JSON, exactness and refusals. Figures are not tested here."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedcore.bench import fold, protect
from fedcore.errors import Abandoned, BadInput, PlanRefused, TagRefused
from fedcore.experiment.environment import peak_memory_mb
from fedcore.report.terminal import as_text
from fedcore.secagg.crypto import ckks
from fedcore.secagg.crypto.masked import MaskedFold, MaskedSealer
from fedcore.secagg.crypto.masking import add_masks
from fedcore.secagg.crypto.sumtag import SumTag
from fedcore.secagg.encode.pack import Layout
from fedcore.secagg.packing import solve_packing
from fedcore.secagg.plan import VectorSpec
from fedcore.secagg.protections import SCHEMES, Protection

ROW_KEYS = {
    "name",
    "bits",
    "bytes_up_per_parameter",
    "bytes_down_per_parameter",
    "protect_seconds_per_million",
    "fold_seconds_per_million",
    "unmask_seconds_per_million",
    "unprotect_seconds_per_million",
    "max_error",
}


@pytest.fixture(scope="module")
def protect_result() -> dict:
    return protect.run(20_000, 16, bits=[8, 16], repeats=2, seed=0)


def test_bench_protect_has_a_row_per_scheme(protect_result: dict) -> None:
    rows = protect_result["rows"]
    assert [(row["name"], row["bits"]) for row in rows] == [
        ("float32", 32),
        ("encrypted", 8),
        ("encrypted-keystream", 8),
        ("masked", 8),
        ("layered", 8),
        ("layered-keystream", 8),
        ("encrypted", 16),
        ("encrypted-keystream", 16),
        ("masked", 16),
        ("layered", 16),
        ("layered-keystream", 16),
        ("ckks", None),
        ("ckks-blocks", None),
    ]
    assert all(row.keys() >= ROW_KEYS for row in rows)
    assert (protect_result["schema"], protect_result["kind"]) == (1, "bench-protect")
    assert json.loads(json.dumps(protect_result)) == protect_result


def test_bench_protect_decodes_within_one_step(protect_result: dict) -> None:
    for row in protect_result["rows"]:
        if row["name"] in SCHEMES:
            assert 0 < row["max_error"] <= row["quantisation_step"]
        else:
            assert row["max_error"] < 1e-6


def test_every_protection_decodes_the_same_sum_of_the_same_bits(protect_result: dict) -> None:
    """Masks that were not all taken off, or ciphertexts, cannot give it by accident."""
    for bits in (8, 16):
        errors = {row["max_error"] for row in protect_result["rows"] if row["bits"] == bits}
        assert len(errors) == 1


def test_only_masks_are_unmasked(protect_result: dict) -> None:
    for row in protect_result["rows"]:
        unmasked = row["unmask_seconds_per_million"]
        masks = Protection.of(SCHEMES.get(row["name"], ("", ""))[0]).masks
        assert unmasked > 0 if masks else unmasked is None


def test_a_site_lays_on_the_masks_of_its_plan_and_all_of_them_come_off() -> None:
    for sites in (3, 4, 16):
        packing = solve_packing(12, sites, "masked")
        layout = Layout(VectorSpec("update", 5000), packing, sites)
        masks = protect._Masks(layout, sites)
        # n - 1 pairwise masks and the self mask; the coordinator expands one self mask a site.
        assert [len(found) for found in masks.of_site] == [sites] * protect.CONTRIBUTORS
        assert len(masks.own) == sites
        seeds = [seed for found in masks.of_site for seed, _ in found]
        pairs_shared = protect.CONTRIBUTORS * (protect.CONTRIBUTORS - 1) // 2
        assert len(set(seeds)) == len(seeds) - pairs_shared
        fold = MaskedFold(packing, layout.slots)
        for found in masks.of_site:
            slots = np.full(layout.slots, 7, dtype=np.uint64)
            add_masks(slots, found, packing.slot_bits)
            for index, chunk in enumerate(MaskedSealer(packing).protect(slots)):
                fold.add(index, chunk)
        assert not (MaskedSealer(packing).open(fold.total(), layout.slots) == 21).any()
        masks.take_off(fold)
        assert (MaskedSealer(packing).open(fold.total(), layout.slots) == 21).all()


@pytest.mark.parametrize("scheme", [name for name in SCHEMES if name != "plain"])
def test_the_sum_tag_is_part_of_what_is_measured(scheme: str, stand_in) -> None:
    vectors = [np.full(100, 0.01, dtype=np.float32)] * protect.CONTRIBUTORS
    found = protect.protected(scheme, 100, 4, bits=8, bound=0.25, seed=0)
    protect._measure(found, vectors, protect._Measured())
    honest = SumTag.tag
    stand_in(SumTag, tag=lambda *arguments: honest(*arguments) ^ 1)
    with pytest.raises(TagRefused):
        protect._measure(found, vectors, protect._Measured())


def test_every_vector_of_a_keystream_has_a_fresh_salt(stand_in) -> None:
    drawn: list[bytes] = []
    honest = protect.draw_salt

    def record(entropy: Any) -> bytes:
        drawn.append(honest(entropy))
        return drawn[-1]

    stand_in(protect, draw_salt=record)
    found = protect.protected("encrypted-keystream", 100, 4, bits=8, bound=0.25, seed=0)
    one, other = (b"".join(found.protect(np.full(100, 0.01, "f4"), 0)) for _ in range(2))
    assert one != other and len(set(drawn)) == len(drawn) == 4 + 2


def test_opening_a_keystream_expands_one_stream_for_every_site_of_the_plan(
    stand_in,
) -> None:
    """As a site of a real round does: no cheaper for a benchmark of three vectors."""
    laid: list[int] = []
    honest = protect.add_masks

    def count(slots: Any, masks: Any, bits: int) -> None:
        laid.append(len(masks))
        honest(slots, masks, bits)

    found = protect.protected("encrypted-keystream", 100, 16, bits=8, bound=0.25, seed=0)
    stand_in(protect, add_masks=count)
    protect._measure(found, [np.full(100, 0.01, "f4")] * 3, protect._Measured())
    assert laid == [1, 1, 1, 16]


def test_masks_are_left_out_where_no_plan_may_have_them() -> None:
    found = protect.run(100, 65, bits=[8], repeats=1)
    names = [row["name"] for row in found["rows"]]
    assert names == ["float32", "encrypted", "encrypted-keystream", "ckks", "ckks-blocks"]
    assert "a plan with masks has at most 64 sites" in " ".join(
        as_text(protect.page(found)).split()
    )


def test_bench_protect_ratios_are_those_of_its_rows(protect_result: dict) -> None:
    rows = {(row["name"], row["bits"]): row for row in protect_result["rows"]}
    ours, other = rows["encrypted", 16], rows["ckks", None]
    expected = other["bytes_up_per_parameter"] / ours["bytes_up_per_parameter"]
    ratios = protect_result["ratios"]["encrypted-16"]
    assert ratios["ckks"]["bytes_up"] == pytest.approx(expected, abs=1e-3)
    assert set(ratios) == {
        "float32", "ckks", "ckks-blocks", "masked", "layered", "encrypted-keystream",
        "layered-keystream",
    }  # fmt: skip
    for other in ("masked", "layered"):
        for short, long in (
            ("bytes_up", "bytes_up_per_parameter"),
            ("protect_seconds", "protect_seconds_per_million"),
        ):
            expected = rows[other, 16][long] / ours[long]
            assert ratios[other][short] == pytest.approx(expected, abs=1e-3)
    assert set(protect_result["ratios"]["layered-8"]) == {
        "float32", "ckks", "ckks-blocks", "encrypted", "masked", "encrypted-keystream",
        "layered-keystream",
    }  # fmt: skip


def test_the_page_says_what_a_keystream_saves_beside_bfv_and_ckks(protect_result: dict) -> None:
    text = " ".join(as_text(protect.page(protect_result)).split())
    for bits in (8, 16):
        for protection in ("encrypted", "layered"):
            ratio = protect_result["ratios"][f"{protection}-keystream-{bits}"]
            ckks, bfv = ratio["ckks"], ratio[protection]
            assert (
                f"{protection}-keystream-{bits}: {ckks['bytes_up']:.1f} times smaller up and "
                f"{ckks['protect_seconds']:.1f} times faster to protect than ckks" in text
            )
            assert (
                f"{protection}-keystream-{bits}: {bfv['bytes_up']:.2f} times smaller up, "
                f"{bfv['bytes_down']:.2f} times down, and {bfv['protect_seconds']:.1f} times faster to "
                f"protect than {protection}-{bits} (bfv)" in text
            )


def test_the_page_says_what_masks_cost_beside_encryption(protect_result: dict) -> None:
    text = " ".join(as_text(protect.page(protect_result)).split())
    for bits in (8, 16):
        ratio = protect_result["ratios"][f"encrypted-{bits}"]["layered"]
        assert (
            f"layered-{bits}: {ratio['bytes_up']:.2f} times the bytes up and "
            f"{ratio['protect_seconds']:.2f} times the seconds to protect of encrypted-{bits}"
        ) in text
        assert text.count(f"masked-{bits}: ") == 1


def test_the_pages_fit_80_columns(protect_result: dict) -> None:
    rows = [{**row, "protect_seconds_per_million": 12.3456} for row in protect_result["rows"]]
    folded = {"sites": 1000, "parameters": 10**9, "peak_rss_mb": 99999.9, "fold_seconds": 9999.9}
    pages = [
        protect.page({**protect_result, "rows": rows}),
        fold.page({"rows": [folded], "peak_rss_ratio": 1.01}),
    ]
    text = "\n".join(as_text(page) for page in pages)
    assert max(map(len, text.splitlines())) <= 80
    for whole in (
        "encrypted 16 bits",
        "ckks-blocks",
        "unmask",
        "unprotect",
        "max error",
        "99999.9",
    ):
        assert whole in text
    assert text.count("12.3456") == len(rows) and "…" not in text


def test_bench_protect_keeps_stdout_for_its_result(capfd: pytest.CaptureFixture[str]) -> None:
    """TenSEAL warns on stdout when a vector needs several ciphertexts."""
    protect.run(ckks.SLOTS + 1, 4, bits=[8], repeats=1)
    captured = capfd.readouterr()
    assert captured.out == ""
    assert "repeat 1 of 1" in captured.err


def test_bench_protect_refuses_what_cannot_be_measured() -> None:
    for arguments in ({"parameters": 0, "sites": 4}, {"parameters": 9, "sites": 2}):
        with pytest.raises(BadInput, match="expected at least"):
            protect.run(**arguments)
    with pytest.raises(BadInput, match="repeats"):
        protect.run(10, 4, repeats=0)
    with pytest.raises(PlanRefused):
        protect.run(10, 1 << 20, bits=[24])


@pytest.mark.parametrize("size", [1, ckks.SLOTS, ckks.SLOTS + 1])
def test_ckks_sums_are_approximate(size: int) -> None:
    context = ckks.new_context()
    vectors = [np.random.default_rng(s).normal(size=size).astype(np.float32) for s in range(3)]
    for protect_vector in (ckks.protect, ckks.protect_blocks):
        running: list = []
        for vector in vectors:
            running = ckks.fold(context, running, protect_vector(context, vector))
        total = ckks.unprotect(context, ckks.serialise(running))
        assert total.shape == (size,)
        assert np.abs(total - np.sum(np.stack(vectors).astype(np.float64), axis=0)).max() < 1e-5


def test_only_the_benchmark_imports_ckks() -> None:
    package = Path(protect.__file__).resolve().parents[1]
    users = {
        path.relative_to(package).as_posix()
        for path in package.rglob("*.py")
        if any("import" in line and "ckks" in line for line in path.read_text().splitlines())
    }
    assert users == {"bench/protect.py"}


def test_bench_fold_is_exact_in_its_own_process() -> None:
    result = fold.run(parameters=5_000, sites=(3, 5), bits=12)
    assert (result["schema"], result["kind"]) == (1, "bench-fold")
    assert [row["sites"] for row in result["rows"]] == [3, 5]
    for row in result["rows"]:
        assert row["exact"] is True
        assert 0 < row["start_rss_mb"] <= row["peak_rss_mb"]
        assert row["fold_seconds"] > 0
    assert result["peak_rss_ratio"] < 1.1


def test_the_peak_is_the_childs_own_not_its_parents() -> None:
    """A positive control: what a fold keeps shows in the figure, what its parent has does not."""
    ballast = np.ones(64 << 17)  # 64 MB here
    code = (
        "from fedcore.experiment.environment import peak_memory_mb as peak; before = peak(); "
        "kept = b'x' * (32 << 20); print(before, peak())"
    )
    root = str(Path(fold.__file__).resolve().parents[2])
    output = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root
    ).stdout
    before, after = map(float, output.split())
    assert after - before > 30
    assert before < peak_memory_mb()
    assert len(ballast) > 0


def test_a_folding_process_that_dies_abandons_the_benchmark(
    stand_in,
) -> None:
    stand_in(fold, python=lambda *_: [sys.executable, "-c", "raise SystemExit(3)"])
    with pytest.raises(Abandoned, match="bench fold: the folding process: found exit 3"):
        fold.run(parameters=200_000, sites=(3,), bits=12)


def test_a_wrong_sum_abandons_the_benchmark(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sealer that protects something else than the slots the parent added up."""

    class Wrong(fold.EncryptedSealer):
        def protect(self, slots: np.ndarray) -> Iterator[bytes]:
            return super().protect(slots ^ np.uint64(1))

    monkeypatch.setattr(fold, "EncryptedSealer", Wrong)
    with pytest.raises(Abandoned, match="not the integer sum"):
        fold.run(parameters=100, sites=(3,), bits=12)


def test_bench_fold_needs_parameters_and_sites() -> None:
    fine = {"parameters": 10, "sites": (4,)}
    for asked in ({"parameters": 0}, {"sites": ()}, {"sites": (0,)}):
        with pytest.raises(BadInput, match="expected at least 1 of each"):
            fold.run(**fine | asked)
