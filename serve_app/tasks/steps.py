"""Long work in short steps, so that others get their turn and no work is done for a caller who has left."""

from __future__ import annotations

import time
from collections.abc import Generator
from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T")
Steps = Generator[None, None, T]
"""Work that may be put aside at each ``yield``, and returns its result."""

STEP_S = 0.02
"""Approximate seconds of work in a row: a request that comes meanwhile waits for so much of each other one."""


@dataclass(frozen=True, slots=True)
class Done(Generic[T]):
    """The result of work that is at its end."""

    result: T


def advance(steps: Steps[T], seconds: float = STEP_S) -> Done[T] | None:
    """Work for about ``seconds``. None: there is more to do."""
    end = time.monotonic() + seconds
    try:
        while True:
            next(steps)
            if time.monotonic() >= end:
                return None
    except StopIteration as stopped:
        return Done(stopped.value)


def finish(steps: Steps[T]) -> T:
    """Work to the end at once."""
    while True:
        if done := advance(steps):
            return done.result
