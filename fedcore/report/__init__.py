"""From a run's files to its report: `report.html`, `report.md`, LaTeX, the terminal.

Invariant: this package reads result.json and rounds.jsonl and nothing else; it measures nothing,
and imports no torch, no training code and, until something is drawn, no plotting.

phrases: numbers and names as text.  sentences, methods, readings: the claims, how the run was made, what each
party could read.  tables: cells.  plots: SVG.  page, markdown, latex, terminal: the layouts.
"""

from collections.abc import Sequence
from pathlib import Path

from fedcore.errors import BadInput, require_extra
from fedcore.files import read_result, read_rounds, write_atomic
from fedcore.results import Result, RoundRow

__all__ = ["PAGE", "TEXT", "read", "render", "require_drawing", "write"]

PAGE, TEXT = "report.html", "report.md"


def require_drawing() -> None:
    """Raise BadInput unless what a page and the intervals in it need is installed."""
    require_extra("report", "report", "jinja2", "matplotlib", "scipy")


def read(run_dir: Path) -> tuple[Result, list[RoundRow]]:
    """The result and the rounds of a finished run or comparison.

    Raises BadInput for a file that is missing, unreadable or of another schema.
    """
    return read_result(run_dir), read_rounds(run_dir)


def render(runs: Sequence[tuple[Result, Sequence[RoundRow]]], form: str = "html") -> str:
    """The report of one or several runs as `html`, `md` or `latex`.

    Only html lays runs side by side; the others put them one after the other. Raises BadInput for
    another form, for no run, and for html of runs beside comparisons.
    """
    if not runs:
        raise BadInput("report: found no run, expected at least one")
    if form == "html":
        require_drawing()
        from fedcore.report import page

        return page.render(runs)
    if form in ("md", "latex"):
        from fedcore.report import latex, markdown

        draw = markdown.render if form == "md" else latex.render
        return "\n".join(draw(result) for result, _ in runs)
    raise BadInput(f"report format: found {form!r}, expected html, latex or md")


def write(run_dir: Path) -> Path:
    """Write `report.html` and `report.md` into `run_dir`; returns the path of the page.

    Each file appears whole or not at all. Raises what `read` raises.
    """
    require_drawing()
    from fedcore.report import page

    run = read(run_dir)
    beside = [name for name in page.FILES if name == TEXT or (run_dir / name).is_file()]
    whole, text = page.render([run], beside), render([run], "md")
    write_atomic(run_dir / TEXT, text.encode())
    write_atomic(run_dir / PAGE, whole.encode())
    return run_dir / PAGE
