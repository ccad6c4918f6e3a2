"""Completions and rankings from values that are not finite, and from texts that are alike."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from serve_app.contract import BatchResult, JobResult, ScoreJob
from serve_app.errors import InternalError
from serve_app.frontend.service import ModelService
from serve_app.schemas import LOWEST
from serve_app.scorer.fake_engine import FakeEngine
from serve_app.settings import ModelSettings
from serve_app.tasks.completions import COMPLETIONS, CompletionRequest, _top
from serve_app.tasks.rerank import RERANK, RerankRequest
from serve_app.tasks.tokenizer import TextTokenizer
from tests.local import CONTEXT, VOCAB_SIZE, DirectReplicas

ENGINE = FakeEngine(VOCAB_SIZE, CONTEXT, nan_token=13)


def service_on(replicas: Any, tokenizer: TextTokenizer) -> ModelService:
    return ModelService(ModelSettings(model="fake-judge", engine="fake"), tokenizer, ENGINE.info, replicas)


@pytest.mark.parametrize("rest", [{"max_tokens": 1}, {"max_tokens": 0, "echo": True, "logprobs": 0}])
async def test_a_prompt_that_is_not_finite_is_named(tokenizer: TextTokenizer, rest: dict[str, Any]):
    request = CompletionRequest(prompt=[[1, 2], [3, 13, 4]], **rest)
    with pytest.raises(InternalError, match=r"prompt\[1\]") as caught:
        await service_on(DirectReplicas(ENGINE), tokenizer).answer(COMPLETIONS, request, request_id="r")
    assert (caught.value.param, caught.value.index) == ("prompt", 1)


async def test_a_document_that_is_not_finite_is_named(tokenizer: TextTokenizer):
    [poison] = tokenizer.encode([" fox"])[0]
    engine = FakeEngine(VOCAB_SIZE, CONTEXT, nan_token=poison)
    request = RerankRequest(query="q", documents=["a", "b fox"])
    with pytest.raises(InternalError, match=r"documents\[1\]") as caught:
        await service_on(DirectReplicas(engine), tokenizer).answer(RERANK, request, request_id="r")
    assert (caught.value.param, caught.value.index) == ("documents", 1)


async def test_an_impossible_token_has_the_lowest_logprob(tokenizer: TextTokenizer):
    class Impossible(DirectReplicas):
        async def score(self, job: ScoreJob) -> JobResult:
            result = self.engine.score(job.batch)
            values = np.full_like(result.values, -np.inf)
            return JobResult(BatchResult(values, result.computed_tokens, result.argmax, result.argmax_values), 0.0, 0.0)

    request = CompletionRequest(prompt=[[1, 2]], max_tokens=0, echo=True, logprobs=1)
    answer = await service_on(Impossible(ENGINE), tokenizer).answer(COMPLETIONS, request, request_id="r")
    told = answer.choices[0].logprobs
    assert told is not None
    assert told.token_logprobs == [None, LOWEST]
    assert "null,null" not in answer.model_dump_json()


def test_the_highest_logprob_is_never_lost():
    assert _top(5, "a", -1.0, 5, "a", -0.9999999) == {"a": -1.0}  # read twice, rounded twice
    assert _top(5, "a", -1.0, 7, "b", -0.5) == {"a": -1.0, "b": -0.5}
    assert _top(5, "\ufffd", -1.0, 7, "\ufffd", -0.5) == {"\ufffd": -1.0, "token_id:7": -0.5}
    assert _top(5, "a", -math.inf, 7, "b", -0.5) == {"a": LOWEST, "b": -0.5}
