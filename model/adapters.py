"""Puts LoRA adapters into the slots that the weights of their base have for them, while the model runs."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from flax import nnx
from jax import lax

from model.checkpoint import Entry, Fused, Place, Targets
from model.computations import Model, State, Weights
from model.cpu import linear
from model.fields import ConfigError
from model.sharding import RULES, place, whole_shape
from model.tensors import adapters
from model.tensors.adapters import Factors
from model.tensors.safetensors_files import SafetensorsFiles
from model.tensors.stored import CheckpointError, whole

Matrix = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Adapter:
    """An adapter in the host's memory.

    Attributes:
        factors: A [in, rank] and B [rank, out] of each linear that it changes, by its path; the scaling is in B.
        head: [classes, D] of its own; None: it has its base's.
        kind: what it is, in words.
    """

    factors: Mapping[Place, tuple[Matrix, Matrix]]
    head: Matrix | None
    kind: str


class Adapters:
    """The slots of one engine.

    Args:
        targets: where the whole model's tensors go.
        weights: that hold the slots. They get new arrays; programs that run keep the ones that they were given.
    """

    def __init__(self, model: Model, targets: Targets, weights: Weights) -> None:
        self._model, self._targets, self._weights = model, targets, weights

    def read(self, folder: Path) -> Adapter:
        """Read an adapter that peft has saved.

        Raises:
            ConfigError: it asks for something that is not implemented, or for a larger rank than the slots have.
            CheckpointError: its tensors do not fit the base.
        """
        lora, config = self._model.config.lora, adapters.read(folder)
        if lora is None:
            raise ConfigError("this model was loaded without room for adapters; set adapters or max_adapters")
        if config is None:
            raise ConfigError(f"{folder} has no {adapters.CONFIG}; an adapter is a folder that peft has saved")
        if config.highest_rank > lora.rank:
            raise ConfigError(
                f"adapter {config.name} has rank {config.highest_rank}, and there is room for {lora.rank}; set "
                f"max_adapter_rank to {config.highest_rank} or more"
            )
        layers = {name: target for name, target in self._targets.items() if _in_layer(target)}
        with SafetensorsFiles() as files:
            own, problems = files.tensors(folder, [folder / adapters.WEIGHTS])
            found, head, more = adapters.factors(own, config, {name: each.shape for name, each in layers.items()})
            shape = self._model.config.classes, self._model.config.width
            if head is not None and head.shape != shape:
                more.append(f"mis-shaped: the head of the adapter's classes is {head.shape}, the model's {shape}")
            if problems := [*problems, *more]:
                raise CheckpointError(f"the tensors of {folder} do not fit the model:\n  " + "\n  ".join(problems))
            read = Adapter(
                {path: pair for name, each in found.items() for path, pair in _parts(each, layers[name])},
                None if head is None else whole(head).astype(np.float32),
                f"{config.kind}, {config.numbers}",
            )
        for matrix in (*(one for pair in read.factors.values() for one in pair), read.head):
            # Other adapters' rows are multiplied by zeros, and zero times infinity is none.
            if matrix is not None and not np.isfinite(matrix).all():
                raise CheckpointError(f"the tensors of {folder} have numbers that are not finite")
        return read

    def put(self, slot: int, adapter: Adapter) -> None:
        """Put an adapter into a slot, from 0. Calls that are launched from now on see it."""
        weights, model = self._weights, self._model
        for number, state in enumerate(weights.layers):
            layers = (number,) if model.by_layer else range(model.config.layers)
            weights.layers[number] = self._with(
                state, model.abstract.block[1], slot, partial(self._stored, adapter, layers)
            )
        if model.config.classes:
            weights.ends = self._with(weights.ends, model.abstract.ends[1], slot, partial(self._head, adapter))

    def _with(self, state: State, shapes: State, slot: int, values: Callable[..., Any]) -> State:
        """Parameters with an adapter in one slot.

        Args:
            shapes: of one layer's parameters on one device.
            values: given a parameter's path and its shapes, what belongs into the slot; None: it has no slots.
        """
        flat: Any = nnx.to_flat_state(state)
        parts: Any = dict(nnx.to_flat_state(shapes))
        replaced: list[tuple[Any, Any]] = []
        for path, leaf in flat:
            part = parts[path]
            if (own := values(path, part)) is not None:
                stack = leaf[...].ndim > len(part.shape)
                leaf = leaf.replace(_in_slot(leaf[...], slot, self._on_device(own, part, stack), stack))
            replaced.append((path, leaf))
        return nnx.from_flat_state(replaced)

    def _stored(self, adapter: Adapter, layers: Sequence[int], path: Place, part: Any) -> npt.NDArray[Any] | None:
        """An adapter's A or B of one linear as its slot stores it, of one layer or stacked."""
        if "low_rank" not in path:
            return None
        *within, _, which = path
        stored = [self._of_linear(adapter, ("blocks", layer, *within), str(which), part) for layer in layers]
        return stored[0] if self._model.by_layer else np.stack(stored)

    def _of_linear(self, adapter: Adapter, path: Place, which: str, part: Any) -> npt.NDArray[Any]:
        if path not in adapter.factors:
            return np.zeros(self._whole(part), self._model.dtype)
        matrix, lora = adapter.factors[path][which == "b"], self._model.config.lora
        assert lora is not None, "``read`` has seen it"
        more = lora.rank - matrix.shape[which == "a"]
        filled = np.pad(matrix, ((0, 0), (0, more)) if which == "a" else ((0, more), (0, 0))).astype(self._model.dtype)
        if not self._model.config.packed:
            return filled
        return linear.pack_a(filled) if which == "a" else linear.pack(filled)

    def _head(self, adapter: Adapter, path: Place, part: Any) -> npt.NDArray[Any] | None:  # noqa: ARG002
        """An adapter's head of classes, or its base's."""
        if path != ("adapter_heads",):
            return None
        return np.asarray(self._weights.ends["head"][...]) if adapter.head is None else adapter.head

    def _whole(self, part: Any) -> tuple[int, ...]:
        """Shape of one slot of the whole model, from one device's part of all."""
        mesh, spec = self._model.mesh, RULES.spec(*part.axes)
        return (part.shape if mesh is None else whole_shape(part.shape, spec, mesh))[1:]

    def _on_device(self, values: npt.NDArray[Any], part: Any, stack: bool) -> jax.Array:
        axes, shape = part.axes[1:], part.shape[1:]
        if self._model.mesh is None:
            return jnp.asarray(values, self._model.dtype)
        if stack:
            axes, shape = (None, *axes), (len(values), *shape)
        return place(values, axes, shape, self._model.dtype, self._model.mesh)


@partial(jax.jit, static_argnums=3)
def _in_slot(slots: jax.Array, number: int, values: jax.Array, stack: bool) -> jax.Array:
    """The slots with these values in one: axis 0, or axis 1 of a stack of layers."""
    return lax.dynamic_update_index_in_dim(slots, values, number, int(stack))


def _in_layer(entry: Entry) -> bool:
    """Whether a tensor of the base is a linear's kernel in a layer, and not an expert's."""
    parts = entry.parts if isinstance(entry, Fused) else (entry,)
    return all(part.path[0] == "blocks" and part.path[-1] == "kernel" and part.stack is None for part in parts)


def _parts(factors: Factors, entry: Entry) -> Iterator[tuple[Place, tuple[Matrix, Matrix]]]:
    """The paths of the linears in one tensor of the base, and the factors of each."""
    a, b = (whole(one).astype(np.float32) for one in (factors.a, factors.b))
    start = 0
    for part in entry.parts if isinstance(entry, Fused) else (entry,):
        rows = slice(start, start := start + part.shape[0])
        yield part.path[:-1], (a.T, b[rows].T * np.float32(factors.scaling))
