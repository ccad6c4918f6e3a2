"""Sends long answers in pieces: rows as lines while others are computed, and JSON without blocking the event loop."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Iterator, Sequence
from contextlib import aclosing
from typing import Any, TypeVar, cast

from pydantic import BaseModel
from pydantic_core import to_json
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from serve_app.errors import InternalError, ScoringError

logger = logging.getLogger("ray.serve")

PIECE_VALUES = 4_000
"""Values of a response that become JSON at once: this takes a millisecond, in which no other thread or task runs."""
PIECE_BYTES = 2**16
"""Bytes of lines that are sent at once."""

T = TypeVar("T")


async def as_finished(
    start: Callable[[], Coroutine[Any, Any, T]],
    more: Callable[[], bool],
    *,
    window: int,
    deadline: float,
    late: Exception,
) -> AsyncGenerator[T]:
    """Call ``start()`` while there is ``more()``, and yield the results as they finish.

    At most ``window`` calls are running, or finished and not yet taken. The first error ends the iteration, after the
    results that have finished by then. When it ends or is closed, running calls are cancelled.

    Args:
        deadline: Unix time in seconds; ``late`` is raised when it has passed.
    """
    running: set[asyncio.Task[T]] = set()
    failing = False
    try:
        while running or more():
            while not failing and len(running) < window and more():
                running.add(asyncio.create_task(start()))
            left = max(deadline - time.time(), 0)
            done, _ = await asyncio.wait(running, timeout=left, return_when=asyncio.FIRST_COMPLETED)
            if not done:
                raise late
            failing = any(_failed(task) for task in done)
            task = min(done, key=_failed)
            running.remove(task)
            yield task.result()
    finally:
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)


def _failed(task: asyncio.Task[Any]) -> bool:
    return task.cancelled() or task.exception() is not None


class LinesResponse(StreamingResponse):
    """Newline-delimited JSON. When the client leaves, ``lines`` is closed.

    Args:
        first: the first lines. They exist before the response starts, so that an error before them has its own status.
        lines: the lines that follow.
    """

    def __init__(self, first: bytes, lines: AsyncGenerator[bytes]) -> None:
        super().__init__(_after(first, lines), media_type="application/x-ndjson")
        self._lines = lines

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with aclosing(self._lines):
            await super().__call__(scope, receive, send)


async def _after(first: bytes, lines: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    yield first
    async for line in lines:
        yield line


async def json_lines(events: AsyncGenerator[Sequence[BaseModel]], request_id: str, path: str) -> AsyncGenerator[bytes]:
    """Yield one line for each value, several at a time. An error after the first value becomes the last line.

    Args:
        path: the route, whose errors have a shape of their own.

    Raises:
        Exception: ``events`` raised it before the first value.
    """
    begun = False
    try:
        async with aclosing(events):
            async for values in events:
                for lines in _json_lines(values):
                    begun = True
                    yield lines
    except Exception as error:
        if not begun:
            raise
        if isinstance(error, ScoringError):
            fault = error
        else:
            fault = InternalError(f"the server failed on this request; look for {request_id} in its log")
        if fault.status == InternalError.status:
            logger.error("request %s: %s", request_id, fault.message, exc_info=error)
        _, body = fault.answer_on(path)
        yield to_json(body) + b"\n"


def _json_lines(values: Sequence[BaseModel]) -> Iterator[bytes]:
    lines = bytearray()
    for value in values:
        lines += to_json(value, exclude_none=True) + b"\n"
        if len(lines) >= PIECE_BYTES:
            yield bytes(lines)
            lines.clear()
    if lines:
        yield bytes(lines)


def json_pieces(answer: BaseModel | list[Any]) -> Iterator[bytes]:
    """Yield the JSON of ``answer``, without fields that are None, in pieces of about ``PIECE_VALUES`` values."""
    if isinstance(answer, list):
        yield from _list_pieces(answer)
        return
    opening = b"{"
    for name, value in answer:
        if value is None:
            continue
        yield opening + to_json(name) + b":"
        if isinstance(value, list):
            yield from _list_pieces(value)  # pyright: ignore[reportUnknownArgumentType]
        elif isinstance(value, dict):
            yield from _object_pieces(value)  # pyright: ignore[reportUnknownArgumentType]
        else:
            yield to_json(value, exclude_none=True)
        opening = b","
    yield b"}"


def _list_pieces(entries: list[Any]) -> Iterator[bytes]:
    yield b"["
    start = 0
    while start < len(entries):
        stop, values = start, 0
        while stop < len(entries) and values < PIECE_VALUES:
            values += _values(entries[stop])
            stop += 1
        if start:
            yield b","
        if stop == start + 1 and values > PIECE_VALUES and isinstance(entries[start], BaseModel | list):
            yield from json_pieces(entries[start])
        else:
            yield to_json(entries[start:stop], exclude_none=True)[1:-1]
        start = stop
    yield b"]"


def _object_pieces(entries: dict[str, Any]) -> Iterator[bytes]:
    comma = b"{"
    for name, value in entries.items():
        yield comma + to_json(name) + b":" + to_json(value, exclude_none=True)
        comma = b","
    yield b"}" if entries else b"{}"


def _values(entry: Any) -> int:
    """The approximate number of numbers and texts in ``entry``."""
    if isinstance(entry, BaseModel):
        return sum(_values(value) for _, value in entry)
    if isinstance(entry, dict):
        return len(entry)  # pyright: ignore[reportUnknownArgumentType]
    if not isinstance(entry, list):
        return 1
    entries = cast(list[Any], entry)
    if not entries or not isinstance(entries[-1], list | dict):
        return len(entries)
    return sum(len(inner) if isinstance(inner, list | dict) else 1 for inner in entries)
