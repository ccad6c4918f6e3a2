"""Threads that are stuck, or gone, are seen; busy ones are left alone."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

import pytest

from serve_app.frontend.watched_threads import WatchedThreads

STALL_S = 0.05
T = TypeVar("T")


async def begun(threads: WatchedThreads, call: Callable[[], T]) -> asyncio.Task[T]:
    """The call, handed to the threads."""
    task = asyncio.create_task(threads.run(call))
    await asyncio.sleep(0)
    return task


@pytest.fixture
def gate() -> Iterator[threading.Event]:
    """Opens at the end: no thread outlives its test."""
    gate = threading.Event()
    yield gate
    gate.set()


async def test_a_call_gives_its_result_or_its_error():
    threads = WatchedThreads(1, "test")
    assert await threads.run(lambda: 3) == 3
    with pytest.raises(ZeroDivisionError):
        await threads.run(lambda: 1 / 0)
    assert threads.stalled_seconds() == 0.0
    threads.close()


async def test_idle_threads_are_well_however_long_they_have_been():
    threads = WatchedThreads(2, "test")
    for _ in range(3):
        threads.check(STALL_S)
        await asyncio.sleep(2 * STALL_S)
    threads.close()


async def test_one_stuck_thread_is_seen_while_the_other_works(gate: threading.Event):
    threads = WatchedThreads(2, "test")
    stuck = await begun(threads, gate.wait)
    until = time.monotonic() + 2 * STALL_S
    while time.monotonic() < until:
        await threads.run(lambda: time.sleep(0.001))
    with pytest.raises(RuntimeError, match=r"stall_s is 0\.05"):
        threads.check(STALL_S)
    stuck.cancel()  # its caller has left, and the thread hangs all the same
    with pytest.raises(RuntimeError, match="has not finished"):
        threads.check(STALL_S)
    gate.set()
    while threads.stalled_seconds() > STALL_S:  # noqa: ASYNC110 - there is no event to wait for
        await asyncio.sleep(0.001)
    threads.close()


async def test_a_long_queue_that_moves_is_no_standstill():
    threads = WatchedThreads(1, "test")
    calls = [await begun(threads, lambda: time.sleep(STALL_S / 5)) for _ in range(20)]
    while not calls[-1].done():
        threads.check(STALL_S * 4)
        await asyncio.sleep(STALL_S / 5)
    await asyncio.gather(*calls)
    threads.close()


async def test_a_thread_that_has_ended_is_seen_by_what_waits_for_it():
    threads = WatchedThreads(1, "test")
    await threads.run(lambda: None)
    threads._pool._work_queue.put(None)  # what tells a thread to look whether it should end
    threads._pool._shutdown = True
    (thread,) = threads._pool._threads
    await asyncio.to_thread(thread.join)
    threads._pool._shutdown = False
    threads.check(STALL_S)
    await asyncio.sleep(2 * STALL_S)
    with pytest.raises(RuntimeError, match="has not finished"):
        threads.check(STALL_S)
    threads._pool._threads.clear()
    threads.close()


async def test_what_waits_can_be_cancelled(gate: threading.Event):
    threads = WatchedThreads(1, "test")
    first = await begun(threads, gate.wait)
    second = await begun(threads, lambda: pytest.fail("it was cancelled"))
    second.cancel()
    gate.set()
    assert await first
    await threads.run(lambda: None)
    assert threads.stalled_seconds() == 0.0
    threads.close()


async def test_who_waits_or_comes_can_be_told_that_nothing_is_done(gate: threading.Event):
    threads = WatchedThreads(1, "test")
    stuck, behind = await begun(threads, gate.wait), await begun(threads, lambda: None)
    threads.abandon(LookupError("gone"))
    for waiting in (stuck, behind, threads.run(lambda: 4)):
        with pytest.raises(LookupError, match="gone"):
            await waiting
    gate.set()
    threads._pool.submit(lambda: None).result()  # behind what was stuck
    assert await threads.run(lambda: 5) == 5
    threads.close()


async def test_a_closed_pool_is_no_pool():
    threads = WatchedThreads(1, "test")
    threads.close()
    with pytest.raises(RuntimeError):
        threads.check(STALL_S)
