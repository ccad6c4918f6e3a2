"""TPU chips: their documented peaks, and how to compile for them without one."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from jax.experimental import topologies

from model.cost import BANDWIDTHS, CLOCKS, PEAKS, Rates
from model.memory import HBM_BYTES
from serve_app.scorer.engines import deepen_libtpu_stacks


@dataclass(frozen=True, slots=True)
class Chip:
    """Peaks of one chip.

    Attributes:
        kind: jax's name of it.
        cores: that share a kernel's grid.
        smallest: the smallest topology that can be compiled for; its first chip stands for a single one.
    """

    kind: str
    cores: int
    smallest: str

    @property
    def flops(self) -> float:
        """bfloat16 operations a second."""
        return PEAKS[self.kind]

    @property
    def hbm_bytes(self) -> float:
        """Memory."""
        return HBM_BYTES[self.kind]

    @property
    def bandwidth(self) -> float:
        """Of the memory, bytes a second."""
        return BANDWIDTHS[self.kind]

    @property
    def clock(self) -> float:
        """Cycles a second."""
        return CLOCKS[self.kind]

    @property
    def rates(self) -> Rates:
        """What it does in a cycle."""
        return Rates.of(self.kind)


CHIPS = {
    "v5e": Chip("TPU v5 lite", 1, "2x2"),
    "v5p": Chip("TPU v5", 2, "2x2x1"),
    "v6e": Chip("TPU v6 lite", 1, "2x2"),
}
HOST_BANDWIDTH = 10e9
"""Bytes a second between a host and its chips: assumed, no document gives it."""


def libtpu_version() -> str | None:
    """The installed version, or None."""
    try:
        return version("libtpu")
    except PackageNotFoundError:
        return None


@cache
def devices(chip: str, topology: str) -> tuple[Any, ...]:
    """The chips of a slice, to compile for. ``1x1`` is a single one.

    Raises:
        ValueError: libtpu is not installed, or does not know the topology.
    """
    if libtpu_version() is None:
        raise ValueError("libtpu is not installed; install this project with its extra tpu-compile")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # no chip is opened
    deepen_libtpu_stacks()
    single = topology in ("1x1", "1x1x1")
    name = f"{chip}:{CHIPS[chip].smallest if single else topology}"
    try:
        described = topologies.get_topology_desc(name, platform="tpu").devices
    except Exception as error:
        raise ValueError(f"libtpu knows no topology {name}: {error}") from error
    return tuple(described[:1] if single else described)
