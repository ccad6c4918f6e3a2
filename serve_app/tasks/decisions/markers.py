"""Options of an encoder's question, cut so that they fit its window, as its publisher cuts them."""

from __future__ import annotations

from collections.abc import Sequence

from serve_app.errors import InvalidRequestError

_LONGEST = 48
"""The most tokens of an option, its marker not counted."""
_LEAST = 4
"""The least tokens that are left of an option, its marker counted."""
_SPARED, _LEAST_SPARED = 16, 8
"""The tokens that are spared for instructions where options are cut for them; and the least that they have anyway."""


def within_window(question: Sequence[int], options: Sequence[list[int]], window: int) -> Sequence[list[int]]:
    """The tokens of each option, its marker included, that fit into a window with the instructions.

    Source: build_sequence in NandhaKishorM/laya, laya/common.py at 8ef5b2d. What is cut there and changes the question,
    instructions and options that become alike, is refused here.

    Args:
        question: the first token, the instructions and a separator.
        options: of each the marker and its text.
        window: the most tokens of instructions and options together.

    Raises:
        InvalidRequestError: the instructions do not fit, or options that differ would not.
    """
    cut = [option[: 1 + _LONGEST] for option in options]
    if window - sum(map(len, cut)) < _SPARED:
        each = max(_LEAST, (window - _SPARED) // len(cut))
        cut = [option[:each] for option in cut]
    room, asked = max(_LEAST_SPARED, window - sum(map(len, cut))), len(question) - 2
    if asked > room:
        raise InvalidRequestError(
            f"the type and the instructions have {asked} tokens; beside these options this model reads {room} of them; "
            "shorten the instructions, or send fewer or shorter options"
        )
    places: dict[tuple[int, ...], int] = {}
    for number, own in enumerate(map(tuple, cut)):
        if (other := places.setdefault(own, number)) != number and options[other] != options[number]:
            raise InvalidRequestError(
                f"options {other} and {number} begin alike, and of so many and so long options this model reads only "
                f"the first {len(own) - 1} tokens of each; shorten them, or send fewer"
            )
    return cut
