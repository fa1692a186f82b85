"""Batches of requests that come while others are worked on."""

import asyncio
from collections.abc import Coroutine
from typing import Any

import pytest

from fgaif.serving.batcher import Batcher


class Worker:
    """Doubles numbers, a batch whenever it is let to; a negative number is an error."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.go = asyncio.Semaphore(0)

    async def __call__(self, items: list[int]) -> list[int]:
        self.batches.append(items)
        await self.go.acquire()
        if min(items) < 0:
            raise ValueError(f"no {min(items)}")
        return [2 * item for item in items]


def run(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(work, 10))


async def settle() -> None:
    """Let everything happen that needs no more than this event loop."""
    for _ in range(20):
        await asyncio.sleep(0)


def test_what_comes_during_a_batch_forms_the_next() -> None:
    async def work() -> None:
        worker = Worker()
        batcher = Batcher(worker, size=4)
        calls = [asyncio.create_task(batcher(0))]
        await settle()
        for item in range(1, 7):  # one after the other, as requests come
            calls.append(asyncio.create_task(batcher(item)))
            await settle()
        assert worker.batches == [[0]]
        for _ in range(3):
            worker.go.release()
        assert await asyncio.gather(*calls) == [0, 2, 4, 6, 8, 10, 12]
        assert worker.batches == [[0], [1, 2, 3, 4], [5, 6]]
        worker.go.release()
        assert await batcher(7) == 14  # after a time without work

    run(work())


def test_batches_in_work_are_limited_and_the_rest_goes_together() -> None:
    async def work() -> None:
        worker = Worker()
        batcher = Batcher(worker, size=3, calls=2)
        calls = []
        for item in range(5):
            calls.append(asyncio.create_task(batcher(item)))
            await settle()
        assert worker.batches == [[0], [1]]
        worker.go.release()
        await settle()
        assert worker.batches == [[0], [1], [2, 3, 4]]
        for _ in range(2):
            worker.go.release()
        assert await asyncio.gather(*calls) == [0, 2, 4, 6, 8]

    run(work())


def test_size_one_calls_for_each_item() -> None:
    async def work() -> None:
        worker = Worker()
        batcher = Batcher(worker, size=1, calls=8)
        calls = [asyncio.create_task(batcher(item)) for item in range(4)]
        await settle()
        assert worker.batches == [[0], [1], [2], [3]]
        for _ in calls:
            worker.go.release()
        assert await asyncio.gather(*calls) == [0, 2, 4, 6]

    run(work())


def test_a_full_batch_does_not_wait_and_one_alone_waits_no_longer_than_told() -> None:
    async def work() -> None:
        worker = Worker()
        patient = Batcher(worker, size=2, wait_s=60.0)
        worker.go.release()
        assert list(await asyncio.gather(patient(1), patient(2))) == [2, 4]
        worker.go.release()
        assert await Batcher(worker, size=2, wait_s=0.01)(3) == 6
        assert worker.batches == [[1, 2], [3]]

    run(work())


def test_an_error_is_the_whole_batchs_and_no_other() -> None:
    async def work() -> None:
        worker = Worker()
        batcher = Batcher(worker, size=2)
        calls = [asyncio.create_task(batcher(item)) for item in (1, -1, 2)]
        worker.go.release()
        worker.go.release()
        found = await asyncio.gather(*calls, return_exceptions=True)
        assert [str(error) for error in found[:2]] == ["no -1", "no -1"]
        assert found[2] == 4

    run(work())


def test_who_stops_waiting_takes_the_item_along() -> None:
    async def work() -> None:
        worker = Worker()
        batcher = Batcher(worker, size=4)
        first, second, third = (asyncio.create_task(batcher(item)) for item in (1, 2, 3))
        await settle()
        fourth, fifth = (asyncio.create_task(batcher(item)) for item in (4, 5))
        await settle()
        for call in (second, fourth):  # one in work, one waiting
            call.cancel()
        worker.go.release()
        worker.go.release()
        assert list(await asyncio.gather(first, third, fifth)) == [2, 6, 10]
        assert worker.batches == [[1, 2, 3], [5]]
        with pytest.raises(asyncio.CancelledError):
            await second

    run(work())
