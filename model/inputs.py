"""What a launch is told, in one array: it goes to the device at once, and the program takes it apart.

A mesh's array has a row for each call of the launch. Without one it has a single row.
"""

import itertools
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from model.plan import reads_of


class Inputs(NamedTuple):
    """The parts of an array of one or several rows, each for a call of M tokens; they share the array's memory.

    Attributes:
        tokens: [M] ids; -1 for padding.
        positions: [M], each token's place in its sequence.
        prefixes: [M], which of the call's P prefixes each token sees.
        segments: [M], see ``attention.AttentionContext``.
        reads: [R] flat indices of the tokens whose hidden states are kept; not used by ``prefill``.
        tables: [P, slots], the pages of each prefix; the same in all rows, as is what follows.
        lengths: [P], each prefix's tokens.
        slots: [P, 2], see ``delta.Packed``; zeros but in a hybrid.
        place: [1], where the first hidden state goes among those of earlier launches.
    """

    tokens: Any
    positions: Any
    prefixes: Any
    segments: Any
    reads: Any
    tables: Any
    lengths: Any
    slots: Any
    place: Any

    @classmethod
    def of(cls, array: Any, size: int, tables: tuple[int, int]) -> "Inputs":
        """Take an array apart.

        Args:
            array: of numpy or jax, [width of ``size``] or [rows, width].
            size: tokens of a call.
            tables: shape of the page tables.
        """
        bounds = [0, *itertools.accumulate(map(int, map(np.prod, _shapes(size, tables))))]
        parts = [array[..., start:stop] for start, stop in itertools.pairwise(bounds)]
        shapes = zip(parts, _shapes(size, tables), strict=True)
        return cls(*(part.reshape(*array.shape[:-1], *shape) for part, shape in shapes))


def width(size: int, tables: tuple[int, int]) -> int:
    """Numbers in a row; see ``Inputs.of``."""
    return sum(int(np.prod(shape)) for shape in _shapes(size, tables))


def padding(rows: int, size: int, tables: tuple[int, int]) -> tuple[npt.NDArray[np.int32], Inputs]:
    """An array of calls that hold no token, and its parts, to be filled."""
    array = np.zeros((rows, width(size, tables)), np.int32)
    inputs = Inputs.of(array, size, tables)
    inputs.tokens[:] = inputs.segments[:] = -1
    return array, inputs


def _shapes(size: int, tables: tuple[int, int]) -> tuple[tuple[int, ...], ...]:
    return ((size,), (size,), (size,), (size,), (reads_of(size),), tables, (tables[0],), (tables[0], 2), (1,))
