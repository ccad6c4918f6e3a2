"""The choice of a replica for a job: the pure part of the router."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ray.serve._private.common import DeploymentHandleSource, DeploymentID, ReplicaID
from ray.serve.config import RequestRouterConfig
from ray.serve.handle import DeploymentHandle

from serve_app.contract import Affinity
from serve_app.frontend import replica_counts
from serve_app.frontend.router import PrefixRouter, ranked, running_replicas

REPLICAS = [f"replica{i}" for i in range(5)]
IDLE = dict.fromkeys(REPLICAS, 0)


async def test_updates_to_serves_own_copy_of_the_router_reach_the_front_end():
    config = RequestRouterConfig(request_router_class=PrefixRouter)  # pickles the class, for another process
    router = config.get_request_router_class()(DeploymentID("Scorer", "heard"), DeploymentHandleSource.REPLICA)
    handle = DeploymentHandle("Scorer", "heard")
    assert running_replicas(handle) == 0
    router.update_replicas([])
    assert replica_counts.routers[str(handle.deployment_id)] is router


def to(key: int, *, part: int = 0, worth: float = 2.0) -> Affinity:
    return Affinity(key.to_bytes(16, "big"), part, worth)


@given(
    ongoing=st.dictionaries(st.sampled_from(REPLICAS), st.integers(0, 9), min_size=1),
    affinity=st.none() | st.builds(to, st.integers(0, 99), part=st.integers(0, 9), worth=st.floats(0, 4)),
)
def test_every_replica_is_tried_once_and_none_much_busier_than_another_first(
    ongoing: dict[str, int], affinity: Affinity | None
):
    order = ranked(affinity, ongoing)
    assert sorted(order) == sorted(ongoing)
    assert ongoing[order[0]] <= min(ongoing.values()) + (affinity.worth if affinity else 0)


def test_a_prefix_sticks_to_a_replica_and_prefixes_spread():
    firsts = [ranked(to(key), IDLE)[0] for key in range(500)]
    assert firsts == [ranked(to(key), dict(reversed(IDLE.items())))[0] for key in range(500)]
    assert min(Counter(firsts).values()) > 500 / len(REPLICAS) / 2


def test_when_a_replica_goes_only_its_own_prefixes_move():
    left = dict.fromkeys(REPLICAS[1:], 0)
    for key in range(100):
        before, after = ranked(to(key), IDLE), ranked(to(key), left)
        assert after == [replica for replica in before if replica != REPLICAS[0]]


def test_the_parts_of_a_request_go_to_different_replicas():
    assert sorted(ranked(to(7, part=part), IDLE)[0] for part in range(5)) == REPLICAS
    assert ranked(to(7, part=5), IDLE) == ranked(to(7), IDLE)


def test_a_busy_replica_keeps_a_prefix_as_long_as_it_is_worth_the_wait():
    order = ranked(to(3), IDLE)
    assert ranked(to(3, worth=2.5), {**IDLE, order[0]: 2})[0] == order[0]
    assert ranked(to(3, worth=1.5), {**IDLE, order[0]: 2})[0] == order[1]
    assert ranked(to(3, worth=1.5), {**IDLE, order[0]: 2, order[1]: 2})[0] == order[2]
    assert ranked(to(3, worth=0), dict.fromkeys(REPLICAS, 3))[0] == order[0]


def test_without_a_prefix_one_of_the_least_busy_is_drawn():
    ongoing = {**IDLE, REPLICAS[0]: 1, REPLICAS[3]: 1}
    drawn = {ranked(None, ongoing)[0] for _ in range(200)}
    assert drawn == {REPLICAS[1], REPLICAS[2], REPLICAS[4]}


async def test_calls_sent_past_serve_count_and_lost_replicas_come_last(monkeypatch: pytest.MonkeyPatch):
    deployment = DeploymentID("Scorer", "counts")
    router = PrefixRouter(deployment, DeploymentHandleSource.REPLICA)
    replicas: list[Any] = [SimpleNamespace(replica_id=ReplicaID(name, deployment)) for name in REPLICAS]
    monkeypatch.setattr(replica_counts, "direct", Counter(dict.fromkeys(REPLICAS[1:], 1)))

    def order() -> list[str]:
        return [each.replica_id.unique_id for each in router._ranked(replicas, None)]

    assert {order()[0] for _ in range(20)} == {REPLICAS[0]}
    monkeypatch.setattr(replica_counts, "lost", {REPLICAS[0]})
    assert REPLICAS[0] not in {order()[0] for _ in range(20)}
