"""Whole rounds through both machines: the exact sum of the survivors, or the abandonment that counting
predicts, and never anything else (the counting is `absences.outcome`)."""

from __future__ import annotations

import random
from importlib.util import find_spec

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.parties import Parties, net, plan_of, recoded

from fedcore.errors import RoundAbandoned
from fedcore.learning.stopwatch import Stopwatch
from fedcore.secagg import in_process
from fedcore.secagg.crypto.entropy import OsEntropy
from fedcore.secagg.crypto.hybrid import HybridKey
from fedcore.secagg.crypto.pairwise import MaskRoot
from fedcore.secagg.in_process import InProcessFederation
from fedcore.secagg.plan import VectorSpec, Wide
from fedcore.secagg.protections import Protection
from fedcore.secagg.protocol import messages
from fedcore.secagg.protocol.absences import ABANDONED_AT, STAGES, outcome
from fedcore.secagg.protocol.round import site
from fedcore.secagg.protocol.round.site import Secrets
from fedcore.secagg.protocol.wire_form import decode, encode
from fedcore.secagg.summing import one_by_one

SPEC = VectorSpec("update", 6, (Wide("weight", 1, 20),))
NEEDS_BFV = pytest.mark.skipif(not find_spec("tenseal"), reason="needs tenseal")


def counted_by_hand(plan, absences):
    """The survivors, or the abandonment, that `absences.outcome` counts."""
    try:
        return outcome(plan.sites, plan.threshold, absences)
    except RoundAbandoned as error:
        return error


class Job:
    """Rounds of one key epoch whose vectors and states are drawn from a seed."""

    def __init__(self, n, threshold, protection, seed):
        self.plan = plan_of(n, threshold, protection)
        self.epoch = InProcessFederation("job", self.plan)
        self.draw = random.Random(seed)
        self.state, self.made, self.number = b"first", set(), 0

    def round(self, absences):
        """The sum, beside the plain integer sum over those whom counting leaves."""
        vectors = [[self.draw.randrange(1 << 16) for _ in range(6)] for _ in self.plan.sites]
        weights = [self.draw.randrange(1 << 20) for _ in self.plan.sites]
        self.made, self.number = set(), self.number + 1

        def contribute(index):
            assert index not in self.made, "one vector a round"
            self.made.add(index)
            return np.array(vectors[index], dtype=np.uint64), {"weight": [weights[index]]}

        led = []

        def lead(opened, survivors):
            led.append(repr((opened.coordinates.tolist(), survivors)).encode())
            return led[-1]

        total = self.epoch.sum(
            SPEC, self.number, one_by_one(contribute), self.state, Stopwatch(),
            lead=lead, absences=absences,
        )  # fmt: skip
        self.state = led[0]
        indices = total.survivors
        sums = [sum(vectors[k][place] for k in indices) for place in range(6)]
        for opened in (total.opened, total.twin):
            assert opened.coordinates.tolist() == sums
            assert opened.wides == {"weight": [sum(weights[k] for k in indices)]}
        assert self.made == set(indices)
        return [self.plan.sites[k] for k in indices]

    def check(self, absences):
        """What counting says about these absences is what the round does; returns whether it ended well.

        Under `encrypted` nothing is sent before the vector.
        """
        counted = absences
        if not self.plan.layers.masks:
            counted = {
                name: "submit" if STAGES.index(stage) <= STAGES.index("submit") else stage
                for name, stage in absences.items()
            }
        expected = counted_by_hand(self.plan, counted)
        if isinstance(expected, RoundAbandoned):
            counts = expected
            before = self.epoch.certificate
            with pytest.raises(RoundAbandoned) as found:
                self.round(absences)
            error = found.value
            assert (error.stage, error.left, error.threshold) == (
                counts.stage, counts.left, counts.threshold,
            )  # fmt: skip
            assert self.epoch.certificate is before
            return False
        assert self.round(absences) == list(expected)
        return True

    def numbers(self):
        return [shell.stage.standing.round for shell in self.epoch.shells.values()]


