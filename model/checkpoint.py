"""Safetensors of a Hugging Face folder -> a model's parameters.

Strict both ways. One parameter is in memory at a time, and of it only the parts that are asked for.
"""

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self, TypeVar

import ml_dtypes  # noqa: F401  # pyright: ignore[reportUnusedImport]  teaches numpy the name "bfloat16"
import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open

T = TypeVar("T")
Place = tuple[str | int, ...]
Transform = Literal["same", "transpose"]

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
DTYPES = ("F32", "BF16", "F16")
_COMPARED = 2**22
"""Numbers of each of two tensors that are compared at a time."""


class CheckpointError(ValueError):
    """A broken file, or tensors that do not fit the model: the message lists all of them by name."""


@dataclass(frozen=True, slots=True)
class Target:
    """The parameter that a checkpoint's tensor becomes.

    Attributes:
        path: the parameter's path in the model.
        shape: the tensor's shape in the checkpoint.
        transform: what turns the tensor into the parameter.
        stack: (number, count): the parameter is a stack of ``count`` such tensors, and this is its member ``number``.
    """

    path: Place
    shape: tuple[int, ...]
    transform: Transform
    stack: tuple[int, int] | None = None


@dataclass(frozen=True, slots=True)
class Fused:
    """A tensor of the checkpoint that holds several parameters, one after the other along its first axis."""

    parts: tuple[Target, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return (sum(part.shape[0] for part in self.parts), *self.parts[0].shape[1:])


Entry = Target | Fused
Targets = Mapping[str, Entry]
"""Tensor name -> its place."""


@dataclass(frozen=True, slots=True)
class _Found:
    file: Path
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True, slots=True)
class _Piece:
    """Rows from ``start`` on of one tensor in a file, and where they go."""

    file: Path
    name: str
    start: int
    target: Target


class _Reader:
    """Reads parts of tensors; keeps the last file open."""

    def __init__(self) -> None:
        self._stack = ExitStack()
        self._file: Path | None = None
        self._tensors: Any = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def part(self, piece: _Piece, index: tuple[slice, ...]) -> npt.NDArray[Any]:
        """What ``index`` cuts from the piece as the model has it."""
        if piece.file != self._file:
            self._stack.close()
            self._tensors = self._stack.enter_context(_open(piece.file))
            self._file = piece.file
        flip = piece.target.transform == "transpose"
        bounds = [cut.indices(size)[:2] for cut, size in zip(index, _shape(piece.target), strict=True)]
        first, *rest = bounds[::-1] if flip else bounds
        cut = (slice(piece.start + first[0], piece.start + first[1]), *(slice(*bound) for bound in rest))
        values: npt.NDArray[Any] = self._tensors.get_slice(piece.name)[cut]
        return values.T if flip else values


def _shape(target: Target) -> tuple[int, ...]:
    """The shape in the model."""
    return target.shape[::-1] if target.transform == "transpose" else target.shape


class Tensor:
    """A parameter that is read from the files on demand, by slices or as a whole."""

    def __init__(self, pieces: Sequence[_Piece], reader: _Reader) -> None:
        self._pieces = pieces
        self._reader = reader
        stack = pieces[0].target.stack
        self.shape = (*((len(pieces),) if stack else ()), *_shape(pieces[0].target))

    def __getitem__(self, index: tuple[slice, ...]) -> npt.NDArray[Any]:
        """Read the values: float32, bfloat16 or float16; they may not be contiguous."""
        if self._pieces[0].target.stack is None:
            return self._reader.part(self._pieces[0], index)
        members, *rest = index
        return np.stack([self._reader.part(piece, tuple(rest)) for piece in self._pieces[members]])

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> npt.NDArray[Any]:
        return np.array(self[tuple(slice(None) for _ in self.shape)], dtype=dtype, copy=copy)


