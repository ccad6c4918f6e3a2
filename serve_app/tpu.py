"""TPU chips for a replica, on one host or a slice of several: what can be asked for, what Ray is told, and what a
cluster lacks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, cast

from pydantic import BaseModel, ConfigDict, model_validator

RESOURCE = "TPU"
"""Ray's name for one chip."""
CHIP_LABEL = "ray.io/accelerator-type"
TOPOLOGY_LABEL = "ray.io/tpu-topology"
SLICE_LABEL = "ray.io/tpu-slice-name"
NUMBER_LABEL = "ray.io/tpu-worker-id"
"""A host's place in its slice, from 0."""

_RAYS_NAMES = {"v4": "TPU-V4", "v5e": "TPU-V5LITEPOD", "v5p": "TPU-V5P", "v6e": "TPU-V6E"}
_FLAT = {"1x1": 1, "2x2": 4, "2x4": 8}
_CUBIC = {"2x2x1": 4}
HOSTS = {"v4": _CUBIC, "v5e": _FLAT, "v5p": _CUBIC, "v6e": _FLAT}
"""Chips of a host, by the kind of chip and the topology of a slice that is one host."""

_FLAT_SLICES = ("4x4", "4x8", "8x8", "8x16", "16x16")
_CUBIC_SLICES = ("2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8")
SLICES = {"v4": _CUBIC_SLICES, "v5e": _FLAT_SLICES, "v5p": _CUBIC_SLICES, "v6e": _FLAT_SLICES}
"""Topologies of slices of several hosts, by the kind of chip.

Source: Google Cloud's pages on TPU configurations, https://cloud.google.com/tpu/docs/v6e and the other kinds' (of v4
and v5p those of at most 512 chips); a test compares them with Ray's table.
"""
CHIPS_OF_A_SLICES_HOST = 4
"""Of every kind, where a slice has several hosts."""

SHARES = (1, 2, 4, 8)
"""Chips that Ray gives to one process: sets that libtpu can address."""


class Tpu(BaseModel):
    """The chips that each scorer replica gets, and sees no others."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    chip: Literal["v4", "v5e", "v5p", "v6e"]
    topology: str
    """Of the slice, as in GKE: ``2x2`` and ``2x4`` are one host, ``4x4`` is four."""
    chips: int = 1
    """Per replica. Of a slice of several hosts always all."""

    @model_validator(mode="before")
    @classmethod
    def _whole_slice(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        fields = cast(dict[str, Any], given)
        topology = str(fields.get("topology"))
        if topology in SLICES.get(str(fields.get("chip")), ()):
            return {"chips": _chips(topology), **fields}
        return fields

    @model_validator(mode="after")
    def _exists(self) -> Tpu:
        hosts, slices = HOSTS[self.chip], SLICES[self.chip]
        if self.topology in slices:
            if self.chips != (whole := _chips(self.topology)):
                raise ValueError(
                    f"a replica cannot have {self.chips} chips of a {self.chip} slice of topology {self.topology}, "
                    f"which has {self.hosts} hosts; it has all {whole}; leave out chips"
                )
            return self
        if self.topology not in hosts:
            raise ValueError(
                f"{self.chip} has no topology {self.topology!r}; it has {', '.join(hosts)} on one host, "
                f"and {', '.join(slices)} on several"
            )
        shares = [str(share) for share in SHARES if share <= hosts[self.topology]]
        if str(self.chips) not in shares:
            raise ValueError(
                f"a replica cannot have {self.chips} chips of a {self.chip} host of topology {self.topology}; "
                f"it can have {' or '.join(shares)}"
            )
        return self

    @property
    def labels(self) -> dict[str, str]:
        """Of the nodes that have such chips, as Ray finds them on TPU hosts."""
        return {CHIP_LABEL: _RAYS_NAMES[self.chip], TOPOLOGY_LABEL: self.topology}

    @property
    def hosts(self) -> int:
        """That a replica spans."""
        return _chips(self.topology) // CHIPS_OF_A_SLICES_HOST if self.topology in SLICES[self.chip] else 1

    def lacking(self, replicas: int, nodes: Sequence[Mapping[str, Any]]) -> str | None:
        """Why so many replicas cannot all run, in words, or None when there are chips for all of them.

        Args:
            nodes: as ``ray.nodes()`` gives them. Chips that others use count as there.
        """
        alive = [node for node in nodes if node["Alive"]]
        fit = [node for node in alive if self.labels.items() <= node["Labels"].items()]
        slices = self._slices(fit)
        if self.hosts > 1:
            room = sum(hosts == self.hosts for hosts in slices.values())
        else:
            room = sum(int(node["Resources"].get(RESOURCE, 0)) // self.chips for node in fit)
        if room >= replicas:
            return None
        kind = f"{self.chip} in topology {self.topology}"
        if not fit:
            others = {_described(node) for node in alive if node["Resources"].get(RESOURCE)}
            return f"no node has chips of {kind}; the nodes have {', '.join(sorted(others)) or 'no TPU at all'}"
        if self.hosts > 1:
            parts = [
                f"{name} has {hosts} of {self.hosts} hosts" for name, hosts in slices.items() if hosts < self.hosts
            ]
            return f"{replicas} replicas need as many slices of {kind}; there are {room} whole ones" + "".join(
                f", and {part}" for part in sorted(parts)
            )
        return (
            f"{replicas} replicas of {self.chips} chips need {replicas * self.chips} chips of {kind}; "
            f"{len(fit)} such nodes have room for {room} replicas"
        )

    def _slices(self, nodes: Sequence[Mapping[str, Any]]) -> dict[str, int]:
        """How many hosts there are of each slice, by its name."""
        numbers: dict[str, set[str]] = {}
        for node in nodes:
            labels = node["Labels"]
            if node["Resources"].get(RESOURCE, 0) >= CHIPS_OF_A_SLICES_HOST and NUMBER_LABEL in labels:
                numbers.setdefault(labels.get(SLICE_LABEL, "a slice without a name"), set()).add(labels[NUMBER_LABEL])
        return {name: len(hosts) for name, hosts in numbers.items()}


def _chips(topology: str) -> int:
    return math.prod(map(int, topology.split("x")))


def _described(node: Mapping[str, Any]) -> str:
    labels = node["Labels"]
    kind = f"{labels.get(CHIP_LABEL, 'an unnamed chip')} in topology {labels.get(TOPOLOGY_LABEL, 'unknown')}"
    return f"{int(node['Resources'][RESOURCE])} of {kind}"
