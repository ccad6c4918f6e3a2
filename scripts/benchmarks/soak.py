"""Sends mixed requests to the whole service for minutes; counts errors, wrong answers, latencies and memory.

python -m scripts.benchmarks.soak                                   concurrency 1, 4, 8 and 64, two minutes each
python -m scripts.benchmarks.soak --concurrency 4 --minutes 15      a soak
python -m scripts.benchmarks.soak --concurrency 8 --overload 10     then ten times as much as it can do
"""

from __future__ import annotations

import asyncio
import json
import random
import re
import time
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Annotated

import httpx
import numpy as np
import psutil
import typer
from rich.console import Console
from rich.table import Table

from scripts.benchmarks.load import arrivals
from scripts.benchmarks.machine import machine, versions
from serve_app.local_ray import APP_NAME, free_port, set_environment, start_ray
from serve_app.settings import Limits, ModelSettings, ServiceSettings

SIZES, SHARES = (3, 30, 500), (0.4, 0.4, 0.2)
"""Items of a request, and the share of requests with that number."""
VARIANTS = 6
"""Different requests of each size; then they repeat."""
TOLERANCE = 1e-4
"""Tolerance of a probability, between a request alone and among others."""
SAMPLE_S = 5.0
PARTS = 15
WARM_UP_SHARE = 1 / 3
"""Share of a run at its start; the memory there does not count for the slope."""
OVERLOAD_S = 20.0
CALM_S = 2.0
"""Seconds after an overload until service must be normal."""
WORDS = ["the", "old", "new", "film", "book", "cat", "dog", "was", "went", "over", "with", "good", "bad", "very"]

_TITLE = re.compile(r"^ray::(?:ServeReplica:[^:]+:)?([\w-]+)|/(raylet|gcs_server)(?: |$)")


@dataclass(frozen=True)
class Ask:
    """A request, and what it scored alone."""

    items: int
    body: bytes
    right: list[list[float]] = field(default_factory=list)


@dataclass(frozen=True)
class Answered:
    """How a request ended: an HTTP status, ``wrong`` or an exception's name; ``refused`` for 503 and 429."""

    items: int
    outcome: str
    seconds: float


def requests(rng: random.Random) -> list[Ask]:
    """``VARIANTS`` of each size: a query of 40 words, and items of 2 to 6."""

    def text(words: int) -> str:
        return " ".join(rng.choice(WORDS) for _ in range(words))

    found: list[Ask] = []
    for size in SIZES:
        for _ in range(VARIANTS):
            body = {
                "query": text(40) + "\n",
                "items": [text(rng.randrange(2, 7)) for _ in range(size)],
                "label_token_ids": [5, 6, 7],
                "apply_softmax": True,
            }
            found.append(Ask(size, json.dumps(body).encode()))
    return found


def choose(asks: Sequence[Ask], rng: random.Random) -> Ask:
    (size,) = rng.choices(SIZES, SHARES)
    return rng.choice([ask for ask in asks if ask.items == size])


async def send(client: httpx.AsyncClient, ask: Ask) -> Answered:
    started = time.perf_counter()
    try:
        answer = await client.post("/v1/score", content=ask.body)
        outcome = str(answer.status_code)
        if outcome == "200" and ask.right and not np.allclose(answer.json()["scores"], ask.right, atol=TOLERANCE):
            outcome = "wrong"
    except httpx.HTTPError as error:
        outcome = type(error).__name__
    return Answered(ask.items, outcome, time.perf_counter() - started)


async def alone(client: httpx.AsyncClient, asks: Sequence[Ask]) -> list[Ask]:
    """The same requests, with what each scores while nothing else runs."""
    found: list[Ask] = []
    for ask in asks:
        answer = await client.post("/v1/score", content=ask.body)
        found.append(Ask(ask.items, ask.body, answer.raise_for_status().json()["scores"]))
    return found


def processes() -> dict[str, psutil.Process]:
    """The processes of the service and of Ray that this process started, by name and id."""
    found: dict[str, psutil.Process] = {}
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            if named := _TITLE.search(" ".join(process.cmdline())):
                found[f"{named[1] or named[2]} {process.pid}"] = process
    return found


@asynccontextmanager
async def watching_memory() -> AsyncIterator[dict[str, list[tuple[float, float]]]]:
    """Samples of each process's resident memory: seconds since the start, MiB."""
    samples: dict[str, list[tuple[float, float]]] = defaultdict(list)
    started = time.monotonic()

    async def watch() -> None:
        while True:
            for name, process in processes().items():
                with suppress(psutil.Error):
                    samples[name].append((time.monotonic() - started, process.memory_info().rss / 2**20))
            await asyncio.sleep(SAMPLE_S)

    task = asyncio.create_task(watch())
    try:
        yield samples
    finally:
        task.cancel()


async def closed_loop(url: str, asks: Sequence[Ask], callers: int, seconds: float) -> list[Answered]:
    """Run callers in a closed loop: each sends its next request when the last is answered."""
    end = time.monotonic() + seconds
    answered: list[Answered] = []

    async def caller(number: int) -> None:
        rng = random.Random(number)
        while time.monotonic() < end:
            answered.append(await send(client, choose(asks, rng)))

    async with _client(url) as client:
        await asyncio.gather(*map(caller, range(callers)))
    return answered


