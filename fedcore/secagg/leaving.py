"""What a job takes from a site: each kind of vector, what it holds, how often it leaves, who can open it.

Like the label it follows from the job's settings and the roster alone, so an operator reads it before a
row of the site is read, and before a word of approval. PROTOCOL W and Q say what the vectors hold.
"""

from __future__ import annotations

from fedcore.config import Job
from fedcore.secagg.label import Terms
from fedcore.secagg.purposes import leaving


def leaving_of(job: Job, terms: Terms) -> list[str]:
    """One line for each purpose of a round, then who opens them, and what goes to the coordinator."""
    lines = [*leaving(job, terms), _who_opens(terms)]
    if terms.public_metrics:
        lines.append(
            "to the coordinator and its operators: the metrics of each release over all its sites"
        )
    if terms.release == "coordinator":
        lines.append(
            "to the coordinator and its operators: the model and statistics of the last round"
        )
    return [
        *lines,
        "nothing else but the shape of the model: rows, file names and errors stay here",
    ]


def _who_opens(terms: Terms) -> str:
    """Who can read a vector, and who the sum, by the protection."""
    least = f"a sum of at least {terms.threshold} sites"
    if not terms.layers.protects:
        return "opened: by the coordinator, the vector of this site"
    if not terms.layers.encrypts:
        return f"opened: by the coordinator and by the sites, as {least}"
    said = f"opened: by the sites only, as {least}"
    if terms.layers.masks:
        return said
    return f"{said}; with any one of them the coordinator opens the vector of this site"
