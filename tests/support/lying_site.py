"""A site that steers the common model into a question about the others' rows, and reads the answers.

It holds no more than any site: the model, its own vector, and the opened sum of each round. From these it
drives a linear model to "is this patient older than tau?", so steep that the others' gradients are those of
the patients on one side; what two values of tau differ by is one patient (PROTOCOL G).

Runs inside `fed-site run` (`steering`), in the place of what the site's rows would give.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from support.hostile_coordinator import TESTS, add_row, rows_of
from support.unguarded_site import trusting

ASKED, READ = "asked.json", "read.jsonl"
STEEP = 60.0
"""How steep the question is: the logit moves by so much over one unit of the standardised column."""


def steering(folder):
    """What the site's process runs first."""
    return (
        f"import sys; sys.path.insert(0, {str(TESTS)!r})\n"
        f"from support.lying_site import install; install({str(folder)!r})\n"
    )


def ask(folder, **what):
    """What the site wants to know: see `Question`."""
    Path(folder, ASKED).write_text(json.dumps(what))


def read(folder, job):
    """tau -> the gradients that the others' rows gave to it, (answers, parameters)."""
    found = {}
    for row in rows_of(folder, READ, job):
        found.setdefault(row["tau"], []).append(row["gradient"])
    return {tau: np.array(rows) for tau, rows in found.items()}


@dataclass
class Question:
    """column: its place among the inputs; center, scale: how it is standardised. taus: the thresholds in
    its own unit, from the first question to the last. rows: the site's own. range_: a power of two; the
    range that the job begins with, since the site says at calibration that all of its update exceeds half
    of it."""

    column: int
    center: float
    scale: float
    taus: list
    rows: int
    range_: float
    at: int = 0
    answers: int = 0
    others: object = 0.0
    start: object = None
    sent: object = None
    bound: float = 0.0
    total: int = 0

    def target(self, size):
        """The model that asks the present question."""
        found = np.zeros(size)
        found[self.column] = STEEP
        tau = self.taus[min(self.at, len(self.taus) - 1)]
        found[-1] = -STEEP * (tau - self.center) / self.scale
        return found

    def lie(self, plan, step, server, wides):
        """Fields and wide integers that bring the model nearer to the question."""
        from fedcore.secagg.encode.quantise import quantise

        size, bound = plan.parameters, server.bound
        velocity = server.moments.get("velocity", np.zeros(size))
        momentum = plan.server.momentum if "velocity" in server.moments else 0.0
        wanted = self.target(size) - server.parameters - momentum * velocity
        total = self.total or 4 * self.rows
        own = np.clip(wanted * total / plan.max_examples - self.others, -bound, bound)
        found = quantise(own, plan.packing.bits, bound, np.random.default_rng(step.training_round))
        self.start, self.sent, self.bound = server.parameters.copy(), found.fields, bound
        return found.fields, {**wides, "over_range": [0], "over_half_range": [size]}

    def lie_at_calibration(self, plan, counts):
        """How many coordinates exceed each power of two."""
        from fedcore.learning.adaptive_range import CALIBRATION_EXPONENTS

        return [
            plan.coordinates if 2.0**power < self.range_ else count
            for power, count in zip(CALIBRATION_EXPONENTS, counts, strict=True)
        ]

    def hear(self, plan, opened, sites):
        """What a sum tells; the gradient of the others' rows where it answers the question."""
        from fedcore.secagg.encode.quantise import dequantise

        bits, size, cap = plan.packing.bits, plan.parameters, plan.max_examples
        whole = dequantise(opened.coordinates, bits, self.bound, sites)
        self.others = whole - dequantise(self.sent, bits, self.bound, 1)
        self.total = opened.wides["weight"][0]
        gradient = -(self.others * cap) / plan.train.lr
        gradient -= plan.train.weight_decay * self.start * (self.total - self.rows)
        if self.at >= len(self.taus) or abs(self.start[self.column] - STEEP) > 6:
            return None
        now = self.center - self.scale * self.start[-1] / self.start[self.column]
        rest = np.delete(self.start, [self.column, size - 1])
        if abs(now - self.taus[self.at]) > 0.25 or np.abs(rest).max() > 2:
            return None
        tau = self.taus[self.at]
        self.answers += 1
        if self.answers == 2:
            self.at, self.answers = self.at + 1, 0
        return {"tau": tau, "gradient": gradient.tolist()}


def install(folder):
    """Lie in every job for which something is asked."""
    from fedcore_clients.round_work import RoundWork
    from fedcore_clients.trainer import Training

    questions, opened = {}, RoundWork.open
    contribute = trusting(Training.contribute)  # of the model that it makes itself

    def asked(job):
        path = Path(folder, ASKED)
        if job not in questions and path.exists():
            questions[job] = Question(**json.loads(path.read_text()))
        return questions.get(job)

    async def contributed(self, job, plan, step, state, *more):
        fields, wides = await contribute(self, job, plan, step, state, *more)
        question = asked(job)
        if question is not None and step.purpose == "range":
            lied = question.lie_at_calibration(plan, wides["exceeding"])
            return fields, {**wides, "exceeding": lied}
        if question is not None and step.purpose == "update":
            return question.lie(plan, step, state.server, wides)
        return fields, wides

    def heard(self, asked, chunks, marks):
        found, job = opened(self, asked, chunks, marks), asked.header.job
        if asked.header.purpose == "update" and job in questions:
            _, total = self.secrets.open(chunks, self.layout(asked.header), asked)
            row = questions[job].hear(self.agreed.plan, total, len(asked.survivors))
            if row is not None:
                add_row(folder, READ, {"job": job, "round": asked.header.training_round, **row})
        return found

    Training.contribute, RoundWork.open = contributed, heard
