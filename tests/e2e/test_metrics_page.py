"""The scorers' counters on ``/metrics``, from all replicas through Ray's agents, with the real engine."""

from __future__ import annotations

import asyncio
import random
import re
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from serve_app.app import build
from serve_app.metrics import scrape
from serve_app.settings import Limits, ModelSettings
from tests.local import service_of

pytestmark = [
    pytest.mark.ray,
    pytest.mark.timeout(600),  # two replicas compile everything at the same time, if nothing was compiled before
]

REPLICAS = 2


EARLIER: set[str] = set()
"""Replicas of earlier applications; Ray's agents keep their numbers for a while."""


@pytest.fixture(scope="module")
def client(deploy: Callable[[Any], httpx.Client], model_folder: Path) -> httpx.Client:
    EARLIER.update(re.findall(r'replica="(.*?)"', asyncio.run(scrape())))
    settings = ModelSettings(
        model=str(model_folder),
        scorer_replicas=REPLICAS,
        scorer_cpus=0.1,
        limits=Limits(max_prompt_tokens=256),  # fewer shapes to compile
    )
    return deploy(build(service_of(settings)))


def read(client: httpx.Client, name: str, **tags: str) -> dict[str, float]:
    """The samples of a metric with these tags, by replica; of a histogram, its count."""
    response = client.get("/metrics")
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/plain")
    found: dict[str, float] = {}
    for line in response.text.splitlines():
        if match := re.fullmatch(rf"ray_score_{name}{{(.*)}} (\S+)", line):
            own = dict(re.findall(r'(\w+)="(.*?)"', match[1]))
            if own.items() >= tags.items() and own["replica"] not in EARLIER:
                found[own["replica"]] = float(match[2])
    return found


def wait_for(condition: Callable[[], bool]) -> None:
    """Wait until ``condition`` holds: Ray collects now and then. The test's own time limit ends a vain wait."""
    while not condition():
        time.sleep(0.1)


def requests(rng: random.Random, vocab: int) -> list[dict[str, Any]]:
    """Send requests of all kinds and lengths, some with a query that comes again and fills a page."""
    long_query = [rng.randrange(vocab) for _ in range(150)]
    made: list[dict[str, Any]] = []
    for i in range(24):
        query = long_query if i % 3 == 0 else [rng.randrange(vocab) for _ in range(rng.randrange(1, 150))]
        items = [[rng.randrange(vocab) for _ in range(rng.randrange(1, 100))] for _ in range(rng.choice([1, 2, 5, 20]))]
        labels = rng.sample(range(vocab), rng.randrange(1, 6))
        made.append({"query": query, "items": items, "label_token_ids": labels, "apply_softmax": rng.random() < 0.5})
    return made


def test_all_replicas_count_their_work_and_none_compiles_after_the_start(client: httpx.Client) -> None:
    wait_for(lambda: len(read(client, "compilations_total")) == REPLICAS)
    compiled = read(client, "compilations_total")
    vocab = client.get("/v1/info").json()["vocab_size"]
    asked = requests(random.Random(0), vocab)
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda request: client.post("/v1/score", json=request), asked))
    assert {answer.status_code for answer in answers} == {200}
    prompts = sum(len(request["items"]) for request in asked)
    wait_for(lambda: sum(read(client, "sequences_total").values()) >= prompts)
    assert len(read(client, "sequences_total")) == REPLICAS
    assert sum(read(client, "sequences_total").values()) == prompts
    assert read(client, "compilations_total") == compiled

    usage = [answer.json()["usage"] for answer in answers]
    cached = sum(each["prompt_tokens_details"]["cached_tokens"] for each in usage)
    assert sum(read(client, "tokens_total", kind="cached").values()) == cached
    computed = sum(each["prompt_tokens"] for each in usage) - cached
    assert sum(read(client, "tokens_total", kind="computed").values()) >= computed
    assert sum(read(client, "tokens_total", kind="padded").values()) > 0
    assert sum(read(client, "prefix_tokens_total", result="hit").values()) >= 128
    assert sum(read(client, "prefix_tokens_total", result="missed").values()) >= 128
    used, pages = read(client, "prefix_pages_used"), read(client, "prefix_pages")
    assert all(0 < used[replica] <= pages[replica] for replica in compiled)
    assert all(read(client, "prefix_bytes_used").values())
    assert sum(read(client, "queue_seconds_count").values()) >= len(asked)
    assert sum(read(client, "device_seconds_count").values()) >= len(asked)
    assert set(read(client, "queued_tokens").values()) == {0}
    assert read(client, "refusals_total") == {}
    assert sum(read(client, "batch_fill_count").values()) == sum(read(client, "batches_total").values())
    wait_for(lambda: sum(read(client, "request_seconds_count").values()) >= len(asked))
    assert sum(read(client, "tokenise_seconds_count").values()) == len(asked)
    wait_for(lambda: sum(read(client, "items_total").values()) >= prompts)
    assert sum(read(client, "items_total").values()) == prompts
    model = client.get("/v1/info").json()["model"]
    assert read(client, "compilations_total", model=model) == compiled
    wait_for(lambda: sum(read(client, "requests_total", model=model, outcome="answered").values()) == len(asked))
    wait_for(lambda: f'vllm:num_requests_waiting{{model_name="{model}"}} 0.0' in client.get("/metrics").text)
    assert f'vllm:num_requests_running{{model_name="{model}"}} 0.0' in client.get("/metrics").text
    assert f'vllm:cache_config_info{{model_name="{model}",block_size="128",' in client.get("/metrics").text
