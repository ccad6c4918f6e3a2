"""Callers of small and large requests at once: all get right answers."""

from __future__ import annotations

import asyncio
import json
import random
from collections import Counter
from collections.abc import Callable
from typing import Any

import httpx
import numpy as np
import pytest

from scripts.benchmarks.soak import Ask, alone, closed_loop, requests
from serve_app.app import build
from serve_app.scorer.fake_engine import FakeEngine
from serve_app.settings import ModelSettings
from tests.batches import label_batch
from tests.local import service_of

pytestmark = pytest.mark.ray

SECONDS = 2.0


@pytest.fixture(scope="module")
def client(deploy: Callable[[Any], httpx.Client], settings: ModelSettings) -> httpx.Client:
    return deploy(build(service_of(settings.model_copy(update={"scorer_replicas": 2}))))


@pytest.fixture(scope="module")
def asks(client: httpx.Client) -> list[Ask]:
    """Requests, each with the scores that the engine itself gives its prompts."""

    async def each_alone() -> list[Ask]:
        async with httpx.AsyncClient(base_url=client.base_url, timeout=60) as asking:
            return await alone(asking, requests(random.Random(0)))

    found = asyncio.run(each_alone())
    for ask in found[::5]:
        body = json.loads(ask.body)
        prompts = client.post("/v1/score", json={**body, "return_prompt_token_ids": True}).json()["prompt_token_ids"]
        labels = body["label_token_ids"]
        values = FakeEngine().score(label_batch(prompts, [labels] * len(prompts))).values.reshape(-1, len(labels))
        chances = np.exp(values.astype(np.float64))
        np.testing.assert_allclose(ask.right, chances / chances.sum(axis=1, keepdims=True), rtol=1e-5)
    return found


@pytest.mark.parametrize("callers", [1, 4, 8, 64])
async def test_no_request_fails_beside_others_of_all_sizes(client: httpx.Client, asks: list[Ask], callers: int):
    answered = await closed_loop(str(client.base_url), asks, callers, SECONDS)
    assert Counter(each.outcome for each in answered).keys() == {"200"}
