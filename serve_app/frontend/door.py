"""The way into a front end. It can be closed: requests inside are answered, later ones are told to try again."""

from __future__ import annotations

import asyncio

from starlette.types import ASGIApp, Receive, Scope, Send

from serve_app.errors import RETRY_AFTER_S, OverloadedError


class Door:
    """Counts the requests that are inside."""

    def __init__(self) -> None:
        self._inside = 0
        self._empty = asyncio.Event()
        self._closed = False

    async def close(self) -> None:
        """Let no more requests in, and return when the last one inside is answered."""
        self._closed = True
        if self._inside:
            await self._empty.wait()

    async def let_in(self, app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request by ``app``.

        Raises:
            OverloadedError: the door is closed.
        """
        if self._closed:
            raise OverloadedError("this service is shutting down; try again", retry_after_s=RETRY_AFTER_S)
        self._inside += 1
        try:
            await app(scope, receive, send)
        finally:
            self._inside -= 1
            if self._closed and not self._inside:
                self._empty.set()


class Entrance:
    """ASGI middleware: requests come in by ``door``."""

    def __init__(self, app: ASGIApp, *, door: Door) -> None:
        self._app = app
        self._door = door

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            await self._door.let_in(self._app, scope, receive, send)
        else:
            await self._app(scope, receive, send)
