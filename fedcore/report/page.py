"""The report as one self-contained HTML page: inline style, inline SVG, one script that sorts, no requests.

Invariant: warnings stand above every number, and nothing from a result reaches the page unescaped
(Jinja's autoescape is on; only our own SVG is marked safe). A content security policy in the page
itself forbids a browser to load anything or to run another script, whatever a task is called.
Sentences and tables come from `sentences` and `tables`; the template only lays them out.
"""

import re
from base64 import b64encode
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from hashlib import sha256
from importlib import resources
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from markupsafe import Markup, escape

from fedcore.errors import BadInput
from fedcore.report import aligned, phrases, plots, readings, tables
from fedcore.report import sentences as say
from fedcore.report.methods import methods, settings_of
from fedcore.report.plots import Finished
from fedcore.results import ComparisonResult, Result

MANY_SITES = 20
"""More sites than this are drawn as dots, and their table is folded."""

FILES = {
    "result.json": "every number of this page",
    "rounds.jsonl": "one line for each arm and round: `pandas.read_json('rounds.jsonl', lines=True)`",
    "model.safetensors": "the released model: `fedcore.load(folder).model` is the torch module, `.predict(rows)` "
    "takes raw rows; `safetensors.torch.load_file` reads the tensors alone",
    "scores.npz": "outputs, targets and split of every row: `numpy.load('scores.npz')`; it says something of single "
    "rows, so keep it where the simulation ran",
    "plan.json": "what the sites and the coordinator agreed on",
    "job.json": "the settings",
    "report.md": "this report as Markdown",
}
"""The files of a run that its page links to, with what is in them."""


def render(runs: Sequence[Finished], files: Sequence[str] = ()) -> str:
    """The page of one run, of several runs laid over each other, or of comparisons.

    runs: at least one (result, rounds) as `fedcore.report.read` returns them. files: those of `FILES` that lie
    beside the page. Raises BadInput for runs beside comparisons, whose intervals do not mean the same.
    """
    results = [result for result, _ in runs]
    if len({isinstance(result, ComparisonResult) for result in results}) > 1:
        raise BadInput(
            "report: found runs beside comparisons, expected one kind",
            remedy="report them separately: their intervals answer different questions",
        )
    several = len(results) > 1
    names = say.run_names(results) if several else [""]
    labels = say.run_labels(results) if several else [""]
    shared, own = settings_of(results)
    tasks = list(dict.fromkeys(phrases.plain(result.task) for result in results))
    return template("report.html.j2").render(
        title=f"{phrases.listed(tasks)}: {len(results)} runs" if several else say.title(results[0]),
        kind="comparison" if isinstance(results[0], ComparisonResult) else "run",
        started=phrases.plain(results[0].origin.started)[:10],
        settings=shared if several else say.setting(results[0]),
        differing=list(zip(labels, own, strict=True)) if several else [],
        warnings=_warnings(names, results),
        headline=_headline(names, results),
        answers=_answers(names, results),
        reproduce=[
            (n, phrases.plain(r.origin.reproduce), say.model_hash(r))
            for n, r in zip(names, results, strict=True)
        ],
        plots=_plots(runs),
        trust=_parts(names, [tuple(_seen(result)) for result in results]),
        arms=tables.arms(results) + tables.best_rounds(results),
        sites=None if several else aligned.site_table(results[0]),
        many=len(results[0].per_site) > MANY_SITES,
        sites_plot=[] if several else _sites_plot(results[0]),
        per_site=tables.per_site(results) if several else [],
        sort=Markup(_script()),  # noqa: S704  our own file
        sort_hash=_script_hash(),
        per_site_note=tables.per_site_note(results),
        site_heading="Each site, alone and together"
        if any("local_only" in result.arm_names for result in results)
        else "Each site",
        seen=_seen_by_parties(names, results),
        sources=tables.sources(results),
        cost=tables.cost(results) + tables.budgets(results),
        details=[
            *tables.confusion(results),
            *tables.sites(results),
            *tables.statistics(results),
            *tables.protected(results),
        ],
        keys=tables.settings(results),
        methods=_parts(names, [(methods(r),) for r in results]),
        files=[(name, FILES[name]) for name in files],
        folder=phrases.plain(results[0].origin.run),
    )


