"""Parts of a process that stop while the process lives: its health check fails, and Serve replaces it."""

from __future__ import annotations

import asyncio
import gc
import os
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest

from serve_app import app
from serve_app.client import ScoreClient
from serve_app.settings import ModelSettings
from tests.faults.conftest import ITEMS, actors, application, inside, under_load, wait_for
from tests.processes import replica_processes

pytestmark = pytest.mark.ray

STALL_S = 1.0


@pytest.fixture(scope="module")
def client(deploy: Callable[[Any], httpx.Client], settings: ModelSettings) -> Iterator[httpx.Client]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(app, "HEALTH_PERIOD_S", 0.5)
        yield deploy(application(settings.model_copy(update={"scorer_replicas": 4, "stall_s": STALL_S})))


def process_of(actor: Any) -> int:
    return inside(actor, lambda _: os.getpid())


def the(kind: str) -> Any:
    """Return the only object of this class in the process."""
    gc.unfreeze()  # Serve freezes the objects that exist when a replica is ready
    (found,) = [each for each in gc.get_objects() if type(each).__name__ == kind]
    return found


def batching_dies(_: Any) -> None:
    """Leave the replica as a fault in Serve's batching does: calls wait for ever, without an error."""
    type(the("Scorer")).score.__globals__["INTAKE_LIMIT_S"] = 1.0
    for task in gc.get_objects():
        if isinstance(task, asyncio.Task) and "_process_batches" in repr(task):
            task.get_loop().call_soon_threadsafe(task.cancel)


def device_hangs(_: Any) -> None:
    the("Dispatcher")._on_device = lambda _parts: time.sleep(1_000)


def device_threads_are_gone(_: Any) -> None:
    the("Dispatcher")._threads.shutdown(wait=False)


def tokenizer_hangs(_: Any) -> None:
    service = the("ModelService")
    for _thread in range(service.settings.tokenizer_threads):
        service._threads._submit(lambda: time.sleep(1_000))


def test_scorers_with_a_stopped_batching_or_device_are_replaced_and_lose_no_request(client: httpx.Client):
    faults = [batching_dies, device_hangs, device_threads_are_gone]
    body = {"query": [1], "items": ITEMS, "label_token_ids": [1, 2]}
    with under_load(lambda: client.post("/v1/score", json=body).raise_for_status().json()["scores"]) as load:
        # One after the other: a job is tried three times at most, and several faults at once could hit all three.
        for broken, fault in zip(actors("Scorer"), faults, strict=False):
            load.wait_for_more(10)
            pid = process_of(broken)
            inside(broken, fault)
            wait_for(lambda pid=pid: pid not in {each.pid for each in replica_processes("Scorer")})
        wait_for(lambda: len(replica_processes("Scorer")) == 4)
        load.wait_for_more(20)
    assert load.failures == []


def test_a_front_end_with_a_hanging_tokenizer_is_replaced(client: httpx.Client):
    (front,) = actors("Ingress")
    pid = process_of(front)
    items: Any = ITEMS
    with ScoreClient(str(client.base_url), attempts=10) as retrying:
        with under_load(lambda: retrying.score([1], items, label_token_ids=[1, 2]).scores) as load:
            load.wait_for_more(10)
            inside(front, tokenizer_hangs)
            wait_for(lambda: pid not in {each.pid for each in replica_processes("Ingress")})
            load.wait_for_more(20)
        assert load.failures == []
