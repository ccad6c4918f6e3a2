"""Extends the uvicorn servers that clients connect to: those of Serve's proxies or, with HAProxy, of the front ends.

Serve starts them. It calls ``install`` first if the environment says so (``local_ray.PROCESSES``).
"""

from __future__ import annotations

import json
from typing import cast

import httptools
import uvicorn.config
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from serve_app.errors import DeadlineExceededError

FIRST_PROBE_S, LAST_PROBE_S = 0.05, 10.0
"""Seconds between two probes of a client that sends no more. They start at the first and double up to the last."""

PROXY_TIMEOUT = 408
"""Status of Serve's proxy for a request that took too long. None of our routes uses it."""


def install() -> list[Middleware]:
    """Make this process's uvicorn servers use ``HttpProtocol``. Call it before they start."""
    uvicorn.config.HTTP_PROTOCOLS["auto"] = f"{__name__}:{HttpProtocol.__name__}"
    return [Middleware(OwnTimeoutAnswer)]


class HttpProtocol(HttpToolsProtocol):
    """Uvicorn's protocol, but requests to upgrade are served as HTTP/1.1, and half-closed clients get their answer.

    Uvicorn assumes that another protocol follows the headers of a request to upgrade (``h2c``, which Java's clients
    send by default). It serves the request without its body, and a body that comes later as a request.
    """

    def data_received(self, data: bytes) -> None:
        self._unset_keepalive_if_required()
        try:
            self._feed(data)
        except httptools.HttpParserError:
            self.send_400_response("Invalid HTTP request received.")

    def _feed(self, data: bytes) -> None:
        """Parse all of ``data``. A request to upgrade is parsed again without its upgrade header."""
        while True:
            try:
                self.parser.feed_data(data)
            except httptools.HttpParserUpgrade as upgrade:
                if self._should_upgrade():
                    self.handle_websocket_upgrade()
                    return
                data = self._head_without_upgrade() + data[upgrade.args[0] :]
                self.parser = httptools.HttpRequestParser(self)
                self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn has it
            else:
                return

    def _head_without_upgrade(self) -> bytes:
        version = self.parser.get_http_version().encode()
        lines = [self.parser.get_method() + b" " + self.url + b" HTTP/" + version]
        lines += [name + b": " + value for name, value in self.headers if name != b"upgrade"]
        return b"\r\n".join(lines) + b"\r\n\r\n"

    def _should_upgrade(self) -> bool:
        # For other applications on this server: a WebSocket begins with GET.
        return self.parser.get_method() == b"GET" and super()._should_upgrade()

    def _comes_again(self) -> bool:
        """Whether ``_feed`` parses this request again."""
        method = self.parser.get_method()
        return self.parser.should_upgrade() and method != b"CONNECT" and not self._should_upgrade()

    def on_headers_complete(self) -> None:
        if not self._comes_again():
            super().on_headers_complete()

    def on_message_complete(self) -> None:
        if not self._comes_again():
            super().on_message_complete()

    def eof_received(self) -> bool:  # pyright: ignore[reportIncompatibleMethodOverride] - asyncio's own has it
        """Handle a client that sends no more: it has left, or it waits for its answer, as ``nc -N`` does.

        Only sending something tells which. So interim responses are sent: every HTTP/1.1 client skips them, and a
        client that has left refuses them, which ends the connection. HTTP/1.0 has no interim responses; its clients
        are assumed to have left.
        """
        cycle = cast(RequestResponseCycle | None, self.cycle)  # None before the first request
        if cycle is None or cycle.more_body or cycle.response_complete or self.pipeline:
            return False
        if self.scheme == "https" or cycle.scope["http_version"] != "1.1":
            return False
        cycle.keep_alive = False  # so that the connection is closed after the answer
        self._probe(cycle, FIRST_PROBE_S)
        return True

    def _probe(self, cycle: RequestResponseCycle, pause_s: float) -> None:
        if self.transport.is_closing() or cycle.response_started:
            return
        self.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        self.loop.call_later(pause_s, self._probe, cycle, min(2 * pause_s, LAST_PROBE_S))


class OwnTimeoutAnswer:
    """Middleware that replaces the plain-text timeout of Serve's proxy, which may come before ours, by our error."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        replaced = False

        async def answer(message: Message) -> None:
            nonlocal replaced
            if message["type"] == "http.response.start" and message["status"] == PROXY_TIMEOUT:
                replaced = True
                error = DeadlineExceededError("the request timed out; send fewer items, or allow more time")
                status, content = error.answer_on(scope["path"])
                body = json.dumps(content).encode()
                kept = [(name, value) for name, value in message["headers"] if not name.lower().startswith(b"content-")]
                headers = [
                    *kept,
                    (b"content-type", b"application/json"),
                    (b"content-length", str(len(body)).encode()),
                ]
                await send({**message, "status": status, "headers": headers})
                await send({"type": "http.response.body", "body": body})
            elif not replaced:
                await send(message)

        await self._app(scope, receive, answer)
