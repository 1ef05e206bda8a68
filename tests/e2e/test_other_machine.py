"""A coordinator that goes on from the journal alone, as a standby on another machine does: spool and files are gone.

Small vectors are in the journal. Larger ones (`large`) are not: sites send them again before the list of survivors
is sent, the round is abandoned after that, and the job ends where the sum may be known.
"""

from __future__ import annotations

import shutil

import pytest
from fedcore_server import job_disk
from town import HUB, SITES, UNHURRIED, Killed, scene

from fedcore.secagg.protocol.round import coordinator


def dies_with(found, kind, folder):
    """The coordinator ends right after the second round's first record of this kind is on disk; its next life finds
    the journal only."""
    done = []

    def look(records):
        second = len(found.hub.facts.rounds.known) == 1
        if second and not done and any(isinstance(each, kind) for each in records):
            done.append(type(found.hub.facts.stage))
            found.journals[HUB].dead = True
            raise Killed

    def another_machine(name):
        if name == HUB and done:
            for each in ("spool", "jobs"):
                shutil.rmtree(folder / HUB / each)

    found._cut_power = another_machine
    found.journals[HUB].signed = look
    return done


def lost_at(tmp_path, pool, kind, protection="masked", hold=""):
    """(the rows of the job's rounds, how it ended, the stage in which the coordinator ended)."""
    out = []

    async def play(found):
        for name in SITES:
            found.start(name)
        if hold:
            go, _ = found.hold(hold, lambda: len(found.hub.facts.rounds.known) == 1)
        found.start_hub()
        stage = dies_with(found, kind, found.folder)
        if hold:
            await found.run(until=lambda: found.deaths)
            go.set()
        await found.run()
        assert found.deaths == [HUB]
        if found.hub.facts.outcome.outcome == "finished":
            await found.check()
        assert all(len(answers) == 1 for answers in found.signed.values())
        out.extend((found.rounds(), found.hub.facts.outcome, stage[0].__name__))

    scene(tmp_path, pool, play, rounds=2, limits=UNHURRIED, protection=protection)
    return out


@pytest.fixture
def large(without):
    without(job_disk, small_file=lambda *_: {})


@pytest.mark.parametrize(
    "kind", [coordinator.SubmissionTaken, coordinator.MasksRebuilt, coordinator.SumSpooled]
)
def test_small_vectors_are_in_the_journal_and_no_round_is_lost(tmp_path, pool, kind):
    hold = "a" if kind is coordinator.SubmissionTaken else ""
    rows, outcome, _ = lost_at(tmp_path, pool, kind, hold=hold)
    assert outcome.outcome == "finished" and all(row["survivors"] == list(SITES) for row in rows)


@pytest.mark.parametrize("protection", ["masked", "encrypted"])
def test_before_the_list_sites_send_their_vectors_again(tmp_path, pool, large, protection):
    kind = coordinator.SubmissionTaken
    rows, outcome, stage = lost_at(tmp_path, pool, kind, protection, hold="a")
    assert stage == "Collecting" and outcome.outcome == "finished"
    assert all(row["survivors"] == list(SITES) for row in rows)


def test_under_encrypted_they_do_until_the_sum_is_announced(tmp_path, pool, large):
    rows, outcome, stage = lost_at(tmp_path, pool, coordinator.ListFixed, "encrypted")
    assert stage == "Summing" and outcome.outcome == "finished"
    assert all(row["survivors"] == list(SITES) for row in rows)


def test_after_the_list_the_round_is_abandoned_and_the_job_goes_on(tmp_path, pool, large):
    rows, outcome, stage = lost_at(tmp_path, pool, coordinator.ListFixed)
    assert stage == "Confirming" and outcome.outcome == "finished"
    assert [row["abandoned"]["stage"] for row in rows if not row["survivors"]] == ["confirm"]
    assert [row["purpose"] for row in rows] == ["update", "update", "metrics"]


@pytest.mark.parametrize("kind", [coordinator.ConfirmsFixed, coordinator.MasksRebuilt])
def test_where_the_sum_may_be_known_the_job_ends_with_that_reason(tmp_path, pool, large, kind):
    rows, outcome, stage = lost_at(tmp_path, pool, kind)
    assert stage in {"Unmasking", "Summing"} and outcome.outcome == "abandoned"
    assert "vectors of sites a, b, c, d are not on this machine" in outcome.text
    assert "no other may be taken from the same state" in outcome.text
    assert [row["survivors"] for row in rows] == [list(SITES)]  # the release before it stays
