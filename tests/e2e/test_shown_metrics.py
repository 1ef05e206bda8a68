"""Public metrics over real processes: what operators see is what each site wrote down and `simulate` found,
and without the setting no byte of a metric leaves a site.

The coordinator's process writes down every frame that it receives and sends. Below that, jobs as they are
deployed but in one process: what a site says when, and what becomes of it where processes end or hang.
"""

from __future__ import annotations

import asyncio
import json
import struct
import types
from dataclasses import replace

import grpc
import pytest
from deployment import HUB, SMALL, deployment, small_task
from fedcore_clients.bench_sites import ROWS
from fedcore_server.operators import write_report
from support.reports import no_reports
from test_patients import RECORDER
from town import SITES, scene

from fedcore import simulate
from fedcore.errors import StoreFull
from fedcore.results import SiteRow
from fedcore.secagg.plan import canonical
from fedcore.secagg.protocol.job.coordinator.facts import Limits
from fedcore.secagg.protocol.job_messages import JobOffer, PublicMetrics
from fedcore.secagg.protocol.messages import Certificate
from fedcore.secagg.protocol.round import coordinator
from fedcore.wire import calls, frames

REFERENCE = {"metric": "auc", "value": 0.95, "source": "a registry"}
TASK = SMALL.replace('metrics=("accuracy",)', 'metrics=("auc", "accuracy")').replace(
    "x[:, 0] + 0.5 * x[:, 1]",
    "x[:, 0] + random.normal(size=40)",  # so that sites differ
)
SETTINGS = {"rounds": 3, "lr": 2.0}
ROUNDS = SETTINGS["rounds"]


@pytest.fixture(scope="module")
def fed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("metrics")
    (folder / "frames").touch()
    with deployment(
        folder, small_task(folder, TASK), {"a": 1, "b": 2, "c": 3}, patches={HUB: RECORDER},
        env={"FRAMES": str(folder / "frames")}, policy={"public_metrics": True},
    ) as found:  # fmt: skip
        found.wire = folder / "frames"
        found.connected()
        yield found


def ran(fed, **settings):
    """(job, its events, the frames of it, each site's own record)."""
    begun = fed.wire.stat().st_size
    job = fed.submit(reference=REFERENCE, **SETTINGS, **settings)
    events = fed.wait(job)
    assert events[-1]["state"] == "finished", (events[-1], fed.log(HUB)[-2000:])
    fed.released(job)
    rows = {}
    for name in fed.sites:
        text = (fed.state(name) / "jobs" / job / "rounds.jsonl").read_text()
        rows[name] = [json.loads(line) for line in text.splitlines()]
        assert len(rows[name]) == ROUNDS + 1, rows[name]
    return job, events, fed.wire.read_bytes()[begun:], rows


def forms(value):
    """A value as bytes, in the ways it may travel; as text where it is long enough to be no accident."""
    text = repr(value).encode()
    return {struct.pack(">d", value), struct.pack("<d", value), *([text] if len(text) > 9 else [])}


def found_in(wire, values):
    """Those of the values that are in the frames in some form."""
    return [value for value in values if any(form in wire for form in forms(value))]


def own_values(rows):
    """Every value of a site's record that is about this site alone, but those that mean nothing."""
    parts = [row[part] for row in rows for part in ("here", "alone", "gained")]
    return {value for part in parts for value in part.values()} - {0.0, 0.5, 1.0, None}


