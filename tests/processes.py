"""The processes of a deployed application, found from outside."""

from __future__ import annotations

from contextlib import suppress

import psutil

from serve_app.contract import QueueStats
from serve_app.local_ray import APP_NAME


def replica_processes(deployment: str) -> list[psutil.Process]:
    """The live replicas of a deployment in this session's cluster, found by the process titles that Ray sets."""
    title = f"ray::ServeReplica:{APP_NAME}:{deployment}"
    found: list[psutil.Process] = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            if title in " ".join(process.cmdline()):
                found.append(process)
    return found


def replica_process(deployment: str) -> psutil.Process:
    """One live replica of a deployment."""
    return replica_processes(deployment)[0]


def scorer_stats() -> list[QueueStats]:
    """The counters of each scorer."""
    from ray import serve

    return serve.get_deployment_handle("Scorer", APP_NAME).broadcast("stats").results(timeout_s=60)


def mapped_files(process: psutil.Process) -> str:
    """Paths of all files that the process has mapped, including shared libraries."""
    return "\n".join(region.path for region in process.memory_maps())
