"""A request from start to end: scores, usage, fan-out, deadlines, and Ray's failures as the service's errors."""

from __future__ import annotations

import asyncio
import math
import pickle
import threading
import time
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from grpc import StatusCode
from grpc.aio import AioRpcError, Metadata
from hypothesis import given
from hypothesis import strategies as st
from ray.exceptions import ActorDiedError, ActorUnavailableError, RayTaskError, TaskCancelledError
from ray.serve.exceptions import BackPressureError, RequestCancelledError

from serve_app import timing
from serve_app.batches import shared_with_previous
from serve_app.contract import BatchResult, JobResult, ScoreJob
from serve_app.errors import (
    DeadlineExceededError,
    InternalError,
    InvalidRequestError,
    OverloadedError,
    ScoringError,
)
from serve_app.frontend import replicas as replicas_module
from serve_app.frontend.info import info as told
from serve_app.frontend.replicas import ScorerReplicas
from serve_app.frontend.service import INLINE_BYTES, INLINE_VALUES, ModelService
from serve_app.schemas import LOWEST, ScoreRequest
from serve_app.scorer.fake_engine import FakeEngine
from serve_app.settings import Limits, ModelSettings
from serve_app.tasks.completions import COMPLETIONS, CompletionRequest
from serve_app.tasks.generative import GENERATIVE, GenerativeScoringRequest
from serve_app.tasks.rerank import RERANK, RerankRequest
from serve_app.tasks.score import SCORE
from serve_app.tasks.scores import label_scores
from serve_app.tasks.tokenizer import TextTokenizer
from tests.local import CONTEXT, VOCAB_SIZE, DirectReplicas
from tests.stubs import HangingReplicas

ENGINE = FakeEngine(VOCAB_SIZE, CONTEXT)
SETTINGS = ModelSettings(model="fake-judge", engine="fake", max_batch_tokens=64)
ASK = ScoreRequest(query=[1, 2], items=[[3], [4, 5], [6]], label_token_ids=[7, 8])

logprobs = st.floats(-100, 0) | st.just(-math.inf)


class TestLabelScores:
    @given(values=st.lists(logprobs, min_size=1, max_size=8))
    def test_plain(self, values: list[float]):
        assert label_scores(values, 0, softmax=False) == [math.exp(value) for value in values]

    @given(
        values=st.lists(logprobs, min_size=1, max_size=8).filter(lambda values: max(values) > -math.inf),
        temperature=st.floats(5e-324, 1e308),
    )
    def test_softmax(self, values: list[float], temperature: float):
        scores = label_scores(values, 0, softmax=True, temperature=temperature)
        assert math.fsum(scores) == pytest.approx(1, abs=1e-12)
        assert max(scores) == scores[values.index(max(values))]
        assert all(score == 0.0 for score, value in zip(scores, values, strict=True) if value == -math.inf)

    @given(values=st.lists(st.floats(-50, 0), min_size=2, max_size=5), shift=st.floats(-50, 50))
    def test_softmax_does_not_see_a_constant(self, values: list[float], shift: float):
        shifted = label_scores([value + shift for value in values], 0, softmax=True)
        assert shifted == pytest.approx(label_scores(values, 0, softmax=True), abs=1e-9)

    def test_temperature(self):
        values = [math.log(0.8), math.log(0.2)]
        assert label_scores(values, 0, softmax=True) == pytest.approx([0.8, 0.2])
        assert label_scores(values, 0, softmax=True, temperature=0.5) == pytest.approx([16 / 17, 1 / 17])
        assert label_scores(values, 0, softmax=True, temperature=1e-300) == [1.0, 0.0]
        assert label_scores(values, 0, softmax=True, temperature=1e300) == pytest.approx([0.5, 0.5])

    def test_impossible_labels(self):
        assert label_scores([-math.inf, 0.0], 0, softmax=True) == [0.0, 1.0]
        assert label_scores([-math.inf, -math.inf], 0, softmax=False) == [0.0, 0.0]

    def test_rounding_gives_no_probability_above_1(self):
        assert label_scores([1e-7], 0, softmax=False) == [1.0]

    @pytest.mark.parametrize(
        ("values", "softmax"),
        [
            ([-1.0, math.nan], False),
            ([math.nan, -1.0], True),
            ([math.inf, 0.0], True),
            ([math.inf], False),
            ([-math.inf] * 2, True),
        ],
    )
    def test_not_finite(self, values: list[float], softmax: bool):
        with pytest.raises(InternalError, match=r"items\[7\]") as caught:
            label_scores(values, 7, softmax=softmax)
        assert caught.value.index == 7


