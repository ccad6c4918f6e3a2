"""GGUF files as they lie on a disk: their keys and tensors, over all parts of a split one."""

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFReader

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
        dtype: of ``rows``.
        raw_shape: as ``shape``, but the last dimension counts what is stored, bytes where numbers are quantised.
    """

    path: Path
    name: str
    type: GGMLQuantizationType
    shape: tuple[int, ...]
    offset: int
    dtype: np.dtype[Any]
    raw_shape: tuple[int, ...]

    def rows(self, first: int, end: int) -> Array:
        """What is stored of the rows from ``first`` to before ``end``; a row is one run of the last dimension."""
        width = self.raw_shape[-1]
        with self.path.open("rb") as file:
            file.seek(self.offset + first * width * self.dtype.itemsize)
            return np.fromfile(file, self.dtype, (end - first) * width).reshape(-1, width)


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
    if twice := [name for name, count in Counter(tensor.name for tensor in tensors).items() if count > 1]:
        raise GgufError(f"{', '.join(twice)}: in more than one part of {source.name}; fetch all parts again")
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
    try:
        reader = GGUFReader(path)
        fields = {name: field.contents() for name, field in reader.fields.items()}
    except FileNotFoundError:
        raise
    # The reader maps the file and trusts its counts: damage shows up as whatever numpy says about it.
    except (ValueError, IndexError, KeyError, UnicodeDecodeError, OverflowError, MemoryError) as error:
        raise GgufError(f"{path.name} is not a whole GGUF file ({error}); fetch it again") from error
    return fields, [
        Stored(
            path=path,
            name=tensor.name,
            type=tensor.tensor_type,
            shape=tuple(int(size) for size in reversed(tensor.shape)),
            offset=tensor.data_offset,
            dtype=tensor.data.dtype,
            raw_shape=tensor.data.shape,
        )
        for tensor in reader.tensors
    ]
