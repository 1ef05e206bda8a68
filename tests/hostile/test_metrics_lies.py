"""Public metrics under attack: sites that lie about them, and a coordinator that wants what it may not have.

The coordinator's side is the real one (`Hearing`), fed with what sites say; the site's side is a site's own
job with the real plan, and the real machine of a round for what comes before its word.
"""

from __future__ import annotations

import asyncio
import struct
from dataclasses import replace

import pytest
from fedcore_clients.bench_sites import ROWS
from kit import world_at
from support.policies import begin, job_at_a_site, policy_of

from fedcore.config import build_job, plan_of, wire_settings
from fedcore.errors import Conflicting, HeaderRefused, ProtocolRefused, ThresholdRefused
from fedcore.results import SiteRow
from fedcore.secagg.plan import METRIC, Wide, canonical
from fedcore.secagg.protocol import effects, job_messages
from fedcore.secagg.protocol.job.coordinator.public_metrics import Hearing
from fedcore.secagg.protocol.job.effects import Track
from fedcore.secagg.protocol.job.site.events import MessageReceived
from fedcore.secagg.protocol.job_messages import told
from fedcore.secagg.protocol.round import site
from fedcore.secagg.protocol.schedule import PlannedRound
from fedcore.secagg.protocol.wire_form import encode

TRUE, FALSE = {"auc": 0.71}, {"auc": 0.99}


class Screen:
    """A round of five honest machines (t = 4), certified, and what an operator would see of it."""

    def __init__(self, threshold=None):
        world = world_at("state")
        plan = replace(world.plan, metric_sums=(Wide(METRIC + "auc", 2, 8),), public_metrics=True)
        header = replace(world.round_header, plan_digest=plan.digest)
        if threshold is not None:  # the check removed: fewer are enough
            header = replace(header, threshold=threshold)
        self.certificate = replace(world.certificate(), header=header)
        self.plan, self.names, self.t = plan, world.roster, world.t
        self.hearing, self.seen = Hearing(plan, header.job), []

    def released(self):
        self.hearing.released(self.certificate)
        return self

    def word(self, name, values=TRUE):
        return told(self.plan, self.certificate, name, values)

    def say(self, name, values=TRUE):
        row, warning = self.hearing.take(name, self.word(name, values))
        if row is not None:
            self.seen.append(row.metrics)
        return warning


# ---------------------------------------------------------------------------------- lying sites


def test_lying_sites_below_the_threshold_put_no_number_on_the_screen():
    screen = Screen().released()
    liars = screen.names[: screen.t - 1]
    for name in liars:
        screen.say(name, FALSE)
    assert screen.seen == []
    for name in screen.names[screen.t - 1 :]:
        warning = screen.say(name)
        assert all(each in warning for each in (name, *liars)), "the log names who differs"
    assert screen.seen == []
    screen = Screen(threshold=1).released()  # control: one word were enough
    screen.say("eve", FALSE)
    assert screen.seen == [FALSE]


def test_a_lying_site_does_not_hide_what_the_others_say():
    screen = Screen().released()
    screen.say("eve", FALSE)
    for name in screen.names[: screen.t]:
        assert screen.seen == []
        screen.say(name)
    assert screen.seen == [TRUE]
    screen = Screen(threshold=5).released()  # control: if all had to say the same, one liar hid it
    for name in screen.names:
        screen.say(name, FALSE if name == "eve" else TRUE)
    assert screen.seen == []


def test_a_lying_site_that_says_it_many_times_is_one_site():
    screen = Screen().released()
    for _ in range(screen.t):
        screen.say("eve", FALSE)
    assert screen.seen == []
    with pytest.raises(Conflicting) as refused:
        screen.say("eve", {"auc": 0.98})
    assert refused.value.fault == "eve"
    for name in ("ann", "bob", "cat"):  # control: as many words of as many sites
        screen.say(name, FALSE)
    assert screen.seen == [FALSE]


def test_a_lying_site_in_the_names_of_others():
    screen = Screen().released()
    for name in screen.names:
        if name != "eve":
            with pytest.raises(HeaderRefused) as refused:
                screen.hearing.take("eve", screen.word(name, FALSE))
            assert refused.value.fault == "eve"
    assert screen.seen == []
    for name in screen.names:  # control: the same words from those they name
        screen.say(name, FALSE)
    assert screen.seen == [FALSE]


