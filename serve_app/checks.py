"""Checks that several routes share."""

from __future__ import annotations

from collections.abc import Sequence

from serve_app.errors import InvalidRequestError


def check_ids(ids: Sequence[int], vocab_size: int, param: str, index: int | None = None) -> None:
    """Token ids that the model has.

    Args:
        ids: Python's integers, before numpy: 10**30 must be an answer too, not an overflow.
        param: the field that they came in, and ``index`` which of its entries, for the error.

    Raises:
        InvalidRequestError: an id is out of the vocabulary.
    """
    if ids and (min(ids) < 0 or max(ids) >= vocab_size):
        wrong = next(i for i in ids if not 0 <= i < vocab_size)
        raise InvalidRequestError(
            f"Token ID {_short(wrong)} is out of vocabulary (vocab size: {vocab_size})", param=param, index=index
        )


def _short(number: int) -> str:
    text = str(number)
    return text if len(text) <= 40 else f"{text[:20]}... ({len(text)} digits)"
