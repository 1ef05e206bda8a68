"""`fedcore bench secagg`: whole rounds, exact, with what each site sends counted."""

from __future__ import annotations

import io
import json

import pytest
from rich.console import Console

from fedcore.bench import secagg_rounds as secagg
from fedcore.cli.main import main
from fedcore.errors import BadInput, PlanRefused

pytest.importorskip("tenseal.sealapi")


@pytest.fixture(scope="module")
def found():
    return secagg.run(parameters=5000, sites=(4, 7), drop=1)


def test_every_row_is_exact_and_says_who_is_in_the_sum(found):
    rows = found["rows"]
    assert [(r["sites"], r["survivors"], r["threshold"]) for r in rows] == [(4, 3, 3), (7, 6, 5)]
    assert all(row["exact"] for row in rows)


def test_control_bytes_grow_with_the_sites_and_stay_beside_the_vector(found):
    four, seven = found["rows"]
    assert 0 < four["control_bytes_up_per_site"] < seven["control_bytes_up_per_site"]
    for row in found["rows"]:
        vector = row["bytes_up_per_site"] - row["control_bytes_up_per_site"]
        assert vector == pytest.approx(row["bytes_up_per_parameter"] * 5000, abs=1)
        assert row["control_bytes_down_per_site"] > row["control_bytes_up_per_site"] / 2


def test_seconds_are_counted_for_both_roles(found):
    for row in found["rows"]:
        assert all(value > 0 for value in row["site_cpu_seconds"].values())
        assert row["coordinator_cpu_seconds"] > 0


def test_masked_needs_fewer_bytes_than_layered(found):
    masked = secagg.run(parameters=5000, sites=(4,), drop=1, protection="masked")["rows"][0]
    assert masked["exact"]
    assert masked["bytes_up_per_parameter"] < found["rows"][0]["bytes_up_per_parameter"]


def test_a_keystream_needs_the_bytes_of_masks_and_a_salt_for_each_vector(found):
    row = secagg.run(parameters=5000, sites=(4,), drop=1, cipher="keystream")["rows"][0]
    masked = secagg.run(parameters=5000, sites=(4,), drop=1, protection="masked")["rows"][0]
    assert row["exact"]
    assert row["bytes_up_per_parameter"] == masked["bytes_up_per_parameter"]
    up = row["control_bytes_up_per_site"] - masked["control_bytes_up_per_site"]
    assert up == pytest.approx(32 * 3 / 4, abs=4)  # a mean over four sites, one of which sends none
    down = row["control_bytes_down_per_site"] - masked["control_bytes_down_per_site"]
    assert down == pytest.approx(32 * 3 * 2 * 3 / 4, abs=16)  # the list, and beside the sum


def test_a_keystream_where_nothing_is_encrypted_is_refused():
    with pytest.raises(PlanRefused, match=r"protect\.cipher: found 'keystream' under 'masked'"):
        secagg.run(parameters=10, sites=(4,), protection="masked", cipher="keystream")


def test_the_page_names_a_sum_that_is_not_exact(found):
    def text(value):
        console = Console(width=160, record=True, file=io.StringIO())
        console.print(secagg.page(value))
        return console.export_text()

    assert text(found).count("exact") == 2
    assert "NOT the plain sum" not in text(found)
    lying = found | {"rows": [found["rows"][0] | {"exact": False}]}
    assert "NOT the plain sum" in text(lying)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sites": (4,), "drop": 2}, "--drop: found 2, expected 0 to 1"),
        ({"sites": (3,), "drop": 1}, "--drop: found 1, expected 0 to 0"),
        ({"protection": "encrypted"}, "--protection: found 'encrypted'"),
        ({"parameters": 0}, "--parameters: found 0"),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(BadInput, match=message):
        secagg.run(**({"parameters": 10, "sites": (4,)} | settings))


def test_the_command_prints_the_json(capsys):
    with pytest.raises(SystemExit) as left:
        main(["bench", "secagg", "--sites", "4", "--parameters", "2000", "--drop", "1", "--json"])
    assert left.value.code == 0
    assert json.loads(capsys.readouterr().out)["kind"] == "bench-secagg"
    with pytest.raises(SystemExit) as left:
        main(["bench", "secagg", "--sites", "four"])
    assert left.value.code == 2
