"""Templates such as ``{title}: {body}``, filled with a row's columns. Nothing in a template or a row is evaluated."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

_PART = re.compile(r"\{\{|\}\}|\{([^{}]+)\}|[{}]")


class RowTemplate:
    """A text with ``{column}`` for the value of a column; ``{{`` and ``}}`` are single braces.

    Raises:
        ValueError: a brace is neither doubled nor part of ``{column}``.
    """

    def __init__(self, text: str) -> None:
        self.text = text
        parts = list(_PART.finditer(text))
        if lone := next((part for part in parts if len(part[0]) == 1 or part[0] == "{}"), None):
            raise ValueError(
                f"{text!r} has a lone {lone[0]!r} at character {lone.start() + 1}; "
                "write {column} for a column's value, or {{ and }} for braces"
            )
        self.columns = tuple(dict.fromkeys(part[1] for part in parts if part[1]))

    def fill(self, row: Mapping[str, Any]) -> str:
        """Fill in a row's values. Braces in a value are text; a value that is not a string is written as JSON.

        Raises:
            ValueError: the row lacks a column or has null there, or the text has a lone surrogate.
        """
        for name in self.columns:
            if row.get(name) is None:
                raise ValueError(f"{name} is {'null' if name in row else 'missing'}")
        text = _PART.sub(lambda part: _text(row[part[1]]) if part[1] else part[0][0], self.text)
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"the text has a lone surrogate at character {error.start + 1}") from None
        return text


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
