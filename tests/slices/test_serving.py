"""The whole service over slices of several hosts: placed whole, and under load while processes are killed."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import numpy as np
import pytest

from scripts.simulation.cluster import start_slice
from serve_app.app import build
from serve_app.contract import Engine
from serve_app.local_ray import APP_NAME
from serve_app.scorer.fake_engine import FakeEngine
from serve_app.scorer.slice_worker import LoadPart, Place
from serve_app.settings import ModelSettings
from tests.e2e.test_autoscaling_up_and_down import BOUNDS, states
from tests.faults.conftest import loading_with, under_load, wait_for
from tests.invariance.rows import TOLERANCE, with_halved_head
from tests.local import service_of
from tests.processes import replica_process, replica_processes
from tests.sharding.one_of_two import SIZES
from tests.slices.leading import TWO_HOSTS, on_cpu, slice_of, worker_of, workers_of
from tests.tiny import make_llama

if TYPE_CHECKING:
    from ray.cluster_utils import Cluster

pytestmark = pytest.mark.ray

BODY = {"query": [1, 2, 3], "items": [[number, 5] for number in range(100, 140)], "label_token_ids": [1, 2]}


@pytest.fixture(scope="module")
def settings(model_folder: Path) -> ModelSettings:
    return ModelSettings(model=str(model_folder), engine="fake", tpu=TWO_HOSTS, scorer_cpus=0.1)


@pytest.fixture(scope="module")
def hosts(nodes: Cluster) -> Iterator[list[Any]]:
    with slice_of(nodes, TWO_HOSTS, 2) as hosts:
        yield hosts


def application(settings: ModelSettings, part: LoadPart) -> Any:
    """Build the application with ``part`` on each host."""

    def load(settings: ModelSettings) -> Engine:
        from serve_app.scorer.slice_group import SliceGroup

        group = SliceGroup(settings, part)
        group.warmup()
        return group

    return loading_with(load, settings)


def asking(client: httpx.Client) -> Callable[[], Any]:
    """A request without the client's retries. It returns whether its scores are the first answer's."""

    def logprobs() -> np.ndarray:
        return np.log(client.post("/v1/score", json=BODY).raise_for_status().json()["scores"])

    first = logprobs()
    return lambda: bool(np.abs(logprobs() - first).max() <= TOLERANCE)


def killed_under_load(client: httpx.Client, victims: list[Callable[[], Any]], calls: int) -> float:
    """Kill one victim after the other, each followed by ``calls`` right answers. Returns the longest call's time."""
    with under_load(asking(client)) as load:
        for victim in victims:
            load.wait_for_more(10)
            process = victim()
            process.kill()
            load.wait_for_more(calls)
    assert load.failures == []
    return load.longest_s


def test_a_replica_is_a_whole_slice_and_outlives_its_processes(
    nodes: Cluster, hosts: list[Any], deploy: Callable[[Any], httpx.Client], settings: ModelSettings
):
    import ray
    from ray import serve

    client = deploy(build(service_of(settings)))
    details = serve.context._get_global_client().get_serve_details()
    for name in ("Scorer", "Ingress"):  # the hosts with chips also had room for them
        replicas = details["applications"][APP_NAME]["deployments"][name]["replicas"]
        assert [replica["node_id"] for replica in replicas] == [nodes.head_node.node_id]
    assert ray.available_resources().get("TPU", 0) == 0
    leader = replica_process("Scorer")
    assert not any("jax" in Path(path).parts for path in {region.path for region in leader.memory_maps()})
    killed_under_load(client, [lambda: worker_of(hosts[0])], 40)
    assert replica_process("Scorer").pid == leader.pid
    killed_under_load(client, [lambda: replica_process("Scorer")], 40)


