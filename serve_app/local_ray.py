"""A private Ray instance on this host, and its settings: for the launcher, jobs and benchmarks."""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import re
import shutil
import signal
import socket
import tempfile
import threading
from collections.abc import Generator, Mapping
from pathlib import Path
from typing import Any

import psutil

APP_NAME = "score"
"""Name of the Serve application: ``serve.get_app_handle("score")``."""

CONNECT_S = 10
"""Seconds in which what listens at RAY_ADDRESS must take a connection."""

FAST_FRONT = {
    "RAY_SERVE_ENABLE_HA_PROXY": "1",
    "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
    # The scorers' logs show the progress of a start; buffered lines would come too late.
    "RAY_SERVE_REQUEST_PATH_LOG_BUFFER_SIZE": "1",
    # For load balancers of a cluster Ray lets a front end that stops wait for 30 s; HAProxy hears of it at once.
    "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "1",
}
"""Environment for HAProxy in place of Serve's Python proxy on a single host. Serve reads it when Ray is imported.
Variables that are already set keep their values."""

PROCESSES = {
    # By default glibc gives every few threads their own heap, and a scorer's heaps grow for hours.
    "MALLOC_ARENA_MAX": "2",
    # By default Ray's daemons have a higher priority than its workers, and interrupt the scorers at every wake-up.
    "RAY_worker_niceness": "0",
    # A proxy that is not ready within Serve's 5 s is killed, and ends the start: a busy machine takes longer.
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",
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

LOOPBACK = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
"""Ray's switch for a machine that is a cluster of its own, as on macOS and Windows by default: its node then has the
address 127.0.0.1, and Ray's ports listen there alone. With a value that is already set Ray does as it says."""

FOLDERS = ("SCORE_SERVE_CACHE", "HF_HOME")
"""Variables that name folders, perhaps relative to the current one."""


def free_port() -> int:
    """A port that is free at the moment."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


def set_environment(more: Mapping[str, str] | None = None) -> None:
    """Set the environment for Ray on this host alone. Call it before Ray Serve is imported, which reads some of it."""
    for name, value in (PROCESSES | GRPC_ENV | dict(more or {})).items():
        os.environ.setdefault(name, value)


def start_ray(cpus: int, *, alone: bool = True, **options: Any) -> None:
    """Start a private Ray instance on this machine, even if another one runs.

    Ray's workers import first what lies in the folder where Ray was started. There a ``model.py`` of the user's would
    be taken for this project's package, so Ray starts in an empty folder. Paths given to workers must be absolute.

    Args:
        alone: no other node joins, so that Ray's ports listen on 127.0.0.1 alone.
        options: more options of ``ray.init``.
    """
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    for name in FOLDERS:
        if path := os.environ.get(name):
            os.environ[name] = str(Path(path).expanduser().absolute())
    set_environment()
    import ray

    with _empty_folder(), _own_sigterm(), _loopback() if alone else contextlib.nullcontext():
        ray.init(  # pyright: ignore[reportUnknownMemberType]
            "local",
            num_cpus=cpus,
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
            _node_ip_address="127.0.0.1",
            **options,
        )


@contextlib.contextmanager
def _empty_folder() -> Generator[None]:
    """Be in an empty folder, which lasts as long as this process: Ray's workers import from where Ray was begun."""
    empty = tempfile.mkdtemp(prefix="score-serve-ray-")
    atexit.register(shutil.rmtree, empty, ignore_errors=True)
    with contextlib.chdir(empty):
        yield


@contextlib.contextmanager
def _own_sigterm() -> Generator[None]:
    """Keep this process's handler of SIGTERM, where it has one, while Ray starts or connects.

    Ray's handler raises SystemExit, which Python turns into an exit without any ``finally`` where it comes in a
    callback from C. Ray also sets one from C++, of which Python learns nothing and which prints a stack; ours is put
    back after it.
    """
    handler = signal.getsignal(signal.SIGTERM)
    if not callable(handler) or threading.current_thread() is not threading.main_thread():
        yield
        return
    from ray._private import utils

    rays, utils.set_sigterm_handler = utils.set_sigterm_handler, lambda _: None
    try:
        yield
    finally:
        utils.set_sigterm_handler = rays
        signal.signal(signal.SIGTERM, handler)


@contextlib.contextmanager
def _loopback() -> Generator[None]:
    """Have a Ray that starts in the ``with`` block listen on 127.0.0.1 alone; a later one may be a cluster."""
    from ray._private import ray_constants

    ((name, value),) = LOOPBACK.items()
    if name in os.environ:
        yield
        return
    os.environ[name] = value  # for Ray's processes, which keep it
    # This process has imported Ray, perhaps long ago.
    before, ray_constants.ENABLE_RAY_CLUSTER = ray_constants.ENABLE_RAY_CLUSTER, False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before
        del os.environ[name]


def keep_calls_on_loopback() -> None:
    """Have the port of this replica for Serve's calls listen where Ray's own ports do, if that is 127.0.0.1.

    Serve opens it on all interfaces, after the deployment's constructor, which therefore calls this.
    """
    from ray.serve._private import replica
    from ray.util import get_node_ip_address

    if get_node_ip_address() == "127.0.0.1":
        open_port = replica.add_port_to_grpc_server  # pyright: ignore[reportPrivateImportUsage]
        replica.add_port_to_grpc_server = lambda server, address: open_port(  # pyright: ignore[reportPrivateImportUsage]
            server, address.replace("[::]", "127.0.0.1")
        )


def join_ray(**options: Any) -> None:
    """Connect to the Ray cluster of RAY_ADDRESS or of this machine, such as that of ``score-serve serve``.

    ``ray.init("auto")`` alone takes 127.0.0.1, where a Ray of ``start_ray`` listens, for the machine's other address.

    Args:
        options: more options of ``ray.init``.

    Raises:
        ConnectionError: there is none.
    """
    address = os.environ.get("RAY_ADDRESS", "")
    _check_answers(address)
    import ray
    from ray._private import ray_constants

    if address.startswith("127.0.0.1:") or (not address and _listens_on_loopback()):
        ray_constants.ENABLE_RAY_CLUSTER = False  # what LOOPBACK sets, for this process, which has imported Ray
    with _empty_folder(), _own_sigterm():
        ray.init("auto", **options)  # pyright: ignore[reportUnknownMemberType]


def _check_answers(address: str) -> None:
    """Raise ConnectionError if nothing listens at an address HOST:PORT: Ray would try for minutes, and say nothing."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not (host and port.isdecimal()):
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_S).close()
    except (OSError, OverflowError) as error:
        raise ConnectionError(f"nothing answers at RAY_ADDRESS={address} ({error})") from error


def _listens_on_loopback() -> bool:
    """Whether a Ray of this machine listens on 127.0.0.1 alone."""
    running = psutil.process_iter(["name", "cmdline"])
    return any(
        each.info["name"] == "gcs_server" and "--node-ip-address=127.0.0.1" in each.info["cmdline"] for each in running
    )


def reason(message: str) -> str:
    """The last error in Serve's message, which holds a replica's traceback: the part that a user needs."""
    errors = list(re.finditer(r"^(?:[\w.]+\.)?(\w+(?:Error|Exception): )", message, re.MULTILINE))
    return message[errors[-1].start(1) :].strip() if errors else message.strip()
