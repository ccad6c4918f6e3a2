"""Too much work, and callers that give up: refusals are quick, and the service recovers at once."""

from __future__ import annotations

import asyncio
import gc
import json
import random
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from serve_app.settings import Limits, ModelSettings
from tests.faults.conftest import ITEMS, actors, application, inside, wait_for
from tests.processes import replica_processes, scorer_stats

pytestmark = pytest.mark.ray

BODY = {"query": [1], "items": ITEMS, "label_token_ids": [1, 2]}
LIMIT = 600
"""Tokens for each of two replicas; a request has 121 in all, and takes 0.06 s on both."""


@pytest.fixture(scope="module")
def client(deploy: Callable[[Any], httpx.Client], settings: ModelSettings) -> httpx.Client:
    limits = Limits(max_queued_tokens=LIMIT)
    return deploy(application(settings.model_copy(update={"scorer_replicas": 2, "limits": limits})))


def left_over(_: Any) -> tuple[int, int]:
    """Count the tasks of all event loops in a replica's process, and its threads."""
    gc.collect()
    tasks = [each for each in gc.get_objects() if isinstance(each, asyncio.Task) and not each.done()]
    return len(tasks), threading.active_count()


def test_ten_times_too_much_is_answered_or_refused_at_once(client: httpx.Client):
    right = client.post("/v1/score", json=BODY).json()["scores"]

    def call(_: int) -> tuple[int, float]:
        started = time.monotonic()
        answer = client.post("/v1/score", json=BODY)
        if answer.status_code == 200:
            assert answer.json()["scores"] == right
        else:
            assert int(answer.headers["retry-after"]) >= 1
            assert "the limit is" in answer.json()["message"]  # the limit of the front end, or of a replica's queue
        return answer.status_code, time.monotonic() - started

    before = {each: each.memory_info().rss for each in replica_processes("Scorer") + replica_processes("Ingress")}
    with ThreadPoolExecutor(100) as pool:  # ten fit
        calls = list(pool.map(call, range(300)))
    assert Counter(status for status, _ in calls).keys() == {200, 503}
    # No time is asserted, since the machine may be busy: a refusal does not wait for requests that are being scored.
    assert sum(status == 200 for status, _ in calls) >= 10
    assert client.post("/v1/score", json=BODY).status_code == 200
    assert sum(each.pending_tokens for each in scorer_stats()) == 0
    grown = [process.memory_info().rss - before[process] for process in before]
    assert max(grown) < 64 * 2**20


def test_a_flood_of_callers_that_leave_does_no_harm(client: httpx.Client, cluster: str):
    right = client.post("/v1/score", json=BODY).json()["scores"]
    address = urlsplit(cluster)
    assert address.hostname
    assert address.port
    body = json.dumps(BODY).encode()
    head = (
        f"POST /v1/score HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    )
    request = head.encode() + body

    def leave(number: int) -> None:
        rng = random.Random(number)
        match number % 3:
            case 0:  # an impatient client
                with suppress(httpx.TimeoutException):
                    client.post("/v1/score", json=BODY, timeout=0.001)
            case 1:  # a socket that closes in the middle of the request or some time later
                with socket.create_connection((address.hostname, address.port)) as connection:
                    connection.sendall(request[: rng.randrange(1, len(request) + 1)])
                    time.sleep(rng.uniform(0, 0.02))
            case _:  # a deadline that cannot be met
                answer = client.post("/v1/score", json=BODY, headers={"x-request-timeout-seconds": "0.01"})
                assert answer.status_code in (408, 503, 504)

    with ThreadPoolExecutor(8) as pool:  # all threads have started
        assert {
            answer.status_code for answer in pool.map(lambda _: client.post("/v1/score", json=BODY), range(16))
        } == {200}
    replicas = [*actors("Scorer"), *actors("Ingress")]
    before = [inside(replica, left_over) for replica in replicas]
    with ThreadPoolExecutor(20) as pool:
        list(pool.map(leave, range(500)))
    wait_for(lambda: all(each.pending_tokens == each.queued_jobs == 0 for each in scorer_stats()))
    for _ in range(50):
        assert client.post("/v1/score", json=BODY).json()["scores"] == right
    for replica, (tasks, threads) in zip(replicas, before, strict=True):
        wait_for(lambda: inside(replica, left_over)[0] <= tasks)  # noqa: B023 - called at once
        assert inside(replica, left_over)[1] <= threads + 1
