"""The report as Markdown: warnings, the headline sentences, the tables and the Methods paragraph.

Invariant: text from a result is escaped, so that no name can open a tag, a link, a table cell or
emphasis (CommonMark and GitHub tables).
"""

import html
import re
from dataclasses import replace

from fedcore.report import phrases, readings, tables
from fedcore.report import sentences as say
from fedcore.report.methods import methods
from fedcore.report.tables import Cell, Grid
from fedcore.results import Result


def escape(text: str) -> str:
    """`text` with every character that Markdown or inline HTML could read as markup made literal."""
    text = html.escape(text, quote=False)
    # A single `_` inside a word or `-` in a number is no markup; escaping it would only be noise,
    # but underscores pair across words, so they are escaped everywhere.
    return re.sub(r"([\\`*_\[\]|~#!$])", r"\\\1", text)


def code(text: str) -> str:
    """`text` as a code span, whatever backticks it holds."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * (longest + 1)
    padding = " " if "`" in text else ""
    return f"{fence}{padding}{text}{padding}{fence}"


def render(result: Result) -> str:
    """The report of one run or comparison, ending in a newline."""
    first, *others = say.lost(result)
    others += filter(None, [say.converged(result)])
    others += [
        *say.gained(result),
        *say.cost(result),
        *say.label_lines(result.label),
    ]
    if method := say.how_measured(result):
        others.append(f"Intervals: {method}.")
    blocks = [
        f"# {escape(say.title(result))}",
        escape(", ".join(say.setting(result))) + ".",
        *(f"> **Warning:** {escape(phrases.plain(warning))}" for warning in result.warnings),
        f"**{escape(first)}**",
        "\n".join(f"- {escape(sentence)}" for sentence in others),
    ]
    found = [*tables.arms([result]), *tables.best_rounds([result]), *tables.sources([result])]
    sites = [replace(t, title=f"Sites: {t.title}") for t in tables.per_site([result])]
    found += [*sites[:-1], *(replace(t, note=tables.per_site_note([result])) for t in sites[-1:])]
    found += tables.confusion([result])
    found += [*readings.table(result), *tables.cost([result]), *tables.budgets([result])]
    for table in found:
        blocks += [f"## {escape(table.title)}", grid(table), *filter(None, [escape(table.note)])]
    blocks += ["## Methods", escape(methods(result))]
    if result.origin.reproduce:
        blocks += ["## Reproduce", code(phrases.plain(result.origin.reproduce))]
    if digest := say.model_hash(result):
        blocks.append(f"Model SHA-256: {code(digest)}")
    return "\n\n".join(blocks) + "\n"


def grid(table: Grid) -> str:
    """A table in the form of GitHub."""
    head, aligned = map(escape, table.head), ("---:" if c.number else "---" for c in table.rows[0])
    rows = [head, aligned, *(map(_cell, row) for row in table.rows)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _cell(cell: Cell) -> str:
    return escape(f"{cell.text} ({cell.sub})" if cell.sub else cell.text)
