"""What each party could read of one site's update: sentences, a table and small pictures of bars.

Invariant: a reading of an upload is called the update only if every coordinate is exact, and nothing
only if its correlation stays within chance; both numbers stand beside the word. What a sum gives away
is never called nothing: it is stated with its correlation.
The numbers are `result.seen` (fedcore.experiment.exposure); a result without them has no section.
"""

import math
from dataclasses import dataclass

from fedcore.report import phrases
from fedcore.report.tables import Cell, Grid
from fedcore.results import PartyView, Reading, Result, RunResult, UpdateExposure
from fedcore.secagg.protections import PROTECTIONS, unprotected

COORDINATOR, SITE, BOTH = PARTIES = ("coordinator", "another site", "both together")
"""The keys of `seen.parties` (a test compares them with fedcore.experiment.exposure)."""

_UPLOAD = {  # (masks?, encrypts?): how the coordinator reads it, and how it does with another site
    (False, False): ("The upload as it is",) * 2,
    (False, True): ("The upload, a ciphertext", "The upload, opened with the key that {other} has"),
    (True, False): (
        "The upload less the masks it rebuilt",
        "The upload less every mask that one of them knows",
    ),
    (True, True): (
        "The upload, masked and encrypted",
        "The upload, decrypted, less every mask that one of them knows",
    ),
}


@dataclass(frozen=True)
class Bars:
    """A picture of coordinates: per cent of the largest, up or down from a line in the middle."""

    strip: tuple[int, ...]
    label: str
    exact: bool


@dataclass(frozen=True)
class Readings:
    """The section of one run. columns: the protections; rows: (party, one cell a column), where a cell is what
    was read, and the bars of the most informative reading, if there is one."""

    title: str
    headline: str
    bars: Bars
    columns: tuple[str, ...]
    rows: tuple[tuple[str, tuple[tuple[str, Bars | None], ...]], ...]
    note: str
    caption: str


def section(result: Result) -> Readings | None:
    """The section of one run; None where the run was not traced."""
    seen = result.seen if isinstance(result, RunResult) else None
    if seen is None:
        return None
    site, size = phrases.plain(seen.site), seen.coordinates
    found = [(seen.parties, phrases.plain(seen.protection)), (seen.plain, "plain")]
    columns = found[: 1 if unprotected(seen.protection) else 2]
    rows = []
    for party in PARTIES:
        held = []
        for views, protection in columns:
            view, bars = views[party], None
            if view.best is not None and (strip := view.best.strip):
                label = f"{_name(seen, party)} under {protection}: {len(strip)} coordinates as read"
                bars = Bars(strip, label, view.best.exact == 1)
            held.append((_cell(seen, party, view, protection), bars))
        rows.append((_name(seen, party), tuple(held)))
    drawn = len(seen.strip)
    first = f"the first {drawn} of {size:,}" if drawn < size else f"all {size:,}"
    return Readings(
        f"What anyone could read of {site}'s update",
        headline(seen),
        Bars(seen.strip, f"{site}'s update: its first {drawn} coordinates", exact=True),
        tuple(f"under {protection}" for _, protection in columns),
        tuple(rows),
        _note(seen),
        f"Bars: {first} coordinates, above or below zero, each strip scaled to its own largest one; "
        "of a party the reading that tells it most. Strong: the update itself. Pale: anything else.",
    )


def table(result: Result) -> list[Grid]:
    """The same as a table of words, for Markdown; empty where the run was not traced."""
    found = section(result)
    if found is None:
        return []
    rows = [
        (Cell(party, number=False), *(Cell(text, number=False) for text, _ in cells))
        for party, cells in found.rows
    ]
    note = f"{found.headline} {found.note}"
    return [Grid(found.title, ("party", *found.columns), tuple(rows), note)]


