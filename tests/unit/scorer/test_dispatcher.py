"""The dispatcher of device batches, with engines that tests can hold, break and watch."""

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve_app.batches import join
from serve_app.contract import EVERYONE, BatchResult, JobResult, ScoreJob, Share, TokenBatch
from serve_app.errors import DeadlineExceededError, InternalError, OverloadedError
from serve_app.scorer.dispatcher import Dispatcher, _Part
from serve_app.scorer.fake_engine import FakeEngine
from serve_app.scorer.speed import Speed
from serve_app.settings import ModelSettings
from tests.batches import batch_of, sequences_of
from tests.stubs import HeldEngine

POISON = 666


class WatchedEngine(HeldEngine):
    """An engine that raises on ``POISON``. Its gate is open."""

    def __init__(self, seconds_per_token: float = 0.0) -> None:
        super().__init__(nan_token=667, seconds_per_token=seconds_per_token)
        self.batches: list[TokenBatch] = []
        """Batches in the order in which the queue formed them; its two threads may call the engine in another."""
        self.gate.set()
        self.threads: set[str] = set()

    def score(self, batch: TokenBatch) -> BatchResult:
        self.threads.add(threading.current_thread().name)
        result = super().score(batch)
        if POISON in batch.tokens:
            raise RuntimeError("device fault")
        return result


class WatchedQueue(Dispatcher):
    """A dispatcher that adds each batch to its engine's ``batches``."""

    async def _compute(self, parts: Sequence[_Part]) -> None:
        if isinstance(self._engine, WatchedEngine):
            self._engine.batches.append(join([part.batch() for part in parts]))
        await super()._compute(parts)


@asynccontextmanager
async def opened(engine: FakeEngine, *, budget: int = 64, queued: int = 10_000) -> AsyncIterator[Dispatcher]:
    queue = WatchedQueue(engine, max_batch_tokens=budget, max_queued_tokens=queued)
    try:
        yield queue
    finally:
        if isinstance(engine, WatchedEngine):
            engine.gate.set()
        await queue.close()


async def test_the_fill_of_each_batch_is_observed():
    fills: list[float] = []
    queue = Dispatcher(FakeEngine(), max_batch_tokens=64, max_queued_tokens=1_000, observe=fills.append)
    asked = [ask(queue, batch_of([[1, 2, 3], [1, 2, 4]])), ask(queue, batch_of([[5] * 40] * 3))]
    answers = await asyncio.gather(*asked)
    await queue.close()
    computed = sum(answer.result.computed_tokens.sum() for answer in answers)
    assert sum(fills) == pytest.approx(computed / 64)
    assert all(0 < fill <= 1 for fill in fills)


def ask(
    queue: Dispatcher,
    batch: TokenBatch,
    *,
    deadline: float | None = None,
    request_id: str = "r",
    share: Share = EVERYONE,
) -> asyncio.Future[JobResult]:
    answer: asyncio.Future[JobResult] = asyncio.get_running_loop().create_future()
    queue.submit(ScoreJob(request_id, batch, deadline, share=share), answer)
    return answer


async def hold(engine: WatchedEngine, queue: Dispatcher) -> asyncio.Future[JobResult]:
    """Keep the device busy until the gate opens. Returns the answer of the job that does."""
    engine.gate.clear()
    engine.entered.clear()
    busy = ask(queue, batch_of([[9]]))
    assert await asyncio.to_thread(engine.entered.wait, 30)
    engine.batches.clear()
    return busy


async def formed(engine: WatchedEngine, batches: int) -> None:
    """Wait until so many batches have been formed since ``hold``."""
    while len(engine.batches) < batches:  # noqa: ASYNC110 - a few turns of the loop
        await asyncio.sleep(0)


