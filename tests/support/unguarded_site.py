"""A site with one rule switched off, or one that colludes: the real `fed-site run`, patched as it starts.

    patches = {"a": unguarded(folder)}       # Python that the process runs before its command
    with switched_off(folder, "one sum a state"):
        ...                                  # here the attack succeeds: the positive control

A rule is looked up each time it would be applied, so one process shows both: the attack with the rule, and
without it. Nothing of the product reads these files; they exist for tests alone.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import json
from pathlib import Path

from support.hostile_coordinator import CAUGHT, TESTS, add_row, rows_of

MACHINE = "fedcore.secagg.protocol.job.site"
ROUND = "fedcore.secagg.protocol.round.site"
OFF, SENT, LIES = "switched-off.json", "sent.jsonl", "lies.json"


def unguarded(folder):
    """What an honest site's process runs first: its rules can be switched off."""
    return (
        f"import sys; sys.path.insert(0, {str(TESTS)!r})\n"
        f"from support.unguarded_site import install; install({str(folder)!r})\n"
    )


def colluding(folder):
    """What the process of a site runs first that gives away its keys, and lies where it is told to."""
    more = f"u.collude({str(folder)!r}); u.lie({str(folder)!r})\n"
    return unguarded(folder) + "import support.unguarded_site as u; " + more


SETTINGS = "the settings are in the plan"
SPLIT = "the split into training and test rows is the site's own"
CAP = "a site with more rows than the cap takes some of them"
GUARD = "a site leaves a job whose model it does not trust"
POLICY = "the policy of the site"
THRESHOLD = "the threshold of a round is the plan's"
ONE_SUM = "of one state at most one sum"
LEDGER = "statistics go again with the sites that had them"
CERTIFIED = "a state is held and applied under its own certificate only"
IMPOSSIBLE = "a sum that no honest vectors have is refused"
UNIFORM = "whatever a sum raises is the one refusal"


def _nothing(_):
    """In the place of a check."""
    return lambda *_: None


def _split_of_the_job(load):
    """The rows are dealt as 45ef960 dealt them: by the job's seed and fold."""

    async def found(self, job, **asked):
        settings = asked["settings"]
        split = {name: settings[name] for name in ("seed", "fold", "folds")}
        return await load(self, job, **{**asked, "split": {"method": "folds", **split}})

    return found


def _too_many_rows(load):
    """A site with more rows than the cap says that it cannot take part, as 45ef960 did."""

    async def found(self, job, **asked):
        from fedcore_clients.trainer import TrainingFailed

        if asked["source"][2] > asked["settings"]["protect"]["max_examples"]:
            raise TrainingFailed("unable")
        return await load(self, job, **asked)

    return found


def trusting(contribute):
    """Whatever the model is like, the site trains on it."""

    async def found(self, job, plan, step, state, record):
        from fedcore.learning.guard import GuardRecord, GuardRules

        lenient = GuardRecord(GuardRules(loss_factor=1e300, rounds=1 << 30))
        lenient.memory = record.memory
        return await contribute(self, job, plan, step, state, lenient)

    return found


def _silent(open_sum):
    """What nobody foresaw in a sum ends the work without a word, as in 45ef960."""

    async def found(self, asked):
        from fedcore.errors import FedcoreError

        event = await open_sum(self, asked)
        foreseen = isinstance(getattr(event, "error", None), FedcoreError | None)
        return event if foreseen else None

    return found


RULES = {
    SETTINGS: [("fedcore.config", "settings_digest", lambda _: lambda *_: "0" * 64)],
    SPLIT: [("fedcore_clients.trainer", "Training.load_task", _split_of_the_job)],
    CAP: [("fedcore_clients.trainer", "Training.load_task", _too_many_rows)],
    GUARD: [("fedcore_clients.trainer", "Training.contribute", trusting)],
    POLICY: [("fedcore_clients.policy", "SitePolicy.on_offer", _nothing)],
    THRESHOLD: [
        ("fedcore.secagg.protocol.checks", "round_threshold", _nothing),
        (f"{ROUND}.events", "SiteParams.least", lambda _: lambda member: member.minimum),
    ],
    ONE_SUM: [(f"{ROUND}.between", "_check_one_sum", _nothing)],
    LEDGER: [(f"{MACHINE}.rounds", "RoundDriver.member", lambda _: lambda self: self.base_member)],
    CERTIFIED: [
        (ROUND, "check_missed", _nothing),
        (f"{ROUND}.between", "check_missed", _nothing),
        (f"{MACHINE}.states", "require_certified", _nothing),
        (
            f"{MACHINE}.states",
            "name_of",
            lambda _: lambda found: f"round {found.header.round}",
        ),
    ],
    IMPOSSIBLE: [("fedcore.learning.released", "check_possible", _nothing)],
    UNIFORM: [("fedcore_clients.job_work", "JobWork.open_sum", _silent)],
}
"""Name -> the functions that hold the rule, as (module, attribute, what makes another one of each)."""


