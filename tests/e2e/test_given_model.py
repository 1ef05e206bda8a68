"""A plan that gives the coordinator the last model: over real processes, and in one process with liars,
deaths and full disks. Without the setting, and before the last round, nobody gives anything.
"""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest
import torch
from deployment import HUB, deployment, small_task
from fedcore_clients.config import read_config
from fedcore_clients.job_work import JobWork
from fedcore_clients.status import export_model
from fedcore_clients.trainer import TrainingFailed
from fedcore_server.job_disk import MODEL_FILE
from fedcore_server.operators import write_report
from safetensors.torch import load_file
from test_patients import RECORDER
from town import PATIENT, SITES, scene

from fedcore.errors import StoreFull
from fedcore.learning.saved import load_model
from fedcore.learning.state import JobState
from fedcore.learning.task import load_task
from fedcore.secagg.plan import canonical
from fedcore.secagg.protocol import schedule
from fedcore.secagg.protocol.job.site.release import PublicRelease
from fedcore.secagg.protocol.job_messages import JobOffer, ModelMade, ModelWanted
from fedcore.secagg.protocol.messages import Announce
from fedcore.secagg.purposes import PURPOSES

# ---------------------------------------------------------------------------- real processes


@pytest.fixture(scope="module")
def fed(tmp_path_factory):
    """Sites a, b and c let a model go to the coordinator; d does not."""
    folder = tmp_path_factory.mktemp("given")
    (folder / "frames").touch()
    with deployment(
        folder, small_task(folder), start=[], patches={HUB: RECORDER},
        env={"FRAMES": str(folder / "frames")},
    ) as found:  # fmt: skip
        for name in ("a", "b", "c"):
            path = found.config(name)
            path.write_text(
                path.read_text().replace("[policy]", '[policy]\nrelease = "coordinator"')
            )
        for name in found.sites:
            found.start(name)
        found.connected()
        found.wire = folder / "frames"
        yield found


def test_the_operator_gets_the_model_that_the_sites_have(fed, tmp_path):
    job = fed.submit(rounds=2, release="coordinator")
    event = fed.wait(job)[-1]
    assert (event["state"], event["text"], event["model"]) == ("finished", "", True)
    assert event["sites"]["d"]["unable"] == "policy", "its operator lets no model go"
    assert "expected 'sites' by policy.release of site.toml" in fed.log("d")
    out = fed.result(job, tmp_path / "out")
    fed.released(job, sites=["a", "b", "c"])
    exported = tmp_path / "site" / "model.safetensors"
    exported.parent.mkdir()
    export_model(read_config(fed.config("b")), job, exported)
    given, own = load_file(out / "model.safetensors"), load_file(exported)
    assert given.keys() == own.keys()
    assert all(torch.equal(given[name], own[name]) for name in own)
    assert str(fed.folder).encode() not in (out / "model.safetensors").read_bytes()
    assert "the plan gives it to the coordinator" in write_report(out).read_text()

    task = load_task(fed.task, fed.folder)
    rows, _ = task.data(1)
    assert load_model(out, task).predict(rows).shape == (40,)


def test_without_the_setting_no_model_leaves(fed, tmp_path):
    begun = fed.wire.stat().st_size
    job = fed.submit(rounds=2)
    event = fed.wait(job)[-1]
    assert (event["state"], event["model"]) == ("finished", False)
    fed.released(job)
    assert b"AtRest" in fed.wire.read_bytes()[begun:], "the recorder saw what the sites said"
    assert b"ModelMade" not in fed.wire.read_bytes()[begun:]
    out = fed.result(job, tmp_path / "out")
    assert not (out / "model.safetensors").exists()
    assert "The model is at the sites" in write_report(out).read_text()


# ------------------------------------------------------------------------- jobs in one process