async def test_a_job_gets_the_values_that_it_has_alone():
    engine = FakeEngine()
    big = batch_of([[1, 2, 3, i] for i in range(100)])
    small = batch_of([[5, 6], [7]], labels=(3,))
    async with opened(engine) as queue:
        answers = await asyncio.gather(ask(queue, big), ask(queue, small))
    for job, answer in zip([big, small], answers, strict=True):
        np.testing.assert_array_equal(answer.result.values, engine.score(job).values)
        assert answer.result.values.dtype == np.float32
        assert len(answer.result.computed_tokens) == job.num_sequences
    assert answers[0].device_seconds > 0
    assert answers[0].queue_seconds >= 0


@pytest.mark.parametrize("length", [30, 40, 60, 64, 200])
async def test_a_job_that_fills_much_of_a_batch_does_not_wait_for_a_large_one(length: int):
    engine = WatchedEngine()
    async with opened(engine, budget=64, queued=20_000) as queue:
        busy = await hold(engine, queue)
        big = ask(queue, batch_of([[i, 1, 2] for i in range(1_000, 6_000)]))
        await formed(engine, 1)
        small = ask(queue, batch_of([[7] * length]))
        engine.gate.set()
        await asyncio.gather(busy, small)
        assert not big.done()
        assert any([7] * length in sequences_of(batch) for batch in engine.batches[1:3])
        await big


async def test_a_batch_that_leaves_out_a_small_job_is_smaller():
    engine = WatchedEngine()
    async with opened(engine, budget=64, queued=20_000) as queue:
        busy = await hold(engine, queue)
        big = ask(queue, batch_of([[i] for i in range(1_000, 2_000)]))
        await formed(engine, 1)
        small = [ask(queue, batch_of([[7] * 25 + [i]])) for i in range(3)]
        engine.gate.set()
        await asyncio.gather(busy, *small, big)
    # A turn of the large job is one sequence and a quarter of a batch.
    assert [len(batch.tokens) for batch in engine.batches[1:4]] == [17 + 26, 17 + 26, 64]


async def test_a_big_job_is_not_starved_by_a_stream_of_small_ones():
    engine = WatchedEngine()
    async with opened(engine, budget=64) as queue:
        big = ask(queue, batch_of([[1_000 + i] * 60 for i in range(10)]))
        small = 0

        async def client() -> None:
            nonlocal small
            while not big.done():
                await ask(queue, batch_of([[1, 2, 3, 4]]))
                small += 1

        await asyncio.gather(big, *(client() for _ in range(20)))
    # New jobs go before a sequence that fills a batch, but not twice in a row.
    assert 0 < small <= 2 * 10 * 20 + 20


@pytest.mark.parametrize(("platform", "batches"), [("tpu", 1), ("gpu", 1), ("cpu", 2)])
async def test_500_items_of_20_tokens_are_one_batch_of_an_accelerator(platform: str, batches: int):
    engine = WatchedEngine()
    budget = ModelSettings().batch_tokens(platform)
    queue = WatchedQueue(engine, max_batch_tokens=budget, max_queued_tokens=100_000, tokens_per_s=100_000)
    query = [i % 500 for i in range(2_000)]
    await ask(queue, batch_of([[*query, 1_000 + i, *range(19)] for i in range(500)]))
    assert len(engine.batches) == batches
    await queue.close()


async def test_a_batch_is_about_a_second_at_the_measured_speed():
    engine = WatchedEngine(seconds_per_token=1e-3)
    queue = WatchedQueue(engine, max_batch_tokens=8_192, max_queued_tokens=100_000, tokens_per_s=200)
    await ask(queue, batch_of([[i, 1] for i in range(1_000, 2_500)]))
    tokens = [len(batch.tokens) for batch in engine.batches]
    assert tokens[0] <= 200
    # The engine does 1,000 tokens a second: the dispatcher learns this, and does not exceed it by much.
    assert 500 < max(tokens) < 1_500
    await queue.close()


