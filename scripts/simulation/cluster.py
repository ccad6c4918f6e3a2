"""Simulates a cluster of TPU hosts on one machine: hosts die under load, and the service recovers.

The hosts are Ray nodes that report chips. Their replicas run the fake engine, which computes scores from hashed
tokens. Everything else is what a real cluster runs.
"""

from __future__ import annotations

import io
import itertools
import logging
import os
import sys
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, redirect_stdout, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import httpx
import typer
from rich.console import Console

from serve_app.cli.launcher import check_port
from serve_app.local_ray import APP_NAME, set_environment, start_ray
from serve_app.settings import ModelSettings, ServiceSettings
from serve_app.tpu import CHIP_LABEL, CHIPS_OF_A_SLICES_HOST, HOSTS, NUMBER_LABEL, RESOURCE, SLICE_LABEL, Tpu

if TYPE_CHECKING:
    from ray.cluster_utils import Cluster

HOST = Tpu(chip="v6e", topology="2x2", chips=2)
SLICE = Tpu(chip="v5p", topology="2x2x2")
"""A topology of two hosts."""
POD_LABEL = "ray.io/tpu-pod-type"
CHIPS = HOSTS[HOST.chip][HOST.topology]
BACK_AFTER_S = 5.0
"""Seconds until a killed host is replaced."""
CALLERS = 4
PAUSE_S = 0.05
"""Seconds between two calls of a client, since the clients run on the same machine."""
ASK: dict[str, Any] = {"query": [1, 2, 3], "items": [[number] for number in range(100, 200)], "label_token_ids": [1, 2]}


@dataclass
class Counts:
    answered: int = 0
    wrong: int = 0
    failed: int = 0


def main(
    hosts: Annotated[int, typer.Option(min=1, help="TPU hosts, each with room for two replicas.")] = 2,
    slices: Annotated[
        int,
        typer.Option(
            min=0, help="Slices of two hosts instead of hosts, each with one replica; a whole slice dies at once."
        ),
    ] = 0,
    kill_every: Annotated[float, typer.Option(help="Seconds between two kills of a host; 0 for none.")] = 20.0,
    seconds: Annotated[float | None, typer.Option(help="Seconds until the end.", show_default="until Ctrl-C")] = None,
    port: Annotated[int, typer.Option(min=1, max=65535)] = 8000,
) -> None:
    """Simulate a cluster of TPU hosts on this machine, kill one now and then under load, and print what happens."""
    os.environ.setdefault("RAY_SERVE_USE_GRPC_BY_DEFAULT", "0")  # as on several hosts
    set_environment()
    import ray
    from ray import serve

    from serve_app.app import build

    console = Console(file=sys.stdout, highlight=False, soft_wrap=True)
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    check_port("127.0.0.1", port)
    tpu, units = (SLICE, slices) if slices else (HOST, hosts)
    replicas = slices or hosts * CHIPS // HOST.chips
    model = ModelSettings(engine="fake", tpu=tpu, scorer_replicas=replicas, scorer_cpus=0.1)
    settings = ServiceSettings(models=(model,), ingress_cpus=0.1)
    kind = "slices of two hosts" if slices else "hosts"
    console.print(f"starting {units} {kind} and {replicas} replicas of {tpu.chips} chips each")
    with ExitStack() as stack:
        # To sys.stdout Ray prints twenty lines of the log of every host that dies.
        stack.enter_context(redirect_stdout(io.StringIO()))
        cluster = start_cluster(4)
        stack.callback(ray.shutdown)
        numbers = itertools.count()

        def join() -> list[Any]:
            return start_slice(cluster, tpu, f"slice-{next(numbers)}") if slices else [_host(cluster)]

        alive = [join() for _ in range(units)]
        stack.callback(lambda: [_die(cluster, unit) for unit in alive])
        serve.start(http_options={"host": "127.0.0.1", "port": port}, proxy_location="HeadOnly")
        serve.run(build(settings), name=APP_NAME)
        counts, stop = Counts(), threading.Event()
        callers = [threading.Thread(target=_call, args=(port, counts, stop)) for _ in range(CALLERS)]
        for caller in callers:
            caller.start()
        stack.callback(lambda: [caller.join() for caller in callers])
        stack.callback(stop.set)
        with suppress(KeyboardInterrupt):
            _watch(cluster, alive, join, counts, kill_every, seconds, console)


