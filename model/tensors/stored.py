"""A checkpoint's tensors, whatever the format they are stored in."""

from collections.abc import Mapping
from typing import Any, Protocol

import ml_dtypes
import numpy as np
import numpy.typing as npt

READ = ("F32", "BF16", "F16", "F64")
"""The types of numbers that become a parameter, by safetensors' names."""

NUMPY: Mapping[str, np.dtype[Any]] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
}
"""numpy's types of the numbers that are read, also of parts of quantised weights, by safetensors' names."""


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
