"""Replicas and their chips on simulated TPU hosts: Ray nodes that say they have some."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from serve_app.app import build
from serve_app.contract import Engine
from serve_app.local_ray import APP_NAME
from serve_app.scorer.fake_engine import FakeEngine
from serve_app.settings import ModelSettings
from serve_app.tpu import Tpu
from tests.local import service_of

if TYPE_CHECKING:
    from ray.cluster_utils import Cluster

pytestmark = pytest.mark.ray

HALF_A_HOST = Tpu(chip="v6e", topology="2x2", chips=2)
OTHER_HOST = Tpu(chip="v6e", topology="2x4")


@contextmanager
def tpu_host(cluster: Cluster, kind: Tpu, chips: int) -> Iterator[None]:
    node = cluster.add_node(num_cpus=4, resources={"TPU": chips}, labels=kind.labels, node_ip_address="127.0.0.1")
    yield
    cluster.remove_node(node)


def application(settings: ModelSettings) -> Any:
    """Build the application. Its engine's ``info`` shows the variables that libtpu would read in its process."""

    def seeing_engine(_settings: ModelSettings) -> Engine:
        import dataclasses
        import os

        engine = FakeEngine()
        seen = (os.environ["TPU_VISIBLE_CHIPS"], os.environ["TPU_CHIPS_PER_HOST_BOUNDS"])
        engine._info = dataclasses.replace(engine.info, buckets=seen)
        return engine

    service = service_of(settings)
    front = build(service)._bound_deployment
    scorer = front.init_args[1]._bound_deployment
    return front.bind(service, scorer.bind(settings, seeing_engine))


def nodes_of(deployment: str) -> list[str]:
    """The node of each running replica."""
    from ray import serve
    from ray.serve._private.common import ReplicaState

    details = serve.context._get_global_client().get_serve_details()
    replicas = details["applications"][APP_NAME]["deployments"][deployment]["replicas"]
    return [replica["node_id"] for replica in replicas if replica["state"] == ReplicaState.RUNNING]


def wait_for(condition: Callable[[], bool]) -> None:
    """Wait until ``condition`` holds; the test's own time limit ends a vain wait."""
    while not condition():
        time.sleep(0.1)


def test_replicas_wait_for_their_chips_with_a_log_line_and_see_no_others(
    nodes: Cluster, cluster: str, settings: ModelSettings, tmp_path: Path
):
    import ray
    from ray import serve

    settings = settings.model_copy(update={"tpu": HALF_A_HOST, "scorer_replicas": 3})
    target = serve.RunTarget(application(settings), name=APP_NAME, logging_config={"logs_dir": str(tmp_path)})

    def said(text: str) -> bool:
        return any(text in path.read_text() for path in tmp_path.glob("replica_*Ingress*.log"))

    with ExitStack() as hosts:
        hosts.enter_context(tpu_host(nodes, OTHER_HOST, chips=8))
        try:
            serve.run_many([target], wait_for_ingress_deployment_creation=False, wait_for_applications_running=False)
            wait_for(
                lambda: said("no node has chips of v6e in topology 2x2; the nodes have 8 of TPU-V6E in topology 2x4")
            )

            hosts.enter_context(tpu_host(nodes, HALF_A_HOST, chips=4))
            wait_for(lambda: said("3 replicas of 2 chips need 6 chips of v6e in topology 2x2"))
            wait_for(lambda: len(nodes_of("Scorer")) == 2)
            wait_for(lambda: len(nodes_of("Ingress")) == 1)
            assert httpx.get(f"{cluster}/ready", timeout=60).status_code == 200

            handle = serve.get_deployment_handle("Scorer", APP_NAME)
            seen = [info.buckets for info in handle.broadcast("info").results(timeout_s=60)]
            assert sorted(seen) == [("0,1", "1,2,1"), ("2,3", "1,2,1")]
            labels = {node["NodeID"]: node["Labels"] for node in ray.nodes()}
            assert all(HALF_A_HOST.labels.items() <= labels[node].items() for node in nodes_of("Scorer"))
            assert nodes_of("Ingress") == [nodes.head_node.node_id]  # hosts with chips also had room for it
        finally:
            serve.delete(APP_NAME)
