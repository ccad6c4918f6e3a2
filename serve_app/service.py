"""The whole life of a request, without HTTP and without Serve."""

from __future__ import annotations

import asyncio
import math
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib.metadata import version
from itertools import pairwise
from typing import Protocol, TypeVar

import numpy as np

from serve_app import fanout
from serve_app.admission import Admission
from serve_app.batches import shared_with_previous
from serve_app.contract import BatchResult, JobResult, ModelInfo, ScoreJob, TokenBatch
from serve_app.errors import DeadlineExceededError, InternalError, NotFoundError, OverloadedError, ScoringError
from serve_app.prompts import Prompts, TextTokenizer
from serve_app.schemas import (
    DetokenizeRequest,
    DetokenizeResponse,
    InfoResponse,
    LimitsInfo,
    ModelCard,
    ModelsResponse,
    PromptTokensDetails,
    ScoreRequest,
    ScoreResponse,
    TokenizeRequest,
    TokenizeResponse,
    Usage,
)
from serve_app.settings import Settings

DEFAULT_NAME = "default"
"""Always a name of the served model."""

LOWEST = float(np.finfo(np.float32).min)
"""Stands for a logprob of -inf where JSON must carry it; its exponential is 0.0 too."""

INLINE_VALUES = 2_000
"""A response with more values, whose softmax takes milliseconds, is made in a thread: the event loop must go on."""

_PROBE_TOLERANCE = 0.02
"""Of a probability, between the same prompt in two batches: bfloat16 stays below it, a wrong answer does not."""

DEMO_PROBE = ([504, 3575, 282, 4649, 314], [7042, 4528], [0.7725, 0.0125])
"""Of the demo model: "The capital of France is", " Paris" and " London", and their probabilities by transformers."""

T = TypeVar("T")


class Replicas(Protocol):
    """The engines behind the service."""

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

    async def metrics(self) -> str:
        """The counters of all replicas, as Prometheus reads them.

        Raises:
            OverloadedError: they cannot be had at the moment.
        """
        ...