def _sites_plot(result: Result) -> list[dict[str, Any]]:
    """The dots of more than `MANY_SITES` sites; of fewer their table says it."""
    metric = say.primary_metric(result)
    known = plots.site_values(result, metric) if metric else {}
    if metric is None or len(known) <= MANY_SITES:
        return []
    draw = partial(plots.sites_figure, result, metric)
    caption = "A dot is one site, on its own test rows, in the order of what is drawn."
    label = f"{phrases.metric_name(metric)} of {len(known)} sites"
    return [drawn("Each site as a dot", draw, caption, {"arms": [], "lines": []}, label)]


def _headline(names: list[str], results: list[Result]) -> list[tuple[str, str, list[str], str]]:
    """Per result: name, the first sentence, the other metrics' sentences, the method behind them."""
    found = []
    methods = [say.how_measured(result) for result in results]
    for i, (name, result) in enumerate(zip(names, results, strict=True)):
        first, *others = say.lost(result)
        repeated = methods[i] in methods[i + 1 :]
        found.append((name, first, others, "" if repeated else methods[i]))
    return found


def _answers(names: list[str], results: list[Result]) -> list[dict[str, Any]]:
    """The questions of the first screen, each with its sentences by run ("" for a single one)."""
    questions: dict[str, Callable[[Result], list[str]]] = {
        "Number of rounds": lambda r: [*filter(None, [say.converged(r)])],
        "Gained over staying alone": lambda r: [" ".join(say.gained(r))],
        "Cost of protection": lambda r: [" ".join(say.cost(r))],
    }
    return [
        {"question": question, "parts": _parts(names, [tuple(of(r)) for r in results])}
        for question, of in questions.items()
        if any(map(of, results))
    ]


def _parts(names: list[str], said: list[tuple[str, ...]]) -> list[tuple[str, tuple[str, ...]]]:
    """The sentences of each run with its name; those that all runs share once, without a name."""
    return [("", said[0])] if len(set(said)) == 1 else list(zip(names, said, strict=True))


def _warnings(names: list[str], results: list[Result]) -> list[tuple[str, str]]:
    """Each warning with the run it is about; one that all runs share comes once, without a name."""
    said = [[phrases.plain(warning) for warning in result.warnings] for result in results]
    shared = [warning for warning in said[0] if all(warning in other for other in said)]
    named = [(n, w) for n, of_run in zip(names, said, strict=True) for w in of_run]
    return [("", warning) for warning in shared] + [(n, w) for n, w in named if w not in shared]


def _seen(result: Result) -> list[str]:
    lines = [phrases.capitalised(line) for line in say.label_lines(result.label)]
    ended = [line if line.endswith(".") else f"{line}." for line in lines]
    return ended or ["Not stated in this result."]


def _seen_by_parties(
    names: list[str], results: list[Result]
) -> list[tuple[str, readings.Readings]]:
    """One section for each protection, of the first run under it."""
    found: dict[str, tuple[str, readings.Readings]] = {}
    for name, result in zip(names, results, strict=True):
        if (section := readings.section(result)) is not None:
            found.setdefault(section.columns[0], (name, section))
    return list(found.values())


_GAP = "and the gap between centralised and federated"


def _plots(runs: Sequence[Finished]) -> list[dict[str, Any]]:
    """By round; for comparisons also by seed and fold. Empty where nothing was measured."""
    results = [result for result, _ in runs if isinstance(result, ComparisonResult)]
    if not results:
        return _by_round(runs)
    metric = say.primary_metric(results[0])
    if metric is None or not any(result.cells for result in results):
        return []
    draw = partial(plots.splits_figure, results, metric)
    caption = "A bar is the mean with its interval; every dot is one seed and fold."
    label = f"{phrases.metric_name(metric)} of every arm, {_GAP}"
    splits = drawn("By seed and fold", draw, caption, _legend(runs), label)
    return [*_by_round([split for run in runs for split in plots.splits_of(run)]), splits]


def _by_round(runs: Sequence[Finished]) -> list[dict[str, Any]]:
    metric = plots.plotted_metric(runs)
    if metric is None:
        return []
    caption = "Measured over the union of the sites' test rows after each round."
    gaps = [result.gap_of("total", metric) for result, _ in runs]
    banded = any(len(members) > 1 for members in plots.groups(runs))
    if not banded and any(gap is not None and gap.ends is not None for gap in gaps):
        caption += " The bar at the last round of the gap is its interval."
    if banded:
        caption += (
            " Lines are means; bands run from the least to the largest of the seeds and folds."
        )
    draw = partial(plots.rounds_figure, runs, metric)
    legend, label = _legend(runs, by_round=True), phrases.metric_name(metric)
    found = [drawn("Round by round", draw, caption, legend, f"{label} of every arm, {_GAP}")]
    if columns := plots.further_columns(runs, metric):
        names = phrases.listed([plots.LOSSES.get(c) or phrases.metric_name(c) for c in columns])
        more = partial(plots.further_figure, runs, columns)
        caption = (
            "The same rounds and arms. Losses are those that the task trains on, means over rows."
        )
        found.append(drawn("Other curves", more, caption, legend, f"{names} of every arm"))
    return found + _sites_by_round(runs, metric)


