"""One Ray cluster with Serve for all end-to-end tests; each module deploys its own application on it."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from serve_app.settings import Settings
from tests.tiny import make_llama

APP_NAME = "score"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def replica_processes(deployment: str) -> list[psutil.Process]:
    """The live replicas in this session's cluster. Ray writes the deployment's name into a process's title."""
    title = f"ray::ServeReplica:{APP_NAME}:{deployment}"
    found: list[psutil.Process] = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            if title in " ".join(process.cmdline()):
                found.append(process)
    return found


def replica_process(deployment: str) -> psutil.Process:
    """One of them."""
    return replica_processes(deployment)[0]


def mapped_files(process: psutil.Process) -> str:
    """Paths of all that the process has loaded, shared libraries among them."""
    return "\n".join(region.path for region in process.memory_maps())


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama checkpoint with a tokenizer."""
    return make_llama(tmp_path_factory.mktemp("tiny-llama"), tokenizer=True)


@pytest.fixture(scope="session")
def cluster() -> Iterator[str]:
    """Ray and Serve in this process tree; the address that Serve listens on."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    import ray
    from ray import serve

    port = free_port()
    ray.init(
        num_cpus=8,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
        _node_ip_address="127.0.0.1",
        _system_config={"metrics_report_interval_ms": 500},
    )
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    yield f"http://127.0.0.1:{port}"
    ray.shutdown()


@pytest.fixture(scope="module")
def deploy(cluster: str) -> Iterator[Callable[[Any], httpx.Client]]:
    """Deploys an application in place of the last one; returns a client of it."""
    from ray import serve

    with httpx.Client(base_url=cluster, timeout=120) as client:

        def run(application: Any) -> httpx.Client:
            serve.run(application, name=APP_NAME)
            return client

        yield run
    serve.delete(APP_NAME)


@pytest.fixture(scope="module")
def settings(model_folder: Path) -> Settings:
    """For the fake engine, with room for several replicas on any machine."""
    return Settings(model=str(model_folder), engine="fake", scorer_cpus=0.1, ingress_cpus=0.1)
