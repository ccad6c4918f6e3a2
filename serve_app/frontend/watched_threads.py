"""Threads for work that would block the event loop, with a check whether they are stuck."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

from serve_app.frontend.turns import Turns

T = TypeVar("T")


class WatchedThreads:
    """A pool of threads that can tell when it is stuck or gone.

    Args:
        threads: the largest number of threads.
        name: the threads' name, to which a number is added.
    """

    def __init__(self, threads: int, name: str) -> None:
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix=name)
        self._turns = Turns(threads + 1)  # no thread waits for the event loop between two calls
        self._callers: set[asyncio.Future[Any]] = set()
        self._abandoned: Exception | None = None
        """The error of the last ``abandon``, which all waiting callers got."""
        self._given_up = False
        """True from ``abandon`` until a thread begins or ends a call."""
        self._open: set[Future[Any]] = set()
        """Calls that wait or run."""
        self._begun: dict[object, float] = {}
        """When each running call began."""
        self._moved = 0.0
        """When a call last began or ended, or arrived when there was no other."""
        self._probe: Future[None] | None = None

    @property
    def idle(self) -> bool:
        """Whether no call waits or runs."""
        return not self._open

    async def run(self, call: Callable[[], T], tenant: str = "") -> T:
        """Run ``call`` in a thread and return its result. Cancelling prevents a call that waits from starting.

        Args:
            tenant: the calls of different tenants go in turn.

        Raises:
            RuntimeError: the pool is closed.
            Exception: the error of ``abandon``, until a thread begins or ends a call.
        """
        if self._given_up and self._abandoned:
            raise self._abandoned.with_traceback(None)
        turn = self._turns.ask(tenant)
        try:
            await self._unless_abandoned(turn)
            return await self._unless_abandoned(asyncio.wrap_future(self._submit(call)))
        finally:
            self._turns.leave(turn)

    async def _unless_abandoned(self, answer: asyncio.Future[T]) -> T:
        self._callers.add(answer)
        try:
            return await answer
        except asyncio.CancelledError:
            if self._abandoned is None or answer in self._callers:
                raise
            raise self._abandoned.with_traceback(None) from None
        finally:
            self._callers.discard(answer)

    def abandon(self, error: Exception) -> None:
        """Raise ``error`` in all callers that wait, and in new ones until a thread has begun or ended a call.

        Running calls go on.
        """
        self._abandoned, self._given_up = error, True
        callers, self._callers = self._callers, set()
        for answer in callers:
            answer.cancel()

    def check(self, stall_s: float) -> None:
        """Raise RuntimeError when the pool is gone, when one call has run for more than ``stall_s``, or when calls wait
        and none has begun or ended for as long.

        It also submits an empty call, and the next check sees whether that was done.
        """
        if self._probe is None or self._probe.done():
            self._probe = self._submit(lambda: None)
        stalled = self.stalled_seconds()
        if stalled > stall_s:
            raise RuntimeError(f"a thread has not finished a call for {stalled:.0f} s; stall_s is {stall_s:g}")

    def stalled_seconds(self) -> float:
        """Seconds for which the longest call has run, or for which calls wait and none began or ended; 0.0 without
        calls."""
        if not self._open:
            return 0.0
        return time.monotonic() - min([self._moved, *self._begun.values()])

    def close(self) -> None:
        """Stop when the running calls are done. Calls that wait are cancelled."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _submit(self, call: Callable[[], T]) -> Future[T]:
        if not self._open:
            self._moved = time.monotonic()
        future = self._pool.submit(self._watched, call)
        self._open.add(future)
        future.add_done_callback(self._open.discard)
        return future

    def _watched(self, call: Callable[[], T]) -> T:
        this = object()
        self._moved = self._begun[this] = time.monotonic()
        self._given_up = False
        try:
            return call()
        finally:
            del self._begun[this]
            self._moved = time.monotonic()
            self._given_up = False
