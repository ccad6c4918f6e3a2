"""A teacher's logprobs: seconds and memory of every position's, beside the least arithmetic, and beside vLLM's.

python -m scripts.benchmarks.teacher            the engine in this process, beside the floor
python -m scripts.benchmarks.teacher --http     the service and vLLM over HTTP, in turn

The floor is the matmuls of all tokens through all layers and of all positions through the head, at the matmul rate that
is measured before and after each run. All prompts are random and new.
"""

from __future__ import annotations

import io
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Annotated

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import httpx
import numpy as np
import typer

from model import loading
from model.engine import Engine
from scripts.benchmarks.machine import gemm_gflops, machine, versions
from scripts.benchmarks.server import VLLM, Server, only_awake, peak_mib, reset_peak, service, vllm
from scripts.benchmarks.work import Sizes
from serve_app import model_source
from serve_app.tasks.positions import Positions

REPEATS = 7


@dataclass(frozen=True)
class Shape:
    """Sequences of one length, all positions of which are asked for, with so many most probable tokens."""

    sequences: int
    tokens: int
    top: int

    def __str__(self) -> str:
        return f"{self.sequences} x {self.tokens:,} tokens, top {self.top}"


@dataclass(frozen=True)
class Asked:
    """Prompts in token ids, and how many most probable tokens are asked for at each position."""

    prompts: list[list[int]]
    top: int


SHAPES = [Shape(8, 512, 0), Shape(8, 512, 64), Shape(8, 512, 256), Shape(1, 4096, 0), Shape(1, 4096, 256)]


def floor_flops(shape: Shape, sizes: Sizes) -> float:
    """Floating-point operations of the matmuls; attention is exactly causal."""
    attention, key_value = sizes.heads * sizes.head_width, sizes.kv_heads * sizes.head_width
    token = 2 * sizes.width * (2 * attention + 2 * key_value + 3 * sizes.ff_width) * sizes.layers
    pairs = shape.tokens * (shape.tokens + 1) / 2
    sequence = shape.tokens * (token + 2 * sizes.width * sizes.vocab) + 4 * attention * pairs * sizes.layers
    return shape.sequences * sequence


def seconds(engine: Engine, shape: Shape, vocab: int, seed: int) -> float:
    rng = np.random.default_rng(seed)
    sequences = [rng.integers(0, vocab, shape.tokens).astype(np.int32) for _ in range(shape.sequences)]
    batch = Positions(sequences, [1] * shape.sequences, top=shape.top).batch()
    started = time.perf_counter()
    engine.score(batch)
    return time.perf_counter() - started


def held(server: Server) -> int:
    """The most memory that a server's processes had resident, added up, in MiB."""
    return sum(map(peak_mib, server.processes))


def over_http() -> None:
    """Ask the service by its two routes and vLLM for the same, and print the seconds and the ratios."""
    folder, sizes, rng = model_source.resolve("demo"), Sizes.of_demo(), np.random.default_rng(0)
    print(f"{machine()}; {versions()}; vLLM {VLLM}", flush=True)

    def completions(client: httpx.Client, asked: Asked) -> None:
        body = {"prompt": asked.prompts, "max_tokens": 1, "temperature": 1, "prompt_logprobs": asked.top}
        choices = client.post("/v1/completions", json=body).raise_for_status().json()["choices"]
        assert [len(each["prompt_logprobs"]) for each in choices] == [len(each) for each in asked.prompts]

    def arrays(client: httpx.Client, asked: Asked) -> None:
        body = {"input": asked.prompts, "start": 1, "top": asked.top, "format": "npz"}
        found = np.load(io.BytesIO(client.post("/v1/logprobs", json=body).raise_for_status().content))
        assert found["top_logprobs"].shape == (sum(len(each) - 1 for each in asked.prompts), asked.top)

    with service("float32") as ours, vllm(folder, "float32", "--max-logprobs", "256") as theirs:
        clients = [httpx.Client(base_url=each.url, timeout=3600) for each in (ours, theirs)]
        with only_awake(partial(completions, clients[1]), theirs.processes) as theirs_awake:
            ways: dict[str, Callable[[Asked], None]] = {
                "service, /v1/logprobs as arrays": partial(arrays, clients[0]),
                "service, /v1/completions": partial(completions, clients[0]),
                "vLLM, /v1/completions": theirs_awake,
            }
            for shape in (each for each in SHAPES if each.top):
                took = {way: list[float]() for way in ways}
                for process in (*ours.processes, *theirs.processes):
                    reset_peak(process)
                before = [held(each) for each in (ours, theirs)]
                for _ in range(REPEATS + 1):  # the first compiles, and is left out
                    for way, run in ways.items():
                        ids = rng.integers(0, sizes.vocab, (shape.sequences, shape.tokens)).tolist()
                        started = time.perf_counter()
                        run(Asked(ids, shape.top))
                        took[way].append(time.perf_counter() - started)
                least = statistics.median(took["service, /v1/logprobs as arrays"][1:])
                for way, own in took.items():
                    median = statistics.median(own[1:])
                    print(f"{shape}: {way}: {median:.2f} s, {median / least:.2f} x", flush=True)
                for name, server, first in zip(("service", "vLLM"), (ours, theirs), before, strict=True):
                    print(f"{shape}: {name}: at most {held(server) - first:,} MiB more than the {first:,} before it")


def main(http: Annotated[bool, typer.Option(help="Ask the service and vLLM over HTTP.")] = False) -> None:
    if http:
        over_http()
        return
    print(f"{machine()}; {versions()}", flush=True)
    sizes = Sizes.of_demo()
    engine = loading.load(model_source.resolve("demo"))
    for shape in SHAPES:
        seconds(engine, shape, sizes.vocab, 0)  # compiles what it calls
        before, took, ratios = peak_mib(os.getpid()), list[float](), list[float]()
        rate = gemm_gflops("float32", sizes)
        for repeat in range(REPEATS):
            took.append(seconds(engine, shape, sizes.vocab, 1 + repeat))
            rate, earlier = gemm_gflops("float32", sizes), rate
            ratios.append(took[-1] * (rate + earlier) / 2 * 1e9 / floor_flops(shape, sizes))
        memory = f"peak {peak_mib(os.getpid()):,} MiB, {peak_mib(os.getpid()) - before} more than before"
        shown = f"{statistics.median(took):.2f} s, {statistics.median(ratios):.2f} x floor"
        print(f"{shape}: {shown} ({min(ratios):.2f} to {max(ratios):.2f}), {memory}", flush=True)


if __name__ == "__main__":
    typer.run(main)
