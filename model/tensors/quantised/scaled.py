"""Numbers of few bits times the scale of their group: what most kinds of quantised weights are made of.

Each class is a ``Stored`` over the tensors of a file, so that a part of a weight reads those parts that it is made of.
"""

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from model.tensors.stored import NUMPY, CheckpointError, Stored

_COMPUTED = 2**18
"""Numbers of a weight that are computed at a time, so that what they are made of takes little memory."""

Group = int | Stored
"""Which group each place along an axis belongs to: consecutive ones of this size, or as this tensor says."""


def strips(rows: slice, width: int) -> Iterator[tuple[slice, slice]]:
    """The rows in parts that are computed one after the other: (of the tensor, of what is read)."""
    step = max(32, _COMPUTED // max(1, width) // 32 * 32)  # 32 numbers are packed together
    for start in range(rows.start, rows.stop, step):
        stop = min(start + step, rows.stop)
        yield slice(start, stop), slice(start - rows.start, stop - rows.start)


@dataclass(frozen=True, slots=True)
class Scaled:
    """(number - zero) x scale, in float32, rounded once to the type of numbers.

    Attributes:
        numbers: rows x columns.
        scales: one for each group of rows and columns.
        rows: the groups of rows.
        columns: the groups of columns.
        zeros: shaped as ``scales``.
        dtype: F32, BF16 or F16.
        factor: multiplied last.
    """

    numbers: Stored
    scales: Stored
    rows: Group
    columns: Group
    zeros: Stored | None = None
    dtype: str = "F32"
    factor: float = 1.0

    @property
    def shape(self) -> tuple[int, ...]:
        return self.numbers.shape

    @property
    def file(self) -> str:
        return self.numbers.file

    def read(self, cut: tuple[slice, ...]) -> npt.NDArray[Any]:
        rows, columns = cut
        values = np.empty((rows.stop - rows.start, columns.stop - columns.start), NUMPY[self.dtype])
        if not values.size:
            return values
        by_row, from_rows = self._groups(self.rows, rows, 0)
        by_column, from_columns = self._groups(self.columns, columns, 1)
        scales = self.scales.read((from_rows, from_columns)).astype(np.float32)
        zeros = None if self.zeros is None else self.zeros.read((from_rows, from_columns)).astype(np.float32)
        for stored, at in strips(rows, values.shape[1]):
            numbers = self.numbers.read((stored, columns)).astype(np.float32)
            if zeros is not None:
                numbers -= self._picked(zeros, by_row[at], by_column)
            numbers *= self._picked(scales, by_row[at], by_column)
            if self.factor != 1:
                numbers *= np.float32(self.factor)
            values[at] = numbers
        return values

    def _picked(
        self, grid: npt.NDArray[np.float32], rows: npt.NDArray[np.intp], columns: npt.NDArray[np.intp]
    ) -> npt.NDArray[np.float32]:
        of_rows = grid[rows]
        return of_rows if self.columns == 1 else of_rows.take(columns, axis=1)

    def _groups(self, group: Group, cut: slice, axis: int) -> tuple[npt.NDArray[np.intp], slice]:
        """The group of each place of the cut, counted from the first one that is read; and which are read."""
        places = np.arange(cut.start, cut.stop) // group if isinstance(group, int) else group.read((cut,))
        first, last = int(places.min()), int(places.max())
        if first < 0 or last >= self.scales.shape[axis]:
            raise CheckpointError(f"{self.file}: groups {first} to {last} and {self.scales.shape[axis]} scales")
        return places.astype(np.intp) - first, slice(first, last + 1)


@dataclass(frozen=True, slots=True)
class Packed:
    """Whole numbers, densely in words of 32 bits along an axis: 32 numbers in as many words as a number has bits.

    Attributes:
        words: of 32 bits.
        axis: along which they are packed.
        count: of numbers along that axis.
        places: of each of 32 numbers, counted from the lowest bits of the first word.
        plus: added to each; what overflows is lost.
        minus: taken from each then.
    """

    words: Stored
    axis: Literal[0, 1]
    count: int
    bits: int
    places: tuple[int, ...] = tuple(range(32))
    plus: int = 0
    minus: int = 0

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.count if axis == self.axis else size for axis, size in enumerate(self.words.shape))

    @property
    def dtype(self) -> str:
        return "I16"

    @property
    def file(self) -> str:
        return self.words.file

    def read(self, cut: tuple[slice, ...]) -> npt.NDArray[Any]:
        along = cut[self.axis]
        first, last = along.start // 32, -(-along.stop // 32)
        words = self._words(cut, slice(first * self.bits, last * self.bits))
        before, after = (words.shape[0], 1) if self.axis else (1, words.shape[1])
        words = words.reshape(before, last - first, self.bits, after)
        numbers = np.empty((before, last - first, 32, after), np.int16)
        for number, place in enumerate(self.places):
            word, shift = divmod(place * self.bits, 32)
            value = words[:, :, word] >> shift
            if shift + self.bits > 32:
                value |= words[:, :, word + 1] << (32 - shift)
            numbers[:, :, number] = (value + self.plus) & ((1 << self.bits) - 1)
        numbers -= self.minus
        numbers = numbers.reshape((before, -1) if self.axis else (-1, after))
        own = slice(along.start - first * 32, along.stop - first * 32)
        return numbers[:, own] if self.axis else numbers[own]

    def _words(self, cut: tuple[slice, ...], along: slice) -> npt.NDArray[np.uint32]:
        """Words ``along`` the axis; the last numbers may have fewer than are read, and then the rest is 0."""
        stop = min(along.stop, self.words.shape[self.axis])
        words = self.words.read(tuple(slice(along.start, stop) if n == self.axis else c for n, c in enumerate(cut)))
        missing = along.stop - stop
        return np.pad(words, [(0, missing if axis == self.axis else 0) for axis in (0, 1)]).view(np.uint32)


