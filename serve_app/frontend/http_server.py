"""What the servers lack that take this service's connections: Serve's proxies, and behind HAProxy the front ends.

They are uvicorn's, started by Serve, which calls ``install`` where the environment names it (``local_ray.PROCESSES``).
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
"""Between two looks at a client that sends no more: at first, and at most, twice as long each time."""

PROXYS_TIMEOUT = 408
"""What Serve's proxy says when a request's time is over; no route of ours does."""


def install() -> list[Middleware]:
    """Make uvicorn's servers of this process, which are not yet started, speak ``HttpProtocol``."""
    uvicorn.config.HTTP_PROTOCOLS["auto"] = f"{__name__}:{HttpProtocol.__name__}"
    return [Middleware(OwnTimeoutAnswer)]


class HttpProtocol(HttpToolsProtocol):
    """Uvicorn's, where a request to upgrade is served as it is, and a client that sends no more gets its answer.

    Uvicorn takes what follows the headers of a request that wants to upgrade (``h2c``, as Java's clients do by default)
    for another protocol: the request is served without its body, and the body, if it comes later, as a request.
    """

    def data_received(self, data: bytes) -> None:
        self._unset_keepalive_if_required()
        try:
            self._feed(data)
        except httptools.HttpParserError:
            self.send_400_response("Invalid HTTP request received.")

    def _feed(self, data: bytes) -> None:
        """Give the parser all of ``data``, and a request to upgrade once more, without that wish."""
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
        # To other applications behind this server; a WebSocket begins with GET.
        return self.parser.get_method() == b"GET" and super()._should_upgrade()

    def _comes_again(self) -> bool:
        """Whether ``_feed`` reads this request once more."""
        method = self.parser.get_method()
        return self.parser.should_upgrade() and method != b"CONNECT" and not self._should_upgrade()

    def on_headers_complete(self) -> None:
        if not self._comes_again():
            super().on_headers_complete()

    def on_message_complete(self) -> None:
        if not self._comes_again():
            super().on_message_complete()

    def eof_received(self) -> bool:  # pyright: ignore[reportIncompatibleMethodOverride] - asyncio's own has it
        """The client sends no more: it has left, or waits for the answer to a whole request, as ``nc -N`` does.

        Which of both only shows when something is sent. Interim responses are, which every client of HTTP/1.1 passes
        over; a connection that nobody has open any more refuses them, and is lost. Those of HTTP/1.0 know none, and are
        taken to have left.
        """
        cycle = cast(RequestResponseCycle | None, self.cycle)  # None before the first request
        if cycle is None or cycle.more_body or cycle.response_complete or self.pipeline:
            return False
        if self.scheme == "https" or cycle.scope["http_version"] != "1.1":
            return False
        cycle.keep_alive = False  # so that the connection is closed behind the answer
        self._probe(cycle, FIRST_PROBE_S)
        return True

    def _probe(self, cycle: RequestResponseCycle, pause_s: float) -> None:
        if self.transport.is_closing() or cycle.response_started:
            return
        self.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        self.loop.call_later(pause_s, self._probe, cycle, min(2 * pause_s, LAST_PROBE_S))


class OwnTimeoutAnswer:
    """Our error in place of the plain text of Serve's proxy, whose deadline may come before the service's own."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        replaced = False

        async def answer(message: Message) -> None:
            nonlocal replaced
            if message["type"] == "http.response.start" and message["status"] == PROXYS_TIMEOUT:
                replaced = True
                error = DeadlineExceededError("the request's time is over; send less, or give it longer")
                body = json.dumps(error.body_on(scope["path"])).encode()
                kept = [(name, value) for name, value in message["headers"] if not name.lower().startswith(b"content-")]
                headers = [
                    *kept,
                    (b"content-type", b"application/json"),
                    (b"content-length", str(len(body)).encode()),
                ]
                await send({**message, "status": error.status, "headers": headers})
                await send({"type": "http.response.body", "body": body})
            elif not replaced:
                await send(message)

        await self._app(scope, receive, answer)
