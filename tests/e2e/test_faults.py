"""Faults beside the event queue, at both ends: the job goes on or fails with a reason, and no party hangs.

Journals, spools, fold workers and protections are real, as in `town`; each fault is made where a disk,
a person or the kernel would make it.
"""

from __future__ import annotations

import functools
import itertools
import os
import signal
from dataclasses import replace

import pytest
from deployment import HUB as COORDINATOR
from deployment import deployment, small_task
from fedcore_clients.job_runner import DiskRefused
from fedcore_server import job_disk
from fedcore_server.folding import FoldPool
from town import PATIENT, SITES, UNHURRIED, scene

from fedcore.runtime.mailbox import Mailbox
from fedcore.secagg.protocol.job.coordinator import events
from fedcore.secagg.protocol.round import coordinator


def begin(found):
    found.start_hub()
    for name in SITES:
        found.start(name)
    return found.hub


def ended(found):
    return lambda: found.hub.facts.outcome is not None


class PoolWith:
    """A pool of fold workers, but each fold's `total` is this: total(fold, the real one, *arguments)."""

    def __init__(self, pool, total):
        self._pool, self._total = pool, total

    def __getattr__(self, name):
        return getattr(self._pool, name)

    def job(self, *about):
        fold = self._pool.job(*about)
        fold.total = functools.partial(self._total, fold, fold.total)
        return fold


async def forgotten(fold, total, *about):
    """No upload is in the memory of a worker."""
    for shard in fold._shards:
        shard.life = -1
    return await total(*about)


def lose_upload(hub):
    """Before the next sum is made, the upload of site a is removed from the disk."""
    disk, real, lost = hub.disk, hub.disk.summands, []

    def removed(asked):
        if not lost:
            lost.append(asked)
            disk.spool.complete("job", asked.header.digest)["a"].unlink()
        return real(asked)

    disk.summands = removed


def test_a_removed_upload_is_restored_from_the_journal(tmp_path, pool):
    """A small vector is in the journal too: its spool file is written again and the round goes on."""

    async def play(found):
        lose_upload(begin(found))
        await found.run()
        assert found.hub.facts.outcome.outcome == "finished"
        assert all(row["survivors"] for row in found.rounds())
        await found.check()

    scene(tmp_path, PoolWith(pool, forgotten), play, rounds=1, limits=UNHURRIED)


def test_a_removed_upload_that_is_nowhere_else_fails_the_job_at_once(tmp_path, pool, without):
    """No deadline passes: UNHURRIED's stages last longer than this test."""
    without(job_disk, small_file=lambda *_: {})

    async def play(found):
        hub = begin(found)
        lose_upload(hub)
        await found.run()
        assert (hub.facts.outcome.outcome, "\n" in hub.facts.outcome.text) == ("failed", False)
        assert hub.facts.outcome.text.startswith("spool: found the vector of site a gone")
        assert str(tmp_path) not in hub.facts.outcome.text

    scene(tmp_path, PoolWith(pool, forgotten), play, limits=UNHURRIED)


def broken(pool, error, times):
    """(a pool whose sums fail so many times, or always for -1; [how often they still will])."""
    left = [times]

    async def total(fold, real, *args):
        if left[0]:
            left[0] -= 1
            raise error
        return await real(*args)

    return PoolWith(pool, total), left


def test_a_disk_error_while_summing_is_retried(tmp_path, pool):
    pool, _ = broken(pool, OSError(5, "Input/output error"), 2)

    async def play(found):
        begin(found)
        await found.run()
        assert found.hub.facts.outcome.outcome == "finished"
        assert all(row["survivors"] for row in found.rounds())
        await found.check()

    scene(tmp_path, pool, play, rounds=1, limits=UNHURRIED)


