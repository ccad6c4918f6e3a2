"""What crosses a Serve handle: numpy, builtins and frozen dataclasses only.

Nothing here may import jax: unpickling one ``jax.Array`` would load jax in the ingress process. What an engine takes
and answers is defined in ``model.contract``, the one module of the model package that the front end loads.
"""

from __future__ import annotations

from dataclasses import dataclass

from model.contract import PAGE_TOKENS as PAGE_TOKENS
from model.contract import BatchResult as BatchResult
from model.contract import Engine as Engine
from model.contract import EngineStats as EngineStats
from model.contract import Float32 as Float32
from model.contract import Int32 as Int32
from model.contract import Int64 as Int64
from model.contract import ModelInfo as ModelInfo
from model.contract import Progress as Progress
from model.contract import TokenBatch as TokenBatch
from model.contract import common_prefix as common_prefix


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


@dataclass(frozen=True, slots=True)
class Affinity:
    """What ties a job to a replica: a prefix that was computed there for an earlier one.

    Attributes:
        key: of the prefix, 16 bytes that tell its tokens from others.
        part: the job's number in a split request; the parts go to different replicas.
        worth: how many more jobs than at another replica it may meet there.
    """

    key: bytes
    part: int
    worth: float


@dataclass(frozen=True, slots=True)
class ScoreJob:
    """One replica-sized part of a request.

    Attributes:
        request_id: the request's ``x-request-id``, for logs.
        deadline: Unix time in seconds after which nobody wants the answer; None: never.
        affinity: for the choice of the replica; None: any.
    """

    request_id: str
    batch: TokenBatch
    deadline: float | None = None
    affinity: Affinity | None = None


@dataclass(frozen=True, slots=True)
class JobResult:
    """The answer to one ``ScoreJob``.

    Attributes:
        queue_seconds: from arrival at the replica to the start of the first device batch that held a part of it.
        device_seconds: summed over the device batches that held a part of it.
    """

    result: BatchResult
    queue_seconds: float
    device_seconds: float
