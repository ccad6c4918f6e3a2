"""Threads for work that must not hold up the event loop; a standstill of theirs is noticed."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

T = TypeVar("T")


class WatchedThreads:
    """A pool of threads that tells when it is stuck, or gone.

    Args:
        threads: at most.
        name: of each, with a number.
    """

    def __init__(self, threads: int, name: str) -> None:
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix=name)
        self._callers: set[asyncio.Future[Any]] = set()
        self._abandoned: Exception | None = None
        """What those got who waited when the pool was last given up."""
        self._given_up = False
        """It was, and has not moved since."""
        self._open: set[Future[Any]] = set()
        """Calls that wait for a thread or have one."""
        self._begun: dict[object, float] = {}
        """When each that has a thread got it."""
        self._moved = 0.0
        """When last a call was begun or ended, or came while there was none."""
        self._probe: Future[None] | None = None

    async def run(self, call: Callable[[], T]) -> T:
        """What ``call`` returns. Cancelling keeps it from being begun.

        Raises:
            RuntimeError: the pool is closed.
            Exception: ``abandon``'s, if it was called and nothing has moved since.
        """
        if self._given_up and self._abandoned:
            raise self._abandoned.with_traceback(None)
        answer = asyncio.wrap_future(self._submit(call))
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
        """Raise ``error`` to all that wait for a call, and to all that come until a thread has begun or ended one.

        What a thread has begun goes on.
        """
        self._abandoned, self._given_up = error, True
        callers, self._callers = self._callers, set()
        for answer in callers:
            answer.cancel()

    def check(self, stall_s: float) -> None:
        """Raise RuntimeError when the pool is gone, when one call has run for more than ``stall_s``, or when calls wait
        and none was begun or ended for as long.

        It also gives the threads something to do, of which the next check sees whether it was done.
        """
        if self._probe is None or self._probe.done():
            self._probe = self._submit(lambda: None)
        stalled = self.stalled_seconds()
        if stalled > stall_s:
            raise RuntimeError(f"a thread has not finished a call for {stalled:.0f} s; stall_s is {stall_s:g}")

    def stalled_seconds(self) -> float:
        """How long the longest call has run, or nothing has moved though there are calls; 0.0 without any."""
        if not self._open:
            return 0.0
        return time.monotonic() - min([self._moved, *self._begun.values()])

    def close(self) -> None:
        """Stop when the calls that run are done; those that wait are cancelled."""
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