def test_a_disk_error_that_stays_fails_the_job_after_a_stage(tmp_path, pool):
    """The clock of the job, not this test, passes the limit of a stage."""
    pool, left = broken(pool, OSError(5, "Input/output error"), -1)

    async def play(found):
        hub = begin(found)
        ahead = [0.0]
        clock = hub.context.clock
        hub.context = replace(hub.context, clock=lambda: clock() + ahead[0])
        await found.run(
            until=lambda: left[0] < -3 and hub.facts.progress.text
        )  # again, and pausing
        assert hub.facts.outcome is None
        ahead[0] = 2 * PATIENT.stage
        await found.run(until=ended(found))
        assert hub.facts.outcome.outcome == "failed"
        assert hub.facts.outcome.text == "the coordinator's disk refused it (Input/output error)"

    scene(tmp_path, pool, play, limits=PATIENT)


def test_any_other_fault_while_summing_fails_the_job(tmp_path, pool):
    pool, _ = broken(pool, KeyError("/secret/path"), 1)

    async def play(found):
        hub = begin(found)
        await found.run()
        assert hub.facts.outcome.outcome == "failed"
        assert hub.facts.outcome.text == "a fault of the coordinator; its own log says which"

    scene(tmp_path, pool, play, limits=UNHURRIED)


class Ignored(events.TimePassed):
    """In place of a fault."""

    def __init__(self, fault):
        pass


def test_control_an_unreported_fault_leaves_the_job_summing(tmp_path, pool, without):
    """The attack: without the report of background faults the job stays in Summing."""
    pool, _ = broken(pool, KeyError("a"), 1)

    background = Mailbox.background
    without(Mailbox, background=lambda box, work, _: background(box, work, Ignored))

    async def play(found):
        hub = begin(found)
        await found.run(until=lambda: isinstance(hub.facts.stage, coordinator.Summing))
        ticks = []
        hub.machine.rounds.overdue_sum = lambda at: ticks.append(at) or []
        await found.run(until=lambda: len(ticks) > 2)
        assert isinstance(hub.facts.stage, coordinator.Summing)
        assert hub.facts.outcome is None

    scene(tmp_path, pool, play, limits=UNHURRIED)


def test_a_fold_worker_that_hangs_fails_the_job_after_a_stage(tmp_path):
    """The worker is stopped by the kernel; once the job failed, it is gone and the pool works again."""
    stopped = []

    async def total(fold, real, *args):
        stopped.append(own.pids[0])
        os.kill(stopped[0], signal.SIGSTOP)
        return await real(*args)

    async def play(found):
        hub, ahead = begin(found), [0.0]
        clock = hub.context.clock
        hub.context = replace(hub.context, clock=lambda: clock() + ahead[0])
        await found.run(until=lambda: bool(stopped))
        ahead[0] = 2 * PATIENT.stage
        await found.run(until=ended(found))
        assert hub.facts.outcome.outcome == "failed"
        assert "found none after 120 s" in hub.facts.outcome.text
        fresh = own.job("next", hub.facts.plan.packing, 10)
        with pytest.raises(Exception, match="expected at least one"):
            await fresh.total([], (), list)  # a request is served
        assert own.pids != tuple(stopped)

    with FoldPool(1, tmp_path / "sums") as own:
        scene(tmp_path, PoolWith(own, total), play, limits=PATIENT)


def test_the_end_of_a_failed_job_is_written_when_the_disk_takes_it(tmp_path, pool):
    pool, _ = broken(pool, KeyError("a"), 1)

    async def play(found):
        hub = begin(found)
        real, refused = hub.context.journal.compact, itertools.count()

        def compact(*args, **kwargs):
            if next(refused) < 2:
                raise OSError(28, "No space left on device")
            real(*args, **kwargs)

        hub.context.journal.compact = compact
        await found.run()
        assert next(refused) >= 3
        assert hub.facts.outcome.outcome == "failed"
        assert hub.context.journal.get("job", "ended") is not None

    scene(tmp_path, pool, play, limits=UNHURRIED)


def test_an_operator_stops_a_job_whose_disk_refuses(tmp_path, pool):
    pool, left = broken(pool, OSError(5, "Input/output error"), -1)

    async def play(found):
        hub = begin(found)
        await found.run(until=lambda: left[0] < -2)
        hub.stop("stopped by op")
        await found.run(until=ended(found))
        assert (hub.facts.outcome.outcome, hub.facts.outcome.text) == ("stopped", "stopped by op")

    scene(tmp_path, pool, play, limits=UNHURRIED)


