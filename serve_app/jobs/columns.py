"""The columns that a job adds to its input's: the one place that names them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from serve_app.schemas import ScoreRequest, ScoreResponse


@dataclass(frozen=True)
class Column:
    """A column that a job may add.

    Attributes:
        number: type of a value.
        per_label: a row has a list with a value for each label or class. CSV has a column for each of them.
        requested: whether a request asks for the column.
    """

    number: type[float] | type[int]
    per_label: bool
    requested: Callable[[ScoreRequest], bool]


COLUMNS = {
    "scores": Column(float, True, lambda _: True),
    "token_logprobs": Column(float, True, lambda request: request.return_token_logprobs),
    "label_mass": Column(float, False, lambda request: request.return_label_mass),
    "truncated": Column(int, False, lambda request: request.truncate == "item"),
}
"""By name, which is also that of the answer's field: a list with an entry for each item."""


def requested(request: ScoreRequest) -> list[str]:
    """Names of the columns that the request asks for, in the table's order."""
    return [name for name, column in COLUMNS.items() if column.requested(request)]


def values(request: ScoreRequest, answer: ScoreResponse, index: int) -> dict[str, Any]:
    """An item's value in each requested column."""
    return {name: getattr(answer, name)[index] for name in requested(request)}
