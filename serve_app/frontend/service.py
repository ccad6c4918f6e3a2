"""Answers requests to one model, from admission to the response, without HTTP and without Serve."""

from __future__ import annotations

import asyncio
import hashlib
import json
import math
import time
from collections import Counter, defaultdict
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np
from pydantic import BaseModel

from serve_app import timing
from serve_app.batches import shared_tokens
from serve_app.contract import SALT_BITS, BatchResult, JobResult, ModelInfo, ScoreJob, TokenBatch, shared_by_all
from serve_app.errors import (
    DeadlineExceededError,
    InternalError,
    InvalidRequestError,
    OverloadedError,
    QuotaExceededError,
    ScoringError,
)
from serve_app.frontend import fanout
from serve_app.frontend.admission import Admission
from serve_app.frontend.streaming import as_finished
from serve_app.frontend.tenants import NOBODY, Tenant
from serve_app.frontend.watched_threads import WatchedThreads
from serve_app.schemas import RequestBody
from serve_app.settings import ModelSettings
from serve_app.tasks.model_facts import ModelFacts
from serve_app.tasks.steps import Steps, advance
from serve_app.tasks.table import TASKS
from serve_app.tasks.task import AnyTask, PreparedRequest, Stream, Task
from serve_app.tasks.tokenizer import TextTokenizer
from serve_app.timing import Timings

PIECES_AT_ONCE = 4
"""Pieces of a streamed request kept in flight for each replica: two half batches in the engine and more to follow."""

INLINE_BYTES = 2_000
"""A request whose body has no more is prepared in the event loop: waking a thread takes longer than a short prompt."""

INLINE_VALUES = 2_000
"""A response with more values is made in a thread: it takes milliseconds, and the event loop must go on."""

STUCK_RETRY_AFTER_S = 2
"""Serve replaces a front end after three failed health checks. ``ScoreClient``'s five tries, this many seconds apart,
outlast that."""

T = TypeVar("T")
A = TypeVar("A")
R = TypeVar("R", bound=RequestBody)


class Replicas(Protocol):
    """The replicas that compute the service's jobs."""

    @property
    def count(self) -> int:
        """How many parts of a request can be computed at once."""
        ...

    async def score(self, job: ScoreJob) -> JobResult:
        """Compute one job on one replica.

        Raises:
            ScoringError: no room, no healthy replica, or the engine failed.
        """
        ...


