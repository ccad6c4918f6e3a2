"""``POST /v1/score``: the labels' probabilities after each prompt."""

from __future__ import annotations

from functools import partial

from serve_app.schemas import ScoreRequest, ScoreResponse
from serve_app.tasks import scores
from serve_app.tasks.model_facts import ModelFacts
from serve_app.tasks.prompts import PromptBuilder
from serve_app.tasks.steps import Steps
from serve_app.tasks.task import PreparedRequest, Task


def prepare(model: ModelFacts, request: ScoreRequest) -> Steps[PreparedRequest[ScoreResponse]]:
    """Build the prompts of all items.

    Raises:
        InvalidRequestError: see ``PromptBuilder``.
        TooLargeError: see ``PromptBuilder``.
    """
    made = yield from PromptBuilder(request, model).rest()
    answer = partial(scores.answer, request, made, model.name)
    return PreparedRequest(made.batch, made.query_tokens, len(made.prompts), scores.size(request, made), answer)


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
