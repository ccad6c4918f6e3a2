"""GGUF files as they lie on a disk: their keys and tensors, over all parts of a split one."""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType

Array = np.ndarray[Any, Any]


class GgufError(ValueError):
    """The file is damaged, or of a kind that is not converted. The message names what, and what is known."""


@dataclass(frozen=True)
class Stored:
    """A tensor in a file.

    Attributes:
        type: how its numbers are stored.
        shape: as numpy has it, the last dimension's numbers side by side.
        offset: of its first byte.
    """

    path: Path
    name: str
    type: GGMLQuantizationType
    shape: tuple[int, ...]
    offset: int

    @property
    def row_bytes(self) -> int:
        """What one run of the last dimension takes."""
        numbers, size = GGML_QUANT_SIZES[self.type]
        return self.shape[-1] // numbers * size

    def rows(self, first: int, end: int) -> Array:
        """The bytes of the rows from ``first`` to before ``end``; a row is one run of the last dimension."""
        with self.path.open("rb") as file:
            file.seek(self.offset + first * self.row_bytes)
            return np.fromfile(file, np.uint8, (end - first) * self.row_bytes).reshape(-1, self.row_bytes)


def read(source: Path) -> tuple[dict[str, Any], dict[str, Stored]]:
    """The keys of ``source`` and its tensors by name; of a split file, those of all parts, whichever is named.

    Raises:
        GgufError: a part is damaged, missing or not of this model.
    """
    fields: dict[str, Any] = {}
    tensors: list[Stored] = []
    parts = list(_parts(source))
    for number, path in enumerate(parts):
        own, held = _one(path)
        count = own.get("split.count", 1)
        if count != len(parts) or own.get("split.no", 0) != number:
            raise GgufError(
                f"{path.name} says that it is part {own.get('split.no', 0) + 1} of {count}; its name must end in "
                f"-{own.get('split.no', 0) + 1:05d}-of-{count:05d}.gguf, beside the others"
            )
        fields = own | fields  # only the first part has more keys than its number
        tensors += held
    if fields.get("split.tensors.count", len(tensors)) != len(tensors):
        raise GgufError(
            f"the parts of {source.name} have {len(tensors)} tensors together, but should have "
            f"{fields['split.tensors.count']}; fetch all parts again"
        )
    return fields, {tensor.name: tensor for tensor in tensors}


def _parts(source: Path) -> Iterator[Path]:
    """All parts in their order, by llama.cpp's names: ``x-00001-of-00003.gguf``."""
    match = re.fullmatch(r"(.*)-\d{5}-of-(\d{5})\.gguf", source.name)
    if match is None:
        yield source
        return
    paths = [source.with_name(f"{match[1]}-{number + 1:05d}-of-{match[2]}.gguf") for number in range(int(match[2]))]
    if missing := [path.name for path in paths if not path.is_file()]:
        raise GgufError(f"{source.name} is split, and {', '.join(missing)} not in {source.parent}; put all parts there")
    yield from paths


def _one(path: Path) -> tuple[dict[str, Any], list[Stored]]:
    with path.open("rb") as file:
        header = _Header(file, path)
        try:
            return header.contents()
        except (ValueError, LookupError, ArithmeticError, TypeError) as error:
            raise GgufError(f"{path.name} is not a whole GGUF file ({error}); fetch it again") from error


class _Header:
    """What lies before the tensors.

    gguf's own reader makes an array of every token and score, which takes half a gigabyte for a vocabulary of 262,144
    tokens. Source: ``docs/gguf.md`` of ggml, versions 2 and 3.
    """

    def __init__(self, file: BinaryIO, path: Path) -> None:
        self._file, self._path, self._size = file, path, path.stat().st_size

    def contents(self) -> tuple[dict[str, Any], list[Stored]]:
        """The keys and the tensors.

        Raises:
            ValueError, LookupError, ArithmeticError, TypeError: it ends too early, or a number stands for nothing.
        """
        if self._bytes(4) != b"GGUF":
            raise ValueError("it does not begin with GGUF")
        if (version := self._number("u4")) not in (2, 3):
            raise ValueError(f"version {version}; known: 2 and 3, little-endian")
        tensors, keys = self._number("u8"), self._number("u8")
        fields: dict[str, Any] = {}
        for _ in range(keys):
            key = self._text()
            fields[key] = self._value(self._number("u4"))
        found = [self._tensor() for _ in range(tensors)]
        alignment = fields.get("general.alignment", 32)
        start = -(-self._file.tell() // alignment) * alignment
        found = [replace(tensor, offset=start + tensor.offset) for tensor in found]
        for tensor in found:
            if tensor.offset + math.prod(tensor.shape[:-1]) * tensor.row_bytes > self._size:
                raise ValueError(f"it ends within the tensor {tensor.name}")
        return fields, found

    def _tensor(self) -> Stored:
        """Its offset is counted from the first tensor."""
        name = self._text()
        sizes = [self._number("u8") for _ in range(self._number("u4"))]
        type = GGMLQuantizationType(self._number("u4"))
        return Stored(self._path, name, type, tuple(reversed(sizes)), self._number("u8"))

    def _value(self, type: int) -> Any:
        if type == GGUFValueType.STRING:
            return self._text()
        if type != GGUFValueType.ARRAY:
            return self._number(NUMBERS[type])
        type, count = self._number("u4"), self._number("u8")
        if type in (GGUFValueType.STRING, GGUFValueType.ARRAY):
            return [self._value(type) for _ in range(count)]
        width = np.dtype(NUMBERS[type]).itemsize
        return np.frombuffer(self._bytes(count * width), f"<{NUMBERS[type]}").tolist()

    def _text(self) -> str:
        return self._bytes(self._number("u8")).decode()

    def _number(self, type: str) -> Any:
        return np.frombuffer(self._bytes(np.dtype(type).itemsize), f"<{type}")[0].item()

    def _bytes(self, count: int) -> bytes:
        found = self._file.read(count) if count <= self._size else b""
        if len(found) < count:
            raise ValueError("it ends within its header")
        return found


NUMBERS = dict(enumerate(("u1", "i1", "u2", "i2", "u4", "i4", "f4", "?", "", "", "u8", "i8", "f8")))
"""numpy's names of the types of numbers."""
