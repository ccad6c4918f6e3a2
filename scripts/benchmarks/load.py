"""scripts/bench load: open-loop load, in which requests arrive whether or not earlier ones have been answered."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import httpx
import numpy as np
import numpy.typing as npt
import typer
from rich import box
from rich.table import Table

from scripts.benchmarks.machine import machine, versions
from scripts.benchmarks.report import output
from scripts.benchmarks.server import body, service
from scripts.benchmarks.work import NAMES, load

PERCENTILES = (50, 90, 95, 99)
VARIANTS = 40
"""Most variants of each workload; then its requests repeat."""


Body = tuple[str, bytes]
"""The route of a request, and its JSON."""


@dataclass(frozen=True)
class Sent:
    """One request: what it was, how it ended (an HTTP status or an exception's name), and when, in seconds.

    ``latency`` counts from the scheduled arrival, so a client that is late in sending hides nothing.
    """

    workload: str
    outcome: str
    latency: float
    finished: float


def arrivals(rate: float, seconds: float, rng: np.random.Generator) -> npt.NDArray[np.float64]:
    """Times of a Poisson process of ``rate`` a second over ``seconds``, ascending."""
    return np.sort(rng.uniform(0, seconds, rng.poisson(rate * seconds)))


def parse_mix(text: str) -> dict[str, float]:
    """``"W4=9,W1=1"``: each workload's share of the requests; they sum to 1."""
    weights: dict[str, float] = {}
    for part in text.split(","):
        name, _, weight = part.partition("=")
        try:
            weights[name] = float(weight or 1)
        except ValueError:
            raise typer.BadParameter(f"{part}: write WORKLOAD=WEIGHT, as in W4=9,W1=1") from None
        if name not in NAMES or not 0 < weights[name] < float("inf"):
            raise typer.BadParameter(f"{part}: not one of {', '.join(NAMES)} with a weight above 0")
    return {name: weight / sum(weights.values()) for name, weight in weights.items()}


def summary(sent: Sequence[Sent], seconds: float) -> dict[str, Any]:
    """Counts, rate and latency of the answered requests; ``seconds`` is how long requests were arriving.

    A percentile is the latency of one of the requests: the least that at least so many percent did not exceed.
    """
    answered = [one.latency * 1e3 for one in sent if one.outcome == "200"]
    latency = None
    if answered:
        found = np.percentile(answered, PERCENTILES, method="inverted_cdf").tolist()
        latency = {f"p{p}": value for p, value in zip(PERCENTILES, found, strict=True)} | {"max": max(answered)}
    return {
        "sent": len(sent),
        "answered": len(answered),
        "answered_per_s": len(answered) / max(seconds, *(one.finished for one in sent), 0.0),
        "latency_ms": latency,
        "errors": dict(Counter(one.outcome for one in sent if one.outcome != "200")),
    }


async def offer(client: httpx.AsyncClient, schedule: Sequence[tuple[float, str, Body]]) -> list[Sent]:
    """Send each (time, workload, body) at its time, and wait for all answers."""
    loop = asyncio.get_running_loop()
    began = loop.time()

    async def one(at: float, workload: str, sent: Body) -> Sent:
        await asyncio.sleep(began + at - loop.time())
        try:
            outcome = str((await _post(client, sent)).status_code)
        except httpx.HTTPError as error:
            outcome = type(error).__name__
        finished = loop.time() - began
        return Sent(workload, outcome, finished - at, finished)

    return await asyncio.gather(*(one(*request) for request in schedule))


def load_test(
    rate: Annotated[str, typer.Option(help="Requests per second; comma-separated rates run in turn.")] = "1,2,4",
    seconds: Annotated[float, typer.Option(min=1, help="Duration of each rate.")] = 30,
    mix: Annotated[str, typer.Option(help="Workloads and their weights.")] = "W4=9,W1=1",
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
    beside: Annotated[
        str | None, typer.Option(help="Workload that one more client sends without a pause, not counted.")
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the results here.")] = None,
) -> None:
    """Offer this service Poisson arrivals over HTTP and print latency percentiles.

    The load is open: a request arrives at its time however many are unanswered, and its latency counts from then. The
    client runs on the same machine and takes some of its time. Percentiles are of the answered requests.
    """
    shares = parse_mix(mix)
    bodies = {name: _bodies(name) for name in shares}
    if beside is not None and beside not in NAMES:
        raise typer.BadParameter(f"{beside}: not one of {', '.join(NAMES)}", param_hint="--beside")
    ceaseless = _bodies(beside) if beside else []
    results: list[dict[str, Any]] = []
    with service(dtype) as server:
        for each in map(float, rate.split(",")):
            rng = np.random.default_rng(0)
            times = arrivals(each, seconds, rng).tolist()
            names = rng.choice(list(shares), len(times), p=list(shares.values())).tolist()
            turn = Counter[str]()
            schedule: list[tuple[float, str, Body]] = []
            for at, name in zip(times, names, strict=True):
                schedule.append((at, name, bodies[name][turn[name] % len(bodies[name])]))
                turn[name] += 1
            sent = asyncio.run(_run(server.url, schedule, ceaseless))
            results.append({"rate": each, "workload": "all", **summary(sent, seconds)})
            if len(shares) > 1:
                for name in shares:
                    part = [one for one in sent if one.workload == name]
                    results.append({"rate": each, "workload": name, **summary(part, seconds)})
    report = {"machine": machine(), "versions": versions(), "dtype": dtype, "mix": shares, "seconds": seconds}
    report["beside"] = beside
    show(report | {"results": results})
    if json_file is not None:
        json_file.write_text(json.dumps(report | {"results": results}, indent=1) + "\n")


def _bodies(workload: str) -> list[Body]:
    requests = [request for variant in load(workload, most=VARIANTS) for request in variant.requests]
    return [(path, json.dumps(content).encode()) for path, content in map(body, requests)]


async def _run(url: str, schedule: Sequence[tuple[float, str, Body]], ceaseless: Sequence[Body]) -> list[Sent]:
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=limits) as client:
        other = asyncio.create_task(_ceaselessly(client, ceaseless))
        try:
            return await offer(client, schedule)
        finally:
            other.cancel()
            await asyncio.wait([other])


async def _ceaselessly(client: httpx.AsyncClient, bodies: Sequence[Body]) -> None:
    """Send the requests in turn, each as soon as the last is answered."""
    for each in itertools.cycle(bodies):
        await _post(client, each)


async def _post(client: httpx.AsyncClient, sent: Body) -> httpx.Response:
    path, content = sent
    return await client.post(path, content=content, headers={"Content-Type": "application/json"})


def show(report: dict[str, Any]) -> None:
    """The results as a table."""
    beside = f", beside {report['beside']} without a pause" if report["beside"] else ""
    output.print(f"{report['machine']}; {report['dtype']}, {report['seconds']:g} s a rate{beside}")
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    table.add_column("rate/s", justify="right")
    table.add_column("requests")
    for heading in ("sent", "answered", "a second", *(f"p{p} ms" for p in PERCENTILES), "max ms"):
        table.add_column(heading, justify="right")
    table.add_column("errors")
    for result in report["results"]:
        table.add_row(
            f"{result['rate']:g}" if result["workload"] == "all" else "",
            result["workload"],
            str(result["sent"]),
            str(result["answered"]),
            f"{result['answered_per_s']:.2f}",
            *([f"{ms:.0f}" for ms in result["latency_ms"].values()] if result["latency_ms"] else [""] * 5),
            ", ".join(f"{count} x {outcome}" for outcome, count in result["errors"].items()),
        )
    output.print(table)
    output.print("latency from the scheduled arrival, of the answered requests")