def test_operators_see_what_the_sites_wrote_and_simulate_found(fed, tmp_path):
    job, events, wire, rows = ran(fed, public_metrics=True)
    shown = [row for event in events for row in event["new_metrics"]]
    assert [row["round"] for row in shown] == list(range(ROUNDS + 1)), "each once, the last one too"
    for name, own in rows.items():
        assert [row["metrics"] for row in shown] == [row["everywhere_before"] for row in own], name
        assert [row["reference"] for row in shown] == [row["reference"] for row in own]
    with no_reports():
        run = simulate(
            fed.task, fed.sites, **SETTINGS, seed=0, resamples=0, max_examples=64,
            arms=("federated",), out=tmp_path / "run", public_metrics=True,
        )  # fmt: skip
    assert shown[-1]["metrics"] == run.result["protected_metrics"]
    assert shown[-1]["reference"]["gap"] == 0.95 - run.result["protected_metrics"]["auc"]
    assert "It learns the metrics of each release" in run.result["label"]
    assert set(shown[-1]["metrics"]) == {"auc", "accuracy"} and shown[-1]["sites"] == 3

    # The search that finds nothing below finds them here, and nothing of one site is among them.
    assert b"PublicMetrics" in wire
    said = {value for row in shown for value in row["metrics"].values()}
    assert set(found_in(wire, said)) == said
    values = {value for own in rows.values() for value in own_values(own)} - said
    assert len(values) > 5
    assert not found_in(wire, values)

    fed.result(job, tmp_path / "out", fed.kit("observer", "obs"))
    lines = (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == shown
    assert f"metrics after round {ROUNDS}: auc " in write_report(tmp_path / "out").read_text()


def test_without_the_setting_no_byte_of_a_metric_leaves(fed):
    job, events, wire, rows = ran(fed)
    assert events[-1]["public_metrics"] is False and events[-1]["metrics"] is None
    assert not any(event["new_metrics"] for event in events)
    assert wire.count(b"AtRest") > 4, "the recorder saw what the sites said"
    assert b"PublicMetric" not in wire
    everywhere = {value for row in rows["a"] for value in row["everywhere_before"].values()}
    values = everywhere | {value for own in rows.values() for value in own_values(own)}
    assert len(everywhere) > 3 and len(values) > 8
    assert not found_in(wire, values)
    folder = fed.state(HUB) / "jobs" / job
    assert sorted(path.name for path in folder.iterdir()) == ["job.toml", "rounds.jsonl"]


def test_public_metrics_under_encrypted_are_refused_by_the_coordinator_too(fed):
    """`submit` builds the job first; whoever calls without it is refused all the same."""
    settings = fed.prepared_settings(protection="encrypted", **SETTINGS)
    settings["track"]["public_metrics"] = True
    about = json.dumps({"settings": settings}).encode()
    task = fed._prepare({}).plan.task_digest
    with pytest.raises(grpc.RpcError) as refused:
        fed.ask(calls.SUBMIT, frames.SubmitRequest(b"# a job\n", "small", task, about))
    assert refused.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert "track.public_metrics: found true under 'encrypted'" in refused.value.details()


# ------------------------------------------------------------------------- jobs in one process


PATIENT = Limits(stage=600.0, gather=600.0, minimum=3, grace=600.0)
"""No deadline can be what ended a wait: each is longer than the whole test."""


def spoken(found):
    """What every site of a town says publicly from now on, with the certificate it has then:
    [(site, record, certificate, state)]."""
    said = []

    def passing(sender, receiver, message):
        if isinstance(message, PublicMetrics):
            site = found.sites[sender].job
            said.append((sender, message, site.stage.standing.certificate, site.state))
        return message

    found.passing = passing
    return said


def public(found, *, hang=()):
    """Make a town's job public; sites in `hang` never come to an end with their record."""
    found.settings["track"]["public_metrics"] = True
    found.rules = {"public_metrics": True}
    found.offer = JobOffer("job", "bench", "0" * 64, canonical(found.settings))

    def start(name):
        found.start(name)
        contributor = found.sites[name].contributor

        async def track(_, job, plan, asked, kept):
            if name in hang:
                await asyncio.sleep(3600)
            before = {
                ROWS.name: sum(asked.wides[ROWS.name]) / asked.sites / asked.step.training_round
            }
            return SiteRow(
                round=asked.step.training_round,
                purpose=asked.step.purpose,
                sites=asked.sites,
                everywhere_before=before,
            )

        contributor.track = types.MethodType(track, contributor)

    return start


def shown(found):
    return [(row["round"], row["metrics"][ROWS.name]) for row in found.hub.facts.metrics.known]


def test_a_site_speaks_of_certified_releases_only_and_once(tmp_path, pool):
    said = []

    async def play(found):
        said.append(spoken(found))
        start = public(found)
        found.start_hub()
        for name in SITES:
            start(name)
        await found.run(until=lambda: len(shown(found)) == 1)
        await found.kill(HUB)
        found.start_hub()  # the sites say the last one again: no second row of it
        await found.run()
        await found.check()
        numbers = [row["number"] for row in found.hub.facts.metrics.known]
        assert len(numbers) == len(set(numbers)) and shown(found)[-1] == (3, 0.25)
        assert set(shown(found)) <= {(0, 1.0), (1, 0.5), (2, 1 / 3), (3, 0.25)}
        lines = (found.folder / HUB / "jobs" / "job" / "metrics.jsonl").read_text().splitlines()
        assert [json.loads(line) for line in lines] == [
            row.to_json() for row in found.hub.facts.metrics.known
        ]

    scene(tmp_path, pool, play, protection="layered", rounds=3, limits=PATIENT)
    (words,), certified = said, {}
    assert len(words) >= 16
    for name, message, standing, state in words:
        certified.setdefault(message.round, message.certificate)
        assert message.certificate == certified[message.round]
        assert standing and state.done is not None, f"{name} stood at a certified release"


@pytest.mark.parametrize("thinned", [True, False], ids=["too few signatures", "control"])
def test_a_coordinator_without_a_certificate_hears_nothing(tmp_path, pool, thinned):
    """Attack: a coordinator that wants the metrics of a release that fewer than t sites signed."""
    words = []

    def lie(sender, receiver, message):
        if isinstance(message, PublicMetrics):
            words.append(message)
        if thinned and isinstance(message, Certificate):
            return replace(message, signatures=message.signatures[:2])
        return message

    async def play(found):
        found.passing = lie
        start = public(found)
        found.start_hub()
        for name in SITES:
            start(name)
        await found.run(until=lambda: len(found.hub.facts.rounds.known) >= 1)
        await asyncio.sleep(0.3)
        assert [bool(s.job.stage.standing.certificate) for s in found.sites.values()] == [
            not thinned
        ] * 4

    scene(tmp_path, pool, play, rounds=2, limits=PATIENT)
    assert bool(words) is not thinned


def test_a_record_that_never_ends_keeps_no_round_and_no_value_back(tmp_path, pool):
    async def play(found):
        start = public(found, hang="d")
        found.start_hub()
        for name in SITES:
            start(name)
        await found.run(until=lambda: found.hub.facts.outcome is not None)
        assert [row["survivors"] for row in found.rounds()] == [list(SITES)] * 3
        assert shown(found) == [(0, 1.0), (1, 0.5), (2, 1 / 3)]

    scene(tmp_path, pool, play, limits=PATIENT)


def test_what_too_few_sites_say_is_not_shown_and_not_waited_for_long(tmp_path, pool):
    async def play(found):
        start = public(found, hang="cd")
        found.start_hub()
        for name in SITES:
            start(name)
        await found.run(until=lambda: found.hub.facts.outcome is not None)
        assert found.hub.facts.outcome.outcome == "finished" and shown(found) == []

    scene(tmp_path, pool, play, limits=replace(PATIENT, gather=0.5))


def test_a_full_disk_at_the_end_of_a_round_costs_none_of_its_metrics(tmp_path, pool):
    """The release is proved and cannot be written: read again from the disk, the round ends, and the sites'
    words on it count as in any other."""

    async def play(found):
        start = public(found)
        found.start_hub()
        full, discard = [], found.hub.context.spool.discard

        def no_room(*about):
            if isinstance(found.hub.facts.stage, coordinator.Released) and not full:
                full.append(True)
                raise StoreFull("spool: found no room")
            discard(*about)

        found.hub.context.spool.discard = no_room
        for name in SITES:
            start(name)
        await found.run(until=lambda: found.hub.facts.outcome is not None, seconds=60)
        assert found.hub.facts.outcome.outcome == "finished", found.hub.facts.outcome
        assert full and shown(found) == [(0, 1.0), (1, 0.5), (2, 1 / 3)]

    scene(tmp_path, pool, play, limits=PATIENT)
