"""Processes and whole nodes killed under load: no request is lost, and none is answered wrongly."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import httpx
import psutil
import pytest

from serve_app.client import ScoreClient
from serve_app.settings import ModelSettings
from serve_app.tpu import Tpu
from tests.faults.conftest import ITEMS, application, under_load, wait_for
from tests.processes import replica_process, replica_processes

if TYPE_CHECKING:
    from ray.cluster_utils import Cluster

pytestmark = [pytest.mark.ray, pytest.mark.slow]

HOST = Tpu(chip="v6e", topology="2x2", chips=2)
BODY = {"query": [1], "items": ITEMS, "label_token_ids": [1, 2]}


def asking(client: httpx.Client) -> Callable[[], Any]:
    """Requests without the client's retries."""
    return lambda: client.post("/v1/score", json=BODY).raise_for_status().json()["scores"]


def add_host(nodes: Cluster) -> Any:
    return nodes.add_node(num_cpus=4, resources={"TPU": 4}, labels=HOST.labels, node_ip_address="127.0.0.1")


def kill_host(nodes: Cluster, host: Any) -> None:
    """Kill every process of the node at once, as in a power failure."""
    raylet = psutil.Process(host.all_processes["raylet"][0].process.pid)
    for process in [raylet, *raylet.children(recursive=True)]:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    nodes.remove_node(host, allow_graceful=False)


def test_a_host_with_two_replicas_is_lost_under_load_and_another_takes_its_place(
    nodes: Cluster, deploy: Callable[[Any], httpx.Client], settings: ModelSettings
):
    hosts = [add_host(nodes), add_host(nodes)]
    try:
        tpu = settings.model_copy(update={"tpu": HOST, "scorer_replicas": 4})
        client = deploy(application(tpu))
        with under_load(asking(client)) as load:
            load.wait_for_more(20)
            kill_host(nodes, hosts.pop(0))
            load.wait_for_more(100)
            hosts.append(add_host(nodes))
            wait_for(lambda: len(replica_processes("Scorer")) == 4)
            load.wait_for_more(80)
        assert load.failures == []
        assert load.longest_s < 30
    finally:
        deploy(application(settings))
        for host in hosts:
            nodes.remove_node(host)


def test_a_killed_front_end_loses_no_request_of_the_retrying_client(
    cluster: str, deploy: Callable[[Any], httpx.Client], settings: ModelSettings
):
    deploy(application(settings.model_copy(update={"scorer_replicas": 2}), front_ends=2))
    with ScoreClient(cluster, attempts=8) as client:
        items: Any = ITEMS
        with under_load(lambda: client.score([1], items, label_token_ids=[1, 2]).scores) as load:
            load.wait_for_more(20)
            replica_process("Ingress").kill()
            load.wait_for_more(180)
            wait_for(lambda: len(replica_processes("Ingress")) == 2)
        assert load.failures == []


def test_a_killed_scorer_loses_no_request(deploy: Callable[[Any], httpx.Client], settings: ModelSettings):
    client = deploy(application(settings.model_copy(update={"scorer_replicas": 2})))
    with under_load(asking(client)) as load:
        load.wait_for_more(20)
        replica_process("Scorer").kill()
        load.wait_for_more(180)
        wait_for(lambda: len(replica_processes("Scorer")) == 2)
    assert load.failures == []


def test_the_only_scorer_is_killed_and_requests_wait_for_the_next(
    deploy: Callable[[Any], httpx.Client], settings: ModelSettings
):
    client = deploy(application(settings))
    with under_load(asking(client)) as load:
        load.wait_for_more(20)
        replica_process("Scorer").kill()
        load.wait_for_more(180)
    assert load.failures == []
