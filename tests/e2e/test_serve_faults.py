"""Faults, through a real Ray Serve, on a slow fake engine."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import httpx
import numpy as np
import pytest

from serve_app.contract import Engine
from serve_app.frontend.ingress import Ingress
from serve_app.frontend.replicas import CANCELLED_BY_S
from serve_app.frontend.router import PrefixRouter
from serve_app.scorer.deployment import MAX_ONGOING, Scorer
from serve_app.scorer.fake_engine import FakeEngine
from serve_app.settings import Limits, ModelSettings
from tests.local import service_of
from tests.processes import replica_process, replica_processes, scorer_stats

pytestmark = pytest.mark.ray

POISON = 13
SECONDS_PER_TOKEN = 0.001
QUEUE_LIMIT = 6_000


def application(settings: ModelSettings, *, scorers: int) -> Any:
    """The application of ``app.build`` with a slow engine."""
    from ray import serve
    from ray.serve.config import RequestRouterConfig

    def slow_engine(
        _settings: ModelSettings,
    ) -> Engine:  # local: its code is sent to the replicas, which lack this module
        return FakeEngine(seconds_per_token=SECONDS_PER_TOKEN, nan_token=POISON)

    options: dict[str, Any] = {
        "max_ongoing_requests": MAX_ONGOING,
        "ray_actor_options": {"num_cpus": 0.1},
        "health_check_period_s": 1,
        "graceful_shutdown_wait_loop_s": 0.1,
    }
    settings = settings.model_copy(
        update={
            "scorer_replicas": scorers,
            "max_batch_tokens": 128,
            "limits": Limits(max_queued_tokens=QUEUE_LIMIT),
        }
    )
    routed = RequestRouterConfig(request_router_class=PrefixRouter)
    deployment = serve.deployment(num_replicas=scorers, request_router_config=routed, **options)
    scorer = deployment(Scorer).bind(settings, slow_engine)
    return Ingress.options(**options).bind(service_of(settings), scorer)


@pytest.fixture(scope="module")
def client(deploy: Callable[[Any], httpx.Client], settings: ModelSettings) -> httpx.Client:
    return deploy(application(settings, scorers=2))


@pytest.fixture(scope="module")
def one_scorer(
    client: httpx.Client,  # noqa: ARG001 - the earlier tests need two
    deploy: Callable[[Any], httpx.Client],
    settings: ModelSettings,
) -> httpx.Client:
    return deploy(application(settings, scorers=1))


def ask(client: httpx.Client, items: list[list[int]], **more: Any) -> httpx.Response:
    return client.post("/v1/score", json={"query": [1], "items": items, "label_token_ids": [1, 2]}, **more)


@contextmanager
def under_load(client: httpx.Client, failures: list[str]) -> Iterator[Callable[[], int]]:
    """Run eight callers in a closed loop. Yields the count of answers so far; wrong ones go to ``failures``."""
    items = [[i, i + 1] for i in range(100, 160)]  # 0.12 s on a device: no scorer is ever idle
    right = ask(client, items).json()["scores"]
    stop = threading.Event()
    done = 0

    def caller() -> None:
        nonlocal done
        while not stop.is_set():
            try:
                answer = ask(client, items)
            except httpx.HTTPError as error:
                failures.append(repr(error))
                continue
            if answer.status_code != 200 or answer.json()["scores"] != right:
                failures.append(answer.text)
            done += 1

    with ThreadPoolExecutor(8) as pool:
        callers = [pool.submit(caller) for _ in range(8)]
        try:
            yield lambda: done
        finally:
            stop.set()
        for finished in callers:
            finished.result()


def wait_for(condition: Callable[[], bool]) -> None:
    """Wait until ``condition`` holds; the test's own time limit ends a vain wait."""
    while not condition():
        time.sleep(0.05)


def test_a_poisoned_item_harms_only_its_own_request(client: httpx.Client):
    clean = [[i, i + 1] for i in range(100, 110)]
    alone = ask(client, clean).json()["scores"]
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda i: ask(client, [[POISON]] if i % 2 else clean), range(16)))
    for i, answer in enumerate(answers):
        if i % 2:
            assert answer.status_code == 500
            assert "items[0]" in answer.json()["message"]
        else:
            np.testing.assert_array_equal(answer.json()["scores"], alone)


def test_killed_scorers_lose_no_request(client: httpx.Client):
    failures: list[str] = []
    with under_load(client, failures) as done:
        for _ in range(3):
            before = done()
            wait_for(lambda: done() > before + 16)  # noqa: B023 - called at once
            replica_process("Scorer").kill()
            wait_for(lambda: len(replica_processes("Scorer")) == 2)
    assert failures == []


def test_jobs_of_clients_that_leave_are_not_sent_again(client: httpx.Client):
    def cancelled() -> int:
        return sum(each.cancelled for each in scorer_stats())

    def leave(number: int) -> None:
        with pytest.raises(httpx.ReadTimeout):
            ask(client, [[number] * 450], timeout=0.3)  # one item: one job, 0.45 s of a scorer

    before = cancelled()
    with ThreadPoolExecutor(5) as pool:
        list(pool.map(leave, range(30)))
    wait_for(lambda: all(each.queued_jobs == 0 for each in scorer_stats()))
    time.sleep(CANCELLED_BY_S + 1)  # a second copy would have come by then
    wait_for(lambda: all(each.queued_jobs == 0 for each in scorer_stats()))
    assert 0 < cancelled() - before <= 30


def test_the_queued_work_of_a_client_that_leaves_is_removed(one_scorer: httpx.Client):
    with pytest.raises(httpx.ReadTimeout):
        ask(one_scorer, [[i] * 100 for i in range(100, 150)], timeout=1)
    wait_for(lambda: [each.cancelled for each in scorer_stats()] == [1])
    wait_for(lambda: 'outcome="cancelled"' in one_scorer.get("/metrics").text)
    assert [each.queued_tokens for each in scorer_stats()] == [0]
    assert ask(one_scorer, [[5]]).status_code == 200


def test_past_the_queues_limit_the_answer_is_503_with_retry_after(one_scorer: httpx.Client):
    big = [[i] * 150 for i in range(100, 130)]
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(lambda: ask(one_scorer, big))
        wait_for(lambda: sum(each.queued_tokens for each in scorer_stats()) > QUEUE_LIMIT / 2)
        refused = ask(one_scorer, big)
        assert not first.done()
        assert refused.status_code == 503
        assert int(refused.headers["retry-after"]) >= 1
        assert f"{QUEUE_LIMIT:,}" in refused.json()["message"]
        assert first.result().status_code == 200