def load(
    folder: Path,
    targets: Targets,
    *,
    ignored: Sequence[str] = (),
    put: Callable[[Place, Tensor], T],
    progress: Callable[[int, int, str], None] | None = None,
) -> dict[Place, T]:
    """Load every target's parameter through ``put``. Nothing is read before the whole table is known to fit.

    Args:
        folder: has ``model.safetensors``, or shards and ``model.safetensors.index.json``.
        targets: each must be there, and nothing else may be.
        ignored: patterns (of the whole name) of tensors that may be present and mean nothing.
        put: given the path and the parameter, reads what it needs and keeps it; called for one parameter at a time, so
            that the host never holds the model twice.
        progress: called as ``progress(done, total, what)``, tensors.

    Raises:
        CheckpointError: a file is missing or broken, or tensors are missing, unexpected, duplicate, mis-shaped or of a
            dtype that is not read.
    """
    files = _files(folder)
    found = _survey(folder, files)
    _check(folder, targets, found, ignored)

    loaded: dict[Place, T] = {}
    stacks: dict[Place, dict[int, _Piece]] = {}
    # In the files' order: a parameter that is a stack waits for its last member.
    names = sorted((name for name in found if name in targets), key=lambda name: found[name][0].file)
    with _Reader() as reader:
        for done, name in enumerate(names, 1):
            for piece in _pieces(found[name][0].file, name, targets[name]):
                pieces = [piece]
                path = piece.target.path
                if piece.target.stack is not None:
                    number, count = piece.target.stack
                    members = stacks.setdefault(path, {})
                    members[number] = piece
                    if len(members) < count:
                        continue
                    pieces = [members[number] for number in range(count)]
                loaded[path] = put(path, Tensor(pieces, reader))
            if progress is not None:
                progress(done, len(targets), name)
    return loaded


def differ(folder: Path, one: str, other: str) -> bool:
    """Return whether both tensors are stored and hold different numbers; some rows are in memory at a time."""
    found = _survey(folder, _files(folder))
    if one not in found or other not in found:
        return False
    first, second = found[one][0], found[other][0]
    if first.shape != second.shape or not {first.dtype, second.dtype}.issubset(DTYPES):
        return True  # and ``load`` refuses them
    rows, *rest = first.shape
    step = max(1, _COMPARED // max(1, math.prod(rest)))
    with _open(first.file) as a, _open(second.file) as b:
        pair = a.get_slice(one), b.get_slice(other)
        for start in range(0, rows, step):
            x, y = (tensor[start : min(start + step, rows)].astype(np.float32) for tensor in pair)
            if not np.array_equal(x, y):
                return True
    return False


def _pieces(file: Path, name: str, target: Entry) -> Iterator[_Piece]:
    """The parameters in one tensor."""
    start = 0
    for part in target.parts if isinstance(target, Fused) else (target,):
        yield _Piece(file, name, start, part)
        start += part.shape[0]


def _files(folder: Path) -> list[Path]:
    """The checkpoint's files; a missing shard is refused."""
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    if not (folder / INDEX).is_file():
        raise CheckpointError(f"{folder} has neither {SINGLE} nor {INDEX}; other weight formats are not read")
    files = [folder / name for name in sorted(set(_weight_map(folder).values()))]
    if missing := [file.name for file in files if not file.is_file()]:
        raise CheckpointError(f"{folder}: {INDEX} names files that are not there: {', '.join(missing)}; fetch them")
    return files


def _weight_map(folder: Path) -> dict[str, str]:
    try:
        weight_map = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
        return {str(name): str(file) for name, file in weight_map.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{folder / INDEX} is damaged ({error!r}): no 'weight_map' can be read from it"
        ) from error


def _open(file: Path) -> Any:
    """Open a file; the package's own type is not annotated."""
    return safe_open(file, framework="np")


def _survey(folder: Path, files: Sequence[Path]) -> dict[str, list[_Found]]:
    """Every tensor in the files, from their headers alone."""
    found: dict[str, list[_Found]] = {}
    broken: list[str] = []
    for file in files:
        try:
            with _open(file) as tensors:
                for name in tensors.keys():  # noqa: SIM118
                    view = tensors.get_slice(name)
                    found.setdefault(name, []).append(_Found(file, tuple(view.get_shape()), view.get_dtype()))
        except (SafetensorError, OSError) as error:
            broken.append(f"{file.name} ({error})")
    if broken:
        raise CheckpointError(f"{folder}: not whole safetensors files: {', '.join(broken)}; fetch them again")
    return found


def _check(folder: Path, targets: Targets, found: Mapping[str, Sequence[_Found]], ignored: Sequence[str]) -> None:
    problems: list[str] = []
    for name, target in targets.items():
        if name not in found:
            problems.append(f"missing: {name} {target.shape}")
    for name, places in sorted(found.items()):
        if (target := targets.get(name)) is None:
            if not any(re.fullmatch(pattern, name) for pattern in ignored):
                problems.append(f"unexpected: {name} {places[0].shape}")
            continue
        if len(places) > 1:
            problems.append(f"duplicate: {name} in {', '.join(place.file.name for place in places)}")
        for place in places:
            if place.shape != target.shape:
                problems.append(f"mis-shaped: {name} is {place.shape}, the config asks for {target.shape}")
            if place.dtype not in DTYPES:
                problems.append(f"dtype: {name} is {place.dtype}; read are {', '.join(DTYPES)}")
    if problems:
        raise CheckpointError(f"the tensors of {folder} do not fit its config.json:\n  " + "\n  ".join(problems))
