"""Messages between two processes of one user on one host, over a Unix socket.

Only Linux has such sockets without a file, and tells which user is at the other end.
"""

from __future__ import annotations

import asyncio
import os
import socket
import struct
import uuid
from collections.abc import Callable
from typing import cast

ADDRESS = "address"
"""Key of a scorer's metadata, which Serve gives to routers: where it takes jobs from its host."""

_HEAD = struct.Struct("!QQ")
"""Before each message: its number, and its length in bytes."""
_PEER = struct.Struct("3i")
"""The process, user and group at the other end, as Linux gives them."""


def listening() -> tuple[socket.socket, str]:
    """A socket to which processes on this host can connect, and its address."""
    address = f"\0score-serve-{uuid.uuid4().hex}"  # the zero byte: no file
    found = socket.socket(socket.AF_UNIX)
    found.bind(address)
    return found, address


async def connected(address: str) -> socket.socket:
    """A socket connected to this address. uvloop, which Ray uses, does not take such an address itself.

    Raises:
        OSError: nobody listens there.
    """
    found = socket.socket(socket.AF_UNIX)
    found.setblocking(False)
    try:
        await asyncio.get_running_loop().sock_connect(found, address)
    except BaseException:
        found.close()
        raise
    return found


class Frames(asyncio.Protocol):
    """One end of a connection. Messages have numbers, by which an answer finds its question.

    Args:
        received: called with each message's number and content.
        lost: called once when the connection has ended, or was refused because the other end is another user's.
    """

    def __init__(self, received: Callable[[int, bytes], None], lost: Callable[[], None]) -> None:
        self._received, self._lost = received, lost
        self._buffer = bytearray()
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        peer: socket.socket = transport.get_extra_info("socket")
        _, user, _ = _PEER.unpack(peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size))
        self._transport = cast(asyncio.Transport, transport)
        if user != os.geteuid():  # messages are pickles: who sends one runs code
            self._transport.abort()

    def data_received(self, data: bytes) -> None:
        assert self._transport is not None
        self._buffer += data
        while len(self._buffer) >= _HEAD.size and not self._transport.is_closing():
            number, length = _HEAD.unpack_from(self._buffer)
            end = _HEAD.size + length
            if len(self._buffer) < end:
                break
            content = bytes(memoryview(self._buffer)[_HEAD.size : end])
            del self._buffer[:end]
            self._received(number, content)

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002
        self._lost()

    def send(self, number: int, content: bytes) -> None:
        """Send a message. After the connection's end it is dropped."""
        if self._transport is not None and not self._transport.is_closing():
            self._transport.writelines((_HEAD.pack(number, len(content)), content))

    def close(self) -> None:
        """End the connection."""
        if self._transport is not None:
            self._transport.abort()
