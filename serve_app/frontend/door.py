"""The door of a front end. Once it is closed, requests inside are still answered, and later ones must retry.

``/health`` has no door: a liveness probe must not restart a front end that is still answering.
"""

from __future__ import annotations

import asyncio

from starlette.types import ASGIApp, Receive, Scope, Send

from serve_app.errors import RETRY_AFTER_S, OverloadedError

ALIVE = "/health"


class Door:
    """A door that counts the requests inside; ``before`` is ASGI middleware."""

    def __init__(self) -> None:
        self._inside = 0
        self._empty = asyncio.Event()
        self._empty.set()
        self._closed = False

    async def close(self) -> None:
        """Refuse new requests, and return when the last request inside is answered."""
        self._closed = True
        await self._empty.wait()

    def before(self, app: ASGIApp) -> ASGIApp:
        """Put this door before ``app``. Once it is closed, the result raises OverloadedError, except for ``ALIVE``."""

        async def enter(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["type"] != "http" or scope["path"].removeprefix(scope.get("root_path", "")) == ALIVE:
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