@dataclass(frozen=True, slots=True)
class Transposed:
    """A matrix that is stored the other way round."""

    stored: Stored

    @property
    def shape(self) -> tuple[int, ...]:
        return self.stored.shape[::-1]

    @property
    def dtype(self) -> str:
        return self.stored.dtype

    @property
    def file(self) -> str:
        return self.stored.file

    def read(self, cut: tuple[slice, ...]) -> npt.NDArray[Any]:
        return self.stored.read(cut[::-1]).T


@dataclass(frozen=True, slots=True)
class Grid:
    """Scales as rows x columns: those of a tensor or of its rows may have fewer axes. Bytes are exponents of 2."""

    stored: Stored

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.stored.shape, 1, 1)[: max(2, len(self.stored.shape))]

    @property
    def dtype(self) -> str:
        return "F8_E8M0" if self.stored.dtype == "U8" else self.stored.dtype

    @property
    def file(self) -> str:
        return self.stored.file

    def read(self, cut: tuple[slice, ...]) -> npt.NDArray[Any]:
        part = self.stored.read(cut[: len(self.stored.shape)])
        return part.view(NUMPY[self.dtype]).reshape([at.stop - at.start for at in cut])


def group_sizes(
    of: str, shape: tuple[int, ...], grid: tuple[int, ...], configured: Collection[tuple[int, ...]] = ()
) -> tuple[int, ...]:
    """Rows and columns of a group, by the numbers of groups.

    Args:
        of: the module's name.
        configured: what the config says; then the last group may be smaller.

    Raises:
        CheckpointError: they do not divide the weight.
    """
    for sizes in configured:
        if tuple(-(-size // part) for size, part in zip(shape, sizes, strict=True)) == grid:
            return sizes
    if len(shape) != 2 or len(grid) != 2 or any(size % count for size, count in zip(shape, grid, strict=True)):
        raise CheckpointError(f"scales: {of}'s weight is {shape}, and its scales {grid} do not divide it")
    return tuple(size // count for size, count in zip(shape, grid, strict=True))
