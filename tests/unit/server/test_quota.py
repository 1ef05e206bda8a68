"""What an operator may submit: each limit is one line with its key, and one less is taken."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
from fedcore_server.config import LimitsSection
from fedcore_server.context import CoordinatorContext
from fedcore_server.coordinator import Coordinator
from fedcore_server.operators import wire_settings
from fedcore_server.operators_api import OperatorsApi

from fedcore.config import build_job
from fedcore.errors import PlanRefused
from fedcore.identity.roster import PinnedRoster, RosterFile
from fedcore.secagg.crypto.identity_key import IdentityKey
from fedcore.secagg.protocol import job_messages
from fedcore.secagg.protocol.job.coordinator.facts import Limits
from fedcore.store.journal import Journal
from fedcore.store.spool import Spool
from fedcore.wire import frames

QUOTA = LimitsSection(most_rounds=50, most_epochs=4, most_batch=64, most_queued=3, most_kept=5)


@pytest.fixture
def journal(tmp_path):
    with Journal.open(tmp_path / "journal.sqlite", party="hub") as found:
        yield found


@pytest.fixture
def hub(tmp_path, journal):
    pins = {name: IdentityKey().public for name in "abcd"}
    spool = Spool(tmp_path / "spool")
    return Coordinator(
        CoordinatorContext(
            "town", RosterFile(PinnedRoster(pins)), journal, spool, None, tmp_path, Limits(), QUOTA
        ),
        gate=None,
    )


def submit(hub, operator="op", **settings):
    complete = build_job({"max_examples": 16, "rounds": 2, "batch_size": 8, **settings})
    about = json.dumps({"settings": wire_settings(complete)}).encode()
    asked = frames.SubmitRequest(b"# job\n", "t", "0" * 64, about)
    peer = SimpleNamespace(name=operator, fingerprint="f0", serial="1")
    return asyncio.run(OperatorsApi(hub).submit(peer, asked)).job


def end(hub, name):
    hub.jobs[name].facts.outcome = job_messages.JobEnded(name, "finished", "", "")


@pytest.mark.parametrize(
    ("key", "most", "line"),
    [
        ("rounds", 50, "round.rounds: found 51, expected at most 50"),
        ("epochs", 4, "train.epochs: found 5, expected at most 4"),
        ("batch_size", 64, "train.batch_size: found 65, expected at most 64"),
    ],
)
def test_a_job_larger_than_the_quota_is_refused(hub, key, most, line):
    with pytest.raises(PlanRefused) as refused:
        submit(hub, **{key: most + 1})
    assert str(refused.value) == line
    assert "federation.toml" in refused.value.remedy
    assert not hub.jobs
    submit(hub, **{key: most})


def test_a_billion_rounds_are_refused_by_default(hub):
    hub.context = replace(hub.context, quota=LimitsSection())
    with pytest.raises(PlanRefused, match="expected at most 10000"):
        submit(hub, rounds=10**9)


def test_so_many_jobs_wait_and_not_more(hub):
    names = [submit(hub) for _ in range(3)]
    with pytest.raises(PlanRefused, match="found 3 jobs that are not over, expected fewer than 3"):
        submit(hub)
    end(hub, names[0])
    submit(hub)


def test_so_many_jobs_are_kept_of_one_operator_also_after_a_restart(hub, journal):
    for _ in range(5):
        end(hub, submit(hub))
    again = Coordinator(hub.context, gate=None)
    for found in again.jobs.values():
        end(again, found.id)
    for each in (hub, again):
        with pytest.raises(PlanRefused, match="found 5 jobs of operator 'op' kept here"):
            submit(each)
        end(each, submit(each, operator="other"))
