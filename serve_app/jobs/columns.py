"""The columns that a job adds to its input's: the one place that names them.

Needs pyarrow, which the extra ``data`` brings.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pyarrow as pa  # pyright: ignore[reportMissingTypeStubs]

from serve_app.schemas import ScoreRequest, ScoreResponse


@dataclass(frozen=True)
class Column:
    """A column that a job may add.

    Attributes:
        type: Arrow's, for Parquet.
        requested: whether a request asks for it.
    """

    type: Any
    requested: Callable[[ScoreRequest], bool]

    @property
    def per_label(self) -> bool:
        """A value is a list with a number for each label or class; CSV has a column for each of them."""
        return pa.types.is_list(self.type)


COLUMNS = {
    "scores": Column(pa.list_(pa.float64()), lambda _: True),
    "token_logprobs": Column(pa.list_(pa.float64()), lambda request: request.return_token_logprobs),
    "label_mass": Column(pa.float64(), lambda request: request.return_label_mass),
    "truncated": Column(pa.int64(), lambda request: request.truncate == "item"),
}
"""By name, which is also the answer's field: a list with a value for each item."""


def requested(request: ScoreRequest) -> list[str]:
    """Names of the columns that the request asks for, in the table's order."""
    return [name for name, column in COLUMNS.items() if column.requested(request)]


def values(request: ScoreRequest, answer: ScoreResponse, index: int) -> dict[str, Any]:
    """An item's value in each of those columns."""
    return {name: getattr(answer, name)[index] for name in requested(request)}
