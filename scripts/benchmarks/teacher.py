"""A teacher's logprobs in process: seconds and memory of every position's, beside the least arithmetic.

``python -m scripts.benchmarks.teacher`` prints a line for each shape. The floor is the matmuls of all tokens through
all layers and of all positions through the head, at the matmul rate that is measured before and after each run.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from model import loading
from model.engine import Engine
from scripts.benchmarks.machine import gemm_gflops
from scripts.benchmarks.work import Sizes
from serve_app import model_source
from serve_app.tasks.positions import Positions

REPEATS = 3


@dataclass(frozen=True)
class Shape:
    """Sequences of one length, all positions of which are asked for, with so many most probable tokens."""

    sequences: int
    tokens: int
    top: int


SHAPES = [Shape(8, 512, 0), Shape(8, 512, 64), Shape(8, 512, 256), Shape(1, 4096, 0), Shape(1, 4096, 256)]


def floor_flops(shape: Shape, sizes: Sizes) -> float:
    """Floating-point operations of the matmuls; attention is exactly causal."""
    attention, key_value = sizes.heads * sizes.head_width, sizes.kv_heads * sizes.head_width
    token = 2 * sizes.width * (2 * attention + 2 * key_value + 3 * sizes.ff_width) * sizes.layers
    pairs = shape.tokens * (shape.tokens + 1) / 2
    sequence = shape.tokens * (token + 2 * sizes.width * sizes.vocab) + 4 * attention * pairs * sizes.layers
    return shape.sequences * sequence


def peak_mib() -> int:
    """The most memory that this process has had."""
    status = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in status if line.startswith("VmHWM")).split()[1]) // 1024


def seconds(engine: Engine, shape: Shape, vocab: int, seed: int) -> float:
    rng = np.random.default_rng(seed)
    sequences = [rng.integers(0, vocab, shape.tokens).astype(np.int32) for _ in range(shape.sequences)]
    batch = Positions(sequences, [1] * shape.sequences, top=shape.top).batch()
    started = time.perf_counter()
    engine.score(batch)
    return time.perf_counter() - started


def main() -> None:
    sizes = Sizes.of_demo()
    engine = loading.load(model_source.resolve("demo"))
    for shape in SHAPES:
        seconds(engine, shape, sizes.vocab, 0)  # compiles what it calls
        before, rates, took = peak_mib(), [gemm_gflops("float32", sizes)], list[float]()
        for repeat in range(REPEATS):
            took.append(seconds(engine, shape, sizes.vocab, 1 + repeat))
            rates.append(gemm_gflops("float32", sizes))
        median = statistics.median(took)
        floor = floor_flops(shape, sizes) / statistics.median(rates) / 1e9
        name = f"{shape.sequences} x {shape.tokens:,} tokens, top {shape.top}"
        memory = f"peak {peak_mib():,} MiB, {peak_mib() - before} more than before"
        print(f"{name}: {median:.2f} s, {median / floor:.2f} x floor, {memory}", flush=True)


if __name__ == "__main__":
    main()
