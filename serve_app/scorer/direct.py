"""Answers the jobs of front ends on the same host, which they send here without Serve's own calls."""

from __future__ import annotations

import asyncio
import logging
import pickle
import sys
import time
from collections.abc import Awaitable, Callable

from serve_app.contract import JobResult, ScoreJob
from serve_app.errors import InternalError, ScoringError
from serve_app.frames import Frames, listening

logger = logging.getLogger("ray.serve")


class DirectCalls:
    """A socket for jobs, and the jobs that came over it and are not answered.

    Args:
        score: computes a job; it is cancelled when the caller has left.
    """

    def __init__(self, score: Callable[[ScoreJob], Awaitable[JobResult]]) -> None:
        self._score = score
        self._server: asyncio.Server | None = None
        self._connections: set[_Connection] = set()
        self._calls: set[asyncio.Task[None]] = set()
        self.begun = 0
        """Number of jobs that came so far."""

    async def listen(self) -> str | None:
        """Begin to listen, and return the address; None: this system has no such sockets."""
        if sys.platform != "linux":
            return None
        own, address = listening()
        self._server = await asyncio.get_running_loop().create_unix_server(lambda: _Connection(self).frames, sock=own)
        return address

    async def close(self) -> None:
        """Wait until all jobs are answered, then end the connections.

        Jobs that come meanwhile are computed, too: a front end may hear late that this replica is stopping.
        """
        while self._calls:
            await asyncio.wait(self._calls)
        if self._server is not None:
            self._server.close()
        for connection in list(self._connections):
            connection.frames.close()

    def opened(self, connection: _Connection) -> None:
        self._connections.add(connection)

    def closed(self, connection: _Connection) -> None:
        self._connections.discard(connection)

    def begin(self, frames: Frames, number: int, job: ScoreJob) -> asyncio.Task[None]:
        """Start a job."""
        self.begun += 1
        call = asyncio.create_task(self._answer(frames, number, job))
        self._calls.add(call)
        call.add_done_callback(self._calls.discard)
        return call

    async def _answer(self, frames: Frames, number: int, job: ScoreJob) -> None:
        began = time.monotonic()
        answer: JobResult | ScoringError
        try:
            answer = await self._score(job)
        except ScoringError as error:
            answer = error
        except Exception:
            logger.exception("request %s: the scorer failed", job.request_id)
            answer = InternalError("the scorer failed on this request; the server's log has more")
        frames.send(number, pickle.dumps(answer, pickle.HIGHEST_PROTOCOL))
        outcome = "OK" if isinstance(answer, JobResult) else type(answer).__name__
        # As Serve logs its own calls.
        about = {"request_id": job.request_id, "serve_access_log": True}
        logger.info("CALL score %s %.1fms", outcome, 1e3 * (time.monotonic() - began), extra=about)


class _Connection:
    """One front end's connection. A message is a job, or, if it is empty, says that the job's caller has left."""

    def __init__(self, calls: DirectCalls) -> None:
        self._calls = calls
        self._running: dict[int, asyncio.Task[None]] = {}
        self.frames = Frames(self._received, self._lost)
        calls.opened(self)

    def _received(self, number: int, content: bytes) -> None:
        if content:
            call = self._running[number] = self._calls.begin(self.frames, number, pickle.loads(content))
            call.add_done_callback(lambda _: self._running.pop(number, None))
        elif call := self._running.get(number):
            call.cancel()

    def _lost(self) -> None:
        self._calls.closed(self)
        for call in self._running.values():
            call.cancel()