async def overload(url: str, asks: Sequence[Ask], rate: float) -> tuple[list[Answered], list[Answered]]:
    """Send requests at ``rate`` a second, answered or not; after a pause, the small ones in turn."""
    rng = random.Random(0)
    times = arrivals(rate, OVERLOAD_S, np.random.default_rng(0)).tolist()
    began = time.monotonic()

    async def one(at: float) -> Answered:
        await asyncio.sleep(began + at - time.monotonic())
        return await send(client, choose(asks, rng))

    async with _client(url) as client:
        during = await asyncio.gather(*map(one, times))
        await asyncio.sleep(CALM_S)
        return during, [await send(client, ask) for ask in asks[: 2 * VARIANTS]]


def growth(samples: Sequence[tuple[float, float]]) -> float:
    """Growth of the memory from the end of the warm-up to the end of the run, in percent, by a linear fit."""
    at, used = np.array(samples).T
    warm = at >= at[-1] * WARM_UP_SHARE
    slope, start = np.polyfit(at[warm], used[warm], 1)
    return 100 * slope * (at[-1] - at[warm][0]) / (start + slope * at[warm][0])


def show(answered: Sequence[Answered], title: str, console: Console) -> None:
    table = Table("items", "requests", "outcomes", "p50 s", "p99 s", "longest s", title=title)
    for size in (*SIZES, None):
        some = [each for each in answered if size in (None, each.items)]
        good = [each.seconds for each in some if each.outcome == "200"] or [0.0]
        outcomes = ", ".join(f"{number} {what}" for what, number in Counter(each.outcome for each in some).items())
        p50, p99 = np.percentile(good, (50, 99))
        table.add_row(str(size or "all"), str(len(some)), outcomes, f"{p50:.2f}", f"{p99:.2f}", f"{max(good):.2f}")
    console.print(table)


def show_memory(samples: dict[str, list[tuple[float, float]]], console: Console) -> None:
    table = Table("process", "growth when warm", f"MiB in each of {PARTS} parts of the run", title="resident memory")
    for name, each in sorted(samples.items()):
        if len(each) > 6:
            parts = np.array_split([used for _, used in each], PARTS)
            means = " ".join(f"{part.mean():.0f}" for part in parts if len(part))
            table.add_row(name, f"{growth(each):+.2f}%", means)
    console.print(table)


def _client(url: str) -> httpx.AsyncClient:
    limits = httpx.Limits(max_connections=None)
    headers = {"content-type": "application/json"}
    return httpx.AsyncClient(base_url=url, headers=headers, timeout=600, limits=limits, trust_env=False)


async def _run(url: str, callers: Sequence[int], minutes: float, console: Console) -> tuple[list[Ask], float]:
    """Run all closed loops in turn; returns the requests with their right answers, and the last loop's rate."""
    rate = 0.0
    async with _client(url) as client:
        asks = await alone(client, requests(random.Random(0)))
    for number in callers:
        async with watching_memory() as samples:
            began = time.monotonic()
            answered = await closed_loop(url, asks, number, minutes * 60)
            rate = len(answered) / (time.monotonic() - began)
        show(answered, f"{number} callers, {rate:.2f} requests/s", console)
        show_memory(samples, console)
    return asks, rate


async def _overload(url: str, asks: Sequence[Ask], rate: float, console: Console) -> None:
    before = {name: process.memory_info().rss / 2**20 for name, process in processes().items()}
    async with watching_memory() as samples:
        during, after = await overload(url, asks, rate)
    show(during, f"{rate:.1f} requests/s", console)
    refused = [each.seconds for each in during if each.outcome in ("503", "429")] or [0.0]
    console.print(
        f"{len(refused)} refusals: p50 {np.median(refused):.3f} s, longest {max(refused):.3f} s after arrival"
    )
    for name, each in sorted(samples.items()):
        console.print(f"{name}: {before.get(name, 0):.0f} MiB before, {max(used for _, used in each):.0f} at most")
    show(after, f"from {CALM_S:g} s after it, one by one", console)


def main(
    concurrency: Annotated[str, typer.Option(help="Callers; comma-separated numbers run in turn.")] = "1,4,8,64",
    minutes: Annotated[float, typer.Option(min=0.01, help="Minutes for each number of callers.")] = 2.0,
    model: Annotated[str, typer.Option(help="Model to serve, as in the service's settings.")] = "demo",
    replicas: Annotated[int, typer.Option(min=1)] = 1,
    times: Annotated[
        float,
        typer.Option(
            "--overload", help="Overload afterwards, as a multiple of the last closed loop's rate; 0 for none."
        ),
    ] = 0.0,
    max_queued_tokens: Annotated[int, typer.Option(help="Queue limit of each replica in the overload.")] = 20_000,
) -> None:
    """Send requests of all sizes to the service on this machine, and print the results."""
    set_environment()
    import ray
    from ray import serve

    from serve_app.app import build

    console = Console(highlight=False, soft_wrap=True)
    console.print(f"{machine()}, {versions()}")
    settings = ModelSettings(model=model, scorer_replicas=replicas, scorer_cpus=0.5)
    port = free_port()
    start_ray(8)
    try:
        quiet = {"log_level": "WARNING", "enable_access_log": False}
        serve.start(http_options={"host": "127.0.0.1", "port": port}, logging_config=quiet)
        serve.run(build(ServiceSettings(models=(settings,))), name=APP_NAME)
        url = f"http://127.0.0.1:{port}"
        asks, rate = asyncio.run(_run(url, [int(each) for each in concurrency.split(",")], minutes, console))
        if times:
            limits = Limits(max_queued_tokens=max_queued_tokens)
            limited = settings.model_copy(update={"limits": limits})
            serve.run(build(ServiceSettings(models=(limited,))), name=APP_NAME)
            asyncio.run(_overload(url, asks, times * rate, console))
    finally:
        ray.shutdown()


if __name__ == "__main__":
    typer.run(main)
