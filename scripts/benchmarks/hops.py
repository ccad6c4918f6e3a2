"""Measures what the way to the device costs a request for one item: the service with the fake engine, whose own time is
nearly nothing, beside a uvicorn server that only echoes.

python -m scripts.benchmarks.hops
python -m scripts.benchmarks.hops --before ../older-checkout
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import re
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from http.client import HTTPConnection
from pathlib import Path
from typing import Annotated
from urllib.parse import urlsplit

import psutil
import typer
from rich import box
from rich.table import Table

from scripts.benchmarks.machine import machine, versions
from scripts.benchmarks.report import output
from scripts.benchmarks.server import Server, body, echo, fake_service
from scripts.benchmarks.work import load
from serve_app.timing import DEVICE, QUEUE, TOKENISE

_TITLE = re.compile(r"^ray::(?:ServeReplica:[^:]+:)?(\w+)|/?(haproxy|raylet|gcs_server)(?: |$)")


@dataclass(frozen=True)
class Round:
    """One measurement of one server.

    Attributes:
        ms: medians of sequential requests in ms, by hop.
        per_s: requests a second of many clients.
        cpu_ms: processor ms for each of these requests, by process.
    """

    ms: dict[str, float]
    per_s: float
    cpu_ms: dict[str, float]


def measure(
    option: Annotated[list[str] | None, typer.Option(help="Word of `score-serve serve`. Repeatable.")] = None,
    before: Annotated[
        Path | None,
        typer.Option(help="Another checkout of this project: its service is measured in the same rounds."),
    ] = None,
    requests: Annotated[int, typer.Option(min=10, help="Sequential requests of each round.")] = 300,
    clients: Annotated[int, typer.Option(min=1, help="Clients that ask without a pause.")] = 16,
    seconds: Annotated[float, typer.Option(min=1, help="Time for which they ask.")] = 5,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds, each of all servers, one after the other.")] = 5,
) -> None:
    """Print the time of each hop of a W4 request, requests a second, and the processor time of each process."""
    path, content = body(load("W4", most=1)[0].requests[0])
    sent = json.dumps(content).encode()
    taken: dict[str, list[Round]] = defaultdict(list)
    checkouts = {"before": before, "service": Path()} if before else {"service": Path()}
    with contextlib.ExitStack() as stack:
        servers = {
            name: stack.enter_context(fake_service(checkout.absolute(), *(option or [])))
            for name, checkout in checkouts.items()
        }
        servers["echo"] = stack.enter_context(echo())
        for _, (name, server) in itertools.product(range(rounds), servers.items()):
            taken[name].append(_round(server, path, sent, requests, clients, seconds))
    show(taken)


def _round(server: Server, path: str, sent: bytes, requests: int, clients: int, seconds: float) -> Round:
    address = urlsplit(server.url)
    assert address.hostname is not None
    assert address.port is not None
    connection = HTTPConnection(address.hostname, address.port)
    hops: dict[str, list[float]] = defaultdict(list)
    for number in range(requests + requests // 10):
        started = time.perf_counter()
        connection.request("POST", path, sent, {"content-type": "application/json"})
        answer = connection.getresponse()
        answer.read()
        whole = 1e3 * (time.perf_counter() - started)
        if answer.status != 200:
            raise RuntimeError(f"{server.url}{path} answered {answer.status}")
        if number >= requests // 10:  # the first ones warm up
            for hop, ms in split(whole, answer.getheader("server-timing", "")).items():
                hops[hop].append(ms)
    connection.close()
    before = _processor_s(server)
    head = f"POST {path} HTTP/1.1\r\nhost: {address.hostname}\r\ncontent-type: application/json\r\n"
    message = head.encode() + b"content-length: %d\r\n\r\n" % len(sent) + sent
    begun = time.perf_counter()
    answered = asyncio.run(_flood(address.hostname, address.port, message, clients, seconds))
    took = time.perf_counter() - begun
    spent = {name: 1e3 * (after - before.get(name, 0.0)) / answered for name, after in _processor_s(server).items()}
    return Round({hop: statistics.median(ms) for hop, ms in hops.items()}, answered / took, spent)


def split(whole: float, server_timing: str) -> dict[str, float]:
    """The ms of a request's hops: those in its Server-Timing header, and what is left between them."""
    stages = {name: float(ms) for name, ms in re.findall(r"(\w+);dur=([\d.]+)", server_timing)}
    if not stages:
        return {"whole": whole}
    known = sum(stages[stage] for stage in (TOKENISE, QUEUE, DEVICE))
    return {
        "whole": whole,
        "over the engine's time": whole - stages[DEVICE],
        "client, proxy, Serve": whole - stages["total"],
        "tokenise": stages[TOKENISE],
        "front end, to the scorer and back": stages["total"] - known,
        "queue": stages[QUEUE],
        "engine": stages[DEVICE],
    }


async def _flood(host: str, port: int, message: bytes, clients: int, seconds: float) -> int:
    """The number of answers that so many clients get, each asking again as soon as it is answered."""
    answered = 0
    end = time.perf_counter() + seconds

    async def ask_on() -> None:
        nonlocal answered
        reader, writer = await asyncio.open_connection(host, port)
        while time.perf_counter() < end:
            writer.write(message)
            head = await reader.readuntil(b"\r\n\r\n")
            if not head.startswith(b"HTTP/1.1 200"):
                raise RuntimeError(head.decode())
            length = re.search(rb"content-length: *(\d+)", head, re.IGNORECASE)
            assert length is not None
            await reader.readexactly(int(length[1]))
            answered += 1
        writer.close()

    await asyncio.gather(*(ask_on() for _ in range(clients)))
    return answered


def _processor_s(server: Server) -> dict[str, float]:
    """Processor seconds so far of the server's processes, by name."""
    spent: dict[str, float] = defaultdict(float)
    for pid in server.processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process = psutil.Process(pid)
            times = process.cpu_times()
            title = _TITLE.search(" ".join(process.cmdline()))
            spent[(title and (title[1] or title[2])) or "others"] += times.user + times.system
    return spent


def show(taken: dict[str, Sequence[Round]]) -> None:
    """Print medians over the rounds, with their range."""
    found = versions()
    output.print(f"{machine()}; Python {sys.version.split()[0]}, ray {found['ray']}; medians over rounds (range)")
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    for heading in ("", *taken):
        table.add_column(heading)
    rows: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for name, rounds in taken.items():
        for each in rounds:
            for hop, ms in each.ms.items():
                rows[f"{hop}, ms"][name].append(ms)
            rows["requests/s"][name].append(each.per_s)
            for process, ms in each.cpu_ms.items():
                if ms >= 0.01:
                    rows[f"processor ms a request: {process}"][name].append(ms)
    for heading, values in rows.items():
        table.add_row(heading, *(_median(values[name]) if name in values else "" for name in taken))
    output.print(table)


def _median(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


if __name__ == "__main__":
    typer.run(measure)
