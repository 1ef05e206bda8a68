"""The mailbox: order of events, a timer that a full queue cannot stop, and background work that reports."""

from __future__ import annotations

import asyncio
import contextlib

import pytest

from fedcore.errors import StoreProblem
from fedcore.runtime.mailbox import Mailbox

TICK = "tick"
SOON = 5.0
"""Seconds after which what was to happen has not happened."""


class Handled:
    """A handler that keeps what it was given, and can be told to do more about some of it."""

    def __init__(self, **reactions):
        self.events, self.reactions = [], reactions

    async def __call__(self, event):
        self.events.append(event)
        if event in self.reactions:
            self.reactions[event]()


def never():
    return None


def play(work):
    async def limited():
        async with asyncio.timeout(SOON):
            return await work

    return asyncio.run(limited())


def report(error):
    return ("fault", type(error), str(error))


async def until_quiet(box, count, wait=never):
    handled = Handled()
    while len(handled.events) < count:
        await box.turn(handled, wait)
    return handled.events


# ------------------------------------------------------------------------------------ the queue


def test_events_are_handled_in_order_and_one_at_a_time():
    async def main():
        box, trace = Mailbox(TICK), []

        async def slow(event):
            trace.append(("begin", event))
            await asyncio.sleep(0.001)
            trace.append(("end", event))

        for event in "abc":
            box.put(event)
        assert box.backlog == 3
        await box.turn(slow, never)
        return trace

    assert play(main()) == [(when, event) for event in "abc" for when in ("begin", "end")]


def test_a_turn_handles_what_is_queued_and_leaves_what_comes_meanwhile():
    async def main():
        box = Mailbox(TICK)
        handled = Handled(a=lambda: box.put("late a"), b=lambda: box.put("late b"))
        box.put("a")
        box.put("b")
        await box.turn(handled, never)
        first = list(handled.events)
        await box.turn(handled, never)
        return first, handled.events

    first, both = play(main())
    assert first == ["a", "b", "late a"]  # queued while the first event was handled
    assert both == [*first, "late b"]


def test_a_handler_that_raises_leaves_the_events_behind_in_the_queue():
    async def main():
        box = Mailbox(TICK)

        def refuse():
            raise StoreProblem("disk")

        for event in ("a", "bad", "b"):
            box.put(event)
        handled = Handled(bad=refuse)
        with pytest.raises(StoreProblem):
            await box.turn(handled, never)
        await box.turn(handled, never)
        return handled.events

    assert play(main()) == ["a", "bad", "b"]


def test_a_cancelled_turn_loses_no_event():
    async def main():
        box, handled = Mailbox(TICK), Handled()
        turn = asyncio.create_task(box.turn(handled, never))
        await asyncio.sleep(0)
        box.put("a")
        turn.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await turn
        if not handled.events:
            await box.turn(handled, never)
        return handled.events

    assert play(main()) == ["a"]


# ------------------------------------------------------------------------------------ the timer


def test_the_tick_comes_when_no_event_does():
    async def main():
        loop = asyncio.get_running_loop()
        began, box, handled = loop.time(), Mailbox(TICK), Handled()
        await box.turn(handled, lambda: 0.05)
        return handled.events, loop.time() - began

    events, seconds = play(main())
    assert events == [TICK]
    assert seconds >= 0.05


def test_the_tick_runs_while_the_queue_never_empties():
    async def main():
        box, clock, due = Mailbox(TICK), [0], [10]

        def another():
            clock[0] += 1
            box.put("event")

        def move_on():
            due[0] += 10

        handled = Handled(event=another, tick=move_on)
        box.put("event")
        for _ in range(20):
            await box.turn(handled, lambda: due[0] - clock[0])
        return handled.events, box.backlog

    events, backlog = play(main())
    assert backlog
    assert [at for at, event in enumerate(events) if event == TICK] == [10, 21, 32, 43]


def test_a_tick_that_stays_due_does_not_keep_events_from_being_handled():
    async def main():
        box = Mailbox(TICK)
        for event in "abc":
            box.put(event)
        return await until_quiet(box, 6, wait=lambda: -1.0)

    assert play(main()) == ["a", TICK, "b", TICK, "c", TICK]


