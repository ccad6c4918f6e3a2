"""How many processes, threads and open files the system allows. Where they are too few, Ray ends with a stack trace."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil

ENOUGH_FILES = 65_536
"""What the limit of open files is raised to, where that is allowed: each connection takes one in the proxy."""

GROUPS = Path("/sys/fs/cgroup")


def needed_tasks(replicas: int, cpus: int) -> int:
    """Processes and threads of a service, somewhat more than were counted.

    Ray, Serve's proxy and controller had 250, an idle worker 23 (Ray starts one for each CPU), a front end or a scorer
    37, with the demo model 54: in all 320 to 340 with one of each on two CPUs, and 600 on sixteen.
    """
    return 260 + 25 * cpus + 60 * replicas


def needed_files(cpus: int) -> int:
    """Open files of the one process that has most, the raylet: 72 on two CPUs, 109 on sixteen; a replica had 80."""
    return 150 + 4 * cpus


def check(replicas: int, cpus: int) -> None:
    """Raise the limit of open files as far as is of use, and see that this user may start what the service needs.

    Args:
        replicas: of scorers and front ends, together.
        cpus: that Ray is told of.

    Raises:
        LimitError: it may not.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < ENOUGH_FILES:
        soft = min(hard, ENOUGH_FILES)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    if soft < needed_files(cpus):
        raise LimitError(
            f"a process may have {soft} open files here (ulimit -Hn), and the service needs {needed_files(cpus)}; "
            "raise the limit: nofile in /etc/security/limits.conf, LimitNOFILE of a systemd unit, --ulimit nofile of a "
            "container"
        )
    needed = needed_tasks(replicas, cpus)
    for room, limit, where in (*_user_room(), *_group_room()):
        if room < needed:
            raise LimitError(
                f"{limit} processes and threads are allowed here, {max(room, 0)} more than there are, and the service "
                f"needs about {needed}; raise the limit: {where}"
            )


class LimitError(Exception):
    """A limit of the system is too low. The message has the value, the need and the remedy."""


def _user_room() -> Iterator[tuple[int, int, str]]:
    """What is left of this user's limit, the limit, and how it is raised."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NPROC)
    if os.geteuid() == 0 or hard == soft == resource.RLIM_INFINITY:  # the kernel lets root have any number
        return
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NPROC, (hard, hard))
    if hard != resource.RLIM_INFINITY:
        where = "nproc in /etc/security/limits.conf, LimitNPROC of a systemd unit, --ulimit nproc of a container"
        yield hard - _tasks(os.getuid()), hard, f"`ulimit -u`, {where}"


def _tasks(user: int) -> int:
    """Processes and threads that run as this user."""
    found = 0
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            found += process.num_threads() if process.uids().real == user else 0
    return found


def _group_room() -> Iterator[tuple[int, int, str]]:
    """The same of the control groups that this process is in; there are none but on Linux."""
    with suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, kinds, path = line.split(":", 2)
            if kinds in ("", "pids"):
                base = GROUPS / kinds
                folder = base / path.lstrip("/")
                while folder.is_relative_to(base):
                    yield from _of_group(folder)
                    folder = folder.parent


def _of_group(folder: Path) -> Iterator[tuple[int, int, str]]:
    with suppress(OSError, ValueError):  # no such file, or "max"
        limit = int((folder / "pids.max").read_text())
        where = "TasksMax of a systemd unit, --pids-limit of a container, podPidsLimit of a kubelet"
        yield limit - int((folder / "pids.current").read_text()), limit, where
