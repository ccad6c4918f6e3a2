"""An engine in the caller's own process instead of replicas."""

from __future__ import annotations

import asyncio

from serve_app.contract import Engine, JobResult, ScoreJob
from serve_app.scorer.adapters import AdapterSlots
from serve_app.scorer.dispatcher import Dispatcher
from serve_app.settings import ModelSettings


class LocalReplicas:
    """``service.Replicas`` without Ray: a dispatcher around one engine.

    Args:
        count: the number of replicas that it reports.
    """

    def __init__(self, engine: Engine, settings: ModelSettings, count: int = 1) -> None:
        self.count = count
        self.adapters = AdapterSlots(engine)
        self.queue = Dispatcher(
            engine,
            max_batch_tokens=settings.batch_tokens(engine.info.platform),
            max_queued_tokens=settings.queued_tokens(engine.info.tokens_per_s, engine.info.platform),
        )

    async def score(self, job: ScoreJob) -> JobResult:
        """Score a job, as ``Replicas.score`` does."""
        with self.adapters.used(job) as slotted:
            answer: asyncio.Future[JobResult] = asyncio.get_running_loop().create_future()
            self.queue.submit(slotted, answer)
            return await answer
