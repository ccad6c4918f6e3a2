"""``POST /v1/score``: the labels' probabilities after each prompt."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from pydantic import BaseModel

from serve_app.schemas import ScoreEnd, ScoreRequest, ScoreResponse
from serve_app.tasks import scores
from serve_app.tasks.model_facts import ModelFacts
from serve_app.tasks.prompts import PromptBuilder
from serve_app.tasks.steps import Steps
from serve_app.tasks.task import Lines, PreparedRequest, Task


def prepare(model: ModelFacts, request: ScoreRequest) -> Steps[PreparedRequest[ScoreResponse]]:
    """Build the prompts of all items.

    Raises:
        InvalidRequestError: see ``PromptBuilder``.
        TooLargeError: see ``PromptBuilder``.
    """
    made = yield from PromptBuilder(request, model).rest()
    answer = partial(scores.answer, request, made, model.name)
    return PreparedRequest(made.batch, made.query_tokens, len(made.prompts), scores.size(request, made), answer)


class _Rows:
    """A request's items, scored some at a time."""

    def __init__(self, model: ModelFacts, request: ScoreRequest) -> None:
        self._model, self._request = model.name, request
        self._builder = PromptBuilder(request, model)
        self._prompt_tokens = 0

    @property
    def left(self) -> int:
        return self._builder.left

    def some(self, tokens: int) -> Steps[PreparedRequest[Sequence[BaseModel]]]:
        made = yield from self._builder.some(tokens)
        self._prompt_tokens += made.prompt_tokens
        rows = partial(scores.rows, self._request, made)
        return PreparedRequest(made.batch, made.query_tokens, len(made.prompts), scores.size(self._request, made), rows)

    def end(self, computed_tokens: int) -> BaseModel:
        return ScoreEnd(model=self._model, usage=scores.usage(self._prompt_tokens, computed_tokens))


SCORE = Task[ScoreRequest, ScoreResponse](
    name="score",
    paths=("/v1/score",),
    description="""The labels' probabilities as the continuation of query + item, for every item.

The header ``x-request-timeout-seconds`` shortens the service's own time limit for this request.""",
    example={
        "query": "\nSentiment:",
        "items": ["Review: I loved every minute of it.", "Review: A waste of two hours."],
        "item_first": True,
        "labels": [" positive", " negative"],
        "apply_softmax": True,
    },
    request=ScoreRequest,
    response=ScoreResponse,
    builder=lambda model: lambda request, _: prepare(model, request),
    lines=Lines(
        "With stream: a line of JSON for each item as it is finished, {index, scores, ...} with the fields of the "
        "whole answer, or {index, error} with on_error: item; then {object: scoring, model, usage}, or an error "
        "object.",
        lambda model: lambda request: _Rows(model, request),
    ),
)
