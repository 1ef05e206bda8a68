"""A job is served again from disk after a fault that it tolerates, and ends with any other."""

from __future__ import annotations

import asyncio

from fedcore.errors import StoreProblem
from fedcore.runtime.mailbox import Mailbox, keep_serving

TICK = "tick"


def disk(fault):
    return isinstance(fault, StoreProblem | OSError)


def play(serve, restore=lambda: None, tolerates=disk):
    async def main():
        async with asyncio.timeout(5):
            return await keep_serving(
                serve, tolerates=tolerates, restore=restore, retry_seconds=0.01
            )

    return asyncio.run(main())


class Serving:
    """Raises the given errors, one a life, and then returns."""

    def __init__(self, *errors):
        self.errors, self.lives = list(errors), 0

    async def __call__(self):
        self.lives += 1
        if self.errors:
            raise self.errors.pop(0)


def test_a_job_that_is_over_is_not_served_again():
    serve = Serving()
    assert play(serve) is None
    assert serve.lives == 1


def test_a_job_is_read_from_disk_and_served_again_after_each_refusal_of_the_disk():
    serve, restored = Serving(StoreProblem("full"), OSError(5, "I/O")), []
    assert play(serve, lambda: restored.append(serve.lives)) is None
    assert (serve.lives, restored) == (3, [1, 2])


def test_a_restore_that_the_disk_refuses_is_tried_again_before_the_job_is_served():
    serve, refusals = Serving(StoreProblem("full")), [OSError(5, "I/O"), StoreProblem("still")]

    def restore():
        if refusals:
            raise refusals.pop()

    assert play(serve, restore) is None
    assert (serve.lives, refusals) == (2, [])


def test_any_other_fault_ends_the_job_and_is_given_back():
    serve = Serving(fault := KeyError("a"), AssertionError)
    assert play(serve) is fault
    assert serve.lives == 1


def test_a_fault_of_the_restore_ends_the_job_as_well():
    serve, fault = Serving(StoreProblem("full")), ValueError("broken")

    def restore():
        raise fault

    assert play(serve, restore) is fault
    assert serve.lives == 1


def test_the_job_decides_with_each_fault_whether_it_goes_on():
    """Such as a limit on how long the disk may refuse."""
    serve, asked = Serving(*[StoreProblem(str(n)) for n in range(5)]), []

    def tolerates(fault):
        asked.append(str(fault))
        return len(asked) < 3

    assert str(play(serve, tolerates=tolerates)) == "2"
    assert asked == ["0", "1", "2"]


def test_a_cancelled_job_is_not_served_again():
    serve = Serving(StoreProblem("full"))

    async def main():
        run = asyncio.create_task(
            keep_serving(serve, tolerates=disk, restore=lambda: None, retry_seconds=5)
        )
        await asyncio.sleep(0.01)
        run.cancel()
        await asyncio.wait([run])
        return run.cancelled()

    assert asyncio.run(main())
    assert serve.lives == 1


def test_a_fault_in_the_background_reaches_the_decision():
    async def main():
        box = Mailbox(TICK)

        async def work():
            raise KeyError("lost")

        async def handle(event):
            raise event

        async def serve():
            box.background(work(), lambda error: error)
            while True:
                await box.turn(handle, lambda: None)

        return await keep_serving(serve, tolerates=disk, restore=list, retry_seconds=0)

    assert isinstance(asyncio.run(main()), KeyError)