@pytest.mark.slow
def test_a_second_replica_waits_for_its_own_slice_and_the_log_says_so(
    nodes: Cluster, hosts: list[Any], deploy: Callable[[Any], httpx.Client], settings: ModelSettings, tmp_path: Path
):
    from ray import serve

    target = serve.RunTarget(
        build(service_of(settings.model_copy(update={"scorer_replicas": 2}))),
        name=APP_NAME,
        logging_config={"logs_dir": str(tmp_path)},
    )

    def said(text: str) -> bool:
        return any(text in path.read_text() for path in tmp_path.glob("replica_*Ingress*.log"))

    others: list[Any] = []
    try:
        serve.run_many([target], wait_for_ingress_deployment_creation=False, wait_for_applications_running=False)
        wait_for(lambda: said("2 replicas need as many slices of v5p in topology 2x2x2; 1 complete slice found"))
        others += start_slice(nodes, TWO_HOSTS, "b-slice")
        wait_for(lambda: len(replica_processes("Scorer")) == 2)
        wait_for(lambda: said("there are enough now"))
        for host in hosts + others:
            wait_for(lambda host=host: len(workers_of(host)) == 1)
    finally:
        deploy(build(service_of(settings.model_copy(update={"tpu": None}))))
        for host in others:
            nodes.remove_node(host)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_processes_of_a_model_are_killed_under_load(
    hosts: list[Any], deploy: Callable[[Any], httpx.Client], settings: ModelSettings, tmp_path: Path
):
    """First a follower's process dies, then host 0's, then the leader: 200 requests after each, without retries."""
    folder = with_halved_head(make_llama(tmp_path / "llama", heads=4, ff=32, layers=2, tokenizer=True))
    of_jax = settings.model_copy(update={"model": str(folder), "engine": "jax"})
    client = deploy(application(of_jax, on_cpu(**SIZES)))
    for victim in (lambda: worker_of(hosts[1]), lambda: worker_of(hosts[0]), lambda: replica_process("Scorer")):
        print(f"answers again within {killed_under_load(client, [victim], 200):.1f} s")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_whole_slices_are_taken_and_released_with_the_work(
    nodes: Cluster, hosts: list[Any], deploy: Callable[[Any], httpx.Client], settings: ModelSettings
):
    import ray

    def slowly(_settings: Any, _place: Place) -> Engine:
        return FakeEngine(seconds_per_token=0.004)  # waiting requests are in the replicas, not on their way to them

    bounds = BOUNDS.model_copy(update={"tokens_per_replica": 100})  # one request has 83
    every = [*hosts, *start_slice(nodes, TWO_HOSTS, "b-slice"), *start_slice(nodes, TWO_HOSTS, "c-slice")]
    looks: list[tuple[float, dict[str, int], float]] = []

    def at(replicas: int) -> bool:
        """Return whether so many replicas run and their slices are taken."""
        look = time.monotonic(), states(), ray.available_resources().get("TPU", 0)
        if not looks or look[1:] != looks[-1][1:]:
            print(
                f"{look[0] - began:5.1f} s: {look[1] or 'no replica'}, {look[2]:.0f} chips are free"
            )  # shown by pytest -rP
        looks.append(look)
        return look[1:] == ({"RUNNING": replicas} if replicas else {}, (3 - replicas) * TWO_HOSTS.chips)

    def all_gone() -> bool:
        groups = ray.util.placement_group_table().values()
        return all(each["state"] == "REMOVED" for each in groups) and not any(map(workers_of, every))

    try:
        client = deploy(application(settings.model_copy(update={"autoscaling": bounds}), slowly))
        began = time.monotonic()
        for most in (3, 1):
            wait_for(lambda: at(0))
            wait_for(all_gone)
            with under_load(asking(client), callers=8 if most == 3 else 1) as load:
                wait_for(lambda most=most: at(most))
                assert [len(workers_of(host)) for host in every].count(1) == most * TWO_HOSTS.hosts
                load.wait_for_more(20)
            assert load.failures == []
        cut = [now - before for (before, _, one), (now, _, other) in pairwise(looks) if one % 8 and other % 8]
        print(f"for {sum(cut):.2f} s of {looks[-1][0] - began:.0f} a slice was free in part")
        assert sum(cut) < 1  # its hosts report one after the other
    finally:
        deploy(build(service_of(settings.model_copy(update={"tpu": None}))))
        for host in every[2:]:
            nodes.remove_node(host)
