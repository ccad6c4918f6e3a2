"""Engines and replicas that tests hold: each is used by several test files."""

import asyncio
import threading

from serve_app.contract import BatchResult, JobResult, ScoreJob, TokenBatch
from serve_app.scorer.fake_engine import FakeEngine


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
