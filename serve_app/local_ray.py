"""A Ray of this process's own, and its settings on a single host: for the launcher, jobs and benchmarks."""

from __future__ import annotations

import logging
import os
import re
import socket
from typing import Any

APP_NAME = "score"
"""Name of the Serve application: ``serve.get_app_handle("score")``."""

FAST_FRONT = {
    "RAY_SERVE_ENABLE_HA_PROXY": "1",
    "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
    # The scorers' log tells how far they are; a buffered line would come too late.
    "RAY_SERVE_REQUEST_PATH_LOG_BUFFER_SIZE": "1",
}
"""Serve's HAProxy front in place of its Python proxy. Serve reads these where Ray is imported, on every node. What is
set already stays as it is."""

PROCESSES = {
    # glibc gives every few threads a heap of their own, and those of a scorer grow for hours.
    "MALLOC_ARENA_MAX": "2",
    # Ray makes its workers nicer than its own daemons, which then interrupt the scorers at every wake-up.
    "RAY_worker_niceness": "0",
    # Clients that ask for an upgrade are not understood, else.
    "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "serve_app.frontend.http_server.install",
}
"""For all of Ray's processes; docs/measurements.md has what each is worth. What is set already stays as it is."""

CALLS = {
    # Actor calls take a small request a third longer.
    "RAY_SERVE_USE_GRPC_BY_DEFAULT": "1",
    # Ray's own limit is 4 MiB, and a job of some thousand long prompts has more.
    "RAY_SERVE_REPLICA_GRPC_MAX_MESSAGE_LENGTH": str(2**31 - 1),
    # Serve calls its replicas by address, and gRPC asks the proxy of ``http_proxy`` even for this host's.
    "no_grpc_proxy": "0.0.0.0/0,::/0",
}
"""How Serve's processes call each other on a single host. Not on several: of a host that is lost without a word Ray
tells actor calls, and these find out after minutes. What is set already stays as it is."""


def free_port() -> int:
    """One that nobody listens on at the moment."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


def set_environment(*, fast_front: bool = False) -> None:
    """For a Ray on this host alone. Before Ray Serve is imported, which reads some of it then."""
    for name, value in (PROCESSES | CALLS | (FAST_FRONT if fast_front else {})).items():
        os.environ.setdefault(name, value)


def start_ray(cpus: int, **options: Any) -> None:
    """A Ray of this process's own on this machine, even where another one runs.

    Args:
        options: more of ``ray.init``'s.
    """
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    set_environment()
    import ray

    ray.init(  # pyright: ignore[reportUnknownMemberType]
        "local",
        num_cpus=cpus,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
        _node_ip_address="127.0.0.1",
        **options,
    )


def reason(message: str) -> str:
    """What the user has to know of Serve's message, which holds the traceback of a replica: its last error."""
    errors = list(re.finditer(r"^(?:[\w.]+\.)?(\w+(?:Error|Exception): )", message, re.MULTILINE))
    return message[errors[-1].start(1) :].strip() if errors else message.strip()