def _sites_by_round(runs: Sequence[Finished], metric: str) -> list[dict[str, Any]]:
    """The curves of each site of a single run, of not too many sites."""
    curves = plots.site_curves(runs[0], metric) if len(runs) == 1 else {}
    if not 0 < len(curves) <= MANY_SITES:
        return []
    shown = [a for a in plots.SITE_ARMS if any(a in of_site for of_site in curves.values())]
    names = {"local_only": "alone", "federated": "together"}
    legend = {"arms": [(a.replace("_", "-"), names[a]) for a in shown], "lines": []}
    draw = partial(plots.sites_by_round_figure, runs[0], metric)
    name = phrases.metric_name(metric)
    caption = f"{phrases.capitalised(name)} on each site's own test rows, on one scale."
    label = f"{name} of {len(curves)} sites by round"
    return [drawn("Each site by round", draw, caption, legend, label)]


def drawn(
    title: str,
    draw: Callable[[tuple[float, float]], Any],
    caption: str,
    legend: dict[str, Any],
    label: str,
    salt: str = "",
) -> dict[str, Any]:
    """One figure, drawn for a wide page and again for a phone. label: what it shows, for who cannot see it. salt: a
    word that no other figure of the page has, by default from the title."""
    salt = salt or title.lower().replace(" ", "-")
    return {
        "title": title,
        # Markup: matplotlib escapes the text it writes, and a test draws hostile names.
        "wide": Markup(plots.svg(draw(plots.WIDE), f"wide-{salt}")),  # noqa: S704  as said above
        "narrow": Markup(plots.svg(draw(plots.NARROW), f"narrow-{salt}")),  # noqa: S704  as said
        "caption": caption,
        "legend": legend,
        "label": label,
    }


def _legend(runs: Sequence[Finished], *, by_round: bool = False) -> dict[str, Any]:
    results = [result for result, _ in runs]
    arms = [a for a in phrases.ARM_NAMES if any(a in say.arms_of(result) for result in results)]
    labels, lines = say.run_labels(results), []
    marks = "●■▲◆" if isinstance(results[0], ComparisonResult) and not by_round else ""
    found = [[i] for i in range(len(results))] if marks else plots.groups(runs)
    if len(found) > 1:
        lines = [
            (marks[i % 4] if marks else "", ", ".join(labels[m] for m in members))
            for i, members in enumerate(found)
        ]
    return {
        "arms": [(a.replace("_", "-"), phrases.ARM_NAMES[a]) for a in arms if not marks],
        "lines": lines,
    }


def _typeset(text: str) -> Markup:
    """Escaped, with a real minus before numbers and `x` between counts as a multiplication sign."""
    safe = str(escape(text))
    safe = re.sub(r"(?<![^\s(])-(?=\d)", "\u2212", safe)
    safe = re.sub(r"(?<=seeds) x (?=\d)", " \u00d7 ", safe).replace(" -&gt; ", " \u2192 ")
    safe = re.sub(r"`([^`]+)`", r"<code>\1</code>", safe)
    # A unit does not leave its number at the end of a line.
    safe = re.sub(r"(?<=\d) (?=(?:points?|kB|MB|B|s|ms)\b|%)", "\u00a0", safe)
    return Markup(safe)  # noqa: S704  escaped in the first line


@lru_cache(maxsize=1)
def _script() -> str:
    """What sorts the table of sites: the only script of a page, which works without it."""
    return resources.files("fedcore.report").joinpath("templates/sort.js").read_text("utf-8")


def _script_hash() -> str:
    """By which the page's policy allows this script and no other."""
    return b64encode(sha256(_script().encode()).digest()).decode()


@lru_cache
def template(name: str) -> Template:
    """One of our templates, which escapes what it is given."""
    environment = Environment(
        loader=PackageLoader("fedcore.report", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["typeset"] = _typeset
    return environment.get_template(name)
