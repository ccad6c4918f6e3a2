"""Loads a checkpoint over several devices; prints the bytes of its weights, and the most memory used beyond them.

Run as ``python -m tests.sharding.loading_memory FOLDER DEVICES``; needs Linux's ``/proc``.
"""

import math
import re
import sys
from pathlib import Path

import jax

from model import loading, sharding


def resident(field: str) -> int:
    """Resident bytes, including mapped pages of files: ``VmRSS`` now, ``VmHWM`` at most so far."""
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return 1024 * int(found[1])


def on_devices(array: jax.Array) -> int:
    """Bytes of all devices' copies."""
    part = array.sharding.shard_shape(array.shape)
    return array.dtype.itemsize * math.prod(part) * len(array.sharding.device_set)


def main(folder: str, devices: str) -> None:
    mesh = sharding.mesh(1, int(devices))
    before = resident("VmRSS")
    scorer = loading.load(Path(folder), mesh=mesh, prefix_cache_bytes=2**21)
    most = resident("VmHWM")
    # The page pool is zeros; no page of it is resident before it is written.
    pool = scorer._pool  # pyright: ignore[reportPrivateUsage]
    held = sum(on_devices(array) for array in jax.live_arrays() if array is not pool)
    sys.stdout.write(f"{held} {most - before - held}\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
