"""Prefixes and their replicas, found by each replica's counters, through a real Ray Serve."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from serve_app.app import build
from serve_app.settings import ModelSettings
from tests.local import service_of
from tests.processes import scorer_stats

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def client(deploy: Callable[[Any], httpx.Client], settings: ModelSettings) -> httpx.Client:
    return deploy(build(service_of(settings.model_copy(update={"scorer_replicas": 2, "max_batch_tokens": 256}))))


@pytest.fixture(scope="module")
def counted(client: httpx.Client) -> Callable[[], list[int]]:
    """Sequences that each of the two replicas has scored."""
    assert client.get("/ready").status_code == 200
    return lambda: [stats.sequences for stats in scorer_stats()]


def ask(client: httpx.Client, query: list[int] | str, items: list[Any]) -> None:
    answer = client.post("/v1/score", json={"query": query, "items": items, "label_token_ids": [1, 2]})
    assert answer.status_code == 200, answer.text


def replicas_of(client: httpx.Client, counted: Callable[[], list[int]], query: Any, requests: list[list[Any]]) -> set:
    """The replicas that scored a query's requests."""
    before = counted()
    for items in requests:
        ask(client, query, items)
    after = counted()
    assert sum(after) - sum(before) == sum(map(len, requests))
    return {number for number in range(2) if after[number] > before[number]}


def test_a_query_that_comes_again_goes_to_the_same_replica_and_queries_spread(
    client: httpx.Client, counted: Callable[[], list[int]]
):
    rng = random.Random(0)
    requests = [[[1]], [[2, 3], [2, 4]], [[5, 6, 7]], [[8], [9]]]
    used: set[int] = set()
    for _ in range(20):
        query = [rng.randrange(49_152) for _ in range(140)]
        replicas = replicas_of(client, counted, query, requests)
        assert len(replicas) == 1
        used |= replicas
    assert used == {0, 1}


def test_a_text_that_comes_again_goes_to_the_same_replica(client: httpx.Client, counted: Callable[[], list[int]]):
    for number in range(8):
        query = f"{number} " + "Is the answer in the text? " * 20
        assert len(replicas_of(client, counted, query, [["Yes"], ["es", " No"], ["the other"]])) == 1


def test_short_queries_and_the_parts_of_a_long_request_go_to_all_replicas(
    client: httpx.Client, counted: Callable[[], list[int]]
):
    assert replicas_of(client, counted, [7], [[[i]] for i in range(40)]) == {0, 1}
    assert replicas_of(client, counted, [*range(140)], [[[i, i, i, i] for i in range(200)]]) == {0, 1}