async def test_the_second_batch_is_formed_late_so_that_it_holds_new_jobs():
    engine = WatchedEngine()
    queue = WatchedQueue(engine, max_batch_tokens=8_192, max_queued_tokens=100_000, tokens_per_s=2_000)
    engine.gate.clear()
    large = ask(queue, batch_of([[1_000 + i, 1] for i in range(5_000)]))
    assert await asyncio.to_thread(engine.entered.wait, 30)
    await asyncio.sleep(0.2)
    assert len(engine.batches) == 1
    small = ask(queue, batch_of([[7]]))
    await formed_by(engine, 2)
    assert [7] in sequences_of(engine.batches[1])
    engine.gate.set()
    await asyncio.gather(large, small)
    await queue.close()


async def test_a_long_sequence_is_prefilled_in_pieces_and_small_jobs_go_between(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Speed, "measured", lambda *_: None)
    engine = WatchedEngine()
    queue = WatchedQueue(engine, max_batch_tokens=8_192, max_queued_tokens=100_000, tokens_per_s=1_100)
    engine.gate.clear()
    long = batch_of([[i % 500 for i in range(8_000)]])
    answer = ask(queue, long)
    assert await asyncio.to_thread(engine.entered.wait, 30)
    small = ask(queue, batch_of([[7]]))
    engine.gate.set()
    await small
    assert not answer.done()
    result = (await answer).result
    await queue.close()
    np.testing.assert_array_equal(result.values, FakeEngine().score(long).values)
    ahead = [batch for batch in engine.batches if batch.keep]
    assert [len(batch.tokens) for batch in ahead] == [1_024 * (i + 1) for i in range(7)]
    assert all(len(batch.read_positions) == 0 for batch in ahead)
    [last] = [batch for batch in engine.batches if not batch.keep and len(batch.tokens) > 1]
    np.testing.assert_array_equal(last.tokens, long.tokens)
    order = [len(batch.tokens) for batch in engine.batches]
    assert order.index(1) <= 2


async def test_two_long_sequences_take_turns_with_their_pieces(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Speed, "measured", lambda *_: None)
    engine = WatchedEngine()
    queue = WatchedQueue(engine, max_batch_tokens=8_192, max_queued_tokens=100_000, tokens_per_s=1_100)
    engine.gate.clear()
    long = [ask(queue, batch_of([[i] * 5_000])) for i in (1, 2)]
    assert await asyncio.to_thread(engine.entered.wait, 30)
    engine.gate.set()
    await asyncio.gather(*long)
    await queue.close()
    assert [int(batch.tokens[0]) for batch in engine.batches if batch.keep] == [1, 2] * 4


async def formed_by(engine: WatchedEngine, batches: int) -> None:
    """Wait until so many batches have been formed; the engine takes its time."""
    while len(engine.batches) < batches:  # noqa: ASYNC110 - there is no event to wait for
        await asyncio.sleep(0.01)


async def test_jobs_of_the_two_kinds_do_not_share_a_batch_and_neither_starves():
    engine = WatchedEngine()
    async with opened(engine) as queue:
        busy = await hold(engine, queue)
        jobs = [batch_of([[i]], vocab_logprobs=i % 2 == 0) for i in range(10)]
        answers = [ask(queue, job) for job in jobs]
        engine.gate.set()
        results = await asyncio.gather(busy, *answers)
    assert [batch.vocab_logprobs for batch in engine.batches] == [True, False]
    for job, answer in zip(jobs, results[1:], strict=True):
        np.testing.assert_array_equal(answer.result.values, FakeEngine().score(job).values)


async def test_jobs_that_ask_for_the_top_token_get_it_in_their_order():
    engine = WatchedEngine()
    async with opened(engine, budget=64) as queue:
        busy = await hold(engine, queue)
        jobs = [replace(batch_of([[i, j] for j in range(20)]), argmax=i % 3 > 0) for i in range(6)]
        answers = [ask(queue, job) for job in jobs]
        engine.gate.set()
        results = await asyncio.gather(busy, *answers)
    for job, answer in zip(jobs, results[1:], strict=True):
        wanted = FakeEngine().score(job)
        assert len(wanted.argmax) == (20 if job.argmax else 0)
        for name in ("values", "argmax", "argmax_values"):
            np.testing.assert_array_equal(getattr(answer.result, name), getattr(wanted, name))


