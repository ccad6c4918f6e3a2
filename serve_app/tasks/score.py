"""``POST /v1/score``: the labels' probabilities after each prompt."""

from __future__ import annotations

from serve_app.schemas import ScoreRequest, ScoreResponse
from serve_app.tasks.model_facts import ModelFacts
from serve_app.tasks.prompts import PromptBuilder
from serve_app.tasks.scores import PreparedScore
from serve_app.tasks.steps import Steps
from serve_app.tasks.task import Task


def prepare(model: ModelFacts, request: ScoreRequest) -> Steps[PreparedScore]:
    """Build the prompts of all items.

    Raises:
        InvalidRequestError: see ``PromptBuilder``.
        TooLargeError: likewise.
    """
    items = yield from PromptBuilder(request, model).rest()
    return PreparedScore(items, request, model.name)


SCORE = Task[ScoreRequest, ScoreResponse](
    name="score",
    paths=("/v1/score",),
    description="""The labels' probabilities as the continuation of query + item, for every item.

The header ``x-request-timeout-seconds`` shortens the service's own time limit for this request.""",
    request=ScoreRequest,
    response=ScoreResponse,
    builder=lambda model: lambda request, _: prepare(model, request),
    lines="With stream: a line of JSON for each item as it is finished, {index, scores, ...} with the fields of the "
    "whole answer, or {index, error} with on_error: item; then {object: scoring, model, usage}, or an error object.",
)