def service_on(
    replicas: Any, tokenizer: TextTokenizer, settings: ModelSettings = SETTINGS, front_ends: int = 1
) -> ModelService:
    return ModelService(settings, tokenizer, ENGINE.info, replicas, front_ends)


class TestScore:
    async def test_usage_counts_what_was_not_computed_as_cached(self, tokenizer: TextTokenizer):
        answer = await service_on(DirectReplicas(ENGINE), tokenizer).answer(SCORE, ASK, request_id="r")
        assert answer.usage.prompt_tokens == answer.usage.total_tokens == 10
        # The query's two tokens are computed once for three items.
        assert answer.usage.prompt_tokens_details.cached_tokens == 4
        assert answer.model == "fake-judge"

    async def test_an_impossible_label_has_the_lowest_logprob(self, tokenizer: TextTokenizer):
        class Impossible(DirectReplicas):
            async def score(self, _job: ScoreJob) -> JobResult:
                values = np.array([-np.inf, -1.0] * 3, np.float32)
                return JobResult(BatchResult(values, np.ones(3, np.int32)), 0.0, 0.0)

        ask = ASK.model_copy(update={"return_token_logprobs": True})
        answer = await service_on(Impossible(ENGINE), tokenizer).answer(SCORE, ask, request_id="r")
        assert answer.token_logprobs == [[LOWEST, -1.0]] * 3
        assert [row[0] for row in answer.scores] == [0.0] * 3
        assert math.exp(LOWEST) == 0.0
        assert "null" not in answer.model_dump_json(exclude_none=True)

    async def test_a_large_answer_is_that_of_small_ones(self, tokenizer: TextTokenizer):
        service = service_on(DirectReplicas(ENGINE), tokenizer)
        items = [[i % VOCAB_SIZE, i // VOCAB_SIZE] for i in range(INLINE_VALUES // 2 + 1)]
        large = await service.answer(SCORE, ASK.model_copy(update={"items": items}), request_id="r")
        for i in (0, len(items) - 1):
            small = await service.answer(SCORE, ASK.model_copy(update={"items": [items[i]]}), request_id="r")
            assert large.scores[i] == small.scores[0]

    async def test_a_job_carries_request_id_and_deadline(self, tokenizer: TextTokenizer):
        replicas = DirectReplicas(ENGINE)
        before = time.time()
        await service_on(replicas, tokenizer).answer(SCORE, ASK, request_id="mine")
        [job] = replicas.jobs
        assert job.request_id == "mine"
        assert before + SETTINGS.timeout_s <= job.deadline <= time.time() + SETTINGS.timeout_s


MANY = ScoreRequest(query=[1] * 20, items=[[2 + i] * 10 for i in range(40)], label_token_ids=[7, 8])


async def hangs(service: ModelService, replicas: HangingReplicas) -> asyncio.Task[Any]:
    """Start a request, and wait until it has reached the replicas."""
    before = len(replicas.jobs)
    task = asyncio.create_task(service.answer(SCORE, ASK, request_id="hangs"))
    while len(replicas.jobs) == before:  # noqa: ASYNC110 - there is no event to wait for
        await asyncio.sleep(0.001)
    return task


async def cancelled(task: asyncio.Task[Any]) -> None:
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


class TestAdmission:
    async def test_a_front_end_lets_in_its_share_of_what_the_running_replicas_may_have(self, tokenizer: TextTokenizer):
        # ASK computes 6 tokens: the query's two once. Two front ends share what each replica may have.
        settings = SETTINGS.model_copy(update={"limits": Limits(max_queued_tokens=10)})
        replicas = HangingReplicas(count=2)
        service = service_on(replicas, tokenizer, settings, front_ends=2)
        first = await hangs(service, replicas)
        with pytest.raises(OverloadedError, match="6 tokens are being scored and this request adds 6; the limit is 10"):
            await service.answer(SCORE, ASK, request_id="refused")
        replicas.count = 3  # another has started
        second = await hangs(service, replicas)
        replicas.count = 2
        await cancelled(first)
        with pytest.raises(OverloadedError):
            await service.answer(SCORE, ASK, request_id="refused")
        await cancelled(second)
        await cancelled(await hangs(service, replicas))
        assert service.outcomes == {"overloaded": 2, "cancelled": 3}

    async def test_a_full_front_end_tokenises_nothing(self, tokenizer: TextTokenizer, monkeypatch: pytest.MonkeyPatch):
        settings = SETTINGS.model_copy(update={"limits": Limits(max_queued_tokens=6)})
        replicas = HangingReplicas()
        service = service_on(replicas, tokenizer, settings)
        first = await hangs(service, replicas)
        monkeypatch.setitem(service._prepare, SCORE.name, lambda *_: pytest.fail("it was tokenised"))
        with pytest.raises(OverloadedError):
            await service.answer(SCORE, ASK, request_id="refused")
        await cancelled(first)


class TestOutcomes:
    async def test_every_request_is_counted_once_by_how_it_ended(self, tokenizer: TextTokenizer):
        service = service_on(DirectReplicas(ENGINE), tokenizer)
        await service.answer(SCORE, ASK, request_id="r")
        with pytest.raises(InvalidRequestError):
            await service.answer(SCORE, ASK.model_copy(update={"label_token_ids": [VOCAB_SIZE]}), request_id="r")
        assert service.outcomes == {"answered": 1, "invalid": 1}
        replicas = HangingReplicas()
        service = service_on(replicas, tokenizer)
        with pytest.raises(DeadlineExceededError, match=r"0\.05 s"):
            await service.answer(SCORE, ASK, request_id="r", timeout_s=0.05)
        assert replicas.jobs[0].deadline == pytest.approx(time.time(), abs=1)  # the replica drops it, too
        await cancelled(await hangs(service, replicas))
        service._replicas = None  # type: ignore[assignment]
        with pytest.raises(AttributeError):
            await service.answer(SCORE, ASK, request_id="r")
        assert service.outcomes == {"expired": 1, "cancelled": 1, "failed": 1}

    async def test_the_other_routes_count_too(self, tokenizer: TextTokenizer):
        service = service_on(DirectReplicas(ENGINE), tokenizer)
        await service.answer(RERANK, RerankRequest(query="the", documents=["fox"]), request_id="r")
        await service.answer(COMPLETIONS, CompletionRequest(prompt="the", max_tokens=1), request_id="r")
        asked = GenerativeScoringRequest(query="the", items=["fox"], label_token_ids=[1])
        await service.answer(GENERATIVE, asked, request_id="r")
        assert service.outcomes == {"answered": 3}
        with pytest.raises(InvalidRequestError):
            await service.answer(GENERATIVE, asked.model_copy(update={"items": []}), request_id="r")
        assert service.outcomes == {"answered": 3, "invalid": 1}
        replicas = HangingReplicas()
        service = service_on(replicas, tokenizer)
        with pytest.raises(DeadlineExceededError, match=r"0\.05 s"):
            await service.answer(RERANK, RerankRequest(query="the", documents=["fox"]), request_id="r", timeout_s=0.05)
        assert service.outcomes == {"expired": 1}


class TestNumbers:
    async def test_items_documents_and_prompts_are_counted(self, tokenizer: TextTokenizer):
        service = service_on(DirectReplicas(ENGINE), tokenizer)
        labels = ["yes", "no", "the quick brown fox"]  # the last label adds one sequence for each item
        await service.answer(SCORE, ScoreRequest(query="is it ", items=["a", "b"], labels=labels), request_id="r")
        assert service.items == 2
        await service.answer(RERANK, RerankRequest(query="the", documents=["fox", "dog", "a"]), request_id="r")
        assert service.items == 5
        await service.answer(COMPLETIONS, CompletionRequest(prompt=["the", "fox"], max_tokens=1), request_id="r")
        assert service.items == 7
        async for _ in service.stream(SCORE, MANY, request_id="r"):
            pass
        assert service.items == 7 + len(MANY.items)
        with pytest.raises(InvalidRequestError):
            await service.answer(SCORE, ASK.model_copy(update={"label_token_ids": [VOCAB_SIZE]}), request_id="r")
        assert service.items == 7 + len(MANY.items)

    async def test_answered_requests_are_timed_with_the_slowest_of_their_parts(self, tokenizer: TextTokenizer):
        class Slow(DirectReplicas):
            async def score(self, job: ScoreJob) -> JobResult:
                answer = await super().score(job)
                return JobResult(answer.result, queue_seconds=len(self.jobs), device_seconds=10 * len(self.jobs))

        seen: list[timing.Timings] = []
        replicas = Slow(ENGINE, count=4)
        service = ModelService(SETTINGS, tokenizer, ENGINE.info, replicas, observe=seen.append)
        timing.begin()
        await service.answer(SCORE, MANY, request_id="r")
        with pytest.raises(InvalidRequestError):
            await service.answer(SCORE, ASK.model_copy(update={"label_token_ids": [VOCAB_SIZE]}), request_id="r")
        (timings,) = seen
        assert (timings.seconds["queue"], timings.seconds["device"]) == (4, 40)
        assert timings.seconds["tokenise"] > 0


class TestFanOut:
    async def test_many_tokens_go_to_all_replicas_and_come_back_in_order(self, tokenizer: TextTokenizer):
        one, four = DirectReplicas(ENGINE), DirectReplicas(ENGINE, count=4)
        whole = await service_on(one, tokenizer).answer(SCORE, MANY, request_id="r")
        parts = await service_on(four, tokenizer).answer(SCORE, MANY, request_id="r")
        assert len(one.jobs) == 1
        assert [job.batch.num_sequences for job in four.jobs] == [10] * 4
        for job in (*one.jobs, *four.jobs):  # so that the replicas need not measure it again
            np.testing.assert_array_equal(job.batch.shared, shared_with_previous(job.batch))
        assert parts.scores == whole.scores

    async def test_parts_and_later_requests_know_the_prefix_of_a_long_query(self, tokenizer: TextTokenizer):
        replicas = DirectReplicas(ENGINE, count=2)
        service = service_on(replicas, tokenizer)
        many = ScoreRequest(query=[1] * 130, items=[[2 + i] * 20 for i in range(20)], label_token_ids=[7])
        await service.answer(SCORE, many, request_id="r")
        await service.answer(SCORE, many.model_copy(update={"items": [[3]]}), request_id="r")
        await service.answer(SCORE, many.model_copy(update={"item_first": True, "items": [[3]]}), request_id="r")
        first, second, again, other = [job.affinity for job in replicas.jobs]
        assert first.key == second.key == again.key
        assert (first.part, second.part, again.part) == (0, 1, 0)
        assert other is None

    async def test_when_a_part_fails_the_others_are_cancelled(self, tokenizer: TextTokenizer):
        class OneFails:
            count = 4
            started = cancelled = 0

            async def score(self, _job: ScoreJob) -> JobResult:
                self.started += 1
                if self.started == self.count:
                    raise OverloadedError("full")
                try:
                    await asyncio.Event().wait()
                except asyncio.CancelledError:
                    self.cancelled += 1
                    raise
                raise AssertionError

        replicas = OneFails()
        with pytest.raises(OverloadedError, match="full"):
            await service_on(replicas, tokenizer).answer(SCORE, MANY, request_id="r")
        assert replicas.cancelled == 3
        assert asyncio.all_tasks() == {asyncio.current_task()}

    async def test_deadline_and_cancelling_leave_no_task(self, tokenizer: TextTokenizer):
        service = service_on(HangingReplicas(count=4), tokenizer, SETTINGS.model_copy(update={"timeout_s": 0.05}))
        with pytest.raises(DeadlineExceededError, match=r"0\.05 s"):
            await service.answer(SCORE, MANY, request_id="r")
        assert asyncio.all_tasks() == {asyncio.current_task()}
        task = asyncio.create_task(service_on(HangingReplicas(count=4), tokenizer).answer(SCORE, MANY, request_id="r"))
        await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert asyncio.all_tasks() == {asyncio.current_task()}

    async def test_a_timeout_raised_elsewhere_is_not_the_deadline(self, tokenizer: TextTokenizer):
        class Timing:
            count = 1

            async def score(self, _job: ScoreJob) -> JobResult:
                raise TimeoutError("a socket")

        with pytest.raises(TimeoutError, match="a socket"):
            await service_on(Timing(), tokenizer).answer(SCORE, ASK, request_id="r")


async def test_only_a_small_request_needs_no_thread_and_only_while_none_is_busy(tokenizer: TextTokenizer):
    service, gate = service_on(DirectReplicas(ENGINE), tokenizer), threading.Event()

    async def ask(size: int) -> None:
        await service.answer(SCORE, ASK, request_id="r", size=size)

    hanging = asyncio.create_task(service._threads.run(gate.wait))
    await asyncio.sleep(0)
    service.close()  # later calls for a thread fail
    with pytest.raises(RuntimeError):
        await ask(INLINE_BYTES)
    gate.set()
    await hanging
    await ask(INLINE_BYTES)
    with pytest.raises(RuntimeError):
        await ask(INLINE_BYTES + 1)


async def test_the_limit_of_admitted_tokens_follows_the_speed_in_the_answers(tokenizer: TextTokenizer):
    class Timed(DirectReplicas):
        async def score(self, job: ScoreJob) -> JobResult:
            answer = await super().score(job)
            return replace(answer, device_seconds=float(answer.result.computed_tokens.sum()) / 5_000)

    info = replace(ENGINE.info, tokens_per_s=100.0)
    service = ModelService(SETTINGS, tokenizer, info, Timed(ENGINE))
    assert told(service, []).limits.max_queued_tokens == 100 * SETTINGS.timeout_s / 2
    await service.answer(SCORE, ASK, request_id="r")
    assert told(service, []).limits.max_queued_tokens == 5_000 * SETTINGS.timeout_s / 2
    service.close()


class Scorer:
    """A stand-in for a Serve handle: ``score.remote(job)`` can be awaited and cancelled."""

    deployment_id = "Scorer"

    def __init__(self, *answers: Any) -> None:
        self.answers = list(answers)
        self.cancelled = 0
        self.score = self

    def remote(self, _job: ScoreJob) -> Scorer:
        return self

    def __await__(self) -> Any:
        return self._answer().__await__()

    async def _answer(self) -> Any:
        answer = self.answers.pop(0)
        if answer is None:
            await asyncio.Event().wait()
        if isinstance(answer, BaseException):
            raise answer
        return answer

    def cancel(self) -> None:
        self.cancelled += 1


def task_error(cause: Exception) -> Exception:
    """The error as Ray passes it between processes and raises it in the caller."""
    error = RayTaskError("score", "Traceback: /secret/path", cause, "proctitle", 1, "127.0.0.1")
    return pickle.loads(pickle.dumps(error)).as_instanceof_cause()


JOB = ScoreJob("r", None)  # type: ignore[arg-type]
LOST = (
    ActorDiedError(),
    ActorUnavailableError("gone", None),
    RequestCancelledError("r"),
    task_error(ActorDiedError()),
    AioRpcError(StatusCode.INTERNAL, Metadata(), Metadata()),
    asyncio.CancelledError(),  # the replica's own, as gRPC passes it on
)
CANCELLED = (
    RequestCancelledError("r"),
    TaskCancelledError(),
    task_error(TaskCancelledError()),
    AioRpcError(StatusCode.CANCELLED, Metadata(), Metadata()),
    asyncio.CancelledError(),
)


class TestScorerReplicas:
    @pytest.mark.parametrize("lost", LOST, ids=lambda error: type(error).__name__)
    async def test_a_job_outlives_two_replicas_and_no_more(self, lost: Exception, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr(replicas_module, "RETRY_PAUSE_S", 0.01)
        monkeypatch.setattr(replicas_module, "CANCELLED_BY_S", 0.01)
        assert await ScorerReplicas(Scorer(lost, lost, "answer")).score(JOB) == "answer"
        scorer = Scorer(lost, lost, lost, "answer")
        with pytest.raises(OverloadedError, match="no healthy replica") as caught:
            await ScorerReplicas(scorer).score(JOB)
        assert caught.value.retry_after_s == 1
        assert scorer.answers == ["answer"]

    @pytest.mark.parametrize("cancelled", CANCELLED, ids=lambda error: type(error).__name__)
    async def test_a_client_that_leaves_is_no_lost_replica(
        self, cancelled: BaseException, caplog: pytest.LogCaptureFixture
    ):
        """Serve cancels the call first, and then the request."""
        scorer = Scorer(cancelled, "a second job")
        task = asyncio.create_task(ScorerReplicas(scorer).score(JOB))
        await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert scorer.answers == ["a second job"]
        assert not caplog.records

    @pytest.mark.parametrize(("given", "said"), [(None, 1), (0.2, 1), (7.4, 7)])
    async def test_back_pressure_is_overload(self, given: float | None, said: int):
        scorer = Scorer(BackPressureError(num_queued_requests=9, max_queued_requests=9, retry_after_s=given))
        with pytest.raises(OverloadedError) as caught:
            await ScorerReplicas(scorer).score(JOB)
        assert caught.value.retry_after_s == said

    async def test_the_services_own_errors_come_through_as_they_were(self):
        sent = OverloadedError("full", param="items", index=3, retry_after_s=9)
        for error in (pickle.loads(pickle.dumps(sent)), task_error(sent)):
            with pytest.raises(ScoringError) as caught:
                await ScorerReplicas(Scorer(error)).score(JOB)
            assert type(caught.value) is OverloadedError
            assert vars(caught.value) == vars(sent)
            assert caught.value.body() == sent.body()

    async def test_a_fault_in_the_scorer_reveals_nothing(self):
        for error in (ValueError("/secret"), task_error(ValueError("/secret"))):
            with pytest.raises(InternalError) as caught:
                await ScorerReplicas(Scorer(error)).score(JOB)
            assert "secret" not in str(caught.value)

    async def test_cancelling_reaches_the_replica(self):
        scorer = Scorer(None)
        task = asyncio.create_task(ScorerReplicas(scorer).score(JOB))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert scorer.cancelled == 1