async def test_cancelled_jobs_never_reach_the_device():
    engine = WatchedEngine()
    async with opened(engine) as queue:
        busy = await hold(engine, queue)
        kept, left = ask(queue, batch_of([[1]])), ask(queue, batch_of([[2]]))
        left.cancel()
        await asyncio.sleep(0)
        assert queue.queued_tokens == 1
        engine.gate.set()
        await asyncio.gather(busy, kept)
        assert queue.stats().cancelled == 1
    assert [sequences_of(batch) for batch in engine.batches] == [[[1]]]


async def test_jobs_of_callers_that_left_take_no_room():
    engine = WatchedEngine()
    async with opened(engine, queued=100) as queue:
        busy = await hold(engine, queue)
        behind = ask(queue, batch_of([[1] * 40]))
        await formed(engine, 1)  # no further batch is formed before one of the two is done
        left = ask(queue, batch_of([[2] * 90]))
        for _ in range(10):
            await asyncio.sleep(0)
        assert queue.queued_tokens == 90
        left.cancel()
        await asyncio.sleep(0)
        assert queue.queued_tokens == 0
        kept = ask(queue, batch_of([[3] * 90]))
        engine.gate.set()
        await asyncio.gather(busy, behind, kept)


async def test_a_job_of_a_caller_that_has_left_is_not_queued():
    async with opened(FakeEngine()) as queue:
        answer: asyncio.Future[JobResult] = asyncio.get_running_loop().create_future()
        answer.cancel()
        queue.submit(ScoreJob("r", batch_of([[1]])), answer)
        assert queue.stats().queued_jobs == 0


async def test_a_job_cancelled_and_expired_in_the_same_tick_does_not_stop_the_queue():
    engine = FakeEngine()
    async with opened(engine) as queue:
        left = ask(queue, batch_of([[2]]), deadline=time.time() - 1)
        left.cancel()
        await ask(queue, batch_of([[1]]))
        assert queue.running


async def test_a_job_cancelled_on_the_device_leaves_the_rest_unharmed():
    engine = WatchedEngine()
    async with opened(engine) as queue:
        busy = await hold(engine, queue)
        busy.cancel()
        after = ask(queue, batch_of([[1]]))
        engine.gate.set()
        await after
        assert queue.stats().cancelled == 1
        assert queue.running


async def test_a_job_past_its_deadline_is_dropped_before_the_device():
    engine = WatchedEngine()
    async with opened(engine) as queue:
        busy = await hold(engine, queue)
        late = ask(queue, batch_of([[2]]), deadline=time.time() + 0.01, request_id="late-one")
        kept = ask(queue, batch_of([[1]]), deadline=time.time() + 100)
        await asyncio.sleep(0.02)
        engine.gate.set()
        await asyncio.gather(busy, kept)
        with pytest.raises(DeadlineExceededError, match="late-one"):
            await late
        assert queue.stats().expired == 1
    assert [sequences_of(batch) for batch in engine.batches] == [[[1]]]


async def test_past_the_limit_jobs_are_refused_and_later_ones_accepted():
    engine = WatchedEngine()
    async with opened(engine, queued=100) as queue:
        busy = await hold(engine, queue)
        kept = ask(queue, batch_of([[1] * 90]))
        refused = ask(queue, batch_of([[2] * 20]))
        with pytest.raises(OverloadedError, match=r"90 tokens are queued and this request adds 20.*100") as caught:
            await refused
        assert 1 <= (caught.value.retry_after_s or 0) <= 60
        assert queue.stats().refused == 1
        engine.gate.set()
        await asyncio.gather(busy, kept)
        await ask(queue, batch_of([[2] * 20]))


