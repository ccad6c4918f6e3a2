"""``score-serve doctor``: what of this machine would stop the service or slow it down, and what to do about it."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console
from rich.table import Table

from serve_app import model_source
from serve_app.cli import launcher, process_limits
from serve_app.cli.client import REFUSED, printable
from serve_app.cli.launcher import LaunchError
from serve_app.cli.process_limits import LimitError
from serve_app.frontend import auth
from serve_app.scorer import host_memory

GIB = 2**30
ENOUGH_MEMORY = 3 * GIB
"""The demo model's service took 2.4 GiB, of which Ray 0.9."""

STANDARD = "#include <span>\nint main() { return std::span<int>{}.size(); }\n"
"""A program that takes a compiler of C++20, as the CPU's kernels do."""

DEVICES = Path("/dev")
ACCELERATORS = {
    "nvidia[0-9]*": ("NVIDIA card", "cuda"),
    "accel*": ("TPU", "tpu"),
    "vfio/[0-9]*": ("TPU", "tpu"),
}
"""Files of devices: what they are, and the extra that brings jax's support."""
SUPPORT = {"cuda": ("jax_cuda12_plugin", "jax_cuda13_plugin"), "tpu": ("libtpu",)}
"""The packages of each extra; one of them is enough."""


@dataclass(frozen=True)
class Finding:
    """What a check found.

    Attributes:
        state: wrong: the service does not start; warning: it is slower, or open to others.
        said: the value; what is not right has its remedy.
    """

    what: str
    state: Literal["right", "warning", "wrong"]
    said: str


Check = Callable[[], Finding]


def doctor(
    host: Annotated[str, typer.Option(help="Address that the service is to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port that it is to listen on.")] = 8000,
    api_keys_file: Annotated[Path | None, typer.Option(help="File of its API keys.")] = None,
    replicas: Annotated[int, typer.Option(min=1, help="Number of its scorers.")] = 1,
) -> None:
    """Look for what would stop a service on this machine or slow it down, and name the remedy.

    It starts nothing and changes nothing, and looks at limits, compiler, memory, disk, port, devices, API keys and the
    cache. "score-serve tpu-check" and "gpu-check" compute on a device.
    Exit codes: 0 the service can start; 1 something stops it.
    """
    checks: Sequence[Check] = (
        lambda: limits(replicas),
        compiler,
        memory,
        lambda: disk(Path(tempfile.gettempdir())),
        lambda: cache(model_source.cache_folder()),
        lambda: address(host, port),
        devices,
        lambda: keys(api_keys_file, host),
    )
    findings = [check() for check in checks]
    table = Table(show_header=False, box=None)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for each in findings:
        table.add_row(each.state, each.what, printable(each.said))
    Console().print(table)
    if any(each.state == "wrong" for each in findings):
        raise typer.Exit(REFUSED)


def limits(replicas: int) -> Finding:
    """Whether this user may start what the service needs."""
    cpus = os.cpu_count() or 1
    try:
        process_limits.check(replicas + 1, cpus)
    except LimitError as error:
        return Finding("limits", "wrong", str(error))
    return Finding(
        "limits", "right", f"room for {process_limits.needed_tasks(replicas + 1, cpus):,} processes and threads"
    )


def compiler() -> Finding:
    """Whether the CPU's kernels can be built."""
    command = os.environ.get("CXX", "c++")
    remedy = "a CPU takes up to twice as long without; install g++ 10 or later, or name a C++20 compiler in CXX"
    try:
        done = subprocess.run(
            [command, "-std=c++20", "-fsyntax-only", "-x", "c++", "-"], input=STANDARD, capture_output=True, text=True
        )
    except OSError as error:
        return Finding("compiler", "warning", f"{command} cannot be run ({error.strerror}): {remedy}")
    if done.returncode:
        return Finding("compiler", "warning", f"{command} does not know C++20: {remedy}")
    return Finding("compiler", "right", f"{shutil.which(command)} compiles C++20")


def memory() -> Finding:
    """Whether there is memory for the smallest service."""
    free = host_memory.free_bytes()
    if free < ENOUGH_MEMORY:
        return Finding(
            "memory",
            "wrong",
            f"{free / GIB:.1f} GiB are free, and the demo model's service takes {ENOUGH_MEMORY / GIB:.0f}; end other "
            "programs, or raise the container's limit",
        )
    return Finding("memory", "right", f"{free / GIB:.1f} GiB are free; weights, pages and Ray's 1 GiB must fit")


def disk(folder: Path) -> Finding:
    """Whether Ray's files and the logs have room."""
    try:
        launcher.check_disk(folder)
    except LaunchError as error:
        return Finding("disk", "wrong", str(error))
    return Finding("disk", "right", f"{folder} has {shutil.disk_usage(folder).free / GIB:.0f} GiB free")


def cache(folder: Path) -> Finding:
    """Whether the folder of models and compiled programs can be used, and by whom."""
    there = next(each for each in (folder, *folder.parents) if each.exists())
    if not os.access(there, os.W_OK | os.X_OK):
        return Finding(
            "cache", "wrong", f"{there} cannot be written to; name a folder of your own in SCORE_SERVE_CACHE"
        )
    if there == folder and folder.stat().st_mode & 0o022:
        return Finding(
            "cache", "warning", f"others may write to {folder}, and what lies there runs as code: chmod go-w {folder}"
        )
    return Finding("cache", "right", f"{folder}, with {shutil.disk_usage(there).free / GIB:.0f} GiB free")


def address(host: str, port: int) -> Finding:
    """Whether a server can listen there."""
    try:
        launcher.check_port(host, port)
    except LaunchError as error:
        return Finding("port", "wrong", str(error))
    return Finding("port", "right", f"{host}:{port} is free")


def devices() -> Finding:
    """Which accelerators there are, and whether jax can use them."""
    found = {kind: extra for pattern, (kind, extra) in ACCELERATORS.items() if any(DEVICES.glob(pattern))}
    lacking = {kind: extra for kind, extra in found.items() if not any(map(find_spec, SUPPORT[extra]))}
    if lacking:
        (kind, extra), *_ = lacking.items()
        return Finding(
            "devices", "warning", f"there is a {kind}, and jax cannot use it: in a checkout, pip install '.[{extra}]'"
        )
    if found:
        return Finding("devices", "right", f"{', '.join(found)}; score-serve gpu-check or tpu-check computes on it")
    return Finding("devices", "right", f"no accelerator; {os.cpu_count()} processors")


def keys(file: Path | None, host: str) -> Finding:
    """Whether API keys can be read, and whether the service would be open to the network."""
    try:
        count = len(auth.read_keys(None if file is None else str(file)))
    except auth.ApiKeyError as error:
        return Finding("API keys", "wrong", str(error))
    if not count and not launcher.is_loopback(host):
        return Finding(
            "API keys",
            "warning",
            f"none, and {host} is open to the network: name a file with --api-keys-file, or set {auth.VARIABLE}",
        )
    return Finding("API keys", "right", f"{count}" if count else "none; the service is for this machine alone")
