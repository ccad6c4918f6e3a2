"""The tensors of a folder's safetensors: one file, or shards with an index."""

import json
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import ml_dtypes  # noqa: F401  # pyright: ignore[reportUnusedImport]  teaches numpy the name "bfloat16"
import numpy.typing as npt
from safetensors import SafetensorError, safe_open

from model.tensors.stored import CheckpointError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


class SafetensorsFiles:
    """Reads parts of tensors, and keeps the last file open: a file that is open keeps what was read of it in memory."""

    def __init__(self) -> None:
        self._stack = ExitStack()
        self._path: Path | None = None
        self._tensors: Any = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def part(self, path: Path, name: str, cut: tuple[slice, ...]) -> npt.NDArray[Any]:
        if path != self._path:
            self._stack.close()
            self._tensors = self._stack.enter_context(_open(path))
            self._path = path
        return self._tensors.get_slice(name)[cut]

    def tensors(
        self, folder: Path, paths: Sequence[Path] | None = None
    ) -> tuple[dict[str, "SafetensorsTensor"], list[str]]:
        """The tensors of all files, from their headers alone, and what is wrong: names that two files have.

        Args:
            paths: None: the files of a checkpoint.

        Raises:
            CheckpointError: a file is missing or broken.
        """
        found: dict[str, SafetensorsTensor] = {}
        twice: dict[str, list[str]] = {}
        broken: list[str] = []
        for path in _paths(folder) if paths is None else paths:
            try:
                with _open(path) as tensors:
                    for name in tensors.keys():  # noqa: SIM118
                        view = tensors.get_slice(name)
                        tensor = SafetensorsTensor(self, path, name, tuple(view.get_shape()), view.get_dtype())
                        if found.setdefault(name, tensor) is not tensor:
                            twice.setdefault(name, [found[name].file]).append(path.name)
            except (SafetensorError, OSError) as error:
                broken.append(f"{path.name} ({error})")
        if broken:
            raise CheckpointError(f"{folder}: not whole safetensors files: {', '.join(broken)}; fetch them again")
        return found, [f"duplicate: {name} in {', '.join(files)}" for name, files in sorted(twice.items())]


@dataclass(frozen=True, slots=True)
class SafetensorsTensor:
    """A tensor as a file has it, see ``Stored``."""

    files: SafetensorsFiles
    path: Path
    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def file(self) -> str:
        return self.path.name

    def read(self, cut: tuple[slice, ...]) -> npt.NDArray[Any]:
        return self.files.part(self.path, self.name, cut)


def _open(path: Path) -> Any:
    """Open a file; the package's own type is not annotated."""
    return safe_open(path, framework="np")


def _paths(folder: Path) -> list[Path]:
    """The checkpoint's files; a missing shard is refused."""
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    if not (folder / INDEX).is_file():
        raise CheckpointError(f"{folder} has neither {SINGLE} nor {INDEX}; other weight formats are not read")
    paths = [folder / name for name in sorted(set(_weight_map(folder).values()))]
    if missing := [path.name for path in paths if not path.is_file()]:
        raise CheckpointError(f"{folder}: {INDEX} names files that are not there: {', '.join(missing)}; fetch them")
    return paths


def _weight_map(folder: Path) -> dict[str, str]:
    try:
        weight_map = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
        return {str(name): str(file) for name, file in weight_map.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{folder / INDEX} is damaged ({error!r}): no 'weight_map' can be read from it"
        ) from error
