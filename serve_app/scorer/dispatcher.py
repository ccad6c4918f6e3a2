"""Answers jobs with one engine: queues them, runs the scheduler's batches in threads, and puts the results together.

Plain asyncio, without Serve, so that unit tests can run it.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from serve_app.batches import join
from serve_app.contract import BatchResult, Engine, JobResult, QueueStats, ScoreJob
from serve_app.errors import DeadlineExceededError, InternalError, OverloadedError
from serve_app.room import has_room
from serve_app.scorer.queued_job import Part, QueuedJob
from serve_app.scorer.scheduler import IN_ENGINE, DeviceBatch, Scheduler
from serve_app.scorer.speed import Speed

logger = logging.getLogger("ray.serve")


class _Pending(QueuedJob):
    """A job that is not answered yet, and its results so far."""

    def __init__(self, job: ScoreJob, answer: asyncio.Future[JobResult]) -> None:
        super().__init__(job.batch, job.share)
        self.job = job
        self.answer = answer
        self.missing = job.batch.num_sequences
        self.values = np.empty(len(job.batch.targets), np.float32)
        self.computed_tokens = np.zeros(job.batch.num_sequences, np.int32)
        reads = len(job.batch.read_positions) if job.batch.argmax else 0
        self.argmax, self.argmax_values = np.empty(reads, np.int32), np.empty(reads, np.float32)
        tops = len(job.batch.read_positions), job.batch.top
        self.top_ids, self.top_values = np.empty(tops, np.int32), np.empty(tops, np.float32)
        self.arrived = time.monotonic()
        self.queue_seconds = -1.0  # until its first batch has run
        self.device_seconds = 0.0

    def expired(self) -> bool:
        """True when its deadline has passed."""
        return self.job.deadline is not None and time.time() > self.job.deadline

    def add(self, part: _Part, result: BatchResult) -> None:
        """Put the results of ``part`` in their place; with the last of them comes the answer."""
        if part.ahead:
            self.computed_tokens[part.start] += result.computed_tokens[0]
            return
        self.values[part.targets()] = result.values
        self.computed_tokens[part.start : part.stop] += result.computed_tokens
        if self.batch.argmax:
            self.argmax[part.reads()], self.argmax_values[part.reads()] = result.argmax, result.argmax_values
        if self.batch.top:
            self.top_ids[part.reads()], self.top_values[part.reads()] = result.top_ids, result.top_values
        self.missing -= part.stop - part.start
        if self.missing == 0 and not self.answer.done():
            self.answer.set_result(JobResult(self.result(), self.queue_seconds, self.device_seconds))

    def result(self) -> BatchResult:
        found = self.argmax, self.argmax_values, self.top_ids, self.top_values
        return BatchResult(self.values, self.computed_tokens, *found)


_Part = Part[_Pending]


class Dispatcher:
    """Answers jobs with one engine, in the device batches of a ``Scheduler``.

    A batch is formed when the engine is free, or nearly (``IN_ENGINE``), so that it holds whatever has arrived by then.
    The engine runs in its own threads: the event loop stays free.

    Args:
        engine: its ``score`` is called from two threads.
        max_batch_tokens: see ``Scheduler``.
        max_queued_tokens: tokens that may wait for the device; jobs above that are refused (``has_room``).
        observe: called for each device batch with the tokens that it computed, as a share of the most that it could.
        tokens_per_s: the engine's measured speed; 0.0: it is learnt from the first batches.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        max_batch_tokens: int,
        max_queued_tokens: int,
        observe: Callable[[float], None] | None = None,
        tokens_per_s: float = 0.0,
    ) -> None:
        self._engine = engine
        self._speed = Speed(tokens_per_s)
        self._scheduler = Scheduler[_Pending](max_batch_tokens, self._speed)
        self._observe = observe
        self._max_queued_tokens = max_queued_tokens
        self._jobs: set[_Pending] = set()
        self._changed = asyncio.Event()
        """Set when a batch may be due: a job has arrived, or a batch has left the engine."""
        self._timer: asyncio.TimerHandle | None = None
        """Sets ``_changed`` when the second batch is due."""
        self._ended = 0.0
        """When a batch last left the engine."""
        self._batches = self._sequences = self._computed_tokens = self._cached_tokens = 0
        self._device_seconds = 0.0
        self._refused = self._cancelled = self._expired = self._failed = 0
        self.failures_in_a_row = 0
        """Device batches that failed since the last one that did not."""
        self._closed = False
        self._threads = ThreadPoolExecutor(IN_ENGINE, thread_name_prefix="device")
        self._task = asyncio.create_task(self._run())
        self._task.add_done_callback(lambda _: self._abandon())

    def resize(self, *, max_batch_tokens: int, max_queued_tokens: int) -> None:
        """Set both limits from now on."""
        self._scheduler.max_batch_tokens, self._max_queued_tokens = max_batch_tokens, max_queued_tokens

    def submit(self, job: ScoreJob, answer: asyncio.Future[JobResult]) -> None:
        """Queue ``job``; ``answer`` gets its result or error. Cancelling ``answer`` drops what is still queued.

        The answer's error may be:
            OverloadedError: the queue is full, or closed.
            DeadlineExceededError: the deadline passed before the device was free.
            InternalError: the engine raised on this job.
        """
        if answer.done():
            return
        if self._closed:
            answer.set_exception(_closed_error())
            return
        pending = _Pending(job, answer)
        held = self._scheduler.held()
        if not has_room(pending.waiting_tokens, job.share, held, self._max_queued_tokens):
            self._refused += 1
            answer.set_exception(
                OverloadedError(
                    f"{sum(held.values()):,} tokens are queued and this request adds {pending.waiting_tokens:,}; the "
                    f"limit is {self._max_queued_tokens:,}; try again in {self._drain_seconds()} s",
                    retry_after_s=self._drain_seconds(),
                )
            )
            return
        self._jobs.add(pending)
        answer.add_done_callback(lambda _: self._forget(pending))
        if pending.exhausted:
            answer.set_result(JobResult(pending.result(), queue_seconds=0.0, device_seconds=0.0))
            return
        self._scheduler.add(pending)
        self._changed.set()

    @property
    def tokens_per_s(self) -> float:
        """The engine's speed, learnt from its batches; 0.0: not known yet."""
        return self._speed.tokens_per_s

    @property
    def queued_tokens(self) -> int:
        """Tokens that wait for the device, shared prefixes counted once."""
        return self._scheduler.queued_tokens

    @property
    def running(self) -> bool:
        """True while the loop is alive. After ``close`` or a fault no job will be answered."""
        return not self._task.done()

    def stalled_seconds(self) -> float:
        """Seconds that a batch has been on the device beyond what its tokens explain; 0.0 without one.

        A batch that hangs counts even after all its callers have left.
        """
        return self._scheduler.overdue(time.monotonic())

    def stats(self) -> QueueStats:
        """The counters at this moment."""
        return QueueStats(
            queued_jobs=len(self._jobs),
            running_jobs=sum(pending.begun for pending in self._jobs),
            queued_tokens=self.queued_tokens,
            pending_tokens=sum(pending.tokens for pending in self._jobs),
            batches=self._batches,
            sequences=self._sequences,
            computed_tokens=self._computed_tokens,
            cached_tokens=self._cached_tokens,
            device_seconds=self._device_seconds,
            refused=self._refused,
            cancelled=self._cancelled,
            expired=self._expired,
            failed=self._failed,
        )

    async def close(self) -> None:
        """Stop. Callers that still wait get ``OverloadedError``; a batch on the device is waited for."""
        self._closed = True
        self._task.cancel()
        await asyncio.wait([self._task])
        await asyncio.to_thread(self._threads.shutdown)

    async def _run(self) -> None:
        async with asyncio.TaskGroup() as batches:
            while True:
                await self._changed.wait()
                self._changed.clear()
                self._drop_done()
                now = time.monotonic()
                while batch := self._scheduler.next_batch(now):
                    batches.create_task(self._serve(batch))
                if due_in := self._scheduler.next_due_in(now):
                    self._look_again(due_in)

    def _drop_done(self) -> None:
        """Answer jobs past their deadline, and remove answered jobs from the queue."""
        for pending in self._jobs:
            if pending.expired() and not pending.exhausted and not pending.answer.done():
                self._expired += 1
                late = f"the deadline of request {pending.job.request_id} passed while it was queued"
                pending.answer.set_exception(DeadlineExceededError(late + "; ask for fewer items, or raise timeout_s"))
        self._scheduler.discard({pending for pending in self._jobs if pending.answer.done()})

    def _look_again(self, seconds: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = asyncio.get_running_loop().call_later(seconds, self._changed.set)

    async def _serve(self, batch: DeviceBatch[_Pending]) -> None:
        """Run one device batch, then make room for the next."""
        try:
            await self._compute(batch.parts)
        finally:
            self._scheduler.finish(batch, time.monotonic())
            self._changed.set()

    async def _compute(self, parts: Sequence[_Part]) -> None:
        """Run one device batch. If it fails, each job's part runs alone, so that a bad job harms only itself."""
        started = time.monotonic()
        # This raises when the threads are gone, and so ends the loop: another replica can compute the jobs.
        computing = asyncio.get_running_loop().run_in_executor(self._threads, self._on_device, parts)
        try:
            result = await computing
        except Exception:
            result = None
            requests = ", ".join(part.job.job.request_id for part in parts)
            logger.exception("the engine failed on a batch of request(s) %s", requests)
        # While two batches are in the engine, the device works on the first one.
        begun, self._ended = max(started, self._ended), time.monotonic()
        if result is not None:
            self.failures_in_a_row = 0
            self._count(parts, result, self._ended - begun)
            _scatter(parts, result, begun, self._ended - begun)
            return
        self.failures_in_a_row += 1
        if len(parts) > 1:
            for part in parts:
                if not part.job.answer.done():
                    await self._compute([part])
        else:
            self._fail(parts[0].job)

    def _on_device(self, parts: Sequence[_Part]) -> BatchResult:
        batch = join([part.batch() for part in parts])
        try:
            return self._engine.score(batch)
        except SystemExit as error:  # it would end the event loop and leave a replica that does nothing
            raise RuntimeError("the engine ended its thread") from error

    def _count(self, parts: Sequence[_Part], result: BatchResult, seconds: float) -> None:
        self._batches += 1
        self._sequences += sum(part.stop - part.start for part in parts)
        computed = int(result.computed_tokens.sum())
        piece = self._scheduler.piece
        self._speed.measured(computed, seconds, piece // 2)
        if self._observe:
            self._observe(computed / piece)
        self._computed_tokens += computed
        lengths = sum(sum(part.job.lengths[part.start : part.stop]) for part in parts)
        self._cached_tokens += lengths - computed
        self._device_seconds += seconds

    def _fail(self, pending: _Pending) -> None:
        if not pending.answer.done():
            self._failed += 1
            pending.answer.set_exception(
                InternalError(
                    f"the model failed on this request; look for {pending.job.request_id} in the server's log"
                )
            )

    def _forget(self, pending: _Pending) -> None:
        """Drop an answered job. The sequences of a cancelled job are no longer computed."""
        self._jobs.discard(pending)
        self._cancelled += pending.answer.cancelled()
        if not pending.exhausted:
            self._scheduler.discard([pending])

    def _abandon(self) -> None:
        """Answer the jobs that are left when the loop has ended, through ``close`` or a fault."""
        self._closed = True
        if not self._task.cancelled() and (error := self._task.exception()):
            logger.error("the dispatcher has stopped", exc_info=error)
        for pending in self._jobs:
            if not pending.answer.done():
                pending.answer.set_exception(_closed_error())

    def _drain_seconds(self) -> int:
        """Seconds until the queue may be empty at the speed so far, from 1 to 60."""
        return min(max(math.ceil(self._speed.seconds(self.queued_tokens)), 1), 60)


def _scatter(parts: Sequence[_Part], result: BatchResult, begun: float, seconds: float) -> None:
    """Give each job the results of its part of a device batch."""
    sequence = read = target = 0
    for part in parts:
        own_targets, own_reads = part.targets(), part.reads()
        sequences = slice(sequence, sequence + part.sequences)
        targets = slice(target, target + own_targets.stop - own_targets.start)
        reads = slice(read, read + own_reads.stop - own_reads.start)
        if part.job.queue_seconds < 0:
            part.job.queue_seconds = begun - part.job.arrived
        part.job.device_seconds += seconds
        part.job.add(
            part,
            BatchResult(
                result.values[targets],
                result.computed_tokens[sequences],
                result.argmax[reads],
                result.argmax_values[reads],
                result.top_ids[reads],
                result.top_values[reads],
            ),
        )
        sequence, read, target = sequences.stop, reads.stop, targets.stop


def _closed_error() -> OverloadedError:
    return OverloadedError("this replica is shutting down; try again", retry_after_s=1)
