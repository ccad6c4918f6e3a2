"""One of several processes that hold a model together: scores prompts in step with the others, and writes the values.

Run as ``python -m tests.sharding.one_of_two FOLDER COORDINATOR PROCESSES NUMBER RESULT``.
"""

import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np

from model import loading, sharding
from tests.invariance.rows import prompts, values

SIZES: dict[str, Any] = {
    "max_segment_tokens": 32,
    "call_tokens": 64,
    "chunks": (64,),
    "head_sizes": (32,),
    "argmax_sizes": (32,),
    "target_sizes": (64,),
    "prefix_cache_bytes": 2**21,
}


def sequences() -> list[list[int]]:
    return [*prompts(5, query=150, longest=30, seed=1), *prompts(3, longest=50, seed=2)]


def main(folder: str, coordinator: str, processes: str, number: str, result: str) -> None:
    sharding.init_distributed(coordinator, int(processes), int(number))
    assert len(jax.devices()) == 2 * len(jax.local_devices())
    spread = loading.load(Path(folder), mesh=sharding.mesh(2, len(jax.devices()) // 2), **SIZES)
    cold = values(spread, sequences())
    np.save(result, [cold, values(spread, sequences())])
    jax.distributed.shutdown()


if __name__ == "__main__":
    main(*sys.argv[1:])
