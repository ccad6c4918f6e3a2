"""Sends jobs to scorers on the same host over their own sockets: a small job takes milliseconds less than by Serve's
calls. Serve's router still chooses the scorer."""

from __future__ import annotations

import asyncio
import pickle
from functools import cache
from itertools import count
from typing import Any

import ray

from serve_app.contract import JobResult, ScoreJob
from serve_app.errors import ScoringError
from serve_app.frames import ADDRESS, Frames, connected
from serve_app.frontend import replica_counts


class ConnectionLostError(Exception):
    """The scorer has ended before it answered."""


class DirectCalls:
    """The connections of one event loop to the scorers on this host."""

    def __init__(self) -> None:
        self._connections: dict[str, asyncio.Task[_Connection | None]] = {}

    async def score(self, job: ScoreJob, deployment: str) -> JobResult | None:
        """Compute ``job``; None: no scorer on this host can, or another one should.

        Raises:
            ScoringError: the scorer raised it.
            ConnectionLostError: the scorer has ended.
        """
        router = replica_counts.routers.get(deployment)
        replica = router.best(job) if router is not None else None
        if replica is None or replica.node_id != _node():
            return None
        address, name = replica.replica_metadata.get(ADDRESS), replica.replica_id.unique_id
        if address is None or replica_counts.direct[name] >= replica.max_ongoing_requests:
            return None
        with replica_counts.counted(name):
            connection = await self._connection(address)
            if connection is None:
                return None
            try:
                return await connection.score(job)
            except ConnectionLostError:
                replica_counts.lost.add(name)
                raise

    async def _connection(self, address: str) -> _Connection | None:
        """The open connection to this address; None: no scorer is there any more."""
        connecting = self._connections.get(address)
        if connecting is None:
            connecting = self._connections[address] = asyncio.create_task(_connect(address))
        if not connecting.done():
            await asyncio.wait([connecting])  # its other callers wait on when this one leaves
        connection = connecting.result()
        if connection is not None and connection.open:
            return connection
        if self._connections.get(address) is connecting:
            del self._connections[address]
        return None


async def _connect(address: str) -> _Connection | None:
    connection = _Connection()
    try:
        own = await connected(address)
    except OSError:
        return None
    await asyncio.get_running_loop().create_unix_connection(lambda: connection.frames, sock=own)
    return connection


class _Connection:
    """A connection to one scorer."""

    def __init__(self) -> None:
        self._numbers = count()
        self._waiting: dict[int, asyncio.Future[JobResult]] = {}
        self.open = True
        self.frames = Frames(self._received, self._lost)

    async def score(self, job: ScoreJob) -> JobResult:
        number = next(self._numbers)
        answer: asyncio.Future[JobResult] = asyncio.get_running_loop().create_future()
        self._waiting[number] = answer
        self.frames.send(number, pickle.dumps(job, pickle.HIGHEST_PROTOCOL))
        try:
            return await answer
        finally:
            del self._waiting[number]
            if answer.cancelled():
                self.frames.send(number, b"")

    def _received(self, number: int, content: bytes) -> None:
        waiting = self._waiting.get(number)
        if waiting is None or waiting.done():
            return
        answer: JobResult | ScoringError = pickle.loads(content)
        if isinstance(answer, ScoringError):
            waiting.set_exception(answer)
        else:
            waiting.set_result(answer)

    def _lost(self) -> None:
        self.open = False
        for waiting in self._waiting.values():
            if not waiting.done():
                waiting.set_exception(ConnectionLostError("its connection ended"))


@cache
def _node() -> Any:
    return ray.get_runtime_context().get_node_id()
