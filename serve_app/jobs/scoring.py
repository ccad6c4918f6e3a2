"""Packs rows into requests, and unpacks the answers into rows."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from serve_app.errors import DeadlineExceededError, InternalError, TooLargeError
from serve_app.jobs import columns
from serve_app.jobs.targets import Ask
from serve_app.schemas import ScoreRequest, ScoreResponse

_ITEM = re.compile(r"items\[\d+\]")
"""An item's index in a request, which means nothing to the job's user."""

MOST_ITEMS = 1_000
"""Items of one request."""
FIRST_ITEMS = 100
"""Items of the first request; its time decides how many the next ones have."""
REQUEST_S = 2.0
"""What a request should take, so that the progress moves."""
MOST_CHARACTERS = 4_000_000
"""Characters of one request; as JSON they stay under the default body limit of 32 MiB."""

_SPLIT = (TooLargeError, DeadlineExceededError, InternalError)
"""Errors after which a request is halved, since one row may be the cause."""


Told = Callable[[int], object]
"""Called with the number of rows whenever some have been asked about."""


@dataclass
class Cost:
    """Prompt tokens of the answered requests, and how many of them were cached."""

    prompt_tokens: int = 0
    cached_tokens: int = 0


def score(
    request: ScoreRequest,
    asked: Sequence[tuple[int, str, str]],
    ask: Ask[ScoreRequest, ScoreResponse],
    told: Told = lambda _: None,
) -> tuple[dict[int, dict[str, Any] | str], Cost]:
    """Score rows: the results by position, or the reason why a row has none.

    Args:
        asked: position, query and item of each row.
        ask: sends a request, of at most ``MOST_ITEMS`` items.
        told: hears of each request's rows.

    Raises:
        ScoringError: no row can be scored, since the labels are wrong, the model is unknown or the service is
            unreachable.
    """
    found: dict[int, dict[str, Any] | str] = {}
    cost = Cost()
    most = FIRST_ITEMS
    for query, rows in _grouped(request, asked):
        at = 0
        while some := _some(query, rows[at : at + min(most, MOST_ITEMS)]):
            started = time.monotonic()
            _score(request, query, some, ask, found, cost)
            told(len(some))
            at += len(some)
            most = max(1, int(len(some) * REQUEST_S / max(time.monotonic() - started, 1e-3)))
    return found, cost


def _grouped(
    request: ScoreRequest, asked: Iterable[tuple[int, str, str]]
) -> Iterable[tuple[str, list[tuple[int, str]]]]:
    """Group rows by their query.

    Rows with a query of their own go together as whole prompts, joined as the service would join them. This does not
    apply to ``truncate: "item"``, for which the service must know where the item is.
    """
    groups: dict[str, list[tuple[int, str]]] = {}
    for at, query, item in asked:
        groups.setdefault(query, []).append((at, item))
    if request.truncate == "item":
        return list(groups.items())
    alone = {query: rows[0] for query, rows in groups.items() if len(rows) == 1}
    whole = [(at, item + query if request.item_first else query + item) for query, (at, item) in alone.items()]
    several = [(query, rows) for query, rows in groups.items() if query not in alone]
    return [*several, ("", whole)] if whole else several


def _some(query: str, rows: list[tuple[int, str]]) -> list[tuple[int, str]]:
    """The first rows, as many as one request may have characters; at least one."""
    characters = len(query)
    for at, (_, item) in enumerate(rows):
        characters += len(item)
        if at and characters > MOST_CHARACTERS:
            return rows[:at]
    return rows


def _score(
    request: ScoreRequest,
    query: str,
    rows: list[tuple[int, str]],
    ask: Ask[ScoreRequest, ScoreResponse],
    found: dict[int, dict[str, Any] | str],
    cost: Cost,
) -> None:
    items = [item for _, item in rows]
    try:
        answer = ask(request.model_copy(update={"query": query, "items": items, "on_error": "item"}))
    except _SPLIT as error:
        if len(rows) == 1:
            found[rows[0][0]] = _ITEM.sub("the item", error.message)
            return
        half = len(rows) // 2
        _score(request, query, rows[:half], ask, found, cost)
        _score(request, query, rows[half:], ask, found, cost)
        return
    cost.prompt_tokens += answer.usage.prompt_tokens
    cost.cached_tokens += answer.usage.prompt_tokens_details.cached_tokens
    errors = {error.index: _ITEM.sub("the item", error.message) for error in answer.errors or []}
    for index, (at, _) in enumerate(rows):
        found[at] = errors[index] if index in errors else columns.scored(request, answer, index)
