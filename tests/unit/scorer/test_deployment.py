"""The scorer's class without Ray: of a replica, Serve's batching needs only its context."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from ray import serve

from serve_app.contract import BatchResult, EngineStats, JobResult, ModelInfo, ScoreJob, TokenBatch
from serve_app.errors import DeadlineExceededError, InternalError, OverloadedError
from serve_app.scorer import deployment, speed
from serve_app.scorer.deployment import MAX_ONGOING, Scorer
from serve_app.scorer.dispatcher import Dispatcher
from serve_app.scorer.engines import load_engine
from serve_app.scorer.fake_engine import FakeEngine
from serve_app.settings import Limits, ModelSettings
from tests.batches import batch_of
from tests.stubs import HeldEngine
from tests.tiny import make_llama

SPEED = 20_000.0
"""Tokens a second, used in place of a measurement."""


@pytest.fixture(autouse=True)
def replica_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give the test what a replica has: a context, and a process in which the batching is unused."""
    batching = Scorer._intake._get_max_batch_size.__self__
    monkeypatch.setattr(batching, "_queue", None)
    config = SimpleNamespace(max_ongoing_requests=MAX_ONGOING)
    monkeypatch.setattr(serve, "get_replica_context", lambda: SimpleNamespace(_deployment_config=config))


@asynccontextmanager
async def started(engine: FakeEngine, settings: ModelSettings | None = None) -> AsyncIterator[Any]:
    replica = Scorer.__new__(Scorer)
    await replica.__init__(settings or ModelSettings(engine="fake"), lambda _: engine, lambda _: SPEED)
    try:
        yield replica
    finally:
        if isinstance(engine, HeldEngine):
            engine.gate.set()
        await replica._queue.close()
        # Only Serve's batching outlives its replica.
        for task in asyncio.all_tasks() - {asyncio.current_task()}:
            task.cancel()


async def until(condition: Callable[[], bool]) -> None:
    while not condition():  # noqa: ASYNC110 - there is no event to wait for
        await asyncio.sleep(0.001)


def job(*rows: list[int], deadline: float | None = None) -> ScoreJob:
    return ScoreJob("r", batch_of(rows), deadline)


async def test_concurrent_calls_each_get_their_own_answer():
    jobs = [job([i], [i, i]) for i in range(100)]
    async with started(FakeEngine()) as replica:
        answers = await asyncio.gather(*map(replica.score, jobs))
        assert (await replica.stats()).sequences == 200
    for asked, answer in zip(jobs, answers, strict=True):
        np.testing.assert_array_equal(answer.result.values, FakeEngine().score(asked.batch).values)


async def test_info_is_the_engines():
    async with started(FakeEngine(vocab_size=77)) as replica:
        assert (await replica.info()).vocab_size == 77


async def test_the_intake_does_not_wait_for_the_device():
    engine = HeldEngine()
    async with started(engine) as replica:
        calls = [asyncio.create_task(replica.score(job([i]))) for i in range(200)]
        await until(lambda: replica._queue.stats().queued_jobs == 200)
        await replica.check_health()
        engine.gate.set()
        await asyncio.gather(*calls)


async def one_leaves(leave: Callable[[Any, asyncio.Task[JobResult]], Awaitable[None]]) -> None:
    """Check that a waiting call that ``leave`` cancels is never computed; it has two sequences."""
    engine = HeldEngine()
    async with started(engine) as replica:
        first = asyncio.create_task(replica.score(job([1])))
        await until(lambda: replica._queue.stats().queued_jobs == 1)
        left = asyncio.create_task(replica.score(ScoreJob("left", job([2], [3]).batch)))
        await leave(replica, left)
        with pytest.raises(asyncio.CancelledError):
            await left
        engine.gate.set()
        await first
        await replica.score(job([4]))
    assert engine.scored == [1, 1]


async def test_a_cancelled_call_removes_its_queued_work():
    async def leave(replica: Any, left: asyncio.Task[JobResult]) -> None:
        await until(lambda: replica._queue.stats().queued_jobs == 2)
        left.cancel()

    await one_leaves(leave)


async def test_a_call_cancelled_before_the_intake_never_reaches_the_queue():
    engine = HeldEngine()
    async with started(engine) as replica:
        left = asyncio.create_task(replica.score(job([2], [3])))
        await asyncio.sleep(0)
        left.cancel()
        with pytest.raises(asyncio.CancelledError):
            await left
        engine.gate.set()
        await replica.score(job([4]))
    assert engine.scored == [1]


async def test_a_call_cancelled_within_the_intake_removes_its_work(monkeypatch: pytest.MonkeyPatch):
    submit = Dispatcher.submit
    callers: list[asyncio.Task[JobResult]] = []

    def cancel_the_caller(queue: Dispatcher, asked: ScoreJob, answer: Any) -> None:
        submit(queue, asked, answer)
        if asked.request_id == "left":
            callers[0].cancel()

    async def leave(_: Any, left: asyncio.Task[JobResult]) -> None:
        callers.append(left)

    monkeypatch.setattr(Dispatcher, "submit", cancel_the_caller)
    await one_leaves(leave)


