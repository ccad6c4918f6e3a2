"""scripts/bench bars and soak: growth of cost, memory that requests leave in use, and the time of a second start."""

from __future__ import annotations

import os
import statistics
import time
from typing import Annotated

import numpy as np
import typer
from rich import box
from rich.table import Table

from scripts.benchmarks.report import output
from scripts.benchmarks.server import peak_mib, reset_peak, resident_mib, service
from scripts.benchmarks.systems import load_engine, token_batch
from scripts.benchmarks.work import LABELS, Request, Sizes, cut_request, load
from serve_app import model_source
from serve_app.batches import join

Dtype = Annotated[str, typer.Option(help="float32 or bfloat16.")]


def bars(dtype: Dtype = "float32") -> None:
    """Print the limits that the comparison does not show, and whether they hold; ``soak`` has the last one."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    for heading in ("", "measured", "at most", ""):
        table.add_column(heading, justify="left" if not heading else "right")

    def add(what: str, measured: float, limit: float) -> None:
        table.add_row(what, f"{measured:.4g}", f"{limit:.4g}", "holds" if measured <= limit else "MISSED")

    with service(dtype):
        pass  # fills the compilation cache
    with service(dtype) as server:
        add("second start of the service, s", server.start_seconds, 20)

    engine = load_engine(dtype)

    def score(request: Request) -> tuple[float, int]:
        """Seconds, and tokens computed beyond the items' own."""
        batch = join([token_batch(request)])
        started = time.perf_counter()
        computed = int(engine.score(batch).computed_tokens.sum())
        return time.perf_counter() - started, computed - sum(map(len, request.items_ids))

    ratios: list[float] = []
    again: list[int] = []
    for seed in range(3):
        whole = cut_request(np.random.default_rng([1000, seed]), 256, [16] * 1110)
        items = whole.items_ids
        score(Request(whole.query_ids, items[:10], "", [], LABELS))
        hundred, more = score(Request(whole.query_ids, items[10:110], "", [], LABELS))
        again.append(more)
        ratios.append(score(Request(whole.query_ids, items[110:], "", [], LABELS))[0] / hundred)
    add("1,000 items against 100, query known, times", statistics.median(ratios), 10.5)
    add("query tokens computed again by a second request", max(again), 0)

    weights = sum(file.stat().st_size for file in model_source.resolve("demo").glob("*.safetensors")) / 2**20
    reset_peak(os.getpid())
    score(load("W3", most=1)[0].requests[0])
    add("peak memory on W3, MiB", peak_mib(os.getpid()), 1.5 * weights / (1 + (dtype == "bfloat16")) + 1024)
    output.print(table)


def soak(
    requests: Annotated[int, typer.Option(min=20, help="Number of requests.")] = 2000, dtype: Dtype = "float32"
) -> None:
    """Score requests of random shapes in process and print the resident memory as they pass."""
    engine, rng, vocab = load_engine(dtype), np.random.default_rng(0), Sizes.of_demo().vocab
    resident: list[int] = []
    for number in range(1, requests + 1):
        engine.score(token_batch(_random_request(rng, vocab)))
        resident.append(resident_mib(os.getpid()))
        if number % (requests // 20) == 0:
            output.print(f"{number:6,} requests: {resident[-1]:,} MiB")
    quarter = requests // 4
    early, late = max(resident[quarter : 2 * quarter]), max(resident[3 * quarter :])
    output.print(f"most in the second quarter {early:,} MiB, in the last {late:,} MiB: {late / early - 1:+.1%}")


def _random_request(rng: np.random.Generator, vocab: int) -> Request:
    """Up to 1,000 tokens of query and 10 items of up to 100 tokens, small ones more often; random ids."""

    def upto(most: int) -> int:
        return int(np.exp(rng.uniform(0, np.log(most + 1))))

    def ids(count: int) -> list[int]:
        return rng.integers(0, vocab, count).tolist()

    return Request(ids(upto(1000)), [ids(upto(100)) for _ in range(upto(10))], "", [], LABELS)
