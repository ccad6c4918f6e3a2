"""A checkpoint's tensors, whatever the format they are stored in."""

from collections.abc import Mapping
from typing import Any, Protocol

import numpy.typing as npt

READ = ("F32", "BF16", "F16")
"""The types of numbers that become a parameter, by safetensors' names."""


class CheckpointError(ValueError):
    """A broken file, or tensors that do not fit the model: the message lists all of them by name."""


class Stored(Protocol):
    """A tensor that is read on demand, so that the host never holds a model twice.

    Attributes:
        shape: its shape.
        dtype: the type of its numbers, by safetensors' names: ``F32``.
        file: the name of the file in which it lies, for messages and for the order of reading.
    """

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> str: ...

    @property
    def file(self) -> str: ...

    def read(self, cut: tuple[slice, ...]) -> npt.NDArray[Any]:
        """Read a part: one slice without a step for each axis."""
        ...


Tensors = Mapping[str, Stored]
"""Tensors by name. A format is a function that makes them of files, or of the tensors of another format."""


def whole(tensor: Stored) -> npt.NDArray[Any]:
    """Read all of a tensor."""
    return tensor.read(tuple(slice(0, size) for size in tensor.shape))
