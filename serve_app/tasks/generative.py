"""Generative scoring, ``POST /generative_scoring``: vLLM's request and response shapes around ``/v1/score``.

An item's score is the score of the first label. Text is joined before it is tokenised, as on ``/v1/score``. vLLM
tokenises query and items apart, which gives other tokens where they meet.
"""

from __future__ import annotations

import time
from typing import Annotated, Literal

from pydantic import Field

from serve_app import compat
from serve_app.contract import ModelInfo
from serve_app.errors import InvalidRequestError
from serve_app.schemas import IdLists, Ids, RequestBody, ResponseBody, ScoreRequest, ScoreResponse, Text, Texts, Usage
from serve_app.tasks import score
from serve_app.tasks.model_facts import ModelFacts
from serve_app.tasks.steps import Steps
from serve_app.tasks.task import Prepare, PreparedRequest, Task
from serve_app.tasks.validation import check_causal


class GenerativeScoringRequest(RequestBody):
    """Request for the first label's probability after each prompt: ``POST /generative_scoring``.

    Attributes:
        query: text or token ids, the same kind as ``items``.
        items: texts or lists of token ids, one prompt each.
        label_token_ids: the labels; the first is scored.
        apply_softmax: True: the probability over the labels alone. False: over the whole vocabulary.
        item_first: the prompt is item + query instead of query + item.
        add_special_tokens: add the tokenizer's special tokens to text, such as a begin-of-sequence token.
        request_id: a part of the answer's ``id``. None: the id in the header, or a new one.
    """

    foreign = compat.GENERATIVE

    model: Text | None = None
    query: Annotated[Text | Ids, Field(union_mode="left_to_right")]
    items: Annotated[Texts | IdLists, Field(union_mode="left_to_right")]
    label_token_ids: Ids
    apply_softmax: bool = True
    item_first: bool = False
    add_special_tokens: bool = True
    request_id: Text | None = None


class ItemScore(ResponseBody):
    """The score of the item at ``index``: the first label's probability.

    Attributes:
        score: the probability, 0 to 1.
    """

    index: int
    object: Literal["score"] = "score"
    score: float


class GenerativeScoringResponse(ResponseBody):
    """One score per item, in order.

    Attributes:
        data: one score for each item.
    """

    id: str
    object: Literal["list"] = "list"
    created: int
    model: str
    data: list[ItemScore]
    usage: Usage


def as_score_request(request: GenerativeScoringRequest, info: ModelInfo) -> ScoreRequest:
    """The same request for ``/v1/score``.

    Raises:
        InvalidRequestError: the model is not causal, or there are no items, which vLLM refuses too.
    """
    check_causal(info)
    if not request.items:
        raise InvalidRequestError("items is empty; send at least one item", param="items")
    # The fields were validated before: once is enough for a million ids.
    return ScoreRequest.model_construct(
        query=request.query,
        items=request.items,
        label_token_ids=request.label_token_ids,
        apply_softmax=request.apply_softmax,
        item_first=request.item_first,
        model=request.model or "default",
        add_special_tokens=request.add_special_tokens,
    )


def as_response(answer: ScoreResponse, request_id: str) -> GenerativeScoringResponse:
    """The answer in vLLM's envelope."""
    return GenerativeScoringResponse(
        id=f"generative-scoring-{request_id}",
        created=int(time.time()),
        model=answer.model,
        data=[ItemScore(index=index, score=row[0]) for index, row in enumerate(answer.scores) if row],
        usage=answer.usage,
    )


def _builder(model: ModelFacts) -> Prepare[GenerativeScoringRequest, GenerativeScoringResponse]:
    def prepare(
        request: GenerativeScoringRequest, request_id: str
    ) -> Steps[PreparedRequest[GenerativeScoringResponse]]:
        prepared = yield from score.prepare(model, as_score_request(request, model.info))
        return prepared.converted(lambda answer: as_response(answer, request.request_id or request_id))

    return prepare


GENERATIVE = Task[GenerativeScoringRequest, GenerativeScoringResponse](
    name="generative_scoring",
    paths=("/generative_scoring",),
    description="The first label's probability for every item, in vLLM's shape.",
    example={"query": "Is this a fruit? ", "items": ["apple", "hammer"], "label_token_ids": [1, 2]},
    request=GenerativeScoringRequest,
    response=GenerativeScoringResponse,
    builder=_builder,
)
