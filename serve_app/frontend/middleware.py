"""What surrounds every route: request ids, timings, and errors as JSON."""

from __future__ import annotations

import json
import logging
import re
import uuid

from fastapi import Request, Response
from fastapi.routing import APIRoute
from ray.exceptions import TaskCancelledError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve_app import compat, timing
from serve_app.errors import (
    BY_STATUS,
    RETRY_AFTER_S,
    AuthenticationError,
    InternalError,
    MethodNotAllowedError,
    NotFoundError,
    OverloadedError,
    ScoringError,
)

logger = logging.getLogger("ray.serve")

CLIENT_GONE = 499
"""Status for a client that has left; only the access log shows it."""

TYPESAFE_REQUEST_ID = b"x-typesafe-request-id"
"""``x-request-id`` under the name that TypeSafe's client reads, and misses if it is absent."""

_SHOWN_PATH = 200
"""Characters of a path that an error repeats."""

_MAX_REQUEST_ID = 128
_NOT_IN_REQUEST_ID = re.compile(r"[^A-Za-z0-9._:@/+=-]")


class RequestContext:
    """Middleware that gives requests their id and timings, and uncaught errors their body. Plain ASGI."""

    def __init__(self, app: ASGIApp, *, echo: bool) -> None:
        self._app = app
        self._echo = echo

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = _request_id(scope)
        scope.setdefault("state", {})["request_id"] = request_id
        timings = timing.begin()
        started = False

        async def tracked(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                own = [(b"server-timing", timings.header().encode()), (TYPESAFE_REQUEST_ID, request_id.encode())]
                if self._echo:
                    own.append((b"x-request-id", request_id.encode()))
                message["headers"] = [*message["headers"], *own]
            await send(message)

        try:
            await self._app(scope, receive, tracked)
        except (ClientDisconnect, TaskCancelledError):  # TaskCancelledError: Serve's proxy, when the body stops coming
            await Response(status_code=CLIENT_GONE)(scope, receive, tracked)
        except ScoringError as refusal:
            await _error_response(refusal, scope["path"])(scope, receive, tracked)
        except Exception:
            logger.exception("request %s: internal error", _named(scope))
            if started:
                raise
            fault = InternalError(f"the server failed on this request; look for {request_id} in its log")
            await _error_response(fault, scope["path"])(scope, receive, tracked)


def _request_id(scope: Scope) -> str:
    """The caller's ``x-request-id``, without characters that could harm a log or a header, or a new id."""
    given = next((value for name, value in scope["headers"] if name == b"x-request-id"), b"")
    return _NOT_IN_REQUEST_ID.sub("", given.decode("latin-1"))[:_MAX_REQUEST_ID] or uuid.uuid4().hex


def _named(scope: Scope) -> str:
    """The request for the log: its id, and whose API key it has."""
    tenant = scope["state"].get("tenant")
    return f"{scope['state']['request_id']} of {tenant}" if tenant else scope["state"]["request_id"]


def _error_response(error: ScoringError, path: str, headers: dict[str, str] | None = None) -> Response:
    headers = dict(headers or {})
    if isinstance(error, OverloadedError):
        headers["retry-after"] = str(error.retry_after_s or RETRY_AFTER_S)
    if error.status == AuthenticationError.status:
        headers["www-authenticate"] = "Bearer"
    status, body = error.answer_on(path)
    return Response(json.dumps(body), status, headers, media_type="application/json")


async def on_scoring_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ScoringError)
    if error.status == InternalError.status:
        logger.error("request %s: %s", _named(request.scope), error.message, exc_info=error)
    return _error_response(error, request.url.path)


async def on_http_exception(request: Request, error: Exception) -> Response:
    """Answer Starlette's own 404 and 405 with flat errors that name the right route."""
    assert isinstance(error, HTTPException)
    path = request.url.path
    shown = path[:_SHOWN_PATH]
    if error.status_code == MethodNotAllowedError.status:
        allowed = (error.headers or {}).get("Allow", "")
        flat: ScoringError = MethodNotAllowedError(f"{shown} does not take {request.method}; send {allowed}")
    elif error.status_code == NotFoundError.status:
        routes = {each.path: each.methods or () for each in request.app.routes if isinstance(each, APIRoute)}
        routes = {path: methods for path, methods in routes.items() if "{" not in path}
        flat = NotFoundError(f"there is no route {shown}; {compat.instead_of(shown, routes)}")
    else:
        flat = BY_STATUS.get(error.status_code, InternalError)(str(error.detail))
    return _error_response(flat, path, dict(error.headers or {}))