@st.composite
def jobs(draw, most):
    n = draw(st.integers(3, most))
    threshold = draw(st.integers(n // 2 + 1, n))
    rounds = []
    for _ in range(2):
        names = draw(
            st.sets(st.integers(0, n - 1), max_size=draw(st.integers(0, n - threshold + 1)))
        )
        stages = {f"s{k:02d}": draw(st.sampled_from(STAGES)) for k in sorted(names)}
        rounds.append(stages)
    return n, threshold, rounds, draw(st.integers(0, 2**32))


def every_round_is_exact_or_abandoned_as_counted(protection, job):
    n, threshold, rounds, seed = job
    job = Job(n, threshold, protection, seed)
    numbers = job.numbers()
    for absences in rounds:
        job.check(absences)
        assert min(new - old for new, old in zip(job.numbers(), numbers, strict=True)) >= 0
        numbers = job.numbers()
    assert job.round({}) == list(job.plan.sites)  # everybody is back, whatever happened before
    assert set(job.numbers()) == {3}


@settings(max_examples=30)
@given(job=jobs(8))
def test_masked_rounds(job):
    every_round_is_exact_or_abandoned_as_counted("masked", job)


@NEEDS_BFV
@settings(max_examples=20)
@given(job=jobs(8))
def test_encrypted_rounds(job):
    every_round_is_exact_or_abandoned_as_counted("encrypted", job)


@NEEDS_BFV
@settings(max_examples=12)
@given(job=jobs(5))
def test_layered_rounds(job):
    every_round_is_exact_or_abandoned_as_counted("layered", job)


@pytest.mark.parametrize(("n", "threshold"), [(12, 9), (16, 11)])
def test_larger_cohorts_lose_as_many_as_they_may(n, threshold):
    job = Job(n, threshold, "masked", n)
    gone = random.Random(n).sample(job.plan.sites, n - threshold)
    stages = [STAGES[k % len(STAGES)] for k in range(len(gone))]
    assert job.check(dict(zip(gone, stages, strict=True)))


PROTECTIONS = ["masked", pytest.param("encrypted", marks=NEEDS_BFV)]


@pytest.mark.parametrize("protection", PROTECTIONS)
@pytest.mark.parametrize("stage", STAGES)
def test_one_absence_more_than_the_threshold_allows(protection, stage):
    """At every stage: exactly the threshold goes through; one fewer does not, or from `unmask` on the
    round waits for it, and then all are back."""
    job = Job(5, 4, protection, 1)
    assert job.check({"s01": stage})
    assert job.check({"s01": stage, "s04": stage}) == (stage not in ABANDONED_AT)
    assert job.round({}) == list(job.plan.sites)


@pytest.mark.parametrize("protection", PROTECTIONS)
def test_who_missed_the_release_catches_up_and_takes_part(protection):
    job = Job(4, 3, protection, 2)
    assert job.check({"s02": "release"})
    shell = job.epoch.shells["s02"]
    assert shell.stage.standing.certificate == job.epoch.certificate.hash
    assert job.round({}) == list(job.plan.sites)


def test_a_site_gone_after_it_confirmed_stays_in_the_sum_while_another_dropped():
    """Attack 5 of docs/threat-model.md: the pair seed of the two is found without either."""
    job = Job(5, 3, "masked", 3)
    assert job.round({"s01": "unmask", "s03": "submit"}) == ["s00", "s01", "s02", "s04"]
    assert job.round({"s03": "unmask", "s01": "submit"}) == ["s00", "s02", "s03", "s04"]


@pytest.mark.parametrize("protection", PROTECTIONS)
def test_rounds_are_the_same_through_the_messages_bytes(protection, stand_in):
    """Nothing rides beside the byte form of a message."""
    crossed = []

    def through_bytes(original):
        def deliver(self, *arguments):
            crossed.append(type(arguments[-1]))
            original(self, *arguments[:-1], recoded(arguments[-1]))

        return deliver

    for name in ("_to_site", "_to_hub"):
        original = getattr(in_process._Exchange, name)
        stand_in(in_process._Exchange, **{name: through_bytes(original)})
    job = Job(4, 3, protection, 4)
    assert job.check({"s01": "submit"}) and job.check({"s02": "release"}) and job.check({})
    heard = {*messages.SiteMessage.__args__, *messages.CoordinatorMessage.__args__}
    rare = {
        messages.Leave,
        messages.Abandon,
        messages.Notice,
        messages.NextKeys,
        messages.NextBundle,
    }
    masked = {messages.KeyBundle, messages.Delivery, messages.SurvivorList, messages.Confirmations}
    masked |= {messages.Keys, messages.Shares, messages.Confirm, messages.Unmask}
    assert set(crossed) == heard - rare - (set() if Protection.of(protection).masks else masked)


@settings(max_examples=40)
@given(
    n=st.integers(3, 6), seed=st.integers(0, 2**32),
    absences=st.dictionaries(st.integers(0, 5), st.sampled_from(STAGES), max_size=2),
)  # fmt: skip
def test_the_masks_that_are_rebuilt_are_those_that_are_left_in_the_sum(n, seed, absences):
    """Seed for seed, in any order of arrival: the survivors' masks less the removed ones are nothing."""
    parties = Parties(n)
    gone = {f"s{k:02d}": stage for k, stage in absences.items() if k < n}
    last = parties.play(random.Random(seed).randrange, **gone)
    survivors = counted_by_hand(parties.plan, gone)
    if isinstance(survivors, RoundAbandoned):
        counts = survivors
        assert (last.stage, last.left, last.exposed) == (counts.stage, counts.left, ())
        return
    assert last.certificate.survivors == survivors
    assert sorted(parties.folded) == sorted(survivors)
    left = net(parties.made[name] for name in survivors)
    assert left == net([parties.removed]) and len(left) >= len(survivors)


@pytest.mark.parametrize("protection", ["masked", "encrypted"])
def test_a_site_that_starts_from_another_state_is_named_and_never_summed(protection):
    parties = Parties(4, protection=protection)
    parties.tags["s02"] = b"another state".ljust(32)
    last = parties.play()
    # The coordinator can see it, in the keys or in the signed submission, and goes on without it.
    assert last.certificate.survivors == ("s00", "s01", "s03")
    assert parties.folded == ["s00", "s01", "s03"]
    assert not parties.refusals
    assert all(isinstance(parties.stages[name], site.Idle) for name in parties.sites)


def test_a_sites_keys_of_a_round_are_derived_once_and_are_in_no_record():
    channel, root = HybridKey.draw(OsEntropy()), MaskRoot(bytes(range(32)))
    made = Secrets.of(channel, root, b"s" * 32)
    assert made.keys[0] is channel and made.keys[1] is root
    read = decode(encode(made), Secrets)
    assert encode(read) == encode(made)
    assert read.keys is read.keys
    assert read.keys[0].public == channel.public and read.keys[1].keys.public == root.keys.public