class ScoringService:
    """Scores requests on ``replicas``. One instance serves any number of concurrent calls on one event loop.

    Args:
        settings: names, limits and times.
        tokenizer: of the model that the replicas hold.
        info: what the replicas say of that model.
        replicas: the engines.
    """

    def __init__(self, settings: Settings, tokenizer: TextTokenizer, info: ModelInfo, replicas: Replicas) -> None:
        self._settings = settings
        self._info = info
        self._replicas = replicas
        self._prompts = Prompts(tokenizer, info, settings.limits)
        self._admission = Admission(settings.limits.max_queued_tokens / settings.ingress_replicas)
        self.outcomes: Counter[str] = Counter()
        """Requests for scores so far, by how they ended."""
        self._threads = ThreadPoolExecutor(settings.tokenizer_threads, thread_name_prefix="tokenizer")
        self._started = int(time.time())
        self._probe_passed = False
        self._probing = asyncio.Lock()

    @property
    def max_body_bytes(self) -> int:
        return self._settings.limits.max_body_bytes

    async def score(self, request: ScoreRequest, *, request_id: str, timeout_s: float = math.inf) -> ScoreResponse:
        """The labels' scores for every item, in order.

        Args:
            request_id: goes with the work to the replicas, for logs.
            timeout_s: the caller's own limit, if it is shorter than ``settings.timeout_s``.

        Raises:
            InvalidRequestError: the request is wrong.
            NotFoundError: it names another model.
            TooLargeError: it asks for more than the limits allow.
            OverloadedError: no room, or no healthy replica.
            DeadlineExceededError: the time is over; the queued work is dropped.
            InternalError: the model's output for an item is not finite, or a fault of ours.
        """
        timeout_s = min(timeout_s, self._settings.timeout_s)
        try:
            self._check_model(request.model)
            work = self._score(request, request_id, time.time() + timeout_s)
            answer = await self._in_time(work, timeout_s)
        except BaseException as error:
            self.outcomes[_outcome(error)] += 1
            raise
        self.outcomes["answered"] += 1
        return answer

    async def tokenize(self, request: TokenizeRequest) -> TokenizeResponse:
        """Ids and pieces of text, as ``score`` would see them."""
        self._check_model(request.model)
        texts = [request.prompt] if isinstance(request.prompt, str) else request.prompt
        call = partial(self._prompts.tokenize, texts, request.add_special_tokens)
        encoded = await self._in_time(self._in_thread(call))
        limit = self._prompts.max_prompt_tokens
        if isinstance(request.prompt, str):
            ids, pieces = encoded[0]
            return TokenizeResponse(tokens=ids, count=len(ids), max_model_len=limit, token_strs=pieces)
        return TokenizeResponse(
            tokens=[ids for ids, _ in encoded],
            count=[len(ids) for ids, _ in encoded],
            max_model_len=limit,
            token_strs=[pieces for _, pieces in encoded],
        )

    async def detokenize(self, request: DetokenizeRequest) -> DetokenizeResponse:
        """The text of ids."""
        self._check_model(request.model)
        call = partial(self._prompts.detokenize, request.tokens)
        return DetokenizeResponse(prompt=await self._in_time(self._in_thread(call)))

    def models(self) -> ModelsResponse:
        """The names that requests may use, ``default`` aside."""
        cards = [
            ModelCard(
                id=name,
                created=self._started,
                owned_by="score-serve",
                max_model_len=self._prompts.max_prompt_tokens,
            )
            for name in self._names()
            if name != DEFAULT_NAME
        ]
        return ModelsResponse(data=cards)

    def info(self) -> InfoResponse:
        """What is served, and the limits."""
        info, limits = self._info, self._settings.limits
        return InfoResponse(
            model=self._settings.name,
            names=self._names(),
            architecture=info.architecture,
            context_length=info.context_length,
            vocab_size=info.vocab_size,
            dtype=info.dtype,
            platform=info.platform,
            buckets=list(info.buckets),
            limits=LimitsInfo(
                max_items=limits.max_items,
                max_labels=limits.max_labels,
                max_body_bytes=limits.max_body_bytes,
                max_prompt_tokens=self._prompts.max_prompt_tokens,
                max_request_tokens=limits.max_request_tokens,
                max_queued_tokens=limits.max_queued_tokens,
                timeout_s=self._settings.timeout_s,
            ),
            version=version("score-serve"),
        )

    async def metrics(self) -> str:
        """See ``Replicas.metrics``."""
        return await self._replicas.metrics()

    async def ready(self) -> None:
        """Return once a known answer came back right; it is asked for until it did, then never again.

        The same prompt is scored alone and behind a longer one. Both answers must be probabilities, and agree. The demo
        model is also asked what transformers was asked, and must answer the same.

        Raises:
            OverloadedError: not able to score, with the reason.
        """
        async with self._probing:
            if self._probe_passed:
                return
            try:
                await self._in_time(self._probe())
            except ScoringError as error:
                raise OverloadedError(f"not ready: {error.message}", retry_after_s=1) from error
            self._probe_passed = True

    def close(self) -> None:
        """Stop the tokenizer's threads."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def _score(self, request: ScoreRequest, request_id: str, deadline: float) -> ScoreResponse:
        self._admission.check(1, self._replicas.count)  # tokenising what will be refused would delay the others
        batch, prefix_tokens, tokens = await self._in_thread(partial(self._prepare, request))
        if batch.num_sequences == 0:
            result = BatchResult(np.zeros(0, np.float32), np.zeros(0, np.int32))
        else:
            with self._admission.inside(tokens, self._replicas.count):
                result = await self._compute(batch, prefix_tokens, request_id, deadline)
        respond = partial(self._response, request, batch, result)
        return respond() if len(batch.targets) <= INLINE_VALUES else await self._in_thread(respond)

    def _prepare(self, request: ScoreRequest) -> tuple[TokenBatch, int, int]:
        """The prompts, how much of their front may come again (0 where there is no choice of replica), and the tokens
        to compute."""
        batch = self._prompts.prepare(request)
        prefix_tokens = self._prompts.prefix_tokens(request, batch) if self._replicas.count > 1 else 0
        return batch, prefix_tokens, int((batch.lengths - shared_with_previous(batch)).sum())

    def _response(self, request: ScoreRequest, batch: TokenBatch, result: BatchResult) -> ScoreResponse:
        values, bounds = result.values.tolist(), batch.target_offsets.tolist()
        rows = [values[start:end] for start, end in pairwise(bounds)]
        prompt_tokens = len(batch.tokens)
        return ScoreResponse(
            scores=[
                label_scores(row, index, softmax=request.apply_softmax, temperature=request.temperature)
                for index, row in enumerate(rows)
            ],
            model=self._settings.name,
            usage=Usage(
                prompt_tokens=prompt_tokens,
                total_tokens=prompt_tokens,
                prompt_tokens_details=PromptTokensDetails(
                    cached_tokens=prompt_tokens - int(result.computed_tokens.sum())
                ),
            ),
            token_logprobs=[[max(value, LOWEST) for value in row] for row in rows]
            if request.return_token_logprobs
            else None,
        )

    async def _compute(self, batch: TokenBatch, prefix_tokens: int, request_id: str, deadline: float) -> BatchResult:
        """On as many replicas as it is worth. When one part fails the others are cancelled."""
        # A part that fills a device batch by itself loses nothing by the split but the prefix.
        parts = fanout.split(batch, self._replicas.count, self._settings.max_batch_tokens)
        affinities = fanout.affinities(parts, prefix_tokens)
        jobs = [ScoreJob(request_id, part, deadline, to) for part, to in zip(parts, affinities, strict=True)]
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(self._run(job)) for job in jobs]
        except BaseExceptionGroup as failures:
            raise failures.exceptions[0] from None
        return fanout.merge([task.result().result for task in tasks])

    async def _run(self, job: ScoreJob) -> JobResult:
        return await self._replicas.score(job)

    async def _probe(self) -> None:
        last = self._info.vocab_size - 1
        prompt, other = [last // 2, last // 3, last // 5], [last // 7, last // 2, last // 11, 0, last]
        labels = [0, last]
        alone, together = [
            await self._compute(_probe_batch(prompts, labels), 0, "ready", time.time() + self._settings.timeout_s)
            for prompts in ([prompt], [other, prompt])
        ]
        first = label_scores(alone.values.tolist(), 0, softmax=True)
        second = label_scores(together.values[len(labels) :].tolist(), 1, softmax=True)
        gap = max(abs(a - b) for a, b in zip(first, second, strict=True))
        if gap > _PROBE_TOLERANCE or not math.isclose(sum(first), 1.0, abs_tol=1e-9):
            raise InternalError(f"a prompt scored {first} alone and {second} in a batch")
        if self._settings.model == "demo" and self._settings.engine == "jax":
            prompt, labels, known = DEMO_PROBE
            answer = await self._compute(
                _probe_batch([prompt], labels), 0, "ready", time.time() + self._settings.timeout_s
            )
            scores = label_scores(answer.values.tolist(), 0, softmax=False)
            if max(abs(a - b) for a, b in zip(scores, known, strict=True)) > _PROBE_TOLERANCE:
                raise InternalError(f"a known prompt scored {scores}; right is {known}")

    async def _in_time(self, work: Awaitable[T], timeout_s: float | None = None) -> T:
        """The result of ``work``, or 504 and the work cancelled."""
        timeout_s = timeout_s or self._settings.timeout_s
        limit = asyncio.timeout(timeout_s)
        try:
            async with limit:
                return await work
        except TimeoutError as error:
            if not limit.expired():
                raise
            raise DeadlineExceededError(
                f"the request was not done after {timeout_s:g} s; send fewer items or try again later"
            ) from error

    def _in_thread(self, call: Callable[[], T]) -> asyncio.Future[T]:
        """Tokenising takes up to seconds, and the event loop must go on."""
        return asyncio.get_running_loop().run_in_executor(self._threads, call)

    def _names(self) -> list[str]:
        return list(dict.fromkeys((self._settings.name, *self._settings.aliases, DEFAULT_NAME)))

    def _check_model(self, name: str) -> None:
        if name not in self._names():
            shown = name if len(name) <= 60 else name[:60] + "..."
            raise NotFoundError(
                f"model {shown!r} is not served here; the names are {', '.join(self._names())}", param="model"
            )


def _outcome(error: BaseException) -> str:
    """In the words of the scorers' own counter."""
    if isinstance(error, asyncio.CancelledError):
        return "cancelled"
    if isinstance(error, OverloadedError):
        return "overloaded"
    if isinstance(error, DeadlineExceededError):
        return "expired"
    invalid = isinstance(error, ScoringError) and error.status < InternalError.status
    return "invalid" if invalid else "failed"


