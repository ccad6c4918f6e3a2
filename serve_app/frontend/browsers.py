"""``HEAD`` on every route, and CORS for web pages of other origins."""

from __future__ import annotations

from collections.abc import Sequence

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve_app.settings import ANY_ORIGIN

EXPOSED = ("x-request-id", "retry-after", "server-timing")
"""Response headers that web pages may read."""


class HeadAsGet:
    """Middleware that answers ``HEAD`` like ``GET``, without the body. Plain ASGI."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "HEAD":
            await self._app(scope, receive, send)
            return

        async def without_body(message: Message) -> None:
            if message["type"] == "http.response.body":
                message = {**message, "body": b""}
            await send(message)

        await self._app({**scope, "method": "GET"}, receive, without_body)


def allow(app: FastAPI, origins: Sequence[str]) -> None:
    """Let web pages of these origins call the app.

    Add this middleware last: preflight requests have no API key, and pages must be able to read errors, too.
    """
    app.add_middleware(
        CORSMiddleware,
        allow_origins=[ANY_ORIGIN] if ANY_ORIGIN in origins else list(origins),
        allow_methods=["GET", "HEAD", "POST"],
        allow_headers=["*"],
        expose_headers=EXPOSED,
    )
