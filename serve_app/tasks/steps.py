"""Steps of long work: others get their turn between them, and work stops when its caller has left."""

from __future__ import annotations

import time
from collections.abc import Generator
from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T")
Steps = Generator[None, None, T]
"""Work that may pause at each ``yield``, and returns its result at the end."""

STEP_S = 0.02
"""Approximate seconds of work without a pause: a new request waits this long for each other request."""


@dataclass(frozen=True, slots=True)
class Done(Generic[T]):
    """The result of work that is done."""

    result: T


def advance(steps: Steps[T], seconds: float = STEP_S) -> Done[T] | None:
    """Work for about ``seconds``, and return the result if the work is done, else None."""
    end = time.monotonic() + seconds
    try:
        while True:
            next(steps)
            if time.monotonic() >= end:
                return None
    except StopIteration as stopped:
        return Done(stopped.value)


def finish(steps: Steps[T]) -> T:
    """Work to the end without a pause."""
    while True:
        if done := advance(steps):
            return done.result
