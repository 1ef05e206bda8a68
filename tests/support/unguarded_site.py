"""A site with one rule switched off, or one that colludes: the real `fed-site run`, patched as it starts.

    patches = {"a": unguarded(folder)}       # Python that the process runs before its command
    with switched_off(folder, "one sum a state"):
        ...                                  # here the attack succeeds: the positive control

A rule is looked up each time it would be applied, so one process shows both: the attack with the rule, and
without it. Nothing of the product reads these files; they exist for tests alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import importlib
import json
from pathlib import Path

from support.hostile_coordinator import CAUGHT, TESTS, add_row, rows_of

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
POLICY = "the policy of the site"
THRESHOLD = "the threshold of a round is the plan's"

IMPOSSIBLE = "a sum that no honest vectors have is refused"
UNIFORM = "whatever a sum raises is the one refusal"

RULES = {
    SETTINGS: [("fedcore.config", "settings_digest", lambda *_: "0" * 64)],
    POLICY: [("fedcore_clients.policy", "SitePolicy.on_offer", lambda *_: None)],
    THRESHOLD: [
        ("fedcore.protocol.site", "check_round_threshold", lambda *_: None),
        ("fedcore.protocol.site", "Member.least", lambda member: member.minimum),
    ],
    IMPOSSIBLE: [
        (f"fedcore.aggregate.{module}", "check_possible", lambda *_: None)
        for module in ("jobstate", "released")
    ],
    UNIFORM: [("fedcore_clients.jobs", "SiteJob._opened", None)],
}
"""Name -> the functions that hold the rule (module, attribute), and what stands in the place of each."""


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

    without = without or _silent(guarded)

    @functools.wraps(guarded)
    def found(*args, **kwargs):
        return (without if is_off(folder, rule) else guarded)(*args, **kwargs)

    return found


def _silent(guarded):
    """The same, but what nobody foresaw ends the work without a word, as 45ef960 did."""

    def found(*args):
        from fedcore.errors import FedcoreError

        try:
            return guarded(*args)
        except FedcoreError:
            raise
        except Exception as error:
            raise asyncio.CancelledError from error

    return found


def install(folder):
    """Make each rule one that can be switched off; write down what no attacker has, to compare with."""
    from fedcore_clients.jobs import SiteJob

    switches(folder)
    protect, catch_up = SiteJob._protect, SiteJob._catch_up

    def protected(self, asked, found):
        row = {
            "job": self.id, "site": self.party.id, "purpose": asked.header.purpose,
            "round": asked.header.training_round, "number": asked.header.round,
            "coordinates": [int(value) for value in found[0]],
            "wides": {name: list(map(int, values)) for name, values in found[1].items()},
        }  # fmt: skip
        add_row(folder, SENT, row)
        return protect(self, asked, found)

    async def caught_up(self, offered):
        try:
            await catch_up(self, offered)
        finally:
            add_row(folder, CAUGHT, {"job": self.id, "site": self.party.id})

    SiteJob._protect, SiteJob._catch_up = protected, caught_up


def collude(folder):
    """Give away the payload of each key epoch."""
    from fedcore_clients.jobs import SiteJob

    use = SiteJob._use

    def given_away(self, payload, maker):
        Path(folder, f"key-{self.id}").write_bytes(payload.reveal())
        use(self, payload, maker)

    SiteJob._use = given_away


def lie(folder):
    """Put other integers into the vectors than the rows give."""
    from fedcore_clients.training import Training

    contribute = Training.contribute

    async def lied(self, job, plan, step, state):
        fields, wides = await contribute(self, job, plan, step, state)
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