async def test_a_tenant_that_floods_the_queue_neither_keeps_another_out_nor_makes_it_wait():
    engine, flood, small = WatchedEngine(), Share("flood"), Share("small")
    async with opened(engine, queued=1_000) as queue:
        busy = await hold(engine, queue)
        many = [ask(queue, batch_of([[j] * 10] * 10), share=flood) for j in range(64)]
        one = ask(queue, batch_of([[7, 7], [8, 8]]), share=small)
        await asyncio.sleep(0)
        refused = [each for each in many if each.done()]
        assert 0 < len(refused) < 64
        assert all(isinstance(each.exception(), OverloadedError) for each in refused)
        engine.gate.set()
        await asyncio.gather(busy, one, *(each for each in many if each not in refused))
    first = next(number for number, batch in enumerate(engine.batches) if [7, 7] in sequences_of(batch))
    assert [8, 8] in sequences_of(engine.batches[first])
    assert first <= 2  # one was on the device, and one had been formed before it came


async def test_a_job_larger_than_the_whole_limit_is_accepted_when_nothing_waits():
    async with opened(FakeEngine(), queued=10) as queue:
        await ask(queue, batch_of([[1] * 50]))


async def test_retry_after_follows_the_speed_so_far():
    engine = WatchedEngine()
    async with opened(engine, queued=2_000) as queue:
        busy = await hold(engine, queue)
        await asyncio.sleep(0.05)  # each token took at least this long
        engine.gate.set()
        await busy
        busy = await hold(engine, queue)
        kept = ask(queue, batch_of([[1] * 1_900]))
        with pytest.raises(OverloadedError) as caught:
            await ask(queue, batch_of([[2] * 200]))
        assert caught.value.retry_after_s == 60
        engine.gate.set()
        await asyncio.gather(busy, kept)


async def test_a_job_on_which_the_engine_raises_harms_only_itself():
    engine = WatchedEngine()
    async with opened(engine) as queue:
        busy = await hold(engine, queue)
        good = [batch_of([[i, i]]) for i in range(3)]
        answers = [ask(queue, good[0]), ask(queue, batch_of([[POISON]]), request_id="bad"), ask(queue, good[1])]
        engine.gate.set()
        await asyncio.gather(busy, answers[0], answers[2])
        with pytest.raises(InternalError, match="bad"):
            await answers[1]
        assert queue.stats().failed == 1
        np.testing.assert_array_equal(answers[2].result().result.values, FakeEngine().score(good[1]).values)
        await ask(queue, good[2])


async def test_a_job_that_fails_in_one_batch_is_not_computed_further():
    engine = WatchedEngine()
    async with opened(engine, budget=64) as queue:
        with pytest.raises(InternalError):
            await ask(queue, batch_of([[POISON], *[[i] * 30 for i in range(50)]]))
        await ask(queue, batch_of([[1]]))
        assert queue.stats().queued_jobs == 0
    assert len(engine.batches) == 3  # one of its batches was in the engine after the one that failed


async def test_values_that_are_not_finite_stay_with_their_sequence():
    async with opened(WatchedEngine()) as queue:
        answer = await ask(queue, batch_of([[1], [667], [2]]))
    assert np.isnan(answer.result.values).tolist() == [False, False, True, True, False, False]


async def test_a_second_batch_but_no_third_is_formed_when_half_a_batch_waits():
    engine = WatchedEngine()
    async with opened(engine, budget=64) as queue:
        busy = await hold(engine, queue)
        first = ask(queue, batch_of([[i] for i in range(31)]))
        for _ in range(10):
            await asyncio.sleep(0)
        assert queue.queued_tokens == 31
        more = ask(queue, batch_of([[i] for i in range(100, 200)]))
        await formed(engine, 1)
        assert sum(map(len, sequences_of(engine.batches[0]))) == 64
        for _ in range(10):
            await asyncio.sleep(0)
        assert queue.queued_tokens == 31 + 100 - 64
        assert queue.stats().pending_tokens == 1 + 31 + 100  # the device has not answered any
        engine.gate.set()
        await asyncio.gather(busy, first, more)
    assert engine.threads == {"device_0", "device_1"}