# ---------------------------------------------------------------------------------- at a site


def test_a_site_whose_vector_is_gone_leaves_the_round_at_once(tmp_path, pool):
    """The others do not wait for the deadline of the stage (600 s in UNHURRIED)."""
    lost = []

    async def play(found):
        hub = begin(found)
        work = found.sites["a"].work
        real = work.finished_vector

        async def finished(submit):
            if not lost:
                lost.append(submit)
                return None
            return await real(submit)

        work.finished_vector = finished
        await found.run()
        assert hub.facts.outcome.outcome == "finished"
        first = found.rounds()[0]
        assert "a" not in first["survivors"]
        await found.check()
        assert "vector gone" in found.sites["a"].job.part.last_error

    scene(tmp_path, pool, play, rounds=1, limits=UNHURRIED)


@pytest.mark.parametrize("where", ["upload", "open_sum", "make_vector"])
def test_a_fault_in_a_sites_background_work_makes_it_leave_the_round(tmp_path, pool, where):
    """Each kind of work that the other sites wait for: they do not wait until a deadline."""
    failed = []

    async def play(found):
        hub = begin(found)
        works = found.sites["a"].work
        real = getattr(works, where)

        async def work(asked):
            if not failed:
                failed.append(asked)
                raise RuntimeError(f"a fault in {where}")
            return await real(asked)

        setattr(works, where, work)
        await found.run(until=lambda: bool(hub.facts.rounds.known))
        assert failed
        assert hub.facts.rounds.known[0]["seconds"] < UNHURRIED.stage
        await found.run()
        assert hub.facts.outcome.outcome == "finished"

    scene(tmp_path, pool, play, rounds=1, limits=UNHURRIED)


def test_a_fault_while_loading_is_told(tmp_path, pool):
    async def play(found):
        found.start_hub()
        for name in SITES:
            found.start(name)
        contributor = found.sites["a"].contributor

        async def load(*args):
            raise RuntimeError("neither the task nor the data")

        contributor.load = load
        hub = found.hub
        await found.run(until=lambda: bool(hub.facts.sites["a"].unable))
        assert hub.facts.sites["a"].unable

    scene(tmp_path, pool, play, limits=UNHURRIED)


def test_a_site_whose_journal_cannot_be_read_says_that_it_is_unable(tmp_path, pool):
    """A fault while everything is read from disk again ends the job there, with a word to the others."""

    async def play(found):
        hub = begin(found)
        await found.run(until=lambda: found.sites["a"].job.plan is not None)

        def restore(*args):
            raise ValueError("another fault")

        site = found.sites["a"]
        site.restore = restore
        site.mailbox.put(DiskRefused(OSError(5, "Input/output error")))
        await found.run(until=lambda: bool(hub.facts.sites["a"].unable))

    scene(tmp_path, pool, play, limits=UNHURRIED)


# ------------------------------------------------------------------------------- real processes


@pytest.mark.slow
def test_the_queue_goes_on_after_a_job_whose_uploads_are_lost(tmp_path):
    """Real processes (5 to 15 s): the first job's spool files vanish, the second runs to its end."""
    patch = """
        from fedcore_server import job_disk
        real, first = job_disk.JobDisk.summands, []
        job_disk.small_file = lambda *_: {}
        def removed(self, asked):
            first.append(asked.header.job)
            if asked.header.job == first[0]:
                for path in self.spool.complete(first[0], asked.header.digest).values():
                    path.unlink()
            return real(self, asked)
        job_disk.JobDisk.summands = removed
    """
    with deployment(tmp_path, small_task(tmp_path), patches={COORDINATOR: patch}) as fed:
        fed.connected()
        first = fed.submit(rounds=2)
        second = fed.submit(rounds=2)
        events = fed.wait(first)
        assert events[-1]["state"] == "failed", events[-1]
        assert "gone" in events[-1]["text"]
        assert fed.wait(second)[-1]["state"] == "finished"
        assert fed.released(second)
