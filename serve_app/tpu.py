"""TPU chips of a replica, on one host or a slice of several: valid settings, Ray's labels, what a cluster lacks."""

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
"""Label of a host's number in its slice, from 0."""

_RAYS_NAMES = {"v4": "TPU-V4", "v5e": "TPU-V5LITEPOD", "v5p": "TPU-V5P", "v6e": "TPU-V6E"}
_FLAT = {"1x1": 1, "2x2": 4, "2x4": 8}
_CUBIC = {"2x2x1": 4}
HOSTS = {"v4": _CUBIC, "v5e": _FLAT, "v5p": _CUBIC, "v6e": _FLAT}
"""Chips of a host, by the kind of chip and the topology of a one-host slice."""

_FLAT_SLICES = ("4x4", "4x8", "8x8", "8x16", "16x16")
_CUBIC_SLICES = ("2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8")
SLICES = {"v4": _CUBIC_SLICES, "v5e": _FLAT_SLICES, "v5p": _CUBIC_SLICES, "v6e": _FLAT_SLICES}
"""Topologies of slices with several hosts, by the kind of chip.

Source: Google Cloud's pages on TPU configurations, https://cloud.google.com/tpu/docs/v6e and its neighbours (for v4 and
v5p the topologies of at most 512 chips). A test compares them with Ray's table.
"""
CHIPS_OF_A_SLICES_HOST = 4
"""Chips of each host in a slice with several hosts, for every kind."""

PARTS = (1, 2)
"""Numbers of chips, besides a whole host's, that Ray gives to one process so that libtpu can address them.

libtpu takes TPU_VISIBLE_CHIPS together with bounds that hold as many chips. Ray 2.60 sets the bounds for one and two
chips, and leaves GKE's otherwise (set_current_process_visible_accelerator_ids in ray/_private/accelerators/tpu.py):
four chips of a 2x4 host would keep the bounds 2,4,1, of eight. A test runs that function.
"""


class Tpu(BaseModel):
    """The TPU chips of each scorer. Ray hides all other chips from it."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    chip: Literal["v4", "v5e", "v5p", "v6e"]
    """The kind of chip."""
    topology: str
    """Topology of the slice, as in GKE: ``2x2`` and ``2x4`` are one host, ``4x4`` is four."""
    chips: int = 1
    """Chips per scorer. In a slice with several hosts it is all of them."""
    data: int | None = None
    """Calls that a scorer runs at once, each on an equal share of its chips with the whole model split over the share.
    None: as many as leave each share room for the model with its whole context."""

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
    def _equal_shares(self) -> Tpu:
        if self.data is not None and (self.data < 1 or self.chips % self.data):
            fitting = [str(n) for n in range(1, self.chips + 1) if self.chips % n == 0]
            raise ValueError(
                f"a replica's {self.chips} chips cannot be divided among {self.data} calls at once; "
                f"data can be {' or '.join(fitting)}"
            )
        return self

    @model_validator(mode="after")
    def _exists(self) -> Tpu:
        hosts, slices = HOSTS[self.chip], SLICES[self.chip]
        if self.topology in slices:
            if self.chips != (whole := _chips(self.topology)):
                raise ValueError(
                    f"a replica cannot have {self.chips} chips of a {self.chip} slice of topology {self.topology}, "
                    f"which has {self.hosts} hosts; it needs all {whole}; leave out chips"
                )
            return self
        if self.topology not in hosts:
            raise ValueError(
                f"{self.chip} has no topology {self.topology!r}; it has {', '.join(hosts)} on one host, "
                f"and {', '.join(slices)} on several"
            )
        shares = [str(share) for share in sorted({*PARTS, hosts[self.topology]}) if share <= hosts[self.topology]]
        if str(self.chips) not in shares:
            raise ValueError(
                f"a replica cannot have {self.chips} chips of a {self.chip} host of topology {self.topology}; "
                f"it can have {' or '.join(shares)}, for which Ray tells libtpu where they are"
            )
        return self

    @property
    def labels(self) -> dict[str, str]:
        """Labels that Ray puts on nodes with such chips."""
        return {CHIP_LABEL: _RAYS_NAMES[self.chip], TOPOLOGY_LABEL: self.topology}

    @property
    def hosts(self) -> int:
        """Number of hosts that a replica spans."""
        return _chips(self.topology) // CHIPS_OF_A_SLICES_HOST if self.topology in SLICES[self.chip] else 1

    def lacking(self, replicas: int, nodes: Sequence[Mapping[str, Any]]) -> str | None:
        """Why ``replicas`` replicas cannot all run; None: there are chips for all of them.

        Args:
            nodes: the result of ``ray.nodes()``. Chips that are in use count as available.
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
                f"; slice {name} has {hosts} of {self.hosts} hosts"
                for name, hosts in sorted(slices.items())
                if hosts < self.hosts
            ]
            found = "1 complete slice" if room == 1 else f"{room} complete slices"
            return f"{replicas} replicas need as many slices of {kind}; {found} found{''.join(parts)}"
        return (
            f"{replicas} replicas of {self.chips} chips need {replicas * self.chips} chips of {kind}; "
            f"matching nodes: {len(fit)}, with room for {room} replicas"
        )

    def _slices(self, nodes: Sequence[Mapping[str, Any]]) -> dict[str, int]:
        """Number of hosts found of each slice, by its name."""
        numbers: dict[str, set[str]] = {}
        for node in nodes:
            labels = node["Labels"]
            if node["Resources"].get(RESOURCE, 0) >= CHIPS_OF_A_SLICES_HOST and NUMBER_LABEL in labels:
                numbers.setdefault(labels.get(SLICE_LABEL, "(unnamed)"), set()).add(labels[NUMBER_LABEL])
        return {name: len(hosts) for name, hosts in numbers.items()}


def _chips(topology: str) -> int:
    return math.prod(map(int, topology.split("x")))


def _described(node: Mapping[str, Any]) -> str:
    labels = node["Labels"]
    kind = f"{labels.get(CHIP_LABEL, 'an unnamed chip')} in topology {labels.get(TOPOLOGY_LABEL, 'unknown')}"
    return f"{int(node['Resources'][RESOURCE])} of {kind}"
