"""The terminal output of `fedcore attack`: a line for each adversary and view, then a sentence for each."""

from collections.abc import Callable, Iterable
from typing import TypeVar

from rich.console import Group, RenderableType
from rich.text import Text

from fedcore.report.phrases import DASH, plain, points
from fedcore.report.terminal import fitted, grid
from fedcore.results import AttackResult, AttackRow


def attack_summary(result: AttackResult) -> RenderableType:
    """A table for each measure, and what each row shows and does not show."""
    parts: list[RenderableType] = []
    ordered = [row for row in result.rows if row.refused is None]
    for measure, rows in together(ordered, lambda row: row.measure).items():
        table = grid(
            "attack",
            "party",
            "view",
            "protection",
            "n",
            "found",
            "95 % interval",
            "chance",
            "beyond it",
        )
        for row in rows:
            table.add_row(
                Text(plain(named(row))), row.party, row.view, row.protection,
                f"{row.samples:,}", figure(row.value, measure), interval(row),
                figure(row.chance, measure), BEYOND[row.beyond_chance],
            )  # fmt: skip
        parts += [Text(measure), fitted(table), Text()]
    parts += [Text(f"{attack}: no figure: {reason}") for attack, reason in without_figure(result)]
    said = dict.fromkeys(
        f"{named(row)}, {row.protection}: {row.shows}" for row in ordered if row.shows
    )
    parts += [Text(plain(text)) for text in said]
    parts += [
        Text(text, style="dim") for text in dict.fromkeys(r.not_shown for r in ordered) if text
    ]
    return Group(*parts)


def named(row: AttackRow) -> str:
    """Task, attack and setting."""
    return " ".join(part for part in (row.task, row.attack, row.setting) if part)


Each = TypeVar("Each")


def together(found: Iterable[Each], name: Callable[[Each], str]) -> dict[str, list[Each]]:
    """{name: those that have it}, in the order in which names come first."""
    named: dict[str, list[Each]] = {}
    for each in found:
        named.setdefault(name(each), []).append(each)
    return named


def without_figure(result: AttackResult) -> list[tuple[str, str]]:
    """(attack, reason) of the rows that have none, each once."""
    return list(
        dict.fromkeys((plain(named(row)), plain(row.refused)) for row in result.rows if row.refused)
    )


BEYOND = {True: "yes", False: "no", None: DASH}


def figure(value: float | None, measure: str) -> str:
    """A share in per cent; an epsilon as it is."""
    if value is None:
        return DASH
    return f"{value:.2f}" if "epsilon" in measure else f"{points(value)} %"


def interval(row: AttackRow) -> str:
    """`12.1 to 40.3 %`, or a dash; an end that there is none of is left out."""
    if row.low is None and row.high is None:
        return DASH
    ends = [DASH if end is None else figure(end, row.measure) for end in (row.low, row.high)]
    return " to ".join(ends)
