"""Files that hold tensors: one, or shards with an index."""

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol, Self

import numpy.typing as npt

from model.tensors.stored import CheckpointError


class OpenFile(Protocol):
    """A file whose tensors can be read in parts."""

    def tensors(self) -> Mapping[str, tuple[tuple[int, ...], str]]:
        """Each tensor's shape, and the type of its numbers by safetensors' names."""
        ...

    def part(self, name: str, cut: tuple[slice, ...]) -> npt.NDArray[Any]: ...


class Files(ABC):
    """Reads parts of tensors, and keeps the last file open: a file that is open keeps what was read of it in memory.

    Attributes:
        single: the name of the file, if there is one.
        index: the name of the shards' index.
        kind: of the files, for messages.
        errors: raised for a broken file.
    """

    single: ClassVar[str]
    index: ClassVar[str]
    kind: ClassVar[str]
    errors: ClassVar[tuple[type[Exception], ...]]

    def __init__(self) -> None:
        self._stack = ExitStack()
        self._path: Path | None = None
        self._file: Any = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @abstractmethod
    def open(self, path: Path) -> AbstractContextManager[OpenFile]: ...

    @classmethod
    def there(cls, folder: Path) -> bool:
        """Return whether the folder has such files."""
        return (folder / cls.single).is_file() or (folder / cls.index).is_file()

    def part(self, path: Path, name: str, cut: tuple[slice, ...]) -> npt.NDArray[Any]:
        if path != self._path:
            self._stack.close()
            self._file = self._stack.enter_context(self.open(path))
            self._path = path
        return self._file.part(name, cut)

    def tensors(self, folder: Path, paths: Sequence[Path] | None = None) -> tuple[dict[str, "FileTensor"], list[str]]:
        """The tensors of all files, from their headers alone, and what is wrong: names that two files have.

        Args:
            paths: None: the files of a checkpoint.

        Raises:
            CheckpointError: a file is missing or broken.
        """
        found: dict[str, FileTensor] = {}
        twice: dict[str, list[str]] = {}
        broken: list[str] = []
        for path in self._paths(folder) if paths is None else paths:
            try:
                with self.open(path) as file:
                    for name, (shape, dtype) in file.tensors().items():
                        tensor = FileTensor(self, path, name, shape, dtype)
                        if found.setdefault(name, tensor) is not tensor:
                            twice.setdefault(name, [found[name].file]).append(path.name)
            except self.errors as error:
                broken.append(f"{path.name} ({str(error) or type(error).__name__})")
        if broken:
            raise CheckpointError(f"{folder}: not whole {self.kind} files: {', '.join(broken)}; fetch them again")
        return found, [f"duplicate: {name} in {', '.join(files)}" for name, files in sorted(twice.items())]

    def _paths(self, folder: Path) -> list[Path]:
        """The checkpoint's files; a missing shard is refused."""
        if (folder / self.single).is_file():
            return [folder / self.single]
        if not (folder / self.index).is_file():
            raise CheckpointError(f"{folder} has neither {self.single} nor {self.index}; other weights are not read")
        paths = [folder / name for name in sorted(set(_weight_map(folder / self.index).values()))]
        if missing := [path.name for path in paths if not path.is_file()]:
            raise CheckpointError(
                f"{folder}: {self.index} names files that are not there: {', '.join(missing)}; fetch them"
            )
        return paths


@dataclass(frozen=True, slots=True)
class FileTensor:
    """A tensor as a file has it, see ``Stored``."""

    files: Files
    path: Path
    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def file(self) -> str:
        return self.path.name

    def read(self, cut: tuple[slice, ...]) -> npt.NDArray[Any]:
        return self.files.part(self.path, self.name, cut)


def _weight_map(index: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        return {str(name): str(file) for name, file in weight_map.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index} is damaged ({error!r}): no 'weight_map' can be read from it") from error