def label_scores(values: Sequence[float], index: int, *, softmax: bool, temperature: float = 1.0) -> list[float]:
    """One item's probabilities from its labels' logprobs, in plain floats.

    Args:
        values: nats; under ``softmax`` any constant may be added to all.
        index: the item, for the error.
        temperature: divides after centring, so that a tiny one cannot overflow.

    Raises:
        InternalError: a value is NaN or +inf, or under ``softmax`` all are -inf.
    """
    peak = max(values)
    if any(math.isnan(value) for value in values) or peak == math.inf or (softmax and peak == -math.inf):
        raise InternalError(
            f"items[{index}]: the model's output is not finite, so there is no score; leave this item out",
            param="items",
            index=index,
        )
    if not softmax:
        # A logprob may come out above 0 by float32's last digit.
        return [min(1.0, math.exp(value)) for value in values]
    weights = [math.exp((value - peak) / temperature) for value in values]
    total = math.fsum(weights)
    return [weight / total for weight in weights]


def _probe_batch(prompts: list[list[int]], labels: list[int]) -> TokenBatch:
    lengths = [len(prompt) for prompt in prompts]
    return TokenBatch(
        tokens=np.array([token for prompt in prompts for token in prompt], np.int32),
        offsets=np.cumsum([0, *lengths], dtype=np.int64),
        read_sequences=np.arange(len(prompts), dtype=np.int32),
        read_positions=np.array(lengths, np.int32) - np.int32(1),
        targets=np.array(labels * len(prompts), np.int32),
        target_offsets=np.arange(len(prompts) + 1, dtype=np.int64) * len(labels),
    )
