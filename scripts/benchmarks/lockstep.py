"""Measures a batch's overhead on a slice of several hosts: the leader's time around engines that compute nothing.

Run as ``python -m scripts.benchmarks.lockstep``; the hosts are Ray nodes on this machine.
"""

from __future__ import annotations

import sys
import time
from typing import Any

import numpy as np

from scripts.simulation.cluster import start_cluster, start_slice
from serve_app.batches import pack_labels
from serve_app.contract import BatchResult, Engine, TokenBatch
from serve_app.scorer.slice_worker import Place
from serve_app.settings import ModelSettings
from serve_app.tpu import Tpu

SLICES = [Tpu(chip="v5p", topology="2x2x2"), Tpu(chip="v6e", topology="4x4")]
WORK = [(1, 20, 0), (200, 20, 0), (400, 640, 600), (400, 2560, 2500)]
"""Sequences of a batch, tokens of each, and how many of them are the same in all."""
TIMES = 200


def batch(sequences: int, length: int, shared: int) -> TokenBatch:
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 30_000, (sequences, length), np.int32)
    tokens[:, :shared] = tokens[0, :shared]
    return pack_labels([*tokens], [[0, 0]] * sequences)


def idle(_settings: Any, _place: Place) -> Engine:
    from serve_app.scorer.fake_engine import FakeEngine

    class Idle(FakeEngine):
        def score(self, batch: TokenBatch) -> BatchResult:
            return BatchResult(np.zeros(len(batch.targets), np.float32), np.zeros(batch.num_sequences, np.int32))

    return Idle()


def main() -> None:
    """Print the median and the 95th percentile."""
    import ray

    @ray.remote(num_cpus=0.1)
    class Leader:
        def __init__(self, tpu: Tpu) -> None:
            from serve_app.scorer.slice_group import SliceGroup

            self._group = SliceGroup(ModelSettings(engine="fake", tpu=tpu, scorer_cpus=0.1), idle)
            self._group.warmup()

        def seconds(self, batch: TokenBatch) -> list[float]:
            return [self._one(batch) for _ in range(TIMES)]

        def _one(self, batch: TokenBatch) -> float:
            started = time.perf_counter()
            self._group.score(batch)
            return time.perf_counter() - started

    cluster = start_cluster(4)
    for tpu in SLICES:
        start_slice(cluster, tpu, tpu.topology)
        leader: Any = Leader.remote(tpu)
        for work in WORK:
            asked = batch(*work)
            taken = 1000 * np.array(ray.get(leader.seconds.remote(asked)))
            size = (asked.tokens.nbytes + asked.offsets.nbytes) / 2**10
            low, high = np.percentile(taken[20:], [50, 95])
            sys.stdout.write(
                f"{tpu.hosts} hosts, {work[0]} sequences, {size:,.0f} KiB: {low:.1f} ms, p95 {high:.1f} ms\n"
            )
        ray.kill(leader)
    ray.shutdown()


if __name__ == "__main__":
    main()
