"""Asks for the logprobs of a job's rows, several rows at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from serve_app.jobs import columns, single_rows
from serve_app.jobs.scoring import Cost, Told
from serve_app.jobs.targets import Ask
from serve_app.tasks.logprobs import LogprobsRequest, LogprobsResponse

_FIELDS = ("input", "start")
"""The fields that say something of the row."""


def teach(
    request: LogprobsRequest,
    asked: Sequence[tuple[int, str]],
    ask: Ask[LogprobsRequest, LogprobsResponse],
    told: Told = lambda _: None,
) -> tuple[dict[int, dict[str, Any] | str], Cost]:
    """Ask for the logprobs of each row: the results by position, or the reason why a row has none.

    Args:
        asked: position and text of each row.
        ask: sends a request; threads share it.
        told: hears of each row.

    Raises:
        ScoringError: no row can be answered, since the model is unknown or the service is unreachable.
    """

    def taught(text: str) -> LogprobsResponse:
        return ask(request.model_copy(update={"input": text}))

    answers = single_rows.ask_each([text for _, text in asked], taught, _FIELDS, told)
    cost = Cost()
    found: dict[int, dict[str, Any] | str] = {}
    for (at, _), answer in zip(asked, answers, strict=True):
        if isinstance(answer, str):
            found[at] = answer
            continue
        found[at] = columns.taught(request, answer.data[0])
        cost.prompt_tokens += answer.usage.prompt_tokens
        cost.cached_tokens += answer.usage.prompt_tokens_details.cached_tokens
    return found, cost
