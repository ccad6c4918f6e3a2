"""A private Ray instance on this host, and its settings: for the launcher, jobs and benchmarks."""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import re
import shutil
import socket
import tempfile
from pathlib import Path
from typing import Any

APP_NAME = "score"
"""Name of the Serve application: ``serve.get_app_handle("score")``."""

FAST_FRONT = {
    "RAY_SERVE_ENABLE_HA_PROXY": "1",
    "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
    # The scorers' logs show the progress of a start; buffered lines would come too late.
    "RAY_SERVE_REQUEST_PATH_LOG_BUFFER_SIZE": "1",
}
"""Environment for HAProxy in place of Serve's Python proxy. Serve reads it when Ray is imported, on every node.
Variables that are already set keep their values."""

PROCESSES = {
    # By default glibc gives every few threads their own heap, and a scorer's heaps grow for hours.
    "MALLOC_ARENA_MAX": "2",
    # By default Ray's daemons have a higher priority than its workers, and interrupt the scorers at every wake-up.
    "RAY_worker_niceness": "0",
    # Without this, requests to upgrade lose their body.
    "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "serve_app.frontend.http_server.install",
}
"""Environment of all of Ray's processes; docs/measurements.md shows the effect of each variable. Variables that are
already set keep their values."""

GRPC_ENV = {
    # With actor calls a small request takes a third longer.
    "RAY_SERVE_USE_GRPC_BY_DEFAULT": "1",
    # Ray's default is 4 MiB, and a job of some thousand long prompts is larger.
    "RAY_SERVE_REPLICA_GRPC_MAX_MESSAGE_LENGTH": str(2**31 - 1),
    # Serve calls its replicas by address, and gRPC would use the proxy of ``http_proxy`` even for this host.
    "no_grpc_proxy": "0.0.0.0/0,::/0",
}
"""Environment for calls between Serve's processes on a single host. Do not use it on several hosts: if one is lost
silently, Ray ends actor calls, but gRPC calls only fail after minutes. Variables that are already set keep their
values."""


FOLDERS = ("SCORE_SERVE_CACHE", "HF_HOME")
"""Variables that name folders, perhaps relative to the current one."""


def free_port() -> int:
    """A port that is free at the moment."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


def set_environment(*, fast_front: bool = False) -> None:
    """Set the environment for Ray on this host alone. Call it before Ray Serve is imported, which reads some of it."""
    for name, value in (PROCESSES | GRPC_ENV | (FAST_FRONT if fast_front else {})).items():
        os.environ.setdefault(name, value)


def start_ray(cpus: int, **options: Any) -> None:
    """Start a private Ray instance on this machine, even if another one runs.

    Ray's workers import first what lies in the folder where Ray was started. There a ``model.py`` of the user's would
    be taken for this project's package, so Ray starts in an empty folder. Paths given to workers must be absolute.

    Args:
        options: more options of ``ray.init``.
    """
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    for name in FOLDERS:
        if path := os.environ.get(name):
            os.environ[name] = str(Path(path).expanduser().absolute())
    set_environment()
    import ray

    empty = tempfile.mkdtemp(prefix="score-serve-ray-")
    atexit.register(shutil.rmtree, empty, ignore_errors=True)
    with contextlib.chdir(empty):
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
    """The last error in Serve's message, which holds a replica's traceback: the part that a user needs."""
    errors = list(re.finditer(r"^(?:[\w.]+\.)?(\w+(?:Error|Exception): )", message, re.MULTILINE))
    return message[errors[-1].start(1) :].strip() if errors else message.strip()
