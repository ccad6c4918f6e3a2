"""Shortening a prompt that is too long by tokens of its item, and of nothing else. Pure functions."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence

from serve_app.errors import InvalidRequestError


def item_span(ends: Sequence[int], query: str, item: str, *, item_first: bool) -> tuple[int, int]:
    """Which tokens of a joined text are the item's alone; one that also holds a character of the query is not.

    Args:
        ends: of each token, as ``TextTokenizer.encode_with_ends`` tells them.

    Returns:
        The first such token, and the one behind the last.
    """
    front = bisect_right(ends, 0)
    if item_first:
        return front, max(front, bisect_right(ends, len(item)))
    # The token that reaches the query's end is the query's, whatever else it holds; a character may be several tokens.
    start = max(bisect_left(ends, len(query)) + 1, bisect_right(ends, len(query))) if query else front
    return start, max(start, bisect_right(ends, len(query) + len(item)))


def shortened(ids: list[int], start: int, stop: int, room: int, index: int) -> list[int]:
    """The ids without so many of the last of the item's, which are ``start`` to ``stop``, that ``room`` are left.

    Raises:
        InvalidRequestError: not one of the item's would be left.
    """
    too_many = len(ids) - room
    if stop - start <= too_many:
        raise InvalidRequestError(
            f"items[{index}]: the prompt has {len(ids)} tokens, {len(ids) - stop + start} of them not the item's; this "
            f"model reads at most {room} before the labels, and truncate takes from the item only and leaves at least "
            "one; shorten the query",
            param="query",
            index=index,
        )
    return ids[: stop - too_many] + ids[stop:]