async def test_time_on_the_device_is_not_counted_twice():
    engine = WatchedEngine()
    began = time.monotonic()
    async with opened(engine, budget=64) as queue:
        busy = await hold(engine, queue)
        second = ask(queue, batch_of([[1] * 40]))
        await formed(engine, 1)
        await asyncio.sleep(0.1)
        engine.gate.set()
        answers = await asyncio.gather(busy, second)
        seconds = queue.stats().device_seconds
        assert 0.1 <= seconds <= time.monotonic() - began
        assert sum(answer.device_seconds for answer in answers) == pytest.approx(seconds)
        # The time that the second waits for the first is queue time, too.
        assert answers[1].queue_seconds >= 0.1 or answers[0].queue_seconds >= 0.1


async def test_a_batch_that_fails_does_not_harm_the_next_one():
    engine = WatchedEngine()
    async with opened(engine, budget=64) as queue:
        busy = await hold(engine, queue)
        bad = ask(queue, batch_of([[POISON] * 20]))
        good = [ask(queue, batch_of([[i] * 20])) for i in range(8)]
        engine.gate.set()
        await asyncio.gather(busy, *good)
        with pytest.raises(InternalError):
            await bad
        stats = queue.stats()
        assert (stats.failed, stats.queued_jobs) == (1, 0)
        assert queue.stalled_seconds() == 0.0
    for i, answer in enumerate(good):
        np.testing.assert_array_equal(answer.result().result.values, engine.score(batch_of([[i] * 20])).values)


async def test_a_job_without_sequences_is_answered():
    async with opened(FakeEngine()) as queue:
        answer = await ask(queue, batch_of([]))
        assert len(answer.result.values) == 0
        await asyncio.sleep(0)
        assert queue.stats().queued_jobs == 0


async def test_close_answers_jobs_that_wait_and_jobs_that_come_later():
    engine = WatchedEngine()
    async with opened(engine) as queue:
        busy = await hold(engine, queue)
        behind = ask(queue, batch_of([[1] * 40]))
        await formed(engine, 1)
        waiting = ask(queue, batch_of([[1]]))
        closing = asyncio.create_task(queue.close())
        for answer in (busy, behind, waiting):
            with pytest.raises(OverloadedError, match="shutting down"):
                await answer
        with pytest.raises(OverloadedError, match="shutting down"):
            await ask(queue, batch_of([[1]]))
        assert not closing.done()
        engine.gate.set()
        await closing
        assert not queue.running


async def test_a_fault_of_the_loop_stops_it_and_answers_the_jobs_that_wait():
    class Short(FakeEngine):
        def score(self, batch: TokenBatch) -> BatchResult:
            result = super().score(batch)
            return BatchResult(result.values[:-1], result.computed_tokens)

    async with opened(Short(), budget=1_000) as queue:
        with pytest.raises(OverloadedError):
            await ask(queue, batch_of([[1], [2], [3]], labels=(1, 2, 3, 4)))
        assert not queue.running
        with pytest.raises(OverloadedError):
            await ask(queue, batch_of([[1]]))


async def test_without_threads_the_queue_stops_and_says_that_another_replica_can_answer():
    async with opened(FakeEngine(), budget=1_000) as queue:
        queue._threads.shutdown()
        with pytest.raises(OverloadedError, match="shutting down"):
            await ask(queue, batch_of([[1]]))
        assert not queue.running


