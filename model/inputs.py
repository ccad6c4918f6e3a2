"""What a launch is told, in one array: it goes to the device at once, and the program takes it apart.

A mesh's array has a row for each call of the launch. Without one it has a single row.
"""

import itertools
import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from model.plan import reads_of


class Room(NamedTuple):
    """What every call has room for.

    Attributes:
        prefixes: P.
        pages: entries of a prefix's page table.
        adapters: A that its tokens take, see ``model.lora``; 0: there are none.
    """

    prefixes: int
    pages: int
    adapters: int = 0


class Inputs(NamedTuple):
    """The parts of an array of one or several rows, each for a call of M tokens; they share the array's memory.

    Attributes:
        tokens: [M] ids; -1 for padding.
        positions: [M], each token's place in its sequence.
        prefixes: [M], which of the call's P prefixes each token sees.
        segments: [M], see ``attention.AttentionContext``.
        adapted: [M], see ``lora.Rows.numbers``; [0] without adapters.
        reads: [R] flat indices of the tokens whose hidden states are kept; not used by ``prefill``.
        adapters: [A], see ``lora.Rows.slots``; the same in all rows, as is what follows.
        tables: [P, pages], the pages of each prefix.
        lengths: [P], each prefix's tokens.
        slots: [P, 2], see ``delta.Packed``; zeros but in a hybrid.
        place: [1], where the first hidden state goes among those of earlier launches.
    """

    tokens: Any
    positions: Any
    prefixes: Any
    segments: Any
    adapted: Any
    reads: Any
    adapters: Any
    tables: Any
    lengths: Any
    slots: Any
    place: Any

    @classmethod
    def of(cls, array: Any, size: int, room: Room) -> "Inputs":
        """Take an array apart.

        Args:
            array: of numpy or jax, [width of ``size``] or [rows, width].
            size: tokens of a call.
            room: of the call.
        """
        rows = array.shape[:-1]
        shapes, bounds = _parts(size, room)
        parts = zip(shapes, itertools.pairwise(bounds), strict=True)
        return cls(*(array[..., start:stop].reshape(*rows, *shape) for shape, (start, stop) in parts))


def width(size: int, room: Room) -> int:
    """Numbers in a row; see ``Inputs.of``."""
    return _parts(size, room)[1][-1]


def padding(rows: int, size: int, room: Room) -> tuple[npt.NDArray[np.int32], Inputs]:
    """An array of calls that hold no token, and its parts, to be filled."""
    array = np.zeros((rows, width(size, room)), np.int32)
    inputs = Inputs.of(array, size, room)
    inputs.tokens[:] = inputs.segments[:] = inputs.adapted[:] = -1
    return array, inputs


@lru_cache(1024)
def _parts(size: int, room: Room) -> tuple[Sequence[tuple[int, ...]], Sequence[int]]:
    """The shapes of a row's parts, and where each begins, and the last one's end."""
    prefixes, pages, adapters = room
    of_tokens = (size,), (size,), (size,), (size,), (size if adapters else 0,)
    shapes = (*of_tokens, (reads_of(size),), (adapters,), (prefixes, pages), (prefixes,), (prefixes, 2), (1,))
    return shapes, [0, *itertools.accumulate(map(math.prod, shapes))]
