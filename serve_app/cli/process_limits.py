"""Checks the limits of processes, threads and open files. With too few, Ray would end with a stack trace."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from contextlib import suppress

import psutil

from serve_app import control_groups

ENOUGH_FILES = 65_536
"""The limit of open files is raised to this, if allowed: each connection takes one in the proxy."""


def needed_tasks(replicas: int, cpus: int) -> int:
    """Processes and threads that a service needs, somewhat more than were counted.

    Ray, Serve's proxy and its controller had 250; an idle worker 23 (Ray starts one for each CPU); a front end or a
    scorer 37, with the demo model 54. That is 320 to 340 with one of each on two CPUs, and 600 on sixteen.
    """
    return 260 + 25 * cpus + 60 * replicas


def needed_files(cpus: int) -> int:
    """Open files of the process with the most, the raylet: 72 on two CPUs, 109 on sixteen. A replica had 80."""
    return 150 + 4 * cpus


def check(replicas: int, cpus: int) -> None:
    """Raise the limit of open files if it helps, and check that this user may start what the service needs.

    Args:
        replicas: number of scorers and front ends together.
        cpus: number of CPUs that Ray is started with.

    Raises:
        LimitError: a limit is too low.
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
    """Yield what is left of this user's limit, the limit, and how to raise it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NPROC)
    if os.geteuid() == 0 or hard == soft == resource.RLIM_INFINITY:  # the kernel does not limit root
        return
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NPROC, (hard, hard))
    if hard != resource.RLIM_INFINITY:
        where = "nproc in /etc/security/limits.conf, LimitNPROC of a systemd unit, --ulimit nproc of a container"
        yield hard - _tasks(os.getuid()), hard, f"`ulimit -u`, {where}"


def _tasks(user: int) -> int:
    """Count this user's processes and threads."""
    found = 0
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            found += process.num_threads() if process.uids().real == user else 0
    return found


def _group_room() -> Iterator[tuple[int, int, str]]:
    """Yield the same for the control groups of this process."""
    for folder in control_groups.folders("pids"):
        with suppress(OSError, ValueError):  # no such file, or "max"
            limit = int((folder / "pids.max").read_text())
            where = "TasksMax of a systemd unit, --pids-limit of a container, podPidsLimit of a kubelet"
            yield limit - int((folder / "pids.current").read_text()), limit, where
