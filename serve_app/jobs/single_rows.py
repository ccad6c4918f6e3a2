"""Asks about rows one by one, several at once: for requests that take one text each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from serve_app.errors import DeadlineExceededError, InternalError, InvalidRequestError, TooLargeError
from serve_app.jobs.scoring import Told

A = TypeVar("A")

AT_ONCE = 16
"""Rows that a worker asks about at once: the service computes them together."""

_OF_THE_ROW = (TooLargeError, DeadlineExceededError, InternalError)
"""Errors of which one row may be the cause."""


def ask_each(texts: Sequence[str], ask: Callable[[str], A], own: Sequence[str], told: Told) -> list[A | str]:
    """The answer about each text, or the reason why it has none.

    Args:
        ask: sends a request about a text; threads share it.
        own: the request's fields that say something of the row, so that a fault in them is the row's.
        told: hears of each row.

    Raises:
        ScoringError: no row can be answered.
    """

    def answered(text: str) -> A | str:
        try:
            return ask(text)
        except _OF_THE_ROW as error:
            return error.message
        except InvalidRequestError as error:
            if error.param not in own:
                raise
            return error.message

    answers: list[A | str] = []
    with ThreadPoolExecutor(AT_ONCE) as pool:
        for answer in pool.map(answered, texts):
            answers.append(answer)
            told(1)
    return answers
