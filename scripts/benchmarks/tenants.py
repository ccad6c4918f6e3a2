"""Measures what one API key notices of another that floods the service with 64 clients.

python -m scripts.benchmarks.tenants                    a fake engine of 2,000 tokens a second
python -m scripts.benchmarks.tenants --engine demo      the demo model

The service runs in a process of its own, over HTTP, without Ray: its front end, queue and engine are the real ones. A
small client sends requests one after the other with random pauses: alone, beside a flood of another key, and beside the
same flood under its own key.
"""

from __future__ import annotations

import asyncio
import random
import socket
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from enum import StrEnum
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from threading import Thread
from typing import Annotated

import httpx
import numpy as np
import typer
import uvicorn

from scripts.benchmarks.machine import machine, versions
from serve_app import model_source
from serve_app.contract import Engine, JobResult, ScoreJob
from serve_app.frontend.auth import ApiKeys
from serve_app.frontend.http_server import HttpProtocol
from serve_app.frontend.models import Models
from serve_app.frontend.routes import create_app
from serve_app.frontend.service import ModelService
from serve_app.scorer import speed
from serve_app.scorer.dispatcher import Dispatcher
from serve_app.scorer.engines import load_engine
from serve_app.scorer.fake_engine import FakeEngine
from serve_app.settings import ModelSettings
from serve_app.tasks.tokenizer import TextTokenizer

CLIENTS = 64
FLOOD_ITEMS, SMALL_ITEMS = 100, 4
FAKE_TOKENS_PER_S = 2_000
PAUSE_S = 0.2
"""The longest pause of the small client before a request; it is random, so that they come at any time of a batch."""
SETTLE_S = 5.0
"""Seconds of the flood before anything is measured."""
WORDS = ["the", "old", "new", "film", "book", "cat", "dog", "was", "went", "over", "with", "good", "bad", "very"]


class Kind(StrEnum):
    FAKE = "fake"
    DEMO = "demo"


class Replicas:
    """One engine in this process.

    Attributes:
        seconds: time of each device batch so far, except the last.
    """

    count = 1

    def __init__(self, engine: Engine, settings: ModelSettings) -> None:
        tokens_per_s = speed.measure(engine)
        self.seconds: list[float] = []
        self._before = 0.0
        self._queue = Dispatcher(
            engine,
            max_batch_tokens=settings.batch_tokens(engine.info.platform),
            max_queued_tokens=settings.queued_tokens(tokens_per_s, engine.info.platform),
            observe=self._observe,
            tokens_per_s=tokens_per_s,
        )

    async def score(self, job: ScoreJob) -> JobResult:
        answer: asyncio.Future[JobResult] = asyncio.get_running_loop().create_future()
        self._queue.submit(job, answer)
        return await answer

    def _observe(self, fill: float) -> None:  # noqa: ARG002
        busy = self._queue.stats().device_seconds
        self.seconds.append(busy - self._before)
        self._before = busy


def serve(kind: Kind, keys: str, listener: socket.socket, pipe: Connection) -> None:
    """Serve until the process ends; answers each message on ``pipe`` with the batches' seconds since the last one."""
    folder = model_source.resolve("demo")
    settings = ModelSettings(engine="fake" if kind is Kind.FAKE else "jax")
    engine = FakeEngine(seconds_per_token=1 / FAKE_TOKENS_PER_S) if kind is Kind.FAKE else load_engine(settings)

    async def run() -> None:
        replicas = Replicas(engine, settings)
        models = Models(ModelService(settings, TextTokenizer.load(folder), engine.info, replicas))
        app = create_app(lambda: models, keys=ApiKeys(keys))
        Thread(target=tell, args=(replicas,), daemon=True).start()
        config = uvicorn.Config(app, http=HttpProtocol, log_config=None, ws="none", lifespan="off")
        await uvicorn.Server(config).serve(sockets=[listener])

    def tell(replicas: Replicas) -> None:
        while True:
            pipe.recv()
            pipe.send(replicas.seconds)
            replicas.seconds = []

    asyncio.run(run())


