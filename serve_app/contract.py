"""Types that cross a Serve handle: numpy, builtins and frozen dataclasses only.

Nothing here may import jax: unpickling one ``jax.Array`` would load jax in the ingress process. An engine's input and
output types are in ``model.contract``, the only module of the model package that the front end loads.
"""

from __future__ import annotations

from dataclasses import dataclass

from model.contract import MOST_READS as MOST_READS
from model.contract import MOST_TOP as MOST_TOP
from model.contract import PAGE_TOKENS as PAGE_TOKENS
from model.contract import SALT_BITS as SALT_BITS
from model.contract import BatchResult as BatchResult
from model.contract import Engine as Engine
from model.contract import EngineStats as EngineStats
from model.contract import Float32 as Float32
from model.contract import Int32 as Int32
from model.contract import Int64 as Int64
from model.contract import LaunchingEngine as LaunchingEngine
from model.contract import MemoryUse as MemoryUse
from model.contract import ModelInfo as ModelInfo
from model.contract import Progress as Progress
from model.contract import TokenBatch as TokenBatch
from model.contract import common_prefix as common_prefix
from model.contract import shared_by_all as shared_by_all

MEMORY = "memory:"
"""Begins the line about memory in a scorer's log, which the launcher shows."""


@dataclass(frozen=True, slots=True)
class QueueStats:
    """The state of a queue, and its counters since the start.

    Attributes:
        queued_jobs: state: jobs that are not yet answered, including those on the device.
        running_jobs: state: those of which something has gone to the device.
        queued_tokens: state: tokens that wait for the device, shared prefixes counted once.
        pending_tokens: state: the same, plus all tokens of the jobs that the device has begun and not finished.
        batches: batches that the device computed.
        sequences: sequences that the device computed.
        computed_tokens: tokens that the device computed, shared prefixes counted once.
        cached_tokens: the other tokens of those sequences.
        device_seconds: seconds in which the engine had at least one batch that did not fail.
        refused: jobs turned away because the queue was full.
        cancelled: jobs whose caller left before the answer.
        expired: jobs dropped because their deadline passed before the device was free.
        failed: jobs on which the engine raised.
    """

    queued_jobs: int = 0
    running_jobs: int = 0
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
    """A job's preference for the replica that has its prefix in the cache.

    Attributes:
        key: 16 bytes that identify the prefix's tokens.
        part: the job's number in a split request; the parts go to different replicas.
        worth: number of jobs that this replica may have more than another and still be chosen.
    """

    key: bytes
    part: int
    worth: float


@dataclass(frozen=True, slots=True)
class Share:
    """Whose turns a job takes, and how much of the device is theirs.

    Attributes:
        tenant: the name of an API key.
        weight: its part of the device, relative to that of other tenants of its class that have work.
        priority: the class, 0 is the first. A class gets what those before it leave, and a turn now and then.
    """

    tenant: str = ""
    weight: float = 1.0
    priority: int = 1


EVERYONE = Share()
"""The share of all callers without an API key."""


@dataclass(frozen=True, slots=True)
class ScoreJob:
    """One replica-sized part of a request.

    Attributes:
        request_id: the request's ``x-request-id``, for logs.
        deadline: Unix time in seconds after which the answer is useless; None: never.
        affinity: helps to choose the replica; None: any replica will do.
        share: whose turns it takes.
        adapter: the name of the LoRA adapter that computes it; empty: the model itself.
    """

    request_id: str
    batch: TokenBatch
    deadline: float | None = None
    affinity: Affinity | None = None
    share: Share = EVERYONE
    adapter: str = ""


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