async def test_errors_reach_their_caller_only():
    engine = HeldEngine()
    settings = ModelSettings(engine="fake", limits=Limits(max_queued_tokens=10))
    async with started(engine, settings) as replica:
        busy = asyncio.create_task(replica.score(job([1])))
        await until(lambda: replica._queue.stats().queued_jobs == 1)
        calls = [replica.score(job([1] * 8)), replica.score(job([2] * 8)), replica.score(job([3], deadline=1.0))]
        waiting = asyncio.gather(*calls, return_exceptions=True)
        await asyncio.sleep(0.05)
        engine.gate.set()
        kept, refused, late = await waiting
        await busy
    assert len(kept.result.values) == 2
    assert isinstance(refused, OverloadedError)
    assert isinstance(late, DeadlineExceededError)


async def test_a_job_that_cannot_be_queued_harms_only_its_caller(monkeypatch: pytest.MonkeyPatch):
    submit = Dispatcher.submit

    def picky(queue: Dispatcher, asked: ScoreJob, answer: Any) -> None:
        if asked.request_id == "bad":
            raise ValueError("not a batch")
        submit(queue, asked, answer)

    monkeypatch.setattr(Dispatcher, "submit", picky)
    async with started(FakeEngine()) as replica:
        bad = ScoreJob("bad", job([1]).batch)
        good, failed = await asyncio.gather(replica.score(job([1])), replica.score(bad), return_exceptions=True)
        assert len(good.result.values) == 2
        assert isinstance(failed, ValueError)
        await replica.check_health()


class EndedError(Exception):
    """Raised in place of the process's end."""


async def ending(call: Awaitable[Any]) -> str:
    """Make a call that ends the process. Returns the message that the replica logs."""
    said: list[str] = []

    def end(_status: int) -> None:
        raise EndedError

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(deployment.os, "_exit", end)
        patch.setattr(deployment.logging, "shutdown", lambda: None)
        patch.setattr(deployment.logger, "critical", lambda message, fault: said.append(message % fault))
        with pytest.raises(EndedError):
            await call
    return said[0]


