"""The service with the fake engine on a real HTTP server in this process, for browsers and commands."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import uvicorn
from fastapi import FastAPI

from serve_app.frontend.http_server import HttpProtocol

KEY = "a-key"
"""The key of the service that needs one."""


@dataclass(frozen=True)
class Served:
    """A running service."""

    url: str


@contextmanager
def serving(app: FastAPI) -> Iterator[Served]:
    """Serve ``app`` on a free port of this machine, in a thread."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = uvicorn.Server(uvicorn.Config(app, http=HttpProtocol, log_config=None, ws="none", lifespan="off"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield Served(f"http://127.0.0.1:{listener.getsockname()[1]}")
        finally:
            server.should_exit = True
            thread.join()
