"""The queue before the device: forms its batches late, from the sequences of several jobs.

Plain asyncio, without Serve, so that unit tests can run it.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from serve_app.batches import cut, join, reads_of, shared_with_previous
from serve_app.contract import BatchResult, Engine, JobResult, ScoreJob, TokenBatch
from serve_app.errors import DeadlineExceededError, InternalError, OverloadedError
from serve_app.speed import Speed

logger = logging.getLogger("ray.serve")

TURNS_PER_BATCH = 4
"""A job's turn ends a batch's tokens over ``TURNS_PER_BATCH`` after its first sequence. Shorter turns would be fairer,
but what the job's sequences share beyond whole pages is computed once more in every turn."""

PIECE_S = 1.0
"""Of device time in one batch, by the measured speed: as long a small job waits for what began before it came."""
SMALLEST_PIECE = 64
"""Tokens in a batch, however slow the device is."""

AHEAD_TOKENS = 1_024
"""A sequence that takes much longer than a piece is prefilled piece by piece, which end at multiples of this: where a
CPU's native engine cuts it anyway, so that its scores have the same bits as if it were prefilled at once (elsewhere
they differ by float32's rounding). The pages are kept, and what comes meanwhile goes between."""

IN_ENGINE = 2
"""Device batches in the engine at once: the host plans the second and unpacks the first while the device works.

The second is formed only when half a piece waits: a batch that is formed early cannot hold what comes later, which
costs little if it is full anyway."""
LEAD_S = 0.05
"""The second is formed so long before the first should end: more than planning takes. What is formed early is computed
even if its callers leave, and holds nothing of what comes meanwhile."""

PATIENCE = 4
"""Times what a batch's tokens should take are no standstill: attention to a long prompt takes longer than the speed
tells, and so does a busy host."""


@dataclass(frozen=True, slots=True)
class QueueStats:
    """Counters since the start, but for the first three, which tell the present state.

    Attributes:
        queued_jobs: not yet answered, those on the device included.
        queued_tokens: waiting for the device, shared prefixes counted once.
        pending_tokens: the same, and all of the jobs that the device has begun and not finished.
        batches: computed by the device.
        sequences: computed by the device.
        computed_tokens: computed by the device, shared prefixes counted once.
        cached_tokens: the others of those sequences.
        device_seconds: while the engine had at least one batch that did not fail.
        refused: jobs turned away because the queue was full.
        cancelled: jobs whose caller left before the answer.
        expired: jobs dropped because their deadline passed before the device was free.
        failed: jobs on which the engine raised.
    """

    queued_jobs: int = 0
    queued_tokens: int = 0
    pending_tokens: int = 0
    batches: int = 0
    sequences: int = 0
    computed_tokens: int = 0
    cached_tokens: int = 0
    device_seconds: float = 0.0
    refused: int = 0
    cancelled: int = 0
    expired: int = 0
    failed: int = 0


