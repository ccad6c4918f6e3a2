"""Engines, replicas and a clock that tests hold: each is used by several test files."""

import asyncio
import threading

from serve_app.contract import BatchResult, JobResult, ScoreJob, TokenBatch
from serve_app.scorer.fake_engine import FakeEngine
from tests.local import CONTEXT, VOCAB_SIZE, DirectReplicas


class HeldEngine(FakeEngine):
    """An engine that computes nothing until ``gate`` opens.

    Attributes:
        entered: a batch has come.
        scored: the number of sequences in each batch that passed the gate.
    """

    def __init__(self, *, seconds_per_token: float = 0.0, nan_token: int | None = None) -> None:
        super().__init__(seconds_per_token=seconds_per_token, nan_token=nan_token)
        self.gate = threading.Event()
        self.entered = threading.Event()
        self.scored: list[int] = []

    def score(self, batch: TokenBatch) -> BatchResult:
        self.entered.set()
        assert self.gate.wait(30)
        self.scored.append(batch.num_sequences)
        return super().score(batch)


class HangingReplicas:
    """Replicas that never answer, and notice when a caller stops waiting.

    Attributes:
        jobs: all jobs that came.
        started: a job has come.
        cancelled: a caller has left.
    """

    def __init__(self, count: int = 1) -> None:
        self.count = count
        self.jobs: list[ScoreJob] = []
        self.started = asyncio.Event()
        self.cancelled = asyncio.Event()

    async def score(self, job: ScoreJob) -> JobResult:
        self.jobs.append(job)
        self.started.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            self.cancelled.set()
            raise
        raise AssertionError


class FailsLater(DirectReplicas):
    """Replicas that answer ``good`` jobs. When those answers are on their way, they raise ``error``, or hang."""

    def __init__(self, good: int, error: Exception | None) -> None:
        super().__init__(FakeEngine(VOCAB_SIZE, CONTEXT))
        self.good = good
        self.error = error
        self.hanging = HangingReplicas()

    async def score(self, job: ScoreJob) -> JobResult:
        if len(self.jobs) < self.good:
            return await super().score(job)
        if self.error is None:
            return await self.hanging.score(job)
        for _ in range(100):
            await asyncio.sleep(0)
        raise self.error


class Clock:
    """A stand-in for ``time.monotonic`` that a test moves."""

    now = 100.0

    def __call__(self) -> float:
        return self.now
