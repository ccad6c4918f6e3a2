"""A service with a classification head: it answers class logits or their softmax, whatever labels are sent."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Awaitable, Callable
from typing import Any

import numpy as np
import pytest

from serve_app.contract import BatchResult, TokenBatch
from serve_app.errors import InternalError, InvalidRequestError
from serve_app.frontend.info import info
from serve_app.frontend.readiness import SelfTest
from serve_app.frontend.service import ModelService
from serve_app.schemas import ScoreRequest, ScoreResponse
from serve_app.scorer.fake_engine import FakeEngine
from serve_app.settings import ModelSettings
from serve_app.tasks.completions import COMPLETIONS, CompletionRequest
from serve_app.tasks.generative import GENERATIVE, GenerativeScoringRequest
from serve_app.tasks.rerank import RERANK, RerankRequest
from serve_app.tasks.score import SCORE
from serve_app.tasks.tokenizer import TextTokenizer
from serve_app.templates import RerankTemplate
from tests.local import CONTEXT, VOCAB_SIZE, DirectReplicas

SETTINGS = ModelSettings(model="fake-judge", engine="fake")


async def score(tokenizer: TextTokenizer, engine: FakeEngine, **fields: Any) -> ScoreResponse:
    service = ModelService(SETTINGS, tokenizer, engine.info, DirectReplicas(engine))
    try:
        await SelfTest(service).passed()
        return await service.answer(SCORE, ScoreRequest(query="the ", items=["fox", "dog"], **fields), request_id="r")
    finally:
        service.close()


async def test_logits_as_they_are_and_their_softmax(tokenizer: TextTokenizer):
    engine = FakeEngine(VOCAB_SIZE, CONTEXT, classes=3)
    plain = (await score(tokenizer, engine)).scores
    assert [len(row) for row in plain] == [3, 3]
    assert min(map(min, plain)) < 0, "logits, not probabilities"
    softmax = (await score(tokenizer, engine, apply_softmax=True)).scores
    for logits, probabilities in zip(plain, softmax, strict=True):
        weights = [math.exp(logit - max(logits)) for logit in logits]
        assert probabilities == pytest.approx([weight / sum(weights) for weight in weights], abs=1e-6)


async def test_classes_are_read_before_the_pads(tokenizer: TextTokenizer):
    engine = FakeEngine(VOCAB_SIZE, CONTEXT, classes=3, pad_token_id=7)
    service = ModelService(SETTINGS, tokenizer, engine.info, DirectReplicas(engine))
    items = [[5, 7, 9], [5, 7, 9, 7, 7], [7], [7, 7]]
    try:
        answer = await service.answer(SCORE, ScoreRequest(query=[3], items=items), request_id="r")
        assert info(service, ["fake-judge"]).pad_token_id == 7
    finally:
        service.close()
    plain, padded, *pads = answer.scores
    assert padded == plain
    assert pads[0] == pads[1] != plain


@pytest.mark.parametrize("labels", [[5], [[1, 2], [3]], [VOCAB_SIZE + 7]])
async def test_labels_are_ignored(tokenizer: TextTokenizer, labels: Any):
    engine = FakeEngine(VOCAB_SIZE, CONTEXT, classes=2)
    plain = (await score(tokenizer, engine)).scores
    assert (await score(tokenizer, engine, label_token_ids=labels)).scores == plain
    assert (await score(tokenizer, engine, labels=["yes", "no"])).scores == plain


async def test_one_class(tokenizer: TextTokenizer):
    engine = FakeEngine(VOCAB_SIZE, CONTEXT, classes=1)
    plain = (await score(tokenizer, engine)).scores
    assert plain[0] != plain[1]
    assert (await score(tokenizer, engine, apply_softmax=True)).scores == [[1.0], [1.0]]


@pytest.mark.parametrize("field", ["return_token_logprobs", "return_label_mass"])
async def test_fields_that_need_a_vocabulary_are_refused(tokenizer: TextTokenizer, field: str):
    engine = FakeEngine(VOCAB_SIZE, CONTEXT, classes=3)
    with pytest.raises(InvalidRequestError, match="this one has 3 classes") as refusal:
        await score(tokenizer, engine, **{field: True})
    assert refusal.value.param == field


async def test_a_causal_model_needs_labels(tokenizer: TextTokenizer):
    with pytest.raises(InvalidRequestError, match="label_token_ids is required"):
        await score(tokenizer, FakeEngine(VOCAB_SIZE, CONTEXT))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
async def test_a_logit_that_is_not_finite_is_an_error(tokenizer: TextTokenizer, value: float):
    class Broken(FakeEngine):
        def score(self, batch: TokenBatch) -> BatchResult:
            result = super().score(batch)
            if batch.num_sequences == 2:  # the self-test has other numbers
                result = dataclasses.replace(
                    result, values=np.where(np.arange(6) == 4, np.float32(value), result.values)
                )
            return result

    with pytest.raises(InternalError, match=r"items\[1\]: the model's output is not finite"):
        await score(tokenizer, Broken(VOCAB_SIZE, CONTEXT, classes=3))


@pytest.mark.parametrize("classes", [1, 2])
async def test_a_classifier_reranks_by_its_own_score(tokenizer: TextTokenizer, classes: int):
    own = RerankTemplate(prompt="{query} {document}.", yes="no such", no="answers")  # a classifier does not need them
    engine = FakeEngine(VOCAB_SIZE, CONTEXT, classes=classes)
    settings = SETTINGS.model_copy(update={"rerank_template": own})
    service = ModelService(settings, tokenizer, engine.info, DirectReplicas(engine))
    documents = ["fox", "dog", "cat"]
    ranked = await service.answer(RERANK, RerankRequest(query="the", documents=documents), request_id="r")
    (end,) = tokenizer.encode(["."])
    prompts = [ids + end for ids in tokenizer.encode([f"the {document}" for document in documents])]
    plain = await service.answer(SCORE, ScoreRequest(items=prompts), request_id="r")
    service.close()
    for result in ranked.results:
        logits = plain.scores[result.index]
        assert logits is not None
        gap = logits[-1] - (logits[0] if classes == 2 else 0.0)
        assert result.relevance_score == pytest.approx(1 / (1 + math.exp(-gap)), rel=1e-5)
    scores = [result.relevance_score for result in ranked.results]
    assert scores == sorted(scores, reverse=True)
    assert len(set(scores)) == 3


@pytest.mark.parametrize(
    ("classes", "ask", "said"),
    [
        (
            3,
            lambda s: s.answer(RERANK, RerankRequest(query="q", documents=["a"]), request_id="r"),
            "no class means relevance",
        ),
        (
            2,
            lambda s: s.answer(COMPLETIONS, CompletionRequest(prompt="a", max_tokens=1), request_id="r"),
            "no next-token probabilities",
        ),
        (
            1,
            lambda s: s.answer(
                GENERATIVE, GenerativeScoringRequest(query="q", items=["a"], label_token_ids=[1]), request_id="r"
            ),
            "no next-token probabilities",
        ),
    ],
)
async def test_what_a_classifier_cannot_answer(
    tokenizer: TextTokenizer, classes: int, ask: Callable[[ModelService], Awaitable[Any]], said: str
):
    engine = FakeEngine(VOCAB_SIZE, CONTEXT, classes=classes)
    service = ModelService(SETTINGS, tokenizer, engine.info, DirectReplicas(engine))
    with pytest.raises(InvalidRequestError, match=said) as refusal:
        await ask(service)
    service.close()
    assert refusal.value.param == "model"