class _Pending:
    """A job that is not answered yet."""

    def __init__(self, job: ScoreJob, answer: asyncio.Future[JobResult]) -> None:
        self.job = job
        self.answer = answer
        self.lengths: list[int] = job.batch.lengths.tolist()
        self.costs: list[int] = (job.batch.lengths - shared_with_previous(job.batch)).tolist()
        self.tokens = self.waiting_tokens = sum(self.costs)
        self.taken = 0
        self.ahead = self.ahead_cost = 0
        """Tokens of the next sequence that were prefilled, and what of its cost that was."""
        self.missing = job.batch.num_sequences
        self.values = np.empty(len(job.batch.targets), np.float32)
        self.computed_tokens = np.zeros(job.batch.num_sequences, np.int32)
        reads = len(job.batch.read_positions) if job.batch.argmax else 0
        self.argmax, self.argmax_values = np.empty(reads, np.int32), np.empty(reads, np.float32)
        self.arrived = time.monotonic()
        self.queue_seconds = -1.0  # until its first batch has run
        self.device_seconds = 0.0

    @property
    def kind(self) -> tuple[bool, bool]:
        """Only jobs whose reads are of one kind share a device batch."""
        return self.job.batch.vocab_logprobs, self.job.batch.argmax

    @property
    def exhausted(self) -> bool:
        """All its sequences were handed to the device."""
        return self.taken == len(self.costs)

    def expired(self) -> bool:
        return self.job.deadline is not None and time.time() > self.job.deadline

    @property
    def next_cost(self) -> int:
        """Tokens to compute for the next sequence: what it shares with the one before it, or was prefilled, is kept."""
        return self.costs[self.taken] - self.ahead_cost

    def hand_out_first(self) -> int:
        """Take the next sequence: what it costs."""
        cost = self.next_cost
        self.waiting_tokens -= cost
        self.taken, self.ahead, self.ahead_cost = self.taken + 1, 0, 0
        return cost

    def hand_out_ahead(self, room: int) -> _Part | None:
        """Take tokens of the next sequence, about ``room``, if it has many more before its first read."""
        known = max(self.ahead, self.lengths[self.taken] - self.costs[self.taken])
        upto = known - known % AHEAD_TOKENS + max(room - room % AHEAD_TOKENS, AHEAD_TOKENS)
        batch = self.job.batch
        first_read = int(batch.read_positions[reads_of(batch, self.taken, self.taken + 1)][:1].min(initial=2**31 - 1))
        if upto + AHEAD_TOKENS // 2 > min(first_read, self.lengths[self.taken]):
            return None
        self.ahead, self.ahead_cost = upto, self.ahead_cost + upto - known
        self.waiting_tokens -= upto - known
        return _Part(self, self.taken, self.taken, upto, upto - known)

    def hand_out_more(self, room: int) -> int:
        """Take the sequences that follow while they fit into ``room`` tokens: what they cost."""
        spent = 0
        while not self.exhausted and spent + self.costs[self.taken] <= room:
            spent += self.costs[self.taken]
            self.taken += 1
        self.waiting_tokens -= spent
        return spent

    def keep(self, part: _Part, result: BatchResult) -> None:
        """Put the values of ``part`` in their place; with the last of them comes the answer."""
        if part.ahead:
            self.computed_tokens[part.start] += result.computed_tokens[0]
            return
        self.values[part.targets()] = result.values
        self.computed_tokens[part.start : part.stop] += result.computed_tokens
        if self.job.batch.argmax:
            self.argmax[part.reads()], self.argmax_values[part.reads()] = result.argmax, result.argmax_values
        self.missing -= part.stop - part.start
        if self.missing == 0 and not self.answer.done():
            self.answer.set_result(JobResult(self.result(), self.queue_seconds, self.device_seconds))

    def result(self) -> BatchResult:
        return BatchResult(self.values, self.computed_tokens, self.argmax, self.argmax_values)


class _InEngine:
    """A device batch that the engine has.

    Attributes:
        begun: when the device was free for it; None: it waits for another.
        expected: seconds that its tokens should take.
    """

    def __init__(self, begun: float | None, expected: float) -> None:
        self.begun = begun
        self.expected = expected

    def left(self, now: float) -> float:
        """Seconds until it should be done, once it has begun."""
        return self.expected if self.begun is None else max(self.begun + self.expected - now, 0.0)

    def overdue(self, now: float) -> float:
        """Seconds on the device beyond all that its tokens explain."""
        return 0.0 if self.begun is None else max(now - self.begun - PATIENCE * self.expected, 0.0)


class _Part(NamedTuple):
    """Sequences ``start`` to ``stop`` of a job, in one device batch; or the first ``ahead`` tokens of the one at
    ``start``, to be kept."""

    pending: _Pending
    start: int
    stop: int
    ahead: int = 0
    cost: int = 0
    """Tokens to compute."""

    def batch(self) -> TokenBatch:
        if self.ahead:
            one = cut(self.pending.job.batch, self.start, self.start + 1)
            nothing = slice(0, 0)
            return replace(
                one,
                tokens=one.tokens[: self.ahead],
                offsets=np.array([0, self.ahead], np.int64),
                read_sequences=one.read_sequences[nothing],
                read_positions=one.read_positions[nothing],
                targets=one.targets[nothing],
                target_offsets=one.target_offsets[:1],
                keep=True,
            )
        return cut(self.pending.job.batch, self.start, self.stop)

    def reads(self) -> slice:
        """Which of the job's."""
        return reads_of(self.pending.job.batch, self.start, self.stop)

    def targets(self) -> slice:
        """Where its values stand among the job's."""
        batch, reads = self.pending.job.batch, self.reads()
        return slice(int(batch.target_offsets[reads.start]), int(batch.target_offsets[reads.stop]))