def test_a_site_that_speaks_before_the_certificate():
    """It knows the sum as soon as it opens it; nobody has proved then that it is the others' too."""
    screen = Screen()
    for name in screen.names:
        with pytest.raises(
            ProtocolRefused, match="a release that is not certified here"
        ) as refused:
            screen.say(name)
        assert refused.value.fault == name
    assert screen.seen == []
    screen.released()  # control: the same words afterwards
    for name in screen.names:
        screen.say(name)
    assert screen.seen == [TRUE]


# -------------------------------------------------------------------------- a lying coordinator


SITES = ("a", "b", "c", "d")


def settings(*, public, protection="layered"):
    asked = {"max_examples": 64, "rounds": 2, "range": 0.5, "protection": "layered"}
    found = wire_settings(build_job(asked))
    found["track"]["public_metrics"], found["protect"]["protection"] = public, protection
    return found


async def begun(folder, offered, plan=None):
    """A site's job after the coordinator's offer, and after the plan it sends, if it sends one."""
    policy = policy_of(len(SITES), public_metrics=True)
    row = SiteRow(round=1, purpose="update", sites=4, everywhere_before={ROWS.name: 0.625})
    found = job_at_a_site(folder, offered, policy, row)
    await begin(found)
    if plan is not None:
        made = plan_of(build_job(plan), found.job.part.survey.shape, SITES, 64)
        await found.handle(
            MessageReceived(job_messages.PlanOffer("job", canonical(made.to_json())))
        )
    return found


def test_a_coordinator_that_asks_for_them_under_encrypted(tmp_path, caplog):
    """Nothing that was decrypted may go back to who holds every site's own ciphertext (PROTOCOL R)."""
    found = asyncio.run(begun(tmp_path / "1", settings(public=True, protection="encrypted")))
    assert found.link.said == [job_messages.SiteUnavailable("job", "a", "policy")]
    assert found.contributor.loaded == 0
    assert "track.public_metrics: found true under 'encrypted'" in caplog.text, "in its own log"
    for number, fine in enumerate(  # control: each half of it alone
        (settings(public=True), settings(public=False, protection="encrypted"))
    ):
        found = asyncio.run(begun(tmp_path / f"control{number}", fine))
        assert [type(each) for each in found.link.said] == [job_messages.SiteSurvey]


def test_a_coordinator_whose_plan_makes_public_what_the_job_does_not(tmp_path):
    """The site's own plan is the one it goes by; under it, nothing is said of a release."""

    async def speaks(folder, offered, plan):
        found = await begun(folder, offered, plan)
        refused = job_messages.SiteUnavailable("job", "a", "unable") in found.link.said
        if refused:  # and what it would say under its own plan
            found = await begun(folder / "own", offered, offered)
        certificate = Screen().certificate
        track = Track(PlannedRound("update", 1), {}, 4, found.job.state, certificate)
        await found.handle(await found.work.track(track))
        return refused, b"".join(map(encode, found.link.said))

    quiet, public = settings(public=False), settings(public=True)
    refused, said = asyncio.run(speaks(tmp_path / "1", quiet, public))
    assert refused and struct.pack(">d", 0.625) not in said and b"PublicMetric" not in said
    refused, said = asyncio.run(speaks(tmp_path / "2", public, public))  # control
    assert not refused and struct.pack(">d", 0.625) in said


def test_a_coordinator_without_enough_signatures_gets_no_word():
    """A site speaks when its machine says `Apply`, which it does for a certificate of t sites only."""
    world = world_at("state")
    thin = world.certificate(world.roster[: world.t - 1])
    before = world.stages["ann"]
    with pytest.raises(ThresholdRefused) as refused:
        world.step("ann", site.MessageFromCoordinator(thin))
    assert refused.value.fault == "coordinator" and world.stages["ann"] is before
    found = world.step(
        "ann", site.MessageFromCoordinator(world.certificate(world.roster[: world.t]))
    )  # control
    assert [e for e in found if isinstance(e, effects.Apply)]
