"""Processes and hosts of a slice die, hang or lose touch, on the fake engine: the leader restarts them all."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import psutil
import pytest

from scripts.simulation.cluster import start_slice
from serve_app.contract import BatchResult, Engine, TokenBatch
from serve_app.scorer.engines import load_part
from serve_app.scorer.fake_engine import FakeEngine
from serve_app.scorer.slice_worker import Place
from serve_app.settings import ModelSettings
from tests.batches import label_batch
from tests.faults.conftest import wait_for
from tests.slices.leading import TWO_HOSTS, leader_of, slice_of, worker_of

if TYPE_CHECKING:
    from ray.cluster_utils import Cluster

pytestmark = pytest.mark.ray

SETTINGS = ModelSettings(engine="fake", tpu=TWO_HOSTS, scorer_cpus=0.1)
BATCH = label_batch([[1, 2, 3], [1, 2, 4]], [[1, 2]] * 2)
RIGHT = FakeEngine().score(BATCH).values


@pytest.fixture(scope="module")
def hosts(nodes: Cluster) -> Iterator[list[Any]]:
    with slice_of(nodes, TWO_HOSTS, 1) as hosts:
        yield hosts


def assert_scores(leader: Any) -> None:
    import ray

    np.testing.assert_array_equal(ray.get(leader.score.remote(BATCH), timeout=60).values, RIGHT)


def test_a_death_while_nothing_is_computed_is_noticed(hosts: list[Any]):
    import ray

    with leader_of(SETTINGS, load_part) as leader:
        assert_scores(leader)
        before = [worker_of(host) for host in hosts]
        before[1].kill()
        wait_for(lambda: not any(psutil.pid_exists(process.pid) for process in before))
        assert_scores(leader)
        _, stats, _, _ = ray.get(leader.state.remote())
        assert stats.computed_tokens == 2 * FakeEngine().score(BATCH).computed_tokens.sum()
        processes = [worker_of(host) for host in hosts]
    wait_for(lambda: not any(process.is_running() for process in processes))  # the processes end with their leader


def test_a_host_that_hangs_has_its_process_replaced_and_the_batch_computed_again(hosts: list[Any], tmp_path: Path):
    import ray

    hung = tmp_path / "hung"

    def hanging(_settings: Any, place: Place) -> Engine:

        class Hanging(FakeEngine):
            def score(self, batch: TokenBatch) -> BatchResult:
                if place.number == 1 and not hung.exists():
                    hung.touch()
                    time.sleep(1000)
                return super().score(batch)

        return Hanging()

    with leader_of(SETTINGS.model_copy(update={"stall_s": 1000}), hanging) as leader:
        ray.get(leader.set_batch_timeout.remote(3))  # as in a running replica
        stuck = worker_of(hosts[1])
        assert_scores(leader)
        assert not psutil.pid_exists(stuck.pid)


def test_a_start_that_takes_too_long_fails_the_health_check(hosts: list[Any], tmp_path: Path):
    import ray

    first = tmp_path / "first"

    def once(_settings: Any, place: Place) -> Engine:
        if place.number == 0:
            first.touch(exist_ok=False)
        return FakeEngine()

    with leader_of(SETTINGS.model_copy(update={"rebuild_s": 1}), once) as leader:
        assert_scores(leader)
        worker_of(hosts[1]).kill()
        with pytest.raises(RuntimeError, match="did not start within 1"):
            ray.get(leader.score.remote(BATCH), timeout=60)
        with pytest.raises(RuntimeError, match=r"have been starting for \d+ s; rebuild_s is 1"):
            ray.get(leader.state.remote(), timeout=60)


@pytest.mark.slow
def test_a_batch_that_ends_the_processes_is_tried_twice(hosts: list[Any], tmp_path: Path):  # noqa: ARG001 - it needs them
    import ray

    tries = tmp_path / "tries"

    def fatal(_settings: Any, place: Place) -> Engine:
        import os

        class Fatal(FakeEngine):
            def score(self, batch: TokenBatch) -> BatchResult:
                if place.number == 0 and 666 in batch.tokens:
                    with tries.open("a") as file:
                        file.write("x")
                    os._exit(1)
                return super().score(batch)

        return Fatal()

    with leader_of(SETTINGS, fatal) as leader:
        with pytest.raises(RuntimeError, match="the slice was lost 2 times with this batch"):
            ray.get(leader.score.remote(label_batch([[666]], [[1]])), timeout=120)
        assert tries.read_text() == "xx"
        assert_scores(leader)


@pytest.mark.slow
def test_after_the_loss_of_a_host_another_slice_is_taken(nodes: Cluster, hosts: list[Any]):
    others: list[Any] = []
    with leader_of(SETTINGS, load_part) as leader:
        try:
            assert_scores(leader)
            nodes.remove_node(hosts.pop(), allow_graceful=False)
            nodes.remove_node(hosts.pop(), allow_graceful=False)
            others += start_slice(nodes, TWO_HOSTS, "another-slice")
            assert_scores(leader)
            assert all(worker_of(host).is_running() for host in others)
        finally:
            for host in others:
                nodes.remove_node(host)
