"""Describes this machine and measures its matmul rate, with which the benchmark compares the systems."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from importlib.metadata import version
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path

from scripts.benchmarks.work import Sizes

ROWS = 1024
"""Rows of the matmuls timed: the tokens of one full call."""


def machine() -> str:
    """Processor, cores and system, and whether bfloat16 is native."""
    fields = {}
    if (cpuinfo := Path("/proc/cpuinfo")).exists():
        fields = dict(line.split(":", 1) for line in cpuinfo.read_text().replace("\t", "").splitlines() if ":" in line)
    name = fields.get("model name", platform.processor() or "CPU").strip()
    flags = (fields.get("flags") or fields.get("Features") or "").split()
    native = "" if {"avx512_bf16", "amx_bf16", "bf16"} & set(flags) else "no "
    cores = len(os.sched_getaffinity(0))
    return f"{name}, {cores} cores, {platform.system()} {platform.machine()}, {native}bfloat16 instructions"


def seconds(function: Callable[[], object]) -> tuple[float, float]:
    """The time, and the processor time of all threads."""
    started, processor = time.perf_counter(), time.process_time()
    function()
    return time.perf_counter() - started, time.process_time() - processor


def in_turns(ways: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, tuple[float, float]]:
    """Median time and processor time of each way; in each repeat they take turns."""
    times = {way: list[tuple[float, float]]() for way in ways}
    for _ in range(repeats):
        for way, run in ways.items():
            times[way].append(seconds(run))
    return {way: medians(each) for way, each in times.items()}


def medians(times: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Of times, and of processor times."""
    return statistics.median(wall for wall, _ in times), statistics.median(processor for _, processor in times)


def versions() -> dict[str, str]:
    return {name: version(name) for name in ("jax", "jaxlib", "flax", "ray", "torch", "transformers")}


def gemm_gflops(dtype: str, sizes: Sizes) -> float:
    """The machine's matmul rate in GFLOP/s, by XLA on all cores: the floor's denominator.

    Timed are the three projections of the model's MLP, two of [1024, D] x [D, F] and one of [1024, F] x [F, D], with
    operands of ``dtype`` and float32 results: two thirds of W1's arithmetic, at the row count of a full call. The rate
    is their operations over the sum of their median times, ten runs each. Attention, the head and small requests,
    W4's 80 tokens for one, have shapes at which the machine is slower; the floor grants them the same rate.
    """
    import jax
    import jax.numpy as jnp
    from jax import lax

    def seconds(features_in: int, features_out: int) -> float:
        a, b = jnp.ones((ROWS, features_in), dtype), jnp.ones((features_in, features_out), dtype)
        matmul = jax.jit(lambda a, b: lax.dot(a, b, preferred_element_type=jnp.float32))
        matmul(a, b).block_until_ready()
        times: list[float] = []
        for _ in range(10):
            started = time.perf_counter()
            matmul(a, b).block_until_ready()
            times.append(time.perf_counter() - started)
        return statistics.median(times)

    took = 2 * seconds(sizes.width, sizes.ff_width) + seconds(sizes.ff_width, sizes.width)
    return 3 * 2 * ROWS * sizes.width * sizes.ff_width / took / 1e9


def _answer(pipe: Connection, dtypes: Sequence[str], sizes: Sizes) -> None:
    with suppress(EOFError):  # the end of the run
        while True:
            pipe.recv()
            pipe.send({dtype: gemm_gflops(dtype, sizes) for dtype in dtypes})


class GemmRates:
    """Measures the rates repeatedly between a run's repeats, in a separate process."""

    def __init__(self, dtypes: Sequence[str], sizes: Sizes) -> None:
        context = get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._rates: dict[str, list[float]] = defaultdict(list)
        context.Process(target=_answer, args=(theirs, dtypes, sizes), daemon=True).start()

    def measure(self) -> None:
        self._pipe.send(True)
        for dtype, rate in self._pipe.recv().items():
            self._rates[dtype].append(rate)

    def medians(self) -> dict[str, float]:
        """Each dtype's rate so far, in GFLOP/s."""
        return {dtype: statistics.median(rates) for dtype, rates in self._rates.items()}