class ModelService:
    """Scores requests on ``replicas``. One instance serves any number of concurrent calls on one event loop.

    Args:
        settings: names, limits and times.
        tokenizer: the model's.
        info: facts about the model, from its replicas.
        replicas: compute the jobs.
        front_ends: number of front ends that share the replicas.
        observe: called with the timings of each answered request.
        folder: the model's files, by which the template of ``/v1/rerank`` is chosen; None: it is chosen by name alone.
    """

    def __init__(
        self,
        settings: ModelSettings,
        tokenizer: TextTokenizer,
        info: ModelInfo,
        replicas: Replicas,
        front_ends: int = 1,
        observe: Callable[[Timings], None] | None = None,
        folder: Path | None = None,
    ) -> None:
        self._folder = folder
        self._tokenizer, self._info, self._replicas = tokenizer, info, replicas
        self._front_ends = front_ends
        self._tokens_per_s = info.tokens_per_s
        self._admission = Admission(0)
        self.reconfigure(settings)
        self.outcomes: Counter[str] = Counter()
        """Numbers of requests for scores so far, by outcome."""
        self.items = 0
        """Items, documents and prompts scored so far."""
        self.tenant_outcomes: defaultdict[str, Counter[str]] = defaultdict(Counter)
        """``outcomes`` of each tenant that has a name."""
        self.tenant_tokens: Counter[str] = Counter()
        """Tokens of the answered requests of each tenant that has a name, shared prefixes counted once."""
        self._observe = observe
        self._threads = WatchedThreads(settings.tokenizer_threads, "tokenizer")

    def reconfigure(self, settings: ModelSettings) -> None:
        """Use these settings for the requests that come from now on.

        Args:
            settings: may differ from those of the start in the fields that ``settings.RECONFIGURABLE`` names.
        """
        model = ModelFacts.of(settings, self._tokenizer, self._info, self._folder)
        # The key is a name, since Serve pickles a deployment's class with copies of the objects that it refers to.
        prepare: dict[str, Callable[[Any, str], Steps[Any]]] = {task.name: task.builder(model) for task in TASKS}
        streams = {task.name: task.lines.builder(model) for task in TASKS if task.lines}
        self._settings, self.model, self._prepare, self._streams = settings, model, prepare, streams
        self._bound_queue()

    @property
    def settings(self) -> ModelSettings:
        """The model's current settings."""
        return self._settings

    @property
    def queued_tokens(self) -> int:
        """The number of tokens that may wait for one replica."""
        return self._queued_tokens

    async def answer(
        self,
        task: Task[R, A],
        request: R,
        *,
        request_id: str,
        timeout_s: float = math.inf,
        tenant: Tenant = NOBODY,
        size: float = math.inf,
    ) -> A:
        """Answer a request.

        Args:
            task: the kind of the request.
            request_id: sent to the replicas with the work, for logs.
            timeout_s: the caller's own limit. ``settings.timeout_s`` holds if it is shorter.
            tenant: who asks.
            size: bytes of the request's body, if they are known.

        Raises:
            InvalidRequestError: the request is wrong.
            TooLargeError: it asks for more than the limits allow.
            QuotaExceededError: the tenant's quota does not cover it.
            OverloadedError: there is no room, or no healthy replica.
            DeadlineExceededError: the time limit has passed; the queued work is dropped.
            InternalError: the model's output for an item is not finite, or the service has a fault.
        """
        prepare = partial(self._prepare[task.name], request, request_id)
        if not task.scores:
            return (
                await self.in_time(self._in_steps(prepare(), tenant, size), self._time_limit(None, timeout_s))
            ).value
        with self._counted(task, tenant):
            limit = self._time_limit(getattr(request, "timeout_s", None), timeout_s)
            asked = self._asked(request, tenant)
            work = self._score(prepare, request_id, time.time() + limit, asked, size)
            return asked.named(await self.in_time(work, limit))

    async def compute(self, batch: TokenBatch, request_id: str) -> BatchResult:
        """Compute a batch that is not a request, such as a self-test's. Call it under ``in_time``.

        Raises:
            ScoringError: see ``answer``.
        """
        deadline = time.time() + self._settings.timeout_s
        return await self._run(self._work(batch, 0, request_id, deadline, _Asked(NOBODY)), NOBODY)

    async def stream(
        self, task: Task[R, Any], request: R, *, request_id: str, timeout_s: float = math.inf, tenant: Tenant = NOBODY
    ) -> AsyncGenerator[Sequence[BaseModel]]:
        """Yield the lines of a request's answer as they finish, several at a time and in no order, and finally an end
        with the usage.

        What is asked is prepared and computed in pieces. No more pieces are begun before the reader asks than the
        replicas need to be busy.

        Args:
            task: the kind of the request; it has ``lines``.

        Raises:
            ScoringError: see ``answer``. It may also come after some lines.
        """
        begin = partial(self._streams[task.name], request)
        with self._counted(task, tenant):
            limit = self._time_limit(getattr(request, "timeout_s", None), timeout_s)
            asked = self._asked(request, tenant)
            async with aclosing(self._stream(begin, request_id, limit, asked)) as answered:
                async for some in answered:
                    yield [asked.named(line) for line in some]

    async def _stream(
        self, begin: Callable[[], Stream], request_id: str, limit: float, asked: _Asked
    ) -> AsyncGenerator[Sequence[BaseModel]]:
        deadline, tenant = time.time() + limit, asked.tenant
        with timing.tokenising():
            stream = await self.in_time(self._in_thread(begin, tenant), limit)
        turn = asyncio.Lock()
        numbers = count()
        computed_tokens = 0

        def prepare() -> Steps[tuple[PreparedRequest[Sequence[BaseModel]], _Work]]:
            prepared = yield from stream.some(self._settings.batch_tokens(self._info.platform) // 2)
            work = self._work(prepared.batch, prepared.query_tokens, request_id, deadline, asked, first=next(numbers))
            return prepared, work

        async def piece() -> tuple[Sequence[BaseModel], int]:
            async with turn:
                with timing.tokenising():
                    prepared, work = await self._in_steps(prepare(), tenant)
            result = await self._run(work, tenant)
            answered = await self._off_loop(partial(prepared.answer, result), prepared.size, tenant)
            self.items += prepared.items
            return answered, int(result.computed_tokens.sum())

        pieces = as_finished(
            piece,
            lambda: stream.left > 0,
            window=PIECES_AT_ONCE * max(self._replicas.count, 1),
            deadline=deadline,
            late=self._too_late(limit),
        )
        async with aclosing(pieces):
            async for answered, computed in pieces:
                computed_tokens += computed
                yield answered
        yield [stream.end(computed_tokens)]

    def adapter(self, name: str) -> str:
        """The LoRA adapter that a request's ``model`` names, alone or as MODEL:ADAPTER; empty: the model itself."""
        if name in self._settings.adapters:
            return name
        last = name.rpartition(":")[2]
        return last if name not in self._settings.names and last in self._settings.adapters else ""

    def _asked(self, request: RequestBody, tenant: Tenant) -> _Asked:
        model = getattr(request, "model", None) or ""
        return _Asked(tenant, _salt(request, tenant), self.adapter(model), model)

    def close(self) -> None:
        """Stop the tokenizer's threads."""
        self._threads.close()

    def check_health(self) -> None:
        """Raise RuntimeError when no prompt can be built any more: the tokenizer's threads are stuck or gone.

        Requests that wait for their prompts then get OverloadedError. So do new ones, since some come after Serve's
        last check. Requests that are being scored go on.
        """
        try:
            self._threads.check(self._settings.stall_s)
        except RuntimeError:
            stuck = "this front end is stuck and will be replaced; try again"
            self._threads.abandon(OverloadedError(stuck, retry_after_s=STUCK_RETRY_AFTER_S))
            raise

    async def _score(
        self,
        prepare: Callable[[], Steps[PreparedRequest[A]]],
        request_id: str,
        deadline: float,
        asked: _Asked,
        size: float,
    ) -> A:
        tenant = asked.tenant

        def work() -> Steps[tuple[PreparedRequest[A], _Work]]:
            prepared = yield from prepare()
            return prepared, self._work(prepared.batch, prepared.query_tokens, request_id, deadline, asked)

        # A request that will be refused need not be tokenised.
        self._admission.check(1, self._replicas.count, tenant.share)
        with timing.tokenising():
            prepared, wanted = await self._in_steps(work(), tenant, size)
        result = await self._run(wanted, tenant)
        answer = await self._off_loop(partial(prepared.answer, result), prepared.size, tenant)
        self.items += prepared.items
        return answer

    def _work(
        self,
        batch: TokenBatch,
        prefix_tokens: int,
        request_id: str,
        deadline: float,
        asked: _Asked,
        *,
        first: int = 0,
    ) -> _Work:
        """Split the batch into jobs, as far as that makes the answer faster.

        Args:
            prefix_tokens: leading tokens of every sequence that another request may have, too; 0: those that all share.
            asked: by whom, and of which adapter.
            first: number of parts that the request had before these.
        """
        replicas = self._replicas.count
        if not len(batch.read_positions):
            return _Work([], 0, first > 0)
        # An encoder computes every sequence whole.
        shared = np.zeros(batch.num_sequences, np.int64) if self._info.encoder else shared_tokens(batch)
        batch, tokens = replace(batch, shared=shared), int((batch.lengths - shared).sum())
        if asked.salt:
            batch = replace(batch, salts=np.full(batch.num_sequences, asked.salt, np.int64))
        job = partial(ScoreJob, request_id, deadline=deadline, share=asked.tenant.share, adapter=asked.adapter)
        if replicas <= 1:
            return _Work([job(batch)], tokens, first > 0)
        # If each part fills a device batch, the split costs nothing but the prefix.
        parts = fanout.split(batch, replicas, self._settings.batch_tokens(self._info.platform), shared_by_all(shared))
        affinities = fanout.affinities(parts, prefix_tokens or shared_by_all(shared), first)
        jobs = [job(part, affinity=to) for part, to in zip(parts, affinities, strict=True)]
        return _Work(jobs, tokens, first > 0)

    async def _run(self, work: _Work, tenant: Tenant) -> BatchResult:
        """Run the jobs and merge their results. When one fails, the others are cancelled."""
        if not work.admitted:
            self._admission.check(work.tokens, self._replicas.count, tenant.share)
        if tenant.bucket:
            (tenant.bucket.owe if work.admitted else tenant.bucket.take)(work.tokens)
        try:
            with self._admission.inside(work.tokens, tenant.share):
                async with asyncio.TaskGroup() as group:
                    tasks = [group.create_task(self._run_one(job)) for job in work.jobs]
        except BaseExceptionGroup as failures:
            raise failures.exceptions[0] from None
        answered = [task.result() for task in tasks]
        if tenant.name:
            self.tenant_tokens[tenant.name] += work.tokens
        timing.current().input_tokens += sum(len(job.batch.tokens) for job in work.jobs)
        # They ran in parallel: the request waited for the longest.
        timing.current().add(timing.QUEUE, max((job.queue_seconds for job in answered), default=0.0))
        timing.current().add(timing.DEVICE, max((job.device_seconds for job in answered), default=0.0))
        return fanout.merge([job.result for job in answered])

    async def _run_one(self, job: ScoreJob) -> JobResult:
        answer = await self._replicas.score(job)
        # The replica's own measurement was of a small batch, just after its start.
        if answer.device_seconds:
            found = float(answer.result.computed_tokens.sum()) / answer.device_seconds
            if found > self._tokens_per_s > 0:
                self._tokens_per_s = found
                self._bound_queue()
        return answer

    def _bound_queue(self) -> None:
        self._queued_tokens = self._settings.queued_tokens(self._tokens_per_s, self._info.platform)
        self._admission.tokens_per_replica = self._queued_tokens / self._front_ends

    @contextmanager
    def _counted(self, task: AnyTask, tenant: Tenant) -> Generator[None]:
        """Count the request by its outcome, and pass on its timings if it is answered."""
        outcome = "answered"
        try:
            with timing.inference(task.name, self._settings.name, tenant.name):
                yield
        except BaseException as error:
            outcome = _outcome(error)
            raise
        finally:
            self.outcomes[outcome] += 1
            if tenant.name:
                self.tenant_outcomes[tenant.name][outcome] += 1
        if self._observe:
            self._observe(timing.current())

    async def in_time(self, work: Awaitable[T], limit_s: float | None = None) -> T:
        """Return the result of ``work``, or cancel it after ``limit_s`` and raise DeadlineExceededError.

        Args:
            limit_s: None: ``settings.timeout_s``.
        """
        limit_s = limit_s or self._settings.timeout_s
        limit = asyncio.timeout(limit_s)
        try:
            async with limit:
                return await work
        except TimeoutError as error:
            if not limit.expired():
                raise
            raise self._too_late(limit_s) from error

    def _too_late(self, limit_s: float) -> DeadlineExceededError:
        longer = f", raise timeout_s (to {self._settings.timeout_s:g} at most)"
        return DeadlineExceededError(
            f"the request was not finished after {limit_s:g} s; send fewer items"
            f"{longer if limit_s < self._settings.timeout_s else ''} or try again later"
        )

    def _time_limit(self, asked_s: float | None, timeout_s: float) -> float:
        """The time limit of a request in seconds: its own or the service's, and no more than its caller's."""
        most = self._settings.timeout_s
        if asked_s is not None and asked_s > most:
            raise InvalidRequestError(
                f"timeout_s is {asked_s:g}; this service allows at most {most:g} s; send that or less",
                param="timeout_s",
            )
        return min(asked_s or most, timeout_s)

    async def _in_thread(self, call: Callable[[], T], tenant: Tenant) -> T:
        """Run ``call`` in a thread: tokenising takes up to seconds, and the event loop must go on."""
        return await self._threads.run(call, tenant.name)

    async def _in_steps(self, steps: Steps[T], tenant: Tenant, size: float = math.inf) -> T:
        """Run ``steps`` in a thread, a short step at a time: other requests' steps run in between, and the steps end
        when the caller leaves or its time has passed. A small request's first step needs no thread."""
        if size <= INLINE_BYTES and self._threads.idle and (done := advance(steps)):
            return done.result
        while not (done := await self._in_thread(partial(advance, steps), tenant)):
            pass
        return done.result

    async def _off_loop(self, call: Callable[[], T], size: int, tenant: Tenant) -> T:
        """Run ``call``, in a thread if the answer that it makes is large."""
        return call() if size <= INLINE_VALUES else await self._in_thread(call, tenant)


class _Asked(NamedTuple):
    """Who asks, and what is theirs.

    Attributes:
        salt: of their prefixes in the cache, see ``TokenBatch.salts``; 0: none.
        adapter: see ``ScoreJob``.
        model: the name by which the request names the model.
    """

    tenant: Tenant
    salt: int = 0
    adapter: str = ""
    model: str = ""

    def named(self, answer: A) -> A:
        """An answer, or a line of one, with the name of the adapter that was asked in the place of its base's."""
        if not self.adapter or not isinstance(answer, BaseModel) or "model" not in type(answer).model_fields:
            return answer
        return answer.model_copy(update={"model": self.model})


class _Work(NamedTuple):
    """A batch for the replicas.

    Attributes:
        tokens: tokens to compute, shared prefixes counted once.
        admitted: the batch belongs to a request that was admitted with an earlier part.
    """

    jobs: Sequence[ScoreJob]
    tokens: int
    admitted: bool


def _outcome(error: BaseException) -> str:
    """The outcome of a request that failed, in the terms of the scorers' own counter."""
    if isinstance(error, asyncio.CancelledError | GeneratorExit):
        return "cancelled"
    if isinstance(error, QuotaExceededError):
        return "over_quota"
    if isinstance(error, OverloadedError):
        return "overloaded"
    if isinstance(error, DeadlineExceededError):
        return "expired"
    invalid = isinstance(error, ScoringError) and error.status < InternalError.status
    return "invalid" if invalid else "failed"


def _salt(request: RequestBody, tenant: Tenant) -> int:
    """The salt of a request's prefixes in the cache, see ``TokenBatch.salts``; 0 without any."""
    parts = [tenant.salt, request.cache_salt or "", getattr(request, "prompt_cache_key", None) or ""]
    if not any(parts):
        return 0
    digest = hashlib.blake2b(json.dumps(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest) >> 8 * len(digest) - SALT_BITS
