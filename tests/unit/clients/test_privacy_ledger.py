"""What is spent of the privacy of a site's rows: on disk before a vector is made, never more than the policy allows."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import sys
import threading
from dataclasses import replace

import pytest
from fedcore_clients.ledger import LEDGER_FILE, Ledger, read_spends
from fedcore_clients.privacy_limits import (
    PrivacyLimits,
    Spend,
    spend_lines,
    spends_json,
    total_epsilon,
)
from fedcore_clients.round_work import RoundWork
from support.deployed_jobs import SITES, loaded, site_job
from support.policies import begin, policy_of

from fedcore.config import PrivacySection, build_job, wire_settings
from fedcore.errors import BadInput, StoreProblem
from fedcore.secagg.crypto.identity_key import IdentityKey
from fedcore.secagg.plan import RoundHeader, canonical
from fedcore.secagg.privacy import accounting
from fedcore.secagg.privacy.accounting import epsilon_of_rounds
from fedcore.secagg.privacy.privacy_plan import PrivacyPlan
from fedcore.secagg.privacy.sampled import Round
from fedcore.secagg.protocol import job_messages
from fedcore.secagg.protocol.effects import MakeVector
from fedcore.secagg.protocol.job.site.events import MessageReceived, VectorReady, WorkFailed

ROWS, MORE = "a" * 64, "b" * 64
IDENTITY = IdentityKey()


def settings(**changes):
    return wire_settings(
        build_job(
            {"max_examples": 64, "rounds": 4, "epsilon": 3, "protection": "masked", **changes}
        )
    )


def spend(name="h1", rows=ROWS, job="j1", mu2=0.01, unit="record", rate=1.0):
    return Spend(name, rows, job, 1, mu2, unit, 2e9, rate)


@pytest.fixture
def ledger(tmp_path):
    with Ledger.open(tmp_path, IDENTITY) as opened:
        yield opened


# ------------------------------------------------------------------------------------- on disk


def test_spends_of_one_vector_count_once_and_those_of_rows_add_up(tmp_path, ledger):
    for each in (spend(), spend(), spend("h2", job="j2"), spend("h3", rows=MORE)):
        ledger.spend(each)
    assert ledger.spends(ROWS) == [spend(), spend("h2", job="j2")]
    assert read_spends(tmp_path) == [spend(), spend("h2", job="j2"), spend("h3", rows=MORE)]
    one, two = total_epsilon([spend()], 1e-5), total_epsilon(ledger.spends(ROWS), 1e-5)
    assert one < two < 2 * one
    assert two == pytest.approx(total_epsilon([spend(mu2=0.02)], 1e-5))


def test_a_ledger_that_was_cut_anywhere_has_every_spend_that_returned(tmp_path):
    """Crash points: the file ends after any byte of the last line; that spend had not returned."""
    with Ledger.open(tmp_path, IDENTITY) as ledger:
        ledger.spend(spend())
        whole = (tmp_path / LEDGER_FILE).read_bytes()
        ledger.spend(spend("h2"))
    both = (tmp_path / LEDGER_FILE).read_bytes()
    for end in range(len(whole), len(both) + 1):
        (tmp_path / LEDGER_FILE).write_bytes(both[:end])
        with Ledger.open(tmp_path, IDENTITY) as found:
            assert len(found.spends(ROWS)) == (2 if end == len(both) else 1)


def test_spends_and_exposures_of_several_threads_are_all_on_disk(tmp_path, ledger):
    """A vector's spend is appended in the thread that makes it, beside the exposures of other jobs."""

    def record(number):
        for k in range(25):
            ledger.spend(spend(f"h{number} {k}"))

    threads = [threading.Thread(target=record, args=(number,)) for number in range(8)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert len(read_spends(tmp_path)) == 200


def test_a_damaged_spend_is_refused_and_never_forgotten(tmp_path, ledger):
    ledger.spend(spend())
    path = tmp_path / LEDGER_FILE
    path.write_bytes(path.read_bytes().replace(b'"mu2"', b'"mu3"'))
    with pytest.raises(StoreProblem, match="found line 1 damaged"):
        read_spends(tmp_path)


def killed(folder, after, draws):
    """Kill -9 a process that records spends and says so of each; (how many it said, how many are on disk)."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        try:
            os.close(reader)
            with Ledger.open(folder, IDENTITY) as ledger:
                number = len(ledger.spends(ROWS))
                while True:
                    ledger.spend(spend(f"h{number}"))
                    os.write(writer, b".")  # from here on a chunk may have left
                    number += 1
        finally:
            os._exit(1)
    os.close(writer)
    for _ in range(after):
        os.read(reader, 1)
    for _ in range(draws.randrange(2000)):  # anywhere between two spends, or within one
        pass
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    said = after
    while part := os.read(reader, 4096):
        said += len(part)
    os.close(reader)
    return said, len(read_spends(folder))


def never_under_counts(folder, kills):
    draws, told = random.Random(0), 0
    for _ in range(kills):
        said, on_disk = killed(folder, draws.randrange(1, 4), draws)
        told += said
        assert told <= on_disk <= told + kills, "at most one spend of each kill had not been told"


@pytest.mark.skipif(sys.platform == "win32", reason="fork and SIGKILL")
def test_ledger_never_under_counts_after_kill_9(tmp_path):
    never_under_counts(tmp_path, 15)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="fork and SIGKILL")
def test_ledger_never_under_counts_in_1000_kills(tmp_path):
    for number in range(50):
        never_under_counts(tmp_path / str(number), 20)


# --------------------------------------------------------------------------------- in a job


def at_work(folder, plan_first=True, **rules):
    """A site whose job has a plan; its contributor notes what the ledger held when it was asked."""
    found = site_job(folder, settings(), protections=("masked",), **rules)
    found.asked = []

    async def contribute(*_):
        found.asked.append(len(found.context.ledger.spends(found.job.part.rows)))

    found.contributor.contribute = contribute
    return found


async def planned(found):
    await begin(found)
    plan = found.job.me.planner.plan(found.offer, found.job.part.survey)
    await found.handle(MessageReceived(job_messages.PlanOffer("job", canonical(plan.to_json()))))
    return found


async def vector(found, number=1):
    plan = found.job.parts.agreed.plan
    header = RoundHeader(
        "town", "job", 1, number, number, "update", SITES, "", 3, "masked", plan.digest
    )

    class Work(RoundWork):
        def without_isolating_metrics(self, found, header):
            return found

        def protect(self, asked, found):
            return [b"chunk"], b"", {}

    found.work.round_work = lambda: Work("a", found.job.parts.agreed, None, None)
    found.job.parts.rounds.announced = found.context.clock()
    return await found.work.make_vector(MakeVector(header, SITES, b""))


def test_spend_is_on_disk_before_the_rows_are_trained_on(tmp_path):
    found = at_work(tmp_path)

    async def play():
        await planned(found)
        return [await vector(found, number) for number in (1, 2, 2)]

    events = asyncio.run(play())
    assert all(isinstance(each, VectorReady) for each in events), events
    assert found.asked == [1, 2, 2]  # a vector that is made again is the same round's
    z = found.job.parts.agreed.plan.privacy.noise_multiplier
    assert [each.mu2 for each in read_spends(tmp_path)] == [1 / z**2] * 2


def test_job_that_would_overspend_is_refused_before_it_trains(tmp_path, caplog):
    found = at_work(tmp_path, lifetime_epsilon=3.5)
    rows = found.context.ledger.rows_key("0" * 64)
    found.context.ledger.spend(spend(rows=rows, mu2=0.2))
    asyncio.run(planned(found))
    assert found.asked == []
    assert "for the same rows" in caplog.text and "policy.lifetime_epsilon" in caplog.text
    assert job_messages.SiteUnavailable("job", "a", "policy") in found.link.said


def test_job_within_the_budget_is_not_refused(tmp_path, caplog):
    found = at_work(tmp_path, lifetime_epsilon=3.5)
    rows = found.context.ledger.rows_key("0" * 64)
    found.context.ledger.spend(spend(rows=rows, mu2=0.001))
    asyncio.run(planned(found))
    assert found.job.part.refused is None, caplog.text


def test_what_another_job_spent_meanwhile_stops_the_next_vector(tmp_path):
    found = at_work(tmp_path, lifetime_epsilon=3.5)

    async def play():
        await planned(found)
        first = await vector(found, 1)
        found.context.ledger.spend(spend(rows=found.job.part.rows, job="j2", mu2=0.5))
        return first, await vector(found, 2)

    first, second = asyncio.run(play())
    assert isinstance(first, VectorReady)
    assert isinstance(second, WorkFailed)
    assert found.asked == [1], "nothing was trained for it"
    assert len(read_spends(tmp_path)) == 2, "and nothing spent"


def test_job_that_began_is_not_refused_for_what_it_spent_itself(tmp_path):
    """Its own rounds are not counted twice when it goes on in a new process."""
    policy, plan = (
        policy_of(4, lifetime_epsilon=3.0),
        PrivacyPlan.asked(PrivacySection(epsilon=3)).calibrated(4),
    )
    own = [spend(f"h{k}", mu2=1 / plan.noise_multiplier**2) for k in range(2)]
    assert policy.on_spend(plan, 2, own) is None
    assert policy.on_spend(plan, 3, own) is not None


# --------------------------------------------------------------------------------- the policy


@pytest.mark.parametrize("key", ["most_epsilon", "lifetime_epsilon"])
def test_job_above_the_floor_of_a_policy_or_without_privacy_is_refused(key):
    policy = policy_of(4, **{key: 2.0})
    for changes, found in (({"epsilon": 3}, "3"), ({"epsilon": None}, "none")):
        offer = job_messages.JobOffer("job", "bench", "0" * 64, canonical(settings(**changes)))
        refused = policy.on_offer(offer)
        assert f"privacy.epsilon: found {found}" in str(refused).replace("'", "")
        assert f"policy.{key}" in str(refused)
    offer = job_messages.JobOffer("job", "bench", "0" * 64, canonical(settings(epsilon=2)))
    assert policy.on_offer(offer) is None


@pytest.mark.parametrize("judged", [False, True])
def test_metrics_of_a_job_are_spent_once_and_not_planned_again(judged):
    """All its vectors together are what its plan states, and after each the policy still has room for the rest."""
    section = PrivacySection(epsilon=3, metric_share=0.3)
    plan = PrivacyPlan.asked(section).calibrated(4, judged=judged)
    policy, spent = policy_of(4, lifetime_epsilon=3.0), []
    header = RoundHeader("f", "job", 1, 1, 1, "update", ("a", "b"), "", 2, "masked", "d" * 64)
    for number in range(1, 6):
        trains, left = number <= 4, 4 - min(4, number - 1)
        releases = plan.metric_releases - (number - 1 if judged else 0)
        assert policy.on_spend(plan, left, spent, releases) is None
        if number < 5:
            assert policy.on_spend(plan, left + 1, spent, releases) is not None
        spent.append(Spend.of(replace(header, round=number), ROWS, plan, trains=trains))
    assert total_epsilon(spent, plan.accounted_delta) == pytest.approx(plan.spent(4))


def test_jobs_of_another_unit_are_not_added_up():
    policy = policy_of(4, lifetime_epsilon=8.0)
    plan = PrivacyPlan.asked(PrivacySection(epsilon=1)).calibrated(4)
    assert policy.on_spend(plan, 4, [spend()]) is None
    assert "privacy.unit" in str(policy.on_spend(plan, 4, [spend(unit="column")]))


def test_rounds_over_secret_samples_and_over_all_rows_are_accounted_together():
    whole, sampled = spend(mu2=1.0), [spend(f"h{k}", mu2=1.0, rate=0.1) for k in range(20)]
    both = total_epsilon([whole, *sampled], 1e-5)
    assert total_epsilon([whole], 1e-5) < both < total_epsilon([whole] * 21, 1e-5) / 3
    assert both == epsilon_of_rounds({Round(1.0): 1, Round(1.0, 0.1): 20}, 1e-5)
    plan = PrivacyPlan.asked(PrivacySection(epsilon=1, sample_rate=0.1)).calibrated(4)
    policy = policy_of(4, lifetime_epsilon=round(both, 2))
    assert policy.on_spend(plan, 4, [whole, *sampled]) is not None
    assert policy.on_spend(plan, 4, [whole]) is None


def test_a_ledger_of_before_there_were_samples_is_read(tmp_path, ledger):
    ledger.spend(spend())
    path = tmp_path / LEDGER_FILE
    path.write_bytes(path.read_bytes().replace(b', "sample_rate": 1.0', b""))
    assert b"sample_rate" not in path.read_bytes()
    assert read_spends(tmp_path) == [spend()]


def test_lines_name_rows_jobs_and_what_is_left():
    found = [spend(), spend("h2"), spend("h3", job="j2", rate=0.5)]
    limits = PrivacyLimits(lifetime_epsilon=5)
    lines = list(spend_lines(found, limits))
    total = total_epsilon(found, 1e-5)
    assert lines[0] == (
        f"rows aaaaaaaaaaaaaaaa: epsilon {total:.4g} at delta 1e-05, {5 - total:.4g} left of 5"
    )
    assert lines[1].startswith("  job j1: 2 vectors, epsilon ")
    assert "unit record, noise multiplier 10, the last at 2033" in lines[1]
    assert lines[2].startswith("  job j2: 1 vectors")
    assert "each over a secret sample of 0.5" in lines[2]
    assert lines[3:] == [
        "most_epsilon: none, no limit for one job",
        "lifetime_epsilon: 5 for all jobs over the same rows",
    ]
    assert spends_json(found, limits)["left"] == {ROWS: 5 - total}
    assert (
        next(spend_lines([], PrivacyLimits()))
        == "no job with privacy had a vector of this site's rows"
    )


# ------------------------------------------------------------------------- an offer's CPU time


def test_offer_is_judged_before_its_noise_is_accounted_for(tmp_path):
    """A submitter chooses these settings: seconds of accounting before any bound is checked would be theirs to burn."""
    extreme = settings(epsilon=0.01, delta=1e-10, sample_rate=0.001)
    extreme["round"]["rounds"] = 1_000_000
    offer = job_messages.JobOffer("job", "bench", "0" * 64, canonical(extreme))
    before = accounting.noise_multiplier.cache_info().misses
    assert "round.rounds" in str(policy_of(4).on_offer(offer))
    assert policy_of(4, most_rounds=10**6).on_offer(offer) is None
    found = loaded(tmp_path, extreme)
    assert "round.rounds" in found.job.part.last_error
    assert accounting.noise_multiplier.cache_info().misses == before


@pytest.mark.parametrize(("key", "value"), [("epsilon", 1e-9), ("sample_rate", 1e-9)])
def test_offer_whose_accounting_would_take_long_is_refused(key, value):
    asked = settings(epsilon=1)
    asked["privacy"][key] = value
    offer = job_messages.JobOffer("job", "bench", "0" * 64, canonical(asked))
    with pytest.raises(
        BadInput, match=f"privacy.{key}: found 1e-09"
    ):  # the site's machine refuses it then
        policy_of(4).on_offer(offer)