@contextlib.contextmanager
def switched_off(folder, *rules):
    """These rules do not hold at the sites inside the `with`."""
    assert set(rules) <= set(RULES), rules
    path = Path(folder, OFF)
    path.write_text(json.dumps(rules))
    try:
        yield
    finally:
        path.unlink()


def is_off(folder, rule):
    """Whether a rule is switched off now."""
    path = Path(folder, OFF)
    return path.exists() and rule in json.loads(path.read_text())


def switches(folder, rules=tuple(RULES)):
    """Put a switch before each of these rules in this process."""
    for rule in rules:
        for module, name, without in RULES[rule]:
            *owners, last = name.split(".")
            owner = importlib.import_module(module)
            for each in owners:
                owner = getattr(owner, each)
            setattr(owner, last, _switched(folder, rule, getattr(owner, last), without))


def _switched(folder, rule, guarded, without):
    if isinstance(guarded, property):
        return property(_switched(folder, rule, guarded.fget, without))
    other = without(guarded)

    @functools.wraps(guarded)
    def found(*args, **kwargs):
        return (other if is_off(folder, rule) else guarded)(*args, **kwargs)

    return found


def install(folder):
    """Make each rule one that can be switched off; write down what no attacker has, to compare with."""
    from fedcore_clients.job_work import JobWork
    from fedcore_clients.round_work import RoundWork

    from fedcore.errors import ProtocolRefused
    from fedcore.secagg.protocol.job.site.release import CatchUp

    switches(folder)
    protect, catch_up, offered = RoundWork.protect, JobWork.catch_up, CatchUp.offered

    def protected(self, asked, found):
        row = {
            "job": asked.header.job, "site": self.site, "purpose": asked.header.purpose,
            "round": asked.header.training_round, "number": asked.header.round,
            "coordinates": [int(value) for value in found[0]],
            "wides": {name: list(map(int, values)) for name, values in found[1].items()},
        }  # fmt: skip
        add_row(folder, SENT, row)
        return protect(self, asked, found)

    async def caught_up(self, offered):
        try:
            return await catch_up(self, offered)
        finally:
            add_row(folder, CAUGHT, {"job": self.id, "site": self.context.id})

    def refused(self, offer):
        try:
            yield from offered(self, offer)
        except ProtocolRefused:
            add_row(folder, CAUGHT, {"job": offer.job, "site": self.rounds.base_member.id})
            raise

    RoundWork.protect, JobWork.catch_up, CatchUp.offered = protected, caught_up, refused


def collude(folder):
    """Give away the payload of each key epoch, and each state."""
    from fedcore.secagg.protocol.job.site.machine import SiteJob

    step = SiteJob.step

    def told(self, *event):
        found = step(self, *event)
        held = self.parts and self.parts.epochs.stage
        if hasattr(held, "payload"):
            Path(folder, f"key-{self.id}").write_bytes(held.payload.reveal())
        if self.state is not None:
            Path(folder, f"state-{self.id}").write_bytes(self.state.to_bytes())
        return found

    SiteJob.step = told


def lie(folder):
    """Put other integers into the vectors than the rows give."""
    from fedcore_clients.trainer import Training

    contribute = Training.contribute

    async def lied(self, job, plan, step, *more):
        fields, wides = await contribute(self, job, plan, step, *more)
        told = _told(folder).get(step.purpose, {})
        wides = {n: [told[n]] * len(v) if n in told else v for n, v in wides.items()}
        return fields, wides

    Training.contribute = lied


def _told(folder):
    path = Path(folder, LIES)
    return json.loads(path.read_text()) if path.exists() else {}


@contextlib.contextmanager
def lies(folder, **told):
    """Inside the `with` lying sites say this: purpose -> {wide integers' name: the value of each}."""
    path = Path(folder, LIES)
    path.write_text(json.dumps(told))
    try:
        yield
    finally:
        path.unlink()


def sent_by(folder, job, purpose, site):
    """What this site put into its vectors of this purpose, in order: the truth that attacks are held
    against, and what a colluding site tells."""
    rows = rows_of(folder, SENT, job)
    return [row for row in rows if (row["purpose"], row["site"]) == (purpose, site)]
