"""The leader of a slice as an actor, like Serve's replica, and the slice's hosts on this machine."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from scripts.simulation.cluster import start_slice
from serve_app.contract import Engine
from serve_app.scorer.slice_worker import LoadPart, Place
from serve_app.settings import ModelSettings
from serve_app.tpu import Tpu

if TYPE_CHECKING:
    from ray.cluster_utils import Cluster

TWO_HOSTS, FOUR_HOSTS = Tpu(chip="v5p", topology="2x2x2"), Tpu(chip="v6e", topology="4x4")


def on_cpu(data: int = 1, **sizes: Any) -> LoadPart:
    """A ``load_part`` like that of ``engines``, on devices that XLA simulates on a CPU.

    Args:
        data: size of the mesh's data axis; neighbours on the other axis are on different hosts.
    """

    def load(settings: Any, place: Place) -> Engine:  # local: its code is sent to the hosts, which lack this module
        import jax
        import numpy as np

        from model import loading, sharding
        from serve_app import model_source
        from serve_app.scorer.engines import compiled_folder

        sharding.init_distributed(place.coordinator, place.hosts, place.number)
        by_host = np.array(jax.devices()).reshape(place.hosts, -1)
        mesh = sharding.mesh(data, by_host.size // data, by_host.T.ravel().tolist())
        folder = model_source.resolve(settings.model)
        return loading.load(folder, mesh=mesh, compiled_folder=compiled_folder(), **sizes)

    return load


@contextmanager
def slice_of(nodes: Cluster, tpu: Tpu, devices: int) -> Iterator[list[Any]]:
    """Start hosts with so many devices each. They are removed after the test."""
    flags = f"--xla_backend_optimization_level=1 --xla_force_host_platform_device_count={devices}"
    # Each device waits for the others in a thread of XLA's pool; with one thread per core some would get none.
    hosts = start_slice(nodes, tpu, "a-slice", XLA_FLAGS=flags, NPROC="16", JAX_COMPILATION_CACHE_DIR="")
    try:
        yield hosts
    finally:
        for host in hosts:
            nodes.remove_node(host)


@contextmanager
def leader_of(settings: ModelSettings, load: LoadPart) -> Iterator[Any]:
    """Start an actor that holds the engine, and wait until it is warm. Its methods are the engine's."""
    import ray

    class Leader:
        def __init__(self) -> None:
            from concurrent.futures import ThreadPoolExecutor

            from serve_app.scorer.slice_group import SliceGroup

            self.engine = SliceGroup(settings, load)
            self.threads = ThreadPoolExecutor(2)  # like the queue's
            self.told: list[tuple[int, int, str]] = []
            self.engine.warmup(lambda *progress: self.told.append(progress))

        def score(self, batch: Any) -> Any:
            return self.threads.submit(self.engine.score, batch).result()

        def set_batch_timeout(self, stall_s: float) -> None:
            self.engine.set_batch_timeout(stall_s)

        def state(self) -> Any:
            import sys

            self.engine.check_health()
            return self.engine.info, self.engine.stats, self.told, "jax" in sys.modules

        def save_coverage(self) -> None:
            import coverage

            if measuring := coverage.Coverage.current():  # a killed process saves nothing
                measuring.save()

    # Detached, like a replica of Serve; else the slice would stay reserved until the test's own process ends.
    actor = ray.remote(max_concurrency=4, num_cpus=0.1, lifetime="detached")(Leader)
    leader = actor.options(name=uuid.uuid4().hex).remote()
    try:
        ray.get(leader.state.remote())
        yield leader
    finally:
        with suppress(ray.exceptions.RayActorError):
            ray.get(leader.save_coverage.remote())
        ray.kill(leader)


def alone(folder: Path, batches: list[Any], **sizes: Any) -> list[Any]:
    """Values of an engine in one process, on a mesh of one device, which multiplies as a slice's devices do.

    It runs in a process of its own: one that has loaded jax cannot start nodes.
    """
    import ray

    @ray.remote(num_cpus=0.1)
    def compute() -> list[Any]:
        import jax

        from model import loading, sharding

        scorer = loading.load(folder, mesh=sharding.mesh(1, 1, jax.devices()[:1]), **sizes)
        return [scorer.score(batch).values for batch in batches]

    return ray.get(compute.remote())


def workers_of(host: Any) -> list[psutil.Process]:
    """The processes that compute on a host; a started slice has one per host."""
    raylet = psutil.Process(host.all_processes["raylet"][0].process.pid)
    found: list[psutil.Process] = []
    for process in raylet.children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            if "ray::SliceWorker" in " ".join(process.cmdline()):
                found.append(process)
    return found


def worker_of(host: Any) -> psutil.Process:
    """The only process that computes on a host."""
    (found,) = workers_of(host)
    return found
