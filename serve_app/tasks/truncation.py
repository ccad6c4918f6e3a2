"""Truncation of a prompt that is too long: it loses tokens of its item, and no others. Pure functions."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence

from serve_app.errors import InvalidRequestError


def item_span(ends: Sequence[int], query: str, item: str, *, item_first: bool) -> tuple[int, int]:
    """The span of the item's own tokens in a joined text. A token with a character of the query is not in it.

    Args:
        ends: the end of each token, as ``TextTokenizer.encode_with_ends`` gives them.

    Returns:
        The position of the first such token, and the position after the last.
    """
    front = bisect_right(ends, 0)
    if item_first:
        return front, max(front, bisect_right(ends, len(item)))
    # The token that reaches the query's end is the query's, whatever else it holds; a character may be several tokens.
    start = max(bisect_left(ends, len(query)) + 1, bisect_right(ends, len(query))) if query else front
    return start, max(start, bisect_right(ends, len(query) + len(item)))


def shortened(ids: list[int], start: int, stop: int, room: int, index: int) -> list[int]:
    """Shorten ``ids`` to ``room`` tokens: remove the last of the item's, which are ``start`` to ``stop``.

    Raises:
        InvalidRequestError: no token of the item would be left.
    """
    too_many = len(ids) - room
    if stop - start <= too_many:
        raise InvalidRequestError(
            f"items[{index}]: the prompt has {len(ids)} tokens, {len(ids) - stop + start} of them outside the item; "
            f"this model reads at most {room} before the labels, and truncate shortens only the item, to one token at "
            "least; shorten the query",
            param="query",
            index=index,
        )
    return ids[: stop - too_many] + ids[stop:]