class DeviceQueue:
    """Answers jobs with one engine, in device batches of about ``PIECE_S`` and at most ``max_batch_tokens``.

    A batch is formed when the engine is free, or nearly (``IN_ENGINE``), so that it holds whatever has come by then.
    Jobs take turns, the first soon after they come; a job's sequences stay in order, so that those which share a prefix
    are neighbours. The engine runs in threads of its own: the event loop stays free.

    Args:
        engine: its ``score`` is called from two threads.
        max_batch_tokens: in one device batch, shared prefixes counted once. A batch's first sequence may be longer, and
            its job gets a turn all the same: it would else compute its prefix for every sequence.
        max_queued_tokens: waiting for the device; past it jobs are refused.
        observe: called for each device batch with the tokens that it computed, as a share of those that it might have.
        tokens_per_s: of the engine, as measured; 0.0: the first batches tell.
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
        self._observe = observe
        self._max_batch_tokens = max_batch_tokens
        self._max_queued_tokens = max_queued_tokens
        self._jobs: set[_Pending] = set()
        self._new: deque[_Pending] = deque()
        """Jobs that had no turn yet, in the order in which they came."""
        self._ring: deque[_Pending] = deque()
        """Other jobs with sequences to hand out; the next turn is the first one's."""
        self._new_went_first = False
        self._changed = asyncio.Event()
        """Set when a batch may be due: a job has come, or a batch has left the engine."""
        self._in_engine: list[_InEngine] = []
        self._timer: asyncio.TimerHandle | None = None
        """Tells when the second batch is due."""
        self._ended = 0.0
        """When a batch last left the engine."""
        self._batches = self._sequences = self._computed_tokens = self._cached_tokens = 0
        self._device_seconds = 0.0
        self._refused = self._cancelled = self._expired = self._failed = 0
        self.failures_in_a_row = 0
        """Device batches that ended in an error since the last that did not."""
        self._closed = False
        self._threads = ThreadPoolExecutor(IN_ENGINE, thread_name_prefix="device")
        self._task = asyncio.create_task(self._run())
        self._task.add_done_callback(lambda _: self._abandon())

    def resize(self, *, max_batch_tokens: int, max_queued_tokens: int) -> None:
        """From now on form batches of, and let wait, so many tokens."""
        self._max_batch_tokens, self._max_queued_tokens = max_batch_tokens, max_queued_tokens

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
        queued = self.queued_tokens
        if queued and queued + pending.waiting_tokens > self._max_queued_tokens:
            self._refused += 1
            answer.set_exception(
                OverloadedError(
                    f"{queued:,} tokens are queued and this request adds {pending.waiting_tokens:,}; the limit is "
                    f"{self._max_queued_tokens:,}; try again in {self._drain_seconds()} s",
                    retry_after_s=self._drain_seconds(),
                )
            )
            return
        self._jobs.add(pending)
        answer.add_done_callback(lambda _: self._forget(pending))
        if pending.exhausted:
            answer.set_result(JobResult(pending.result(), queue_seconds=0.0, device_seconds=0.0))
            return
        self._new.append(pending)
        self._changed.set()

    @property
    def tokens_per_s(self) -> float:
        """That the engine computes, as its batches tell; 0.0: not known yet."""
        return self._speed.tokens_per_s

    @property
    def queued_tokens(self) -> int:
        """Tokens that wait for the device, shared prefixes counted once."""
        return sum(pending.waiting_tokens for pending in (*self._new, *self._ring))

    @property
    def running(self) -> bool:
        """The loop is alive. False after ``close`` or a fault: no job will be answered."""
        return not self._task.done()

    def stalled_seconds(self) -> float:
        """How long a batch has been on the device beyond what its tokens should take (``PATIENCE``); 0.0 without one.

        A batch that hangs counts after all its callers have left.
        """
        now = time.monotonic()
        return max((batch.overdue(now) for batch in self._in_engine), default=0.0)

    def stats(self) -> QueueStats:
        """The counters at this moment."""
        return QueueStats(
            queued_jobs=len(self._jobs),
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
                while parts := self._next_parts():
                    expected = self._speed.seconds(sum(part.cost for part in parts))
                    batch = _InEngine(None if self._in_engine else time.monotonic(), expected)
                    self._in_engine.append(batch)
                    batches.create_task(self._serve(parts, batch))

    async def _serve(self, parts: list[_Part], batch: _InEngine) -> None:
        """Run one device batch, and make room for the next."""
        try:
            await self._compute(parts)
        finally:
            self._in_engine.remove(batch)
            for other in self._in_engine:
                other.begun = other.begun or time.monotonic()
            self._changed.set()

    def _piece(self) -> int:
        """Tokens of about ``PIECE_S``."""
        if not self._speed.tokens_per_s:
            return self._max_batch_tokens
        return min(max(int(self._speed.tokens_per_s * PIECE_S), SMALLEST_PIECE), self._max_batch_tokens)

    def _room(self) -> int:
        """Tokens for the next device batch; 0 while none is due."""
        if not self._in_engine:
            return self._piece()
        piece = self._piece()
        if len(self._in_engine) == IN_ENGINE or self.queued_tokens < piece // 2:
            return 0
        early = self._in_engine[0].left(time.monotonic()) - LEAD_S
        if early <= 0:
            return piece
        if self._timer is not None:
            self._timer.cancel()
        self._timer = asyncio.get_running_loop().call_later(early, self._changed.set)
        return 0

    def _next_parts(self) -> list[_Part]:
        """The next device batch, if one is due: the jobs' turns in order, then what still fits from those that had one,
        unless one that has just come was left out.

        A job that gets nothing, since its next sequence does not fit or its reads are of the other kind, keeps its
        place at the front and opens the next batch.
        """
        for pending in [pending for pending in self._jobs if pending.expired() and not pending.answer.done()]:
            if not pending.exhausted:
                self._expired += 1
                late = f"the deadline of request {pending.job.request_id} passed while it was queued; ask for fewer"
                pending.answer.set_exception(DeadlineExceededError(late + " items, or raise timeout_s"))
        self._new = deque(pending for pending in self._new if not pending.answer.done())
        self._ring = deque(pending for pending in self._ring if not pending.answer.done())
        room = self._room()
        if not room or not (order := self._order(room)):
            return []
        if part := order[0].hand_out_ahead(room):
            self._new = deque(pending for pending in self._new if pending is not part.pending)
            self._ring = deque([*(pending for pending in self._ring if pending is not part.pending), part.pending])
            return [part]
        kind = order[0].kind
        if any(pending.kind != kind for pending in order):
            room //= 2  # the others come next, and wait no longer for two batches
        turn = room // TURNS_PER_BATCH
        parts: list[_Part] = []
        for pending in order:
            start = pending.taken
            if pending.kind != kind or (pending.next_cost > room and parts):
                continue
            spent = pending.hand_out_first()
            spent += pending.hand_out_more(min(turn, room - spent) if parts else turn)
            room -= spent
            parts.append(_Part(pending, start, pending.taken, cost=spent))
        if all(pending.taken for pending in self._new if pending.kind == kind):  # else the next batch comes the sooner
            for number, part in enumerate(parts):
                more = part.pending.hand_out_more(room)
                room -= more
                parts[number] = part._replace(stop=part.pending.taken, cost=part.cost + more)
        had = {id(part.pending) for part in parts}
        others = [pending for pending in self._new if pending.kind != kind and id(pending) not in had]
        self._ring = deque(
            [
                *others,  # of the other kind: they open the next batch
                *(pending for pending in self._ring if id(pending) not in had),
                *(part.pending for part in parts if not part.pending.exhausted),
            ]
        )
        had |= {id(pending) for pending in others}
        self._new = deque(pending for pending in self._new if id(pending) not in had)
        return parts

    def _order(self, room: int) -> list[_Pending]:
        """Who goes next: the job that has waited longest for its turn, those that have just come, then the others.

        Where its turn leaves no room for the first of these, those that have just come go before it, every other time.
        """
        if not self._ring:
            return list(self._new)
        first, *others = self._ring
        fills = bool(self._new) and first.next_cost + room // TURNS_PER_BATCH + self._new[0].next_cost > room
        self._new_went_first = fills and not self._new_went_first
        return [*self._new, first, *others] if self._new_went_first else [first, *self._new, *others]

    async def _compute(self, parts: list[_Part]) -> None:
        """Run one device batch. If it fails, each job's part runs alone, so that the job at fault harms only itself."""
        # Raises when the threads are gone, which ends the loop: another replica can compute this.
        computing = asyncio.get_running_loop().run_in_executor(self._threads, self._on_device, parts)
        started = time.monotonic()
        try:
            result = await computing
        except Exception:
            result = None
            requests = ", ".join(part.pending.job.request_id for part in parts)
            logger.exception("the engine failed on a batch of request(s) %s", requests)
        # While two batches are in the engine, the device's time is the first one's.
        begun, self._ended = max(started, self._ended), time.monotonic()
        if result is not None:
            self.failures_in_a_row = 0
            self._count(parts, result, self._ended - begun)
            self._scatter(parts, result, begun, self._ended - begun)
            return
        self.failures_in_a_row += 1
        if len(parts) > 1:
            for part in parts:
                if not part.pending.answer.done():
                    await self._compute([part])
        else:
            self._fail(parts[0].pending)

    def _on_device(self, parts: list[_Part]) -> BatchResult:
        batch = join([part.batch() for part in parts])
        try:
            return self._engine.score(batch)
        except SystemExit as error:  # it would end the event loop, and leave a replica that does nothing
            raise RuntimeError("the engine ended its thread") from error

    def _count(self, parts: list[_Part], result: BatchResult, seconds: float) -> None:
        self._batches += 1
        self._sequences += sum(part.stop - part.start for part in parts)
        computed = int(result.computed_tokens.sum())
        piece = self._piece()
        self._speed.measured(computed, seconds, piece // 2)
        if self._observe:
            self._observe(computed / piece)
        self._computed_tokens += computed
        lengths = sum(sum(part.pending.lengths[part.start : part.stop]) for part in parts)
        self._cached_tokens += lengths - computed
        self._device_seconds += seconds

    def _scatter(self, parts: list[_Part], result: BatchResult, begun: float, seconds: float) -> None:
        sequence = read = target = 0
        for part in parts:
            sequences = slice(sequence, sequence + (1 if part.ahead else part.stop - part.start))
            own, own_reads = part.targets(), part.reads()
            targets = slice(target, target + own.stop - own.start)
            reads = slice(read, read + own_reads.stop - own_reads.start)
            if part.pending.queue_seconds < 0:
                part.pending.queue_seconds = begun - part.pending.arrived
            part.pending.device_seconds += seconds
            part.pending.keep(
                part,
                BatchResult(
                    result.values[targets],
                    result.computed_tokens[sequences],
                    result.argmax[reads],
                    result.argmax_values[reads],
                ),
            )
            sequence, read, target = sequences.stop, reads.stop, targets.stop

    def _fail(self, pending: _Pending) -> None:
        if not pending.answer.done():
            self._failed += 1
            pending.answer.set_exception(
                InternalError(
                    f"the model failed on this request; the server's log has it under {pending.job.request_id}"
                )
            )

    def _forget(self, pending: _Pending) -> None:
        """After the answer, whatever it is: a cancelled job's sequences are not computed any more."""
        self._jobs.discard(pending)
        self._cancelled += pending.answer.cancelled()
        for waiting in (self._new, self._ring):
            if pending in waiting:
                waiting.remove(pending)

    def _abandon(self) -> None:
        """The loop has ended, by ``close`` or a fault: nobody will answer the jobs that are left."""
        self._closed = True
        if not self._task.cancelled() and (error := self._task.exception()):
            logger.error("the device queue has stopped", exc_info=error)
        for pending in self._jobs:
            if not pending.answer.done():
                pending.answer.set_exception(_closed_error())

    def _drain_seconds(self) -> int:
        """When the queue may be empty at the speed so far: 1 to 60 s."""
        return min(max(math.ceil(self._speed.seconds(self.queued_tokens)), 1), 60)


def _closed_error() -> OverloadedError:
    return OverloadedError("this replica is shutting down; try again", retry_after_s=1)
