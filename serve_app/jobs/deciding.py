"""Asks a job's questions about rows, several rows at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from serve_app.jobs import columns, single_rows
from serve_app.jobs.scoring import Cost, Told
from serve_app.jobs.targets import Ask
from serve_app.tasks.systemone import ErrorAnswer, SystemOneRequest, SystemOneResponse


def decide(
    request: SystemOneRequest,
    asked: Sequence[tuple[int, str]],
    ask: Ask[SystemOneRequest, SystemOneResponse],
    told: Told = lambda _: None,
) -> tuple[dict[int, dict[str, Any] | str], Cost]:
    """Decide the request's questions for each row: the results by position, or the reason why a row has none.

    Args:
        asked: position and state of each row.
        ask: sends a request; threads share it.
        told: hears of each row.

    Raises:
        ScoringError: no row can be answered, since a question is wrong, the model is unknown or the service is
            unreachable.
    """

    def decided(state: str) -> SystemOneResponse:
        return ask(request.model_copy(update={"state": state, "on_error": "item"}))

    answers = single_rows.ask_each([state for _, state in asked], decided, ("state",), told)
    found = {at: _values(answer) for (at, _), answer in zip(asked, answers, strict=True)}
    answered = [answer for answer in answers if not isinstance(answer, str)]
    tokens = sum(answer.usage.input_tokens for answer in answered)
    return found, Cost(tokens, sum(answer.x_cached_tokens for answer in answered))


def _values(answer: SystemOneResponse | str) -> dict[str, Any] | str:
    """A row's values; the reason if a question has no answer."""
    if isinstance(answer, str):
        return answer
    wrong = [f"{name}: {own.x_error.message}" for name, own in answer.answers.items() if isinstance(own, ErrorAnswer)]
    if wrong:
        return "; ".join(wrong)
    return columns.decided(answer.answers)
