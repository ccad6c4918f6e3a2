"""The front end's client of the scorer replicas, over a Serve handle."""

from __future__ import annotations

import asyncio
import logging
from typing import Any, cast

from grpc import StatusCode
from grpc.aio import AioRpcError
from opentelemetry import trace
from ray.exceptions import RayError, RayTaskError, TaskCancelledError
from ray.serve.exceptions import BackPressureError, RayServeException, RequestCancelledError
from ray.serve.handle import DeploymentHandle

from serve_app.contract import JobResult, ScoreJob
from serve_app.errors import RETRY_AFTER_S, InternalError, OverloadedError, ScoringError
from serve_app.frontend.direct import ConnectionLostError, DirectCalls
from serve_app.frontend.router import running_replicas

logger = logging.getLogger("ray.serve")

TRIES = 3
"""Tries of a job if its replica is lost. The second may reach another replica on the same lost host, before Ray knows
that it is lost. There are no more, since the job itself may be the cause."""
RETRY_PAUSE_S = 0.5
CANCELLED_BY_S = 0.5
"""When a client leaves, Serve cancels its calls to the scorers and the request itself, in no order. If the request is
still there after this time, the call was cancelled by a replica that is shutting down."""

NO_ANSWER = (RayError, RayServeException, AioRpcError)
"""Errors that a handle's call raises when the replica is lost."""


def cause_of(error: Exception) -> object:
    """The error that the replica raised, or one of ``NO_ANSWER``. Actor calls wrap the former, gRPC does not."""
    return cast(Any, error).cause if isinstance(error, RayTaskError) else error


class ScorerReplicas:
    """``service.Replicas`` over a Serve handle: Ray's failures become the service's errors.

    Args:
        scorer: its ``score`` takes a ``ScoreJob`` and returns a ``JobResult``; its router is a ``PrefixRouter``.
    """

    def __init__(self, scorer: DeploymentHandle[Any]) -> None:
        self._scorer: Any = scorer
        self._deployment = str(scorer.deployment_id)
        self._direct = DirectCalls()

    @property
    def count(self) -> int:
        """Number of running replicas. It changes with autoscaling, faults and deploys."""
        return running_replicas(self._scorer)

    async def score(self, job: ScoreJob) -> JobResult:
        """Compute ``job``. If its replica is lost, another one computes it, which is safe: scoring has no side effects.

        Raises:
            ScoringError: the replica raised it, or no replica has room, or none answers.
        """
        for lost in range(TRIES):
            if lost > 1:  # no pause before the second try
                await asyncio.sleep(RETRY_PAUSE_S)
            try:
                return await self._score(job)
            except _ReplicaLostError as error:
                if error.cancelled:
                    await asyncio.sleep(CANCELLED_BY_S)
                logger.warning("request %s: a replica was lost: %s", job.request_id, error)
        raise OverloadedError("no healthy replica answered; try again shortly", retry_after_s=RETRY_AFTER_S)

    async def _score(self, job: ScoreJob) -> JobResult:
        if not trace.get_current_span().is_recording():  # the spans of Serve's calls show a traced request's way
            try:
                if (result := await self._direct.score(job, self._deployment)) is not None:
                    return result
            except ConnectionLostError as error:
                raise _ReplicaLostError(str(error)) from error
        response = self._scorer.score.remote(job)
        try:
            return await response
        except asyncio.CancelledError as error:
            if not cast(asyncio.Task[Any], asyncio.current_task()).cancelling():  # the replica is shutting down
                raise _ReplicaLostError("it cancelled the call", cancelled=True) from error
            response.cancel()
            raise
        except BackPressureError as error:
            wait = max(1, round(error.retry_after_s or RETRY_AFTER_S))
            raise OverloadedError(f"all replicas are full; try again in {wait} s", retry_after_s=wait) from error
        except Exception as error:
            cause = cause_of(error)
            if isinstance(cause, ScoringError):
                raise cause from None
            if isinstance(cause, NO_ANSWER):
                raise _ReplicaLostError(str(cause), cancelled=_is_cancellation(cause)) from error
            raise InternalError("the scorer failed on this request; the server's log has more") from error


class _ReplicaLostError(Exception):
    """The replica died or shut down before it answered the job.

    Args:
        cancelled: the call was cancelled, perhaps because its request has ended.
    """

    def __init__(self, message: str, *, cancelled: bool = False) -> None:
        super().__init__(message)
        self.cancelled = cancelled


def _is_cancellation(cause: object) -> bool:
    """Whether an error says that a call was cancelled: Ray's errors for actor calls, a status for gRPC."""
    if isinstance(cause, AioRpcError):
        return cause.code() is StatusCode.CANCELLED
    return isinstance(cause, TaskCancelledError | RequestCancelledError)
