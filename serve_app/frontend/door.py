"""The way into a front end. It can be closed: requests inside are answered, later ones are told to try again."""

from __future__ import annotations

import asyncio

from starlette.types import ASGIApp, Receive, Scope, Send

from serve_app.errors import RETRY_AFTER_S, OverloadedError


class Door:
    """Counts the requests that are inside; ``before`` is ASGI middleware."""

    def __init__(self) -> None:
        self._inside = 0
        self._empty = asyncio.Event()
        self._empty.set()
        self._closed = False

    async def close(self) -> None:
        """Let no more requests in, and return when the last one inside is answered."""
        self._closed = True
        await self._empty.wait()

    def before(self, app: ASGIApp) -> ASGIApp:
        """``app`` behind this door. It raises OverloadedError when the door is closed."""

        async def enter(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["type"] != "http":
                await app(scope, receive, send)
                return
            if self._closed:
                raise OverloadedError("this service is shutting down; try again", retry_after_s=RETRY_AFTER_S)
            self._inside += 1
            self._empty.clear()
            try:
                await app(scope, receive, send)
            finally:
                self._inside -= 1
                if not self._inside:
                    self._empty.set()

        return enter