def headline(seen: UpdateExposure) -> str:
    """One sentence: what each party could read of the named site's update under this plan."""
    alone, other, both = (_level(seen, party) for party in PARTIES)
    if both == other:
        both = "no more"
    site, who = phrases.plain(seen.site), phrases.plain(seen.other)
    return (
        f"Of {site}'s update in round {seen['round']}, the coordinator could read {alone}, "
        f"{who} {other}, and both together {both}."
    )


def _level(seen: UpdateExposure, party: str) -> str:
    view, sites = seen.parties[party], seen.contributors
    message, best = view.message, view.best
    if best is not None and best.exact == 1:
        return "all of it"
    if message is not None and _beyond_chance(seen, message):
        return f"something ({_correlation(seen, message)})"
    if view.sum is None:
        return "nothing measurable"
    if party == COORDINATOR:
        return f"only the sum of {sites} sites"
    return f"only the mean of the other {sites - 1} sites"


def _name(seen: UpdateExposure, party: str) -> str:
    other = phrases.plain(seen.other)
    return {COORDINATOR: "coordinator", SITE: f"another site ({other})"}.get(party, party)


def _cell(seen: UpdateExposure, party: str, view: PartyView, protection: str) -> str:
    other, sites = phrases.plain(seen.other), seen.contributors
    message, from_sum = view.message, view.sum
    upload = "It never gets the upload."
    if message is not None:
        lead, layers = "The upload", PROTECTIONS.get(protection)
        if layers is not None:
            lead = _UPLOAD[layers.masks, layers.encrypts][party == BOTH].format(other=other)
        upload = f"{lead}: {_verdict(seen, message)}."
        if message.exact == 1:
            return upload
    if from_sum is None:
        return f"{upload} The sum stays encrypted for it."
    found = _correlation(seen, from_sum)
    if party == COORDINATOR:
        return f"{upload} The sum of {sites} sites: {found}."
    rest = f"The sum less {other}'s own update"
    if sites == 2:
        return f"{upload} {rest}: {_verdict(seen, from_sum)}."
    return f"{upload} {rest}, so the mean of the other {sites - 1}: {found}."


def _verdict(seen: UpdateExposure, reading: Reading) -> str:
    if reading.exact == 1:
        return "the update itself, every coordinate exact"
    if reading.correlation is None:
        return "nothing measurable (its values are all alike)"
    found, limit = _correlation(seen, reading), _number(seen, seen.chance)
    if not _beyond_chance(seen, reading):
        return f"nothing measurable ({found}; chance alone reaches {limit})"
    exact = f"{reading['exact'] * 100:.2g} % of the coordinates exact"
    return f"{found}, where chance alone reaches {limit}; {exact}"


def _beyond_chance(seen: UpdateExposure, reading: Reading) -> bool:
    return reading.correlation is not None and abs(reading.correlation) > seen.chance


def _correlation(seen: UpdateExposure, reading: Reading) -> str:
    return f"correlation {_number(seen, reading['correlation'])}"


def _number(seen: UpdateExposure, value: float | None) -> str:
    """A correlation with as many decimals as chance leaves a meaning to; never `-0.00`."""
    if value is None:
        return phrases.DASH
    digits = max(2, 1 - math.floor(math.log10(seen.chance)))
    text = f"{value:.{digits}f}"
    return text.removeprefix("-") if float(text) == 0 else text


def _note(seen: UpdateExposure) -> str:
    size, other = seen.coordinates, phrases.plain(seen.other)
    return (
        "Measured on this run's own messages, a check and not a proof: Pearson correlation over "
        f"{phrases.plural(size, 'coordinate')}, where 1 is the update itself and unrelated values stay below "
        f"{_number(seen, seen['chance'])} in 999 of 1000 readings. Sites that learn the same thing send "
        f"similar updates: {other}'s own, with no message at all, reaches {_number(seen, seen['own'])}. "
        "The parties followed the protocol; what one that breaks it can do is said under "
        '"Who could have seen what".'
    )