async def test_an_engine_that_ends_its_thread_harms_only_the_job_at_fault():
    class Leaving(FakeEngine):
        def score(self, batch: TokenBatch) -> BatchResult:
            if 13 in batch.tokens:
                raise SystemExit
            return super().score(batch)

    async with opened(Leaving(), budget=1_000) as queue:
        good, bad = ask(queue, batch_of([[1]])), ask(queue, batch_of([[13]]))
        assert len((await good).result.values) == 2
        with pytest.raises(InternalError):
            await bad
        assert queue.running


async def test_after_resizing_batches_and_the_queue_hold_so_much():
    engine = WatchedEngine()
    async with opened(engine, budget=1_000, queued=1_000) as queue:
        busy = await hold(engine, queue)
        queue.resize(max_batch_tokens=64, max_queued_tokens=100)
        first = ask(queue, batch_of([[i] * 40 for i in range(2)]))
        with pytest.raises(OverloadedError, match="the limit is 100"):
            await ask(queue, batch_of([[1] * 40]))
        engine.gate.set()
        await asyncio.gather(busy, first)
        assert queue.stats().batches == 3


async def test_stalled_seconds_grow_while_a_batch_hangs_even_when_its_callers_have_left():
    engine = WatchedEngine()
    async with opened(engine) as queue:
        assert queue.stalled_seconds() == 0.0
        busy = await hold(engine, queue)
        busy.cancel()
        await asyncio.sleep(0.05)
        assert queue.stalled_seconds() >= 0.05
        waiting = ask(queue, batch_of([[1] * 40]))
        await formed(engine, 1)
        assert queue.stalled_seconds() >= 0.05
        engine.gate.set()
        await waiting
        while queue.stats().batches < 2:  # noqa: ASYNC110 - either batch may leave the engine first
            await asyncio.sleep(0)
        assert queue.stalled_seconds() == 0.0


async def test_the_event_loop_stays_free_while_the_device_works():
    engine = WatchedEngine()
    async with opened(engine) as queue:
        busy = await hold(engine, queue)
        for _ in range(10):
            await asyncio.sleep(0)
        assert not busy.done()
        engine.gate.set()
        await busy


async def test_jobs_wait_until_something_of_them_has_gone_to_the_device():
    engine = WatchedEngine()
    async with opened(engine) as queue:
        busy = await hold(engine, queue)
        behind = ask(queue, batch_of([[1_000 + i] for i in range(500)]))
        while queue.queued_tokens == 500:  # noqa: ASYNC110 - a few turns of the loop
            await asyncio.sleep(0)
        others = [ask(queue, batch_of([[j]])) for j in range(7)]
        await asyncio.sleep(0)
        stats = queue.stats()
        assert (stats.queued_jobs, stats.running_jobs) == (9, 2)
        engine.gate.set()
        await asyncio.gather(busy, behind, *others)
        stats = queue.stats()
        assert (stats.queued_jobs, stats.running_jobs) == (0, 0)


async def test_the_counters():
    async with opened(FakeEngine()) as queue:
        await ask(queue, batch_of([[1, 2, 3], [1, 2, 4]]))
        stats = queue.stats()
    assert (stats.batches, stats.sequences, stats.computed_tokens) == (1, 2, 4)
    assert stats.device_seconds > 0
    assert stats.queued_tokens == stats.pending_tokens == 0


sequences = st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=6), min_size=1, max_size=8)


@settings(max_examples=50)
@given(st.lists(st.tuples(sequences, st.booleans()), min_size=1, max_size=6), st.integers(1, 20))
def test_any_mix_of_jobs_gives_each_its_own_values(jobs: list[tuple[list[list[int]], bool]], budget: int):
    async def run() -> None:
        engine = FakeEngine()
        async with opened(engine, budget=budget) as queue:
            batches = [batch_of(rows, vocab_logprobs=vocab) for rows, vocab in jobs]
            answers = await asyncio.gather(*(ask(queue, batch) for batch in batches))
        for batch, answer in zip(batches, answers, strict=True):
            np.testing.assert_array_equal(answer.result.values, engine.score(batch).values)

    asyncio.run(run())