# ------------------------------------------------------------------------------ background work


def test_the_result_of_background_work_is_an_event():
    async def main():
        box = Mailbox(TICK)

        async def work(result):
            await asyncio.sleep(0)
            return result

        box.background(work(None), report)
        box.background(work("done"), report)
        return await until_quiet(box, 1), box.backlog

    assert play(main()) == (["done"], 0)


@pytest.mark.parametrize(
    "error",
    [StoreProblem("full"), OSError(5, "Input/output error"), KeyError("a"), TimeoutError()],
    ids=lambda error: type(error).__name__,
)
def test_whatever_background_work_raises_is_an_event(error):
    async def main():
        box = Mailbox(TICK)

        async def work():
            raise error

        box.background(work(), report)
        return await until_quiet(box, 1)

    assert play(main()) == [report(error)]


def test_cancelled_work_queues_nothing_whether_it_began_or_not():
    async def main():
        box, began = Mailbox(TICK), []

        async def work(name):
            began.append(name)
            await asyncio.sleep(SOON)
            return "done"

        first = box.background(work("first"), report)
        await asyncio.sleep(0)
        second = box.background(work("second"), report)
        first.cancel()
        second.cancel()
        await asyncio.wait([first, second])
        await asyncio.sleep(0)
        return began, box.backlog

    assert play(main()) == (["first"], 0)


def test_a_cancellation_that_nobody_asked_for_is_a_fault():
    async def main():
        box = Mailbox(TICK)

        async def work():
            other = asyncio.get_running_loop().create_future()
            other.cancel()
            await other

        box.background(work(), report)
        return await until_quiet(box, 1)

    [(_, kind, text)] = play(main())
    assert (kind, text) == (RuntimeError, "background work: found it cancelled from inside")


def test_close_cancels_background_work_and_waits_for_its_cleanup():
    async def main():
        box, cleaned = Mailbox(TICK), []

        async def work(name):
            try:
                await asyncio.sleep(SOON)
            finally:
                await asyncio.sleep(0.01)
                cleaned.append(name)

        box.background(work("a"), report)
        box.background(work("b"), report)
        await asyncio.sleep(0)
        box.put("kept")
        await box.close()
        return sorted(cleaned), await until_quiet(box, 1)

    assert play(main()) == (["a", "b"], ["kept"])


def test_close_also_ends_work_that_began_during_it_and_reports_a_failed_cleanup():
    async def main():
        box, cleaned = Mailbox(TICK), []

        async def late():
            try:
                await asyncio.sleep(SOON)
            finally:
                cleaned.append("late")

        async def work():
            try:
                await asyncio.sleep(SOON)
            finally:
                box.background(late(), report)
                await asyncio.sleep(0.01)
                raise OSError("cleanup")

        box.background(work(), report)
        await asyncio.sleep(0)
        await box.close()
        return cleaned, await until_quiet(box, 1)

    assert play(main()) == (["late"], [("fault", OSError, "cleanup")])


# ---------------------------------------------------------------------------------- the hang


async def outcome_of_a_sum(box, seconds):
    """A job that can only go on once its sum is made, and whose sum cannot be made: its outcome."""
    outcome = []

    async def make_sum():
        return {"b": "file"}["a"]  # the upload of site a is gone

    async def handle(event):
        if event != TICK:
            outcome.append(event)

    box.background(make_sum(), report)
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            while not outcome:
                await box.turn(handle, lambda: 0.01)
    return outcome


def test_a_job_hears_of_a_fault_in_the_background():
    assert play(outcome_of_a_sum(Mailbox(TICK), SOON)) == [("fault", KeyError, "'a'")]


def test_control_without_the_report_of_faults_the_job_waits_for_ever(without):
    put = Mailbox.put

    def unreported(self, event):
        if event[0] != "fault":
            put(self, event)

    without(Mailbox, put=unreported)
    assert play(outcome_of_a_sum(Mailbox(TICK), 0.3)) == []
