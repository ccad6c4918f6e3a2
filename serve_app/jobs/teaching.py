"""Asks for the logprobs of a job's rows, several rows at once."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

from serve_app.errors import DeadlineExceededError, InternalError, InvalidRequestError, TooLargeError
from serve_app.jobs import columns
from serve_app.jobs.scoring import Cost, Told
from serve_app.jobs.targets import Ask
from serve_app.tasks.logprobs import LogprobsRequest, LogprobsResponse

AT_ONCE = 16
"""Rows that a worker asks about at once: the service computes them together."""

_OF_THE_ROW = (TooLargeError, DeadlineExceededError, InternalError)
"""Errors of which one row may be the cause."""
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
    with ThreadPoolExecutor(AT_ONCE) as pool:
        answers: list[LogprobsResponse | str] = []
        for answer in pool.map(partial(_teach, request, ask), [text for _, text in asked]):
            answers.append(answer)
            told(1)
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


def _teach(request: LogprobsRequest, ask: Ask[LogprobsRequest, LogprobsResponse], text: str) -> LogprobsResponse | str:
    """A row's answer, or the reason why it has none."""
    try:
        return ask(request.model_copy(update={"input": text}))
    except _OF_THE_ROW as error:
        return error.message
    except InvalidRequestError as error:
        if error.param not in _FIELDS:
            raise
        return error.message
