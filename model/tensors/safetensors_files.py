"""The tensors of a folder's safetensors."""

import json
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open

from model.tensors.files import Files
from model.tensors.stored import NUMPY  # whose import also teaches numpy the name "bfloat16"

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


class SafetensorsFiles(Files):
    """See ``Files``."""

    single = SINGLE
    index = INDEX
    kind = "safetensors"
    errors = (SafetensorError, OSError)

    @contextmanager
    def open(self, path: Path) -> Generator["_File"]:
        with safe_open(path, framework="np") as tensors:
            yield _File(path, tensors)


class _File:
    def __init__(self, path: Path, tensors: Any) -> None:  # the package's own type is not annotated
        self._path = path
        self._tensors = tensors

    def tensors(self) -> Mapping[str, tuple[tuple[int, ...], str]]:
        views = ((name, self._tensors.get_slice(name)) for name in self._tensors.keys())  # noqa: SIM118
        return {name: (tuple(view.get_shape()), view.get_dtype()) for name, view in views}

    def part(self, name: str, cut: tuple[slice, ...]) -> npt.NDArray[Any]:
        view = self._tensors.get_slice(name)
        if view.get_dtype().startswith("F8_"):  # the package looks for these types in numpy, which has none
            start, header = self._header
            stored = np.memmap(
                self._path,
                NUMPY[view.get_dtype()],
                mode="r",
                offset=start + header[name]["data_offsets"][0],
                shape=tuple(view.get_shape()),
            )
            return np.array(stored[cut])
        return view[cut]

    @cached_property
    def _header(self) -> tuple[int, dict[str, Any]]:
        """Where the numbers begin, and the file's table; see github.com/huggingface/safetensors, "Format"."""
        with self._path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            return 8 + size, json.loads(file.read(size))