async def test_a_replica_with_a_stuck_intake_ends_itself(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(deployment, "INTAKE_LIMIT_S", 0.02)
    async with started(FakeEngine()) as replica:
        await replica.check_health()
        await replica.score(job([1]))
        # After a fault in Serve's batching its task is dead, and calls wait for ever.
        (batching,) = [task for task in asyncio.all_tasks() if "_process_batches" in repr(task)]
        batching.cancel()
        assert "was not queued" in await ending(replica.score(job([1])))
        assert "was not queued" in await ending(replica.check_health())


class LimitedEngine(FakeEngine):
    """An engine that keeps the timeout that it was given last."""

    stall_s: float

    def set_batch_timeout(self, stall_s: float) -> None:
        self.stall_s = stall_s


class BrokenEngine(FakeEngine):
    """An engine that raises until ``broken`` is False."""

    broken = True

    def score(self, batch: TokenBatch) -> BatchResult:
        if self.broken:
            raise RuntimeError("the device is lost")
        return super().score(batch)


async def test_health_fails_when_every_batch_does_and_recovers_with_the_next_good_one():
    engine = BrokenEngine()
    async with started(engine) as replica:
        for _ in range(deployment.BROKEN_AFTER):
            await replica.check_health()
            with pytest.raises(InternalError):
                await replica.score(job([1]))
        with pytest.raises(RuntimeError, match="failed on the last 5 batches"):
            await replica.check_health()
        engine.broken = False
        await replica.score(job([1]))
        await replica.check_health()


async def test_a_replica_with_a_stopped_queue_ends_with_its_waiting_jobs():
    engine = HeldEngine()
    async with started(engine) as replica:
        computing = asyncio.create_task(replica.score(job([1])))
        await until(lambda: replica._queue.stats().queued_jobs == 1)
        waiting = asyncio.create_task(ending(replica.score(job([2]))))
        await until(lambda: replica._queue.stats().queued_jobs == 2)
        replica._queue._threads.shutdown(wait=False)
        engine.gate.set()
        await computing
        assert "dispatcher has stopped" in await waiting
        assert "dispatcher has stopped" in await ending(replica.check_health())


async def test_a_replica_with_a_hanging_device_ends_itself():
    engine = HeldEngine()
    async with started(engine, ModelSettings(engine="fake", stall_s=0.05)) as replica:
        call = asyncio.create_task(replica.score(job([1])))
        await asyncio.sleep(0.01)
        await replica.check_health()
        await asyncio.sleep(0.1)
        assert "stall_s is 0.05" in await ending(replica.check_health())
        engine.gate.set()
        await call
        await replica.check_health()


async def test_the_event_loop_is_free_while_the_engine_loads():
    gate = threading.Event()

    def load(_: ModelSettings) -> FakeEngine:
        assert gate.wait(30)
        return FakeEngine()

    replica = Scorer.__new__(Scorer)
    loading = asyncio.create_task(replica.__init__(ModelSettings(engine="fake"), load))
    await asyncio.sleep(0.01)
    gate.set()
    await loading
    await replica._queue.close()


async def test_a_failure_to_load_reaches_serve():
    def load(_: ModelSettings) -> FakeEngine:
        raise ValueError("no such model")

    replica = Scorer.__new__(Scorer)
    with pytest.raises(ValueError, match="no such model"):
        await replica.__init__(ModelSettings(engine="fake"), load)


def test_the_fake_engine_is_loaded_by_name():
    assert load_engine(ModelSettings(engine="fake")).info.platform == "none"


@pytest.mark.heavy
def test_the_models_engine_answers_in_the_contracts_classes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    # The model's own classes would load jax wherever they are unpickled.
    # Without the warm-up, only what this one batch needs is compiled.
    warmed: list[object] = []
    monkeypatch.setattr("model.engine.Engine.warmup", lambda engine, _progress: warmed.append(engine))
    monkeypatch.setenv("SCORE_SERVE_CACHE", str(tmp_path / "cache"))
    engine = load_engine(ModelSettings(model=str(make_llama(tmp_path / "model", context=32))))
    assert len(warmed) == 1
    assert type(engine.info) is ModelInfo
    result = engine.score(job([1, 2, 3], [4]).batch)
    assert type(result) is BatchResult
    assert type(engine.stats) is EngineStats
    assert engine.stats.compilations > 0
    assert engine.stats.computed_tokens == 4
    assert result.values.shape == (4,)
    assert (result.values < 0).all()


async def test_reconfigurable_settings_change_and_all_others_are_refused(caplog: pytest.LogCaptureFixture):
    settings = ModelSettings(engine="fake", stall_s=7, max_batch_tokens=512)
    engine = LimitedEngine()
    async with started(engine, settings) as replica:

        def now() -> tuple[float, float, int, int]:
            queue = replica._queue
            return replica._live.stall_s, engine.stall_s, queue._scheduler.max_batch_tokens, queue._max_queued_tokens

        await replica.reconfigure({"stall_s": 8, "limits": {"max_queued_tokens": 99}}, rank=0)
        assert now() == (8, 8, 512, 99)
        for wrong, named in (
            ({"stall_s": 9, "dtype": "bfloat16"}, "dtype: cannot change"),
            ({"stall_s": 9, "max_batch_tokens": 1}, "max_batch_tokens"),
            ({"stall_s": 9, "limits": {"max_prompt_tokens": 5}}, "limits.max_prompt_tokens"),
        ):
            caplog.clear()
            await replica.reconfigure(wrong, rank=0)
            assert named in caplog.text
            assert now() == (8, 8, 512, 99)
        await replica.reconfigure(None, rank=0)
        assert now() == (7, 7, 512, settings.queued_tokens(SPEED, "none"))


async def test_the_measured_speed_limits_the_queue_and_is_in_info():
    settings = ModelSettings(engine="fake", timeout_s=60)
    async with started(FakeEngine(), settings) as replica:
        assert (await replica.info()).tokens_per_s == SPEED
        assert replica._queue._max_queued_tokens == 20_000 * 60 / 2


async def test_the_queues_limit_follows_the_speed_of_its_batches(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(deployment, "REPORT_S", 0.01)
    async with started(FakeEngine(seconds_per_token=1e-6), ModelSettings(engine="fake", timeout_s=60)) as replica:
        await replica.score(job([1] * 5_000))
        assert replica._queue.tokens_per_s > SPEED
        await until(lambda: replica._queue._max_queued_tokens > SPEED * 60 / 2)


def test_the_speed_is_measured_by_a_batch():
    assert speed.measure(FakeEngine(seconds_per_token=1e-3)) == pytest.approx(1_000, rel=0.3)
    assert speed.measure(FakeEngine(context_length=16)) > 0


@pytest.mark.parametrize(
    ("limits", "tokens_per_s", "tokens"),
    [
        (Limits(), 1_850, 555_000),  # two cores: five minutes of work; 4,000,000 tokens would take 36
        (Limits(), 1e6, 4_000_000),
        (Limits(), 1, 8_192),  # one batch at least
        (Limits(max_queued_tokens=7), 1_850, 7),
    ],
)
def test_waiting_work_takes_at_most_half_a_requests_time(limits: Limits, tokens_per_s: float, tokens: int):
    assert ModelSettings(limits=limits).queued_tokens(tokens_per_s, "cpu") == tokens