def giving(found, *, release="coordinator", lies=(), silent=(), failing=()):
    """Begin a town's job that gives its model, at sites that let it; returns what starts one anew.

    Sites in `lies` export other bytes, `silent` ones never upload theirs, and the training of those in
    `failing` fails after the first round.
    """
    found.settings["protect"]["release"] = release
    found.offer = JobOffer("job", "bench", "0" * 64, canonical(found.settings))

    def start(name):
        found.rules = {"release": "coordinator"}
        found.start(name)
        site = found.sites[name]
        own, contribute = site.contributor, site.contributor.contribute

        async def lie(job, state):
            return b"a lie of " + name.encode()

        async def give(asked):
            if not asked.digest:
                await JobWork.give_model(site.work, asked)

        async def once(job, plan, step, state, record):
            if step.training_round > 1:
                raise TrainingFailed("unable")
            return await contribute(job, plan, step, state, record)

        own.export = lie if name in lies else own.export
        own.contribute = once if name in failing else contribute
        if name in silent:
            site.work.give_model = give

    found.start_hub()
    for name in SITES:
        start(name)
    return start


def given(found):
    path = found.folder / HUB / "jobs" / "job" / MODEL_FILE
    return path.read_bytes() if path.exists() else None


async def check_given(found):
    """The file is what the plain sums of the listed survivors lead to."""
    expected = await found.expected()
    assert JobState.from_bytes(given(found)).canonical() == expected.canonical()
    await found.check()


@pytest.mark.parametrize("protection", ["masked", "layered"])
def test_it_is_what_the_rounds_led_to(tmp_path, pool, protection):
    async def play(found):
        giving(found)
        await found.run()
        assert (found.hub.facts.outcome.outcome, found.hub.facts.outcome.text) == ("finished", "")
        await check_given(found)

    scene(tmp_path, pool, play, protection=protection, limits=PATIENT)


@pytest.mark.parametrize("after", ["asked", "said", "uploaded"])
@pytest.mark.parametrize("who", [HUB, "a", "b"])
def test_whoever_dies_meanwhile_the_model_comes(tmp_path, pool, caplog, after, who):
    moments = set()

    def passing(sender, receiver, message):
        if isinstance(message, ModelWanted | ModelMade):
            moments.add("asked" if sender == HUB else "said")
        return message

    async def play(found):
        found.passing = passing
        start = giving(found)
        await found.run(
            until=lambda: after in moments or (after == "uploaded" and given(found) is not None)
        )
        await found.kill(who)
        if who == HUB:
            found.start_hub()
        else:
            start(who)
        await found.run()
        assert found.hub.facts.outcome.outcome == "finished"
        assert "a fault of this side" not in caplog.text
        assert "an internal error" not in caplog.text
        await check_given(found)

    scene(tmp_path, pool, play, limits=PATIENT)


def test_a_site_that_lies_is_outvoted_and_named(tmp_path, pool, caplog):
    async def play(found):
        said = asyncio.Event()  # it is named only if it speaks before enough others have

        def passing(sender, receiver, message):
            if sender == "a" and isinstance(message, ModelMade):
                said.set()
            return message

        def after_it(export):
            async def run(job, state):
                await said.wait()
                return await export(job, state)

            return run

        found.passing = passing
        giving(found, lies="a")
        for name in "bcd":
            own = found.sites[name].contributor
            own.export = after_it(own.export)
        await found.run()
        assert (found.hub.facts.outcome.outcome, found.hub.facts.outcome.text) == ("finished", "")
        await check_given(found)
        assert "sites differ over the model" in caplog.text

    scene(tmp_path, pool, play, limits=PATIENT)


def test_too_few_that_say_the_same_give_no_model(tmp_path, pool):
    async def play(found):
        giving(found, lies="ab")
        await found.run()
        assert found.hub.facts.outcome.outcome == "finished"
        assert (
            "without the model: too few sites report the same file" in found.hub.facts.outcome.text
        )
        assert given(found) is None and not found.hub.machine.model.here

    scene(tmp_path, pool, play, limits=replace(PATIENT, gather=0.5))


def test_another_site_is_asked_where_one_does_not_give_it(tmp_path, pool):
    async def play(found):
        giving(found, silent="ab")
        await found.run()
        await check_given(found)

    scene(tmp_path, pool, play, limits=replace(PATIENT, gather=0.3))


