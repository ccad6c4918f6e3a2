"""Jobs over sockets between a front end and the scorers of its host, both ends in this process."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import uvloop

from serve_app import frames
from serve_app.contract import JobResult, ScoreJob
from serve_app.errors import InternalError, OverloadedError
from serve_app.frames import ADDRESS
from serve_app.frontend import direct, replica_counts
from serve_app.frontend.direct import ConnectionLostError
from serve_app.scorer.deployment import Scorer
from serve_app.scorer.direct import DirectCalls
from serve_app.scorer.fake_engine import FakeEngine
from serve_app.settings import ModelSettings
from tests.batches import batch_of

HERE = "this node"


def job(*rows: list[int]) -> ScoreJob:
    return ScoreJob("r", batch_of(rows))


async def computed(asked: ScoreJob) -> JobResult:
    await asyncio.sleep(0)
    return JobResult(FakeEngine().score(asked.batch), 0.0, 0.0)


class Front:
    """A front end whose router always chooses one replica."""

    def __init__(self, address: str | None) -> None:
        replica = SimpleNamespace(
            node_id=HERE,
            replica_id=SimpleNamespace(unique_id="replica"),
            replica_metadata={} if address is None else {ADDRESS: address},
            max_ongoing_requests=100,
        )
        self.replica = replica
        self.calls = direct.DirectCalls()

    async def score(self, asked: ScoreJob) -> JobResult | None:
        return await self.calls.score(asked, "scorers")


@asynccontextmanager
async def connected(
    score: Callable[[ScoreJob], Any], monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[tuple[Front, DirectCalls]]:
    server = DirectCalls(score)
    front = Front(await server.listen())
    monkeypatch.setattr(direct, "_node", lambda: HERE)
    router = SimpleNamespace(running=1, best=lambda _: front.replica)
    monkeypatch.setitem(replica_counts.routers, "scorers", router)
    monkeypatch.setattr(replica_counts, "lost", set())
    yield front, server
    await server.close()
    await asyncio.sleep(0.01)  # both ends notice
    assert not replica_counts.direct


async def test_each_job_gets_its_own_answer_however_large(monkeypatch: pytest.MonkeyPatch):
    await each_gets_its_own(monkeypatch)


def test_they_do_in_the_loop_that_serves_replicas_have(monkeypatch: pytest.MonkeyPatch):
    uvloop.run(each_gets_its_own(monkeypatch))


async def each_gets_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = [job([i], [i, i]) for i in range(50)] + [job(*[[i] * 2_000 for i in range(500)])]
    async with connected(computed, monkeypatch) as (front, server):
        answers = await asyncio.gather(*map(front.score, jobs))
        assert server.begun == len(jobs)
    for asked, answer in zip(jobs, answers, strict=True):
        assert answer is not None
        np.testing.assert_array_equal(answer.result.values, FakeEngine().score(asked.batch).values)


async def test_the_services_errors_come_as_they_were_and_a_fault_reveals_nothing(monkeypatch: pytest.MonkeyPatch):
    errors = [OverloadedError("full", retry_after_s=9), ValueError("/secret")]

    async def failing(_: ScoreJob) -> JobResult:
        raise errors.pop(0)

    async with connected(failing, monkeypatch) as (front, _):
        with pytest.raises(OverloadedError, match="full") as refused:
            await front.score(job([1]))
        assert refused.value.retry_after_s == 9
        with pytest.raises(InternalError) as failed:
            await front.score(job([1]))
        assert "secret" not in str(failed.value)


class Held:
    """Scores nothing until ``gate`` opens."""

    def __init__(self) -> None:
        self.gate = asyncio.Event()
        self.entered = asyncio.Event()
        self.cancelled = asyncio.Event()

    async def __call__(self, asked: ScoreJob) -> JobResult:
        self.entered.set()
        try:
            await self.gate.wait()
        except asyncio.CancelledError:
            self.cancelled.set()
            raise
        return await computed(asked)


async def test_the_job_of_a_caller_that_leaves_is_cancelled(monkeypatch: pytest.MonkeyPatch):
    held = Held()
    async with connected(held, monkeypatch) as (front, _):
        leaving, staying = asyncio.create_task(front.score(job([1]))), asyncio.create_task(front.score(job([2])))
        await held.entered.wait()
        leaving.cancel()
        await held.cancelled.wait()
        held.gate.set()
        assert await staying is not None


async def test_the_jobs_of_a_front_end_that_ends_are_cancelled(monkeypatch: pytest.MonkeyPatch):
    held = Held()
    async with connected(held, monkeypatch) as (front, _):
        asked = asyncio.create_task(front.score(job([1])))
        await held.entered.wait()
        (connecting,) = front.calls._connections.values()
        connection = connecting.result()
        assert connection is not None
        connection.frames.close()
        await held.cancelled.wait()
        with pytest.raises(ConnectionLostError):
            await asked
        assert replica_counts.lost == {"replica"}


async def test_a_scorer_that_stops_answers_what_it_has_begun(monkeypatch: pytest.MonkeyPatch):
    held = Held()
    async with connected(held, monkeypatch) as (front, server):
        asked = asyncio.create_task(front.score(job([1])))
        await held.entered.wait()
        stopping = asyncio.create_task(server.close())
        late = asyncio.create_task(front.score(job([2])))
        await asyncio.sleep(0.05)
        assert not stopping.done()
        held.gate.set()
        assert await asked is not None
        assert await late is not None
        await stopping
        await asyncio.sleep(0.01)
        assert await front.score(job([1])) is None  # Serve's call finds another one


async def test_jobs_for_other_hosts_and_for_full_or_unknown_scorers_are_left_to_serve(monkeypatch: pytest.MonkeyPatch):
    async with connected(computed, monkeypatch) as (front, server):
        for change in ({"node_id": "another"}, {"max_ongoing_requests": 0}, {"replica_metadata": {}}):
            with monkeypatch.context() as patch:
                for name, value in change.items():
                    patch.setattr(front.replica, name, value)
                assert await front.score(job([1])) is None
        assert await front.calls.score(job([1]), "others") is None
        assert server.begun == 0
        front.replica.replica_metadata = {ADDRESS: "\0nobody"}
        assert await front.score(job([1])) is None


async def test_another_user_is_refused(monkeypatch: pytest.MonkeyPatch):
    async with connected(computed, monkeypatch) as (front, server):
        mine = frames.os.geteuid()
        monkeypatch.setattr(frames.os, "geteuid", lambda: mine + 1)
        assert await front.score(job([1])) is None
        assert server.begun == 0


async def test_a_replica_that_had_a_direct_call_is_not_idle(monkeypatch: pytest.MonkeyPatch):
    """Serve does not count these calls, and would stop the last replica under few small requests."""
    replica: Any = Scorer.__new__(Scorer)
    await replica.__init__(ModelSettings(engine="fake"), lambda _: FakeEngine(), lambda _: 20_000.0)
    front = Front((await replica.record_replica_metadata())[ADDRESS])
    monkeypatch.setattr(direct, "_node", lambda: HERE)
    router = SimpleNamespace(running=1, best=lambda _: front.replica)
    monkeypatch.setitem(replica_counts.routers, "scorers", router)
    monkeypatch.setattr(replica, "_intake", lambda call: _queue(replica, call))
    assert await replica.record_autoscaling_stats() == {"pending_tokens": 0}
    assert await front.score(job([1, 2])) is not None
    assert await replica.record_autoscaling_stats() == {"pending_tokens": 1}
    assert await replica.record_autoscaling_stats() == {"pending_tokens": 0}
    await replica.__del__()
    await replica._queue.close()
    replica._reporting.cancel()


async def _queue(replica: Any, call: Any) -> None:
    replica._queue.submit(call.job, call.answer)