def body(rng: random.Random, items: int) -> dict[str, object]:
    def text(words: int) -> str:
        return " ".join(rng.choice(WORDS) for _ in range(words))

    return {
        "query": text(30) + "\n",
        "items": [text(rng.randrange(4, 9)) for _ in range(items)],
        "labels": [" yes", " no"],
    }


async def ask(client: httpx.AsyncClient, key: str, rng: random.Random, items: int) -> float:
    """Seconds of one request."""
    started = time.perf_counter()
    answer = await client.post("/v1/score", json=body(rng, items), headers={"authorization": f"Bearer {key}"})
    if answer.status_code == httpx.codes.SERVICE_UNAVAILABLE:
        await asyncio.sleep(float(answer.headers["retry-after"]))
    else:
        answer.raise_for_status()
    return time.perf_counter() - started


@asynccontextmanager
async def flood(client: httpx.AsyncClient, key: str) -> AsyncIterator[None]:
    async def one(number: int) -> None:
        rng = random.Random(number)
        while True:
            await ask(client, key, rng, FLOOD_ITEMS)

    tasks = [asyncio.create_task(one(number)) for number in range(CLIENTS)]
    await asyncio.sleep(SETTLE_S)
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def small(client: httpx.AsyncClient, seconds: float) -> list[float]:
    rng = random.Random(-1)
    found: list[float] = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        await asyncio.sleep(rng.uniform(0, PAUSE_S))
        found.append(await ask(client, "small-key", rng, SMALL_ITEMS))
    return found


async def measure(url: str, seconds: float, pipe: Connection) -> None:
    def batches() -> list[float]:
        pipe.send(None)
        return pipe.recv()

    limits = httpx.Limits(max_connections=CLIENTS)
    async with (
        httpx.AsyncClient(base_url=url, timeout=600, limits=limits, trust_env=False) as many,
        httpx.AsyncClient(base_url=url, timeout=600, trust_env=False) as one,
    ):
        for _ in range(20):
            await ask(one, "small-key", random.Random(0), SMALL_ITEMS)
        alone = await small(one, seconds)
        print(shown("alone", alone))
        batches()
        async with flood(many, "flood-key"):
            beside = await small(one, seconds)
        longest = max(batches())
        print(shown(f"beside {CLIENTS} clients of another key", beside))
        async with flood(many, "small-key"):
            same = await small(one, seconds)
        print(shown(f"beside {CLIENTS} clients of the same key", same))
    bound = 1.3 * np.percentile(alone, 99) + longest
    p99 = np.percentile(beside, 99)
    print(f"longest device batch {longest:.3f} s; 1.3 x alone + one batch = {bound:.3f} s; p99 beside is {p99:.3f} s")


def shown(name: str, seconds: Sequence[float]) -> str:
    p50, p99 = np.percentile(seconds, [50, 99])
    return f"{name}: {len(seconds)} requests, p50 {p50:.3f} s, p99 {p99:.3f} s"


def main(
    engine: Annotated[Kind, typer.Option(help="What computes.")] = Kind.FAKE,
    seconds: Annotated[float, typer.Option(help="Length of each of the three parts.")] = 60.0,
) -> None:
    """Print the latencies of the small client, and the bound that they should keep."""
    print(machine(), versions())
    context = get_context("spawn")
    pipe, other = context.Pipe()
    with tempfile.TemporaryDirectory() as folder, socket.create_server(("127.0.0.1", 0)) as listener:
        keys = Path(folder) / "keys"
        keys.write_text("flood: flood-key\nsmall: small-key\n")
        server = context.Process(target=serve, args=(engine, str(keys), listener, other))
        server.start()
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        try:
            while True:
                with suppress(httpx.TransportError):
                    if httpx.get(f"{url}/ready", timeout=60, trust_env=False).status_code == httpx.codes.OK:
                        break
                time.sleep(0.2)
            asyncio.run(measure(url, seconds, pipe))
        finally:
            server.terminate()
            server.join()


if __name__ == "__main__":
    typer.run(main)
