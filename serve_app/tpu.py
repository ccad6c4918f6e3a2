"""TPU chips for a replica, on one host: what can be asked for, what Ray is told, and what a cluster lacks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, model_validator

RESOURCE = "TPU"
"""Ray's name for one chip."""
CHIP_LABEL = "ray.io/accelerator-type"
TOPOLOGY_LABEL = "ray.io/tpu-topology"

_RAYS_NAMES = {"v4": "TPU-V4", "v5e": "TPU-V5LITEPOD", "v5p": "TPU-V5P", "v6e": "TPU-V6E"}
_FLAT = {"1x1": 1, "2x2": 4, "2x4": 8}
_CUBIC = {"2x2x1": 4}
HOSTS = {"v4": _CUBIC, "v5e": _FLAT, "v5p": _CUBIC, "v6e": _FLAT}
"""Chips of a host, by the kind of chip and the topology of a slice that is one host."""

SHARES = (1, 2, 4, 8)
"""Chips that Ray gives to one process: sets that libtpu can address."""


class Tpu(BaseModel):
    """The chips that each scorer replica gets, and sees no others."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    chip: Literal["v4", "v5e", "v5p", "v6e"]
    topology: str
    """Of the slice that is the host, as in GKE: ``2x2``, ``2x4``."""
    chips: int = 1
    """Per replica."""

    @model_validator(mode="after")
    def _exists(self) -> Tpu:
        hosts = HOSTS[self.chip]
        if self.topology not in hosts:
            raise ValueError(f"{self.chip} has no hosts of topology {self.topology!r}; it has {', '.join(hosts)}")
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

    def lacking(self, replicas: int, nodes: Sequence[Mapping[str, Any]]) -> str | None:
        """Why so many replicas cannot all run, in words, or None when there are chips for all of them.

        Args:
            nodes: as ``ray.nodes()`` gives them. Chips that others use count as there.
        """
        alive = [node for node in nodes if node["Alive"]]
        fit = [node for node in alive if self.labels.items() <= node["Labels"].items()]
        room = sum(int(node["Resources"].get(RESOURCE, 0)) // self.chips for node in fit)
        if room >= replicas:
            return None
        kind = f"{self.chip} in topology {self.topology}"
        if not fit:
            others = {_described(node) for node in alive if node["Resources"].get(RESOURCE)}
            return f"no node has chips of {kind}; the nodes have {', '.join(sorted(others)) or 'no TPU at all'}"
        return (
            f"{replicas} replicas of {self.chips} chips need {replicas * self.chips} chips of {kind}; "
            f"{len(fit)} such nodes have room for {room} replicas"
        )


def _described(node: Mapping[str, Any]) -> str:
    labels = node["Labels"]
    kind = f"{labels.get(CHIP_LABEL, 'an unnamed chip')} in topology {labels.get(TOPOLOGY_LABEL, 'unknown')}"
    return f"{int(node['Resources'][RESOURCE])} of {kind}"
