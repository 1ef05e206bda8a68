"""The figures of docs/gap.md are those that its commands give today."""

import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

import fedcore
from fedcore.cli.main import app
from fedcore.report import phrases

PAGE = (Path(__file__).parents[2] / "docs" / "gap.md").read_text()
ROWS = re.findall(r"^\| (none|`[^`|]+`) \|([^|]*)\|([^|]*)\|([^|]*)\|$", PAGE, re.MULTILINE)


def measured(settings: str, out: Path) -> list[str]:
    """The cells of a line of the table: both scores, what is lost and its interval."""
    (command,) = re.findall(r"^```sh\nfedcore (.*)\n```", PAGE, re.MULTILINE)
    words = [*shlex.split(command), *shlex.split(settings.strip("`")), "--out", str(out)]
    done = CliRunner().invoke(app, [word for word in words if word != "none"])
    assert done.exit_code == 0, done.output
    result = fedcore.load(out).result
    scores = [phrases.score(result.score(arm, "accuracy")) for arm in ("centralised", "federated")]
    gap = result.gap_of("total", "accuracy")
    low, high = (phrases.points(end) for end in gap.ends)
    return [*scores, f"{phrases.points(gap.mean)} [{low}, {high}]"]


def test_the_page_has_a_table_that_begins_with_the_plain_command():
    assert len(ROWS) >= 10 and ROWS[0][0] == "none"
    assert len({settings for settings, *_ in ROWS}) == len(ROWS)


@pytest.mark.slow
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0].strip("`"))
def test_every_line_is_what_its_settings_give(row, tmp_path):
    settings, *shown = row
    shown, found = [cell.strip() for cell in shown], measured(settings, tmp_path / "run")
    if "--lr 1" not in settings:
        assert shown == found
        return
    # At this rate training is unstable: the last bits of another processor's arithmetic become points.
    assert abs(float(shown[0]) - float(found[0])) <= 0.01
    (_, low, high), (_, least, most) = (
        map(float, re.findall(r"-?[0-9.]+", cells[2])) for cells in (shown, found)
    )
    assert max(low, least) <= min(high, most), (shown, found)  # the intervals overlap
