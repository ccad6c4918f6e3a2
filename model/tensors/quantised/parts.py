"""The tensors from which the weight of one module is made."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from model.fields import Fields
from model.tensors.stored import CheckpointError, Stored


class Parts(dict[str, Stored]):
    """A module's tensors by the last part of their names."""

    def __init__(self, module: str) -> None:
        super().__init__()
        self.module = module

    def __missing__(self, part: str) -> Stored:
        raise CheckpointError(f"missing: {self.module}.{part}")

    def typed(self, part: str, dtypes: Sequence[str]) -> Stored:
        """A part whose numbers are of one of these types."""
        tensor = self[part]
        if tensor.dtype not in dtypes:
            raise CheckpointError(f"dtype: {self.module}.{part} is {tensor.dtype}; read are {', '.join(dtypes)}")
        return tensor

    def shaped(self, part: str, dtypes: Sequence[str], shape: tuple[int, ...]) -> Stored:
        """A part of one of these types and of this shape."""
        tensor = self.typed(part, dtypes)
        if tensor.shape != shape:
            raise CheckpointError(f"mis-shaped: {self.module}.{part} is {tensor.shape}; {shape} fits its other parts")
        return tensor


Weight = Callable[[Parts], Stored]
"""Makes a module's weight of its parts; raises CheckpointError for parts that do not fit."""


@dataclass(frozen=True, slots=True)
class Method:
    """A way of quantising.

    Attributes:
        parts: the ends of the names of tensors that a weight is made of.
        read: reads ``quantization_config``; refuses the keys that it does not know.
    """

    parts: tuple[str, ...]
    read: Callable[[Fields], Weight]