def test_an_operator_who_thinks_better_of_it_gives_none(tmp_path, pool, caplog):
    """Its site comes back in the middle of the job with a site.toml that lets no model go."""

    async def play(found):
        giving(found)
        await found.run(until=lambda: len(found.hub.facts.rounds.known) >= 1)
        await found.kill("d")
        found.rules = {}
        found.start("d")
        await found.run()
        assert "expected 'sites' by policy.release of site.toml" in caplog.text
        assert "d" not in found.hub.machine.model.reported
        assert "d" not in found.rounds()[-1]["survivors"]
        await check_given(found)

    scene(tmp_path, pool, play, rounds=4, limits=PATIENT)


def test_a_full_disk_at_the_coordinator_is_waited_out(tmp_path, pool):
    full = []

    async def play(found):
        giving(found)
        keep = found.hub.disk.keep_model

        def no_room(digest):
            if not full:
                full.append(True)
                raise StoreFull("model: found no room")
            keep(digest)

        found.hub.disk.keep_model = no_room
        await found.run()
        assert full and found.hub.facts.outcome.text == ""
        await check_given(found)

    scene(tmp_path, pool, play, limits=PATIENT)


def test_a_job_whose_last_rounds_are_abandoned_gives_none(tmp_path, pool, caplog):
    """The sites then have the model of an earlier round, which no plan gives."""

    async def play(found):
        giving(found, failing="ab")
        await found.run()
        assert found.rounds()[0]["survivors"] == list(SITES)
        assert not any(row["survivors"] for row in found.rounds()[1:])
        said = "without the model: the last round was abandoned"
        assert (found.hub.facts.outcome.outcome, found.hub.facts.outcome.text) == ("finished", said)
        assert given(found) is None
        assert "fault: coordinator" not in caplog.text, "nobody asked for it"

    scene(tmp_path, pool, play, limits=PATIENT)


# ---------------------------------------------------------- a coordinator that wants more of them


ROUNDS = 200
"""More than there is time for: the job is stopped."""


@pytest.mark.parametrize("control", [False, True], ids=["attack", "control"])
@pytest.mark.parametrize("early", [False, True], ids=["not in the plan", "before the last round"])
def test_a_model_that_the_plan_does_not_give_is_not_given(
    tmp_path, pool, without, caplog, early, control
):
    """Attack: a coordinator asks for the model of the first round, or under a plan that gives it none.

    The control takes away the one check of the site that refuses it: then the words of the sites come.
    """
    said, told = [], []

    def heard(sender, receiver, message):
        if isinstance(message, ModelMade):
            said.append(sender)
        if isinstance(message, Announce) and receiver == "a" and message.header.certificate:
            # Just before this: a site in a round is asked in vain, and with keys sent ahead it is in one nearly always.
            told[0].sites["a"].tell(ModelWanted("job", message.header.certificate, b""))
        return message

    if control:
        without(PublicRelease, may_give=lambda *_, **__: True)

    async def play(found):
        told.append(found)
        found.passing = heard
        giving(found, release="coordinator" if early else "sites")
        refusal = "before the last round" if early else "stays at the sites"
        await found.run(until=lambda: said or refusal in caplog.text or found.hub.facts.outcome)
        words = list(said)
        assert found.hub.facts.outcome is None and len(found.hub.facts.rounds.known) < ROUNDS
        found.hub.stop("enough")
        await found.run()
        assert bool(words) is control and (refusal in caplog.text) is not control

    scene(tmp_path, pool, play, rounds=ROUNDS, limits=PATIENT)


def test_after_the_end_nothing_is_given(tmp_path, pool):
    """A coordinator that asks once more; the site's process has forgotten the task by then."""
    said = []

    def heard(sender, receiver, message):
        said.append(type(message))
        return message

    async def play(found):
        giving(found)
        await found.run()
        found.passing = heard
        site = found.sites["a"]
        site.tell(ModelWanted("job", site.job.stage.standing.certificate, b""))
        await asyncio.sleep(0.3)
        assert ModelMade not in said

    scene(tmp_path, pool, play, limits=PATIENT)


def test_is_last_model_knows_the_last_round_and_its_measure():
    class Plan:
        rounds = 3

    last = [("update", 3), ("metrics", 4)]
    for purpose in PURPOSES:
        for number in range(6):
            step = schedule.PlannedRound(purpose, number)
            assert schedule.is_last_model(Plan, step) is ((purpose, number) in last)