def start_cluster(cpus: int, **options: Any) -> Cluster:
    """Start a Ray cluster of one node, which others may join.

    Args:
        options: additional options of ``ray.init``.
    """
    from ray._private import worker
    from ray.cluster_utils import Cluster

    start_ray(cpus, alone=False, **options)
    cluster = Cluster()
    # Started as the launcher does it, not by Cluster, which binds other addresses and knows no token.
    node: Any = worker._global_node  # pyright: ignore[reportPrivateUsage]
    cluster.head_node, cluster.redis_address = node, node.redis_address
    return cluster


def start_slice(cluster: Cluster, tpu: Tpu, name: str, **env: str) -> list[Any]:
    """Start the hosts of a slice, in the order of their numbers, with the resources and labels that Ray finds there.

    Args:
        env: environment of every process on them.
    """
    from ray._private.accelerators.tpu import infer_tpu_pod_type_from_topology

    pod = infer_tpu_pod_type_from_topology(tpu.topology, tpu.labels[CHIP_LABEL])
    return [
        cluster.add_node(
            num_cpus=4,
            resources={RESOURCE: CHIPS_OF_A_SLICES_HOST} | ({} if number else {f"TPU-{pod}-head": 1}),
            labels=tpu.labels | {SLICE_LABEL: name, NUMBER_LABEL: str(number), POD_LABEL: str(pod)},
            env_vars={"TPU_NAME": name, **env},
            node_ip_address="127.0.0.1",
        )
        for number in range(tpu.hosts)
    ]


def _host(cluster: Cluster) -> Any:
    return cluster.add_node(num_cpus=4, resources={RESOURCE: CHIPS}, labels=HOST.labels, node_ip_address="127.0.0.1")


def _die(cluster: Cluster, unit: list[Any]) -> None:
    for host in unit:
        cluster.remove_node(host, allow_graceful=False)  # SIGKILL


def _call(port: int, counts: Counts, stop: threading.Event) -> None:
    """Send the same request repeatedly; all answers must equal the first."""
    right = None
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
        while not stop.is_set():
            try:
                scores = client.post("/v1/score", json=ASK).raise_for_status().json()["scores"]
            except httpx.HTTPError:
                counts.failed += 1
                continue
            right = right or scores
            counts.answered += scores == right
            counts.wrong += scores != right
            time.sleep(PAUSE_S)


def _watch(
    cluster: Cluster,
    alive: list[list[Any]],
    join: Callable[[], list[Any]],
    counts: Counts,
    kill_every: float,
    seconds: float | None,
    console: Console,
) -> None:
    from ray import serve

    started = killed_at = time.monotonic()
    lost = 0
    while seconds is None or time.monotonic() - started < seconds:
        now = time.monotonic()
        if kill_every and alive and now - killed_at >= kill_every:
            console.print(f"        {'a slice' if len(alive[0]) > 1 else 'a host'} dies")
            _die(cluster, alive.pop(0))
            killed_at, lost = now, lost + 1
        if lost and now - killed_at >= BACK_AFTER_S:
            alive.append(join())
            console.print(f"        {'a slice' if len(alive[-1]) > 1 else 'a host'} joins")
            lost -= 1
        application = serve.status().applications[APP_NAME]
        states = application.deployments["Scorer"].replica_states
        replicas = ", ".join(f"{number} {state.lower()}" for state, number in states.items() if number)
        console.print(
            f"{now - started:6.0f} s  {sum(map(len, alive))} hosts  scorers: {replicas or 'none'}  "
            f"{counts.answered:,} answered, {counts.wrong} wrong, {counts.failed} failed"
        )
        time.sleep(1)


if __name__ == "__main__":
    typer.run(main)
