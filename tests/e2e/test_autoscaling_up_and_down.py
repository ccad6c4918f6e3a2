"""Autoscaling from none to three replicas and back by the waiting tokens, through a real Ray Serve."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from serve_app.local_ray import APP_NAME
from serve_app.settings import Autoscaling, ModelSettings
from tests.faults.conftest import application, wait_for
from tests.processes import scorer_stats

pytestmark = [pytest.mark.ray, pytest.mark.slow]

BOUNDS = Autoscaling(min_replicas=0, max_replicas=3, tokens_per_replica=1_000, upscale_delay_s=0.5, downscale_delay_s=5)
ITEMS = [[i, i + 1] for i in range(100, 400)]
ASK: dict[str, Any] = {"query": [1], "items": ITEMS, "label_token_ids": [1, 2]}


def states() -> dict[str, int]:
    """The number of replicas in each state."""
    from ray import serve

    found = serve.status().applications[APP_NAME].deployments["Scorer"].replica_states
    return {state: count for state, count in found.items() if count}


def running() -> int:
    now = states()
    print(f"{time.monotonic():.1f} s: {now}")  # shown by pytest -rP
    return now.get("RUNNING", 0)


def test_replicas_come_with_the_work_and_go_with_it(deploy: Callable[[Any], httpx.Client], settings: ModelSettings):

    settings = settings.model_copy(update={"autoscaling": BOUNDS, "max_batch_tokens": 128})
    client = deploy(application(settings))
    right = client.post("/v1/score", json=ASK).json()["scores"]
    wait_for(lambda: running() == 0)

    with ThreadPoolExecutor(16) as pool:
        answers = [pool.submit(client.post, "/v1/score", json=ASK) for _ in range(24)]  # 14,000 tokens
        wait_for(lambda: running() == 3)
        assert all(answer.result().json()["scores"] == right for answer in answers)

    # A request is split between the replicas that run now, not those of the settings.
    before = [stats.sequences for stats in scorer_stats()]
    assert client.post("/v1/score", json=ASK).json()["scores"] == right
    after = [stats.sequences for stats in scorer_stats()]
    assert sum(after) - sum(before) == len(ITEMS)
    assert sum(a > b for a, b in zip(after, before, strict=True)) >= 2

    wait_for(lambda: running() == 0)
