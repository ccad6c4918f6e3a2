"""Requests over a socket, in ways that no HTTP library sends them, and their answers."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.client import HTTPResponse
from typing import Any
from urllib.parse import urlsplit

BODY: dict[str, Any] = {"query": [1], "items": [[2], [3]], "label_token_ids": [4, 5]}

UPGRADES = {
    "h2c": ("Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c", "HTTP2-Settings: AAEAAEAAAAIAAAAB"),
    "websocket": (
        "Connection: Upgrade",
        "Upgrade: websocket",
        "Sec-WebSocket-Version: 13",
        "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",
    ),
    "other": ("Connection: keep-alive, upgrade", "Upgrade: foo/2, bar"),
}


def post(
    *headers: str, body: bytes | None = None, version: str = "1.1", path: str = "/v1/score"
) -> tuple[bytes, bytes]:
    """The head and the body of a good request."""
    body = json.dumps(BODY).encode() if body is None else body
    lines = [
        f"POST {path} HTTP/{version}",
        "Host: here",
        "Content-Type: application/json",
        f"Content-Length: {len(body)}",
        *headers,
    ]
    return "\r\n".join([*lines, "", ""]).encode(), body


class Wire:
    """One connection to a server."""

    def __init__(self, connection: socket.socket) -> None:
        self.socket = connection

    def send(self, *packets: bytes) -> None:
        """Send each part in a packet of its own."""
        for number, packet in enumerate(packets):
            if number:
                time.sleep(0.1)
            self.socket.sendall(packet)

    def answer(self, method: str = "POST") -> tuple[int, Any]:
        """The status and the JSON of the next response; interim ones are passed over."""
        response = HTTPResponse(self.socket, method=method)
        response.begin()
        return response.status, json.loads(response.read() or "null")

    def ends(self) -> bool:
        """Return whether the other end has closed without sending more."""
        return self.socket.recv(1) == b""


@contextmanager
def connected(url: str) -> Iterator[Wire]:
    """Open a connection to the service."""
    address = urlsplit(url)
    with socket.create_connection((address.hostname or "", address.port or 80), timeout=60) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        yield Wire(connection)


def upgrade_is_ignored(url: str, upgrade: str, split: Callable[[bytes, bytes], tuple[bytes, ...]]) -> None:
    """Check that a request that wants to upgrade is answered, and the next one on its connection, too."""
    with connected(url) as wire:
        for _ in range(2):
            wire.send(*split(*post(*UPGRADES[upgrade])))
            status, answer = wire.answer()
            assert (status, len(answer["scores"])) == (200, 2), answer
        wire.send(*post())
        assert wire.answer()[0] == 200


SPLITS: dict[str, Callable[[bytes, bytes], tuple[bytes, ...]]] = {
    "one packet": lambda head, body: (head + body,),
    "head and body": lambda head, body: (head, body),
    "within both": lambda head, body: (head[:70], head[70:] + body[:5], body[5:]),
}
