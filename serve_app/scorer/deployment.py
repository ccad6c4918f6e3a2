"""The scorer: each replica holds one engine, in its own process or on the hosts of a slice."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from ray import serve

from serve_app import timing
from serve_app.contract import Engine, JobResult, ModelInfo, QueueStats, ScoreJob
from serve_app.errors import OverloadedError
from serve_app.frames import ADDRESS
from serve_app.local_ray import keep_calls_on_loopback
from serve_app.metrics import REPORT_S, ScorerMetrics
from serve_app.scorer import speed
from serve_app.scorer.adapters import AdapterSlots
from serve_app.scorer.autoscaling import PENDING_TOKENS
from serve_app.scorer.direct import DirectCalls
from serve_app.scorer.dispatcher import Dispatcher
from serve_app.scorer.engines import load_engine
from serve_app.settings import ModelSettings

logger = logging.getLogger("ray.serve")

INTAKE_BATCH = 32
INTAKE_CONCURRENCY = 32
MAX_ONGOING = INTAKE_BATCH * INTAKE_CONCURRENCY
"""Calls that a replica accepts at once. Most of them wait for the device, which costs nothing;
``limits.max_queued_tokens`` is the bound that matters."""
INTAKE_WAIT_S = 0.0
INTAKE_LIMIT_S = 15.0
"""Seconds. The intake never waits for the device, so a call that takes longer than this will never end."""

BROKEN_AFTER = 5
"""Failed batches in a row after which the replica is unhealthy. After one bad job the next good one resets it."""


@dataclass(frozen=True, slots=True)
class _Call:
    job: ScoreJob
    answer: asyncio.Future[JobResult]


class Scorer:
    """The class of the deployment: answers ``ScoreJob``s. Serve counts it as ready when the engine is warm.

    Args:
        load: makes the engine. It runs in a thread, so that the replica can answer Serve meanwhile.
        measure: returns the engine's speed in tokens per second. It also runs in a thread.
    """

    async def __init__(
        self,
        settings: ModelSettings,
        load: Callable[[ModelSettings], Engine] = load_engine,
        measure: Callable[[Engine], float] = speed.measure,
    ) -> None:
        keep_calls_on_loopback()
        self._engine = await asyncio.to_thread(load, settings)
        self._tokens_per_s = await asyncio.to_thread(measure, self._engine)
        logger.info("this replica computes about %d tokens per second", self._tokens_per_s)
        self._metrics = ScorerMetrics(settings.name)
        self._queue = Dispatcher(
            self._engine,
            max_batch_tokens=settings.batch_tokens(platform := self._engine.info.platform),
            max_queued_tokens=settings.queued_tokens(self._tokens_per_s, platform),
            observe=self._metrics.batch,
            tokens_per_s=self._tokens_per_s,
        )
        self._settings = self._live = settings
        self._adapters = AdapterSlots(self._engine)
        await self._adapters.change(settings.adapters)
        self._adapters.check()
        self._intake_works = True
        self._direct = DirectCalls(self.score)
        self._direct_reported = 0
        # Serve waits for its own calls, and then for this. A method of the class would be called by Python, too.
        self.__del__ = self._direct.close
        self._reporting = asyncio.create_task(self._report())

    async def score(self, job: ScoreJob) -> JobResult:
        """Compute the values of all targets of ``job``. Cancelling the call drops what is still queued.

        Raises:
            NotFoundError: there is no such adapter.
            OverloadedError: the queue is full; another replica may have room.
            DeadlineExceededError: ``job.deadline`` passed while the job was queued.
            InternalError: the engine failed on this job.
        """
        with self._adapters.used(job) as slotted:
            return await self._answered(slotted)

    async def _answered(self, job: ScoreJob) -> JobResult:
        answer: asyncio.Future[JobResult] = asyncio.get_running_loop().create_future()
        arrived = time.time()
        try:
            try:
                async with asyncio.timeout(INTAKE_LIMIT_S):
                    await self._intake(_Call(job, answer))
            except TimeoutError:
                self._intake_works = False
                raise OverloadedError("this replica is stuck; try again", retry_after_s=1) from None
            result = await answer
            self._metrics.answered(result)
            timing.record_job(
                job.request_id, arrived, result.queue_seconds, result.device_seconds, job.batch.num_sequences
            )
            return result
        except OverloadedError:
            self._end_if_lost()
            raise
        finally:
            answer.cancel()

    @serve.batch(  # pyright: ignore[reportUnknownMemberType]
        max_batch_size=INTAKE_BATCH, batch_wait_timeout_s=INTAKE_WAIT_S, max_concurrent_batches=INTAKE_CONCURRENCY
    )
    async def _intake(self, calls: list[_Call]) -> list[None]:
        """Queue the calls that came together. It must not wait or raise: either would affect all of them."""
        self._intake_works = True
        for call in calls:
            try:
                self._queue.submit(call.job, call.answer)
            except BaseException as error:
                call.answer.set_exception(error)
        return [None] * len(calls)

    async def info(self) -> ModelInfo:
        """Facts about the loaded model."""
        return replace(self._engine.info, tokens_per_s=self._tokens_per_s)

    async def stats(self) -> QueueStats:
        """The queue's counters."""
        return self._queue.stats()

    async def reconfigure(self, user_config: Mapping[str, Any] | None, rank: object) -> None:  # noqa: ARG002
        """Change settings that are in ``settings.RECONFIGURABLE``. Those not given return to their values at the start.

        Serve calls it with ``user_config``, or with None after that was removed, which it only does if there is a
        parameter ``rank``. A wrong value is logged and changes nothing: Serve would kill the replica if this raised.
        """
        try:
            settings = self._settings.live(user_config or {})
        except ValueError as error:
            logger.error("user_config is refused, and nothing changes: %s", error)
            return
        self._live = settings
        self._changing = asyncio.create_task(self._adapters.change(settings.adapters))
        self._engine.set_batch_timeout(settings.stall_s)
        self._resize()

    def _resize(self) -> None:
        """Bound the queue by the current settings, and by the speed measured so far."""
        speed_now, platform = max(self._queue.tokens_per_s, self._tokens_per_s), self._engine.info.platform
        self._queue.resize(
            max_batch_tokens=self._live.batch_tokens(platform),
            max_queued_tokens=self._live.queued_tokens(speed_now, platform),
        )

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """The input of ``autoscaling.PendingTokensPolicy``. Serve calls the method by this name.

        Serve counts no direct calls, so a replica that has had one since the last report has a token at least.
        """
        asked, self._direct_reported = self._direct.begun > self._direct_reported, self._direct.begun
        return {PENDING_TOKENS: max(self._queue.stats().pending_tokens, asked)}

    async def record_replica_metadata(self) -> dict[str, str]:
        """Tell routers where front ends on this host may send their jobs. Serve calls the method by this name."""
        address = await self._direct.listen()
        return {} if address is None else {ADDRESS: address}

    async def _report(self) -> None:
        while True:
            self._metrics.update(self._queue.stats(), self._engine.stats)
            self._resize()
            await asyncio.sleep(REPORT_S)

    async def check_health(self) -> None:
        """Raise RuntimeError if the last batches failed or the engine has a fault. Serve then replaces the replica."""
        self._end_if_lost()
        if self._queue.failures_in_a_row >= BROKEN_AFTER:
            raise RuntimeError(f"the engine failed on the last {self._queue.failures_in_a_row} batches")
        self._engine.check_health()

    def _end_if_lost(self) -> None:
        """End the process when it can no longer answer, which sends its jobs to other replicas at once.

        Serve would repeat a failed health check twice, and wait for the jobs as for a healthy replica's. Meanwhile the
        replica would get more new jobs than others, since it fails faster than they answer.
        """
        if fault := self._fault():
            logger.critical("this replica ends itself: %s", fault)
            logging.shutdown()
            os._exit(1)

    def _fault(self) -> str | None:
        """Why this replica can no longer answer any job; None: it can."""
        if not self._intake_works:
            return f"a call was not queued within {INTAKE_LIMIT_S:.0f} s"
        if not self._queue.running:
            return "the dispatcher has stopped"
        stalled = self._queue.stalled_seconds()
        if stalled > self._live.longest_batch_s:
            return f"the device has not finished a batch for {stalled:.0f} s; stall_s is {self._live.stall_s}"
        return None
