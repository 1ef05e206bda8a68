"""The tables of arms and gaps and the Methods paragraph as LaTeX, for a paper (needs booktabs).

Invariant: text from a result is escaped; no name can start a command, a comment or mathematics.
"""

import re

from fedcore.report import phrases, tables
from fedcore.report import sentences as say
from fedcore.report.methods import methods
from fedcore.report.tables import Cell, Grid
from fedcore.results import Result

_SPECIAL = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    '"': r"\textquotedbl{}",
    "`": r"\textasciigrave{}",
    "–": "--",
    "\ufffd": "?",  # the sign for a control character, which pdflatex does not have
    # After the `\\\\` of the row above, a star or a bracket would be read as its argument.
    "*": "{*}",
    "[": "{[}",
    "]": "{]}",
    **{character: "\\" + character for character in "&%$#_{}"},
}
_PATTERN = re.compile("[" + re.escape("".join(_SPECIAL)) + "]")


def escape(text: str) -> str:
    """`text` with LaTeX's special characters made literal, in one pass: none is escaped twice."""
    return _PATTERN.sub(lambda m: _SPECIAL[m[0]], text)


def render(result: Result) -> str:
    """`table` environments and a paragraph, ending in a newline; needs the package booktabs."""
    where = say.title(result)
    method = say.how_measured(result)
    intervals = f" Intervals: {method}." if method else ""
    parts = ["% needs \\usepackage{booktabs}"]
    parts += [f"% {escape(phrases.plain(warning))}" for warning in result.warnings]
    sites = tables.per_site_note([result])
    captioned = [
        *((t, f"arms. {t.note}{intervals}") for t in tables.arms([result])),
        *((t, f"where the loss comes from. {t.note}") for t in tables.sources([result])),
        *((t, f"{t.title}. {sites}") for t in tables.per_site([result])),
    ]
    parts += [_table(table, f"{where}: {caption}") for table, caption in captioned]
    parts += ["\\paragraph{Methods.}", _prose(methods(result))]
    return "\n".join(parts) + "\n"


def _table(table: Grid, caption: str) -> str:
    columns = "".join("r" if cell.number else "l" for cell in table.rows[0])
    head = " & ".join(escape(name) for name in table.head)
    lines = [
        "\\begin{table}[ht]",
        "\\centering",
        f"\\caption{{{_prose(caption)}}}",
        f"\\begin{{tabular}}{{{columns}}}",
        "\\toprule",
        f"{head} \\\\",
        "\\midrule",
    ]
    for row in table.rows:
        if row[0].text == "total":
            lines.append("\\midrule")
        lines.append(" & ".join(_cell(cell) for cell in row) + " \\\\")
    return "\n".join([*lines, "\\bottomrule", "\\end{tabular}", "\\end{table}"])


def _cell(cell: Cell) -> str:
    signed = cell.number and re.fullmatch(r"[-+][\d.]+", cell.text)
    text = f"${cell.text}$" if signed else escape(cell.text)
    return f"{text} ({_prose(cell.sub)})" if cell.sub else text


def _prose(text: str) -> str:
    """Escaped, with negative numbers and arrows in mathematics, where a minus is one."""
    text = escape(text).replace(r" -\textgreater{} ", r" $\to$ ")
    return re.sub(r"(?<![^\s(])-[\d.]*\d", lambda m: f"${m[0]}$", text)
