"""The tensors of a checkpoint -> a model's parameters.

Strict both ways. One parameter is in memory at a time, and of it only the parts that are asked for.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import numpy as np
import numpy.typing as npt

from model.tensors.folder import Opened
from model.tensors.stored import READ, CheckpointError, Stored

T = TypeVar("T")
Place = tuple[str | int, ...]
Transform = Literal["same", "transpose"]


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
class _Piece:
    """Rows from ``start`` on of one tensor, and where they go."""

    tensor: Stored
    start: int
    target: Target

    def part(self, index: tuple[slice, ...]) -> npt.NDArray[Any]:
        """What ``index`` cuts from the piece as the model has it."""
        flip = self.target.transform == "transpose"
        bounds = [cut.indices(size)[:2] for cut, size in zip(index, _shape(self.target), strict=True)]
        first, *rest = bounds[::-1] if flip else bounds
        cut = (slice(self.start + first[0], self.start + first[1]), *(slice(*bound) for bound in rest))
        values = self.tensor.read(cut)
        return values.T if flip else values


def _shape(target: Target) -> tuple[int, ...]:
    """The shape in the model."""
    return target.shape[::-1] if target.transform == "transpose" else target.shape


class Tensor:
    """A parameter that is read from the files on demand, by slices or as a whole."""

    def __init__(self, pieces: Sequence[_Piece]) -> None:
        self._pieces = pieces
        stack = pieces[0].target.stack
        self.shape = (*((len(pieces),) if stack else ()), *_shape(pieces[0].target))

    def __getitem__(self, index: tuple[slice, ...]) -> npt.NDArray[Any]:
        """Read the values: of one of the types ``READ``; they may not be contiguous."""
        if self._pieces[0].target.stack is None:
            return self._pieces[0].part(index)
        members, *rest = index
        pieces = self._pieces[members]
        first = pieces[0].part(tuple(rest))
        values = np.empty((len(pieces), *first.shape), first.dtype)  # np.stack would hold all members twice
        values[0] = first
        for number, piece in enumerate(pieces[1:], 1):
            values[number] = piece.part(tuple(rest))
        return values

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> npt.NDArray[Any]:
        return np.array(self[tuple(slice(None) for _ in self.shape)], dtype=dtype, copy=copy)


def load(
    opened: Opened,
    targets: Targets,
    *,
    ignored: Sequence[str] = (),
    put: Callable[[Place, Tensor], T],
    progress: Callable[[int, int, str], None] | None = None,
) -> dict[Place, T]:
    """Load every target's parameter through ``put``. Nothing is read before the whole table is known to fit.

    Args:
        opened: the checkpoint's tensors.
        targets: each must be there, and nothing else may be.
        ignored: patterns (of the whole name) of tensors that may be present and mean nothing.
        put: given the path and the parameter, reads what it needs and keeps it; called for one parameter at a time, so
            that the host never holds the model twice.
        progress: called as ``progress(done, total, what)``, tensors.

    Raises:
        CheckpointError: tensors are missing, unexpected, duplicate, mis-shaped or of a dtype that is not read.
    """
    _check(opened, targets, ignored)
    loaded: dict[Place, T] = {}
    stacks: dict[Place, dict[int, _Piece]] = {}
    # In the files' order: a parameter that is a stack waits for its last member.
    names = sorted((name for name in opened.tensors if name in targets), key=lambda name: opened.tensors[name].file)
    for done, name in enumerate(names, 1):
        for piece in _pieces(opened.tensors[name], targets[name]):
            pieces = [piece]
            path = piece.target.path
            if piece.target.stack is not None:
                number, count = piece.target.stack
                members = stacks.setdefault(path, {})
                members[number] = piece
                if len(members) < count:
                    continue
                pieces = [members[number] for number in range(count)]
            loaded[path] = put(path, Tensor(pieces))
        if progress is not None:
            progress(done, len(targets), name)
    return loaded


def _pieces(tensor: Stored, target: Entry) -> Iterator[_Piece]:
    """The parameters in one tensor."""
    start = 0
    for part in target.parts if isinstance(target, Fused) else (target,):
        yield _Piece(tensor, start, part)
        start += part.shape[0]


def _check(opened: Opened, targets: Targets, ignored: Sequence[str]) -> None:
    problems = [f"missing: {name} {target.shape}" for name, target in targets.items() if name not in opened.tensors]
    problems += opened.problems
    for name, tensor in sorted(opened.tensors.items()):
        if (target := targets.get(name)) is None:
            if not any(re.fullmatch(pattern, name) for pattern in ignored):
                problems.append(f"unexpected: {name} {tensor.shape}")
            continue
        if tensor.shape != target.shape:
            problems.append(f"mis-shaped: {name} is {tensor.shape}, the config asks for {target.shape}")
        if tensor.dtype not in READ:
            problems.append(f"dtype: {name} is {tensor.dtype}; read are {', '.join(READ)}")
    if problems:
        raise CheckpointError(f"the tensors of {opened.folder} do not fit its config.json:\n  " + "\n  ".join(problems))
