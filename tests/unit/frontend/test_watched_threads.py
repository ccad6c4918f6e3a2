"""Watched threads: stuck and ended ones are noticed, busy ones are left alone."""

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
    """Hand the call to the threads."""
    task = asyncio.create_task(threads.run(call))
    await asyncio.sleep(0)
    return task


@pytest.fixture
def gate() -> Iterator[threading.Event]:
    """A gate that opens when the test ends, so that no thread outlives it."""
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


async def test_threads_are_healthy_however_long_they_are_idle():
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
    stuck.cancel()  # its caller has left, but the thread still hangs
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


async def test_a_thread_that_has_ended_is_noticed_by_the_calls_that_wait():
    threads = WatchedThreads(1, "test")
    await threads.run(lambda: None)
    threads._pool._work_queue.put(None)  # a thread that gets None checks whether to end
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


async def test_a_waiting_call_can_be_cancelled(gate: threading.Event):
    threads = WatchedThreads(1, "test")
    first = await begun(threads, gate.wait)
    second = await begun(threads, lambda: pytest.fail("a cancelled call was made"))
    second.cancel()
    gate.set()
    assert await first
    await threads.run(lambda: None)
    assert threads.stalled_seconds() == 0.0
    threads.close()


async def test_abandoned_threads_fail_the_calls_that_wait_or_come_later(gate: threading.Event):
    threads = WatchedThreads(1, "test")
    stuck, queued = await begun(threads, gate.wait), await begun(threads, lambda: None)
    threads.abandon(LookupError("gone"))
    for waiting in (stuck, queued, threads.run(lambda: 4)):
        with pytest.raises(LookupError, match="gone"):
            await waiting
    gate.set()
    threads._pool.submit(lambda: None).result()  # runs after the stuck call
    assert await threads.run(lambda: 5) == 5
    threads.close()


async def test_a_closed_pool_fails_its_check():
    threads = WatchedThreads(1, "test")
    threads.close()
    with pytest.raises(RuntimeError):
        threads.check(STALL_S)


async def test_a_tenant_with_many_calls_lets_another_go_between_them(gate: threading.Event):
    threads = WatchedThreads(1, "test")
    made: list[str] = []
    first = await begun(threads, gate.wait)
    many = [asyncio.create_task(threads.run(lambda: made.append("many"), "many")) for _ in range(50)]
    await asyncio.sleep(0)
    few = [asyncio.create_task(threads.run(lambda: made.append("few"), "few")) for _ in range(2)]
    left = asyncio.create_task(threads.run(lambda: pytest.fail("a cancelled call was made"), "few"))
    await asyncio.sleep(0)
    left.cancel()
    gate.set()
    await asyncio.gather(first, *many, *few)
    assert made[:5].count("few") == 2
    assert (len(made), made.count("few")) == (52, 2)
    threads.close()


async def test_calls_that_wait_for_their_turn_fail_when_the_threads_are_abandoned(gate: threading.Event):
    threads = WatchedThreads(1, "test")
    calls = [await begun(threads, gate.wait) for _ in range(5)]
    threads.abandon(ZeroDivisionError())
    for call in calls:
        with pytest.raises(ZeroDivisionError):
            await call
    gate.set()
    threads.close()
