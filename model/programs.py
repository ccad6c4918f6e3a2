"""The programs over the weights: how their launches follow each other, and what goes onto the device before them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, final

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from flax import nnx
from jax.sharding import PartitionSpec as P

from model import plan
from model.compiler import Compiler
from model.computations import CALLS, POOL, WHOLE, Angles, Kept, KeysValues, Kind, Model, Size, Span, Weights, spans_of
from model.delta import Snapshots
from model.inputs import Inputs
from model.plan import Shape
from model.sharding import abstract, put

Array = npt.NDArray[np.int32]
"""What a launch is told, see ``model.inputs``."""


class Layers(Protocol):
    """The layers of a model. Calls return when launched."""

    def wanted(self) -> list[tuple[Kind, Size]]:
        """Kinds and sizes of all programs that the two others can call."""
        ...

    def segments(self, shape: Shape, array: Array, pool: jax.Array, snapshots: Kept, collected: jax.Array) -> jax.Array:
        """``collected`` with the final normalised hidden states at the reads of up to ``Model.at_once`` calls."""
        ...

    def prefill(self, size: int, array: Array, pool: jax.Array, snapshots: Kept) -> tuple[KeysValues, Kept]:
        """Keys and values of ``size`` tokens in one bin, and the snapshots with theirs; ``snapshots`` is given away."""
        ...

    def prefill_read(
        self, size: int, array: Array, pool: jax.Array, snapshots: Kept, collected: jax.Array
    ) -> tuple[KeysValues, Kept, jax.Array]:
        """``prefill``, and ``collected`` with the final normalised hidden states of all these tokens."""
        ...


@final
class LayerByLayer:
    """One launch per layer; see ``model.computations``."""

    def __init__(self, model: Model, weights: Weights, compiler: Compiler) -> None:
        self._model, self._weights, self._compiler = model, weights, compiler
        self._numbers = [_put(model, np.array(number, np.int32), WHOLE) for number in range(len(weights.layers))]

    def wanted(self) -> list[tuple[Kind, Size]]:
        layout = self._model.layout
        called = sorted({shape.tokens for shape in layout.ladder})
        wanted: list[tuple[Kind, Size]] = [(Kind.LAYER, shape) for shape in layout.ladder]
        wanted += [(kind, size) for size in layout.sizes.chunks for kind in (Kind.KEEP, Kind.LAST, Kind.READ_ALL)]
        wanted += [(Kind.READ, tokens) for tokens in called]
        return wanted + [(Kind.EMBED, tokens) for tokens in sorted({*layout.sizes.chunks, *called})]

    def segments(self, shape: Shape, array: Array, pool: jax.Array, snapshots: Kept, collected: jax.Array) -> jax.Array:
        x, angles, inputs = self.begin(shape.tokens, array)
        layer, read = self._compiler.get(Kind.LAYER, shape), self._compiler.get(Kind.READ, shape.tokens)
        for number, weights in zip(self._numbers[:-1], self._weights.layers[:-1], strict=True):
            x = layer(weights, x, angles, inputs, pool, snapshots, number)
        last, number = self._weights.layers[-1], self._numbers[-1]
        return read(self._weights.ends, last, x, angles, inputs, pool, snapshots, number, collected)

    def prefill(self, size: int, array: Array, pool: jax.Array, snapshots: Kept) -> tuple[KeysValues, Kept]:
        begun = _, angles, inputs = self.begin(size, array)
        x, kept, snapshots = self._kept(size, begun, pool, snapshots, len(self._numbers) - 1)
        last = self._compiler.get(Kind.LAST, size)
        keys_values, snapshots = last(self._weights.layers[-1], x, angles, inputs, snapshots)
        return (*kept, keys_values), snapshots

    def prefill_read(
        self, size: int, array: Array, pool: jax.Array, snapshots: Kept, collected: jax.Array
    ) -> tuple[KeysValues, Kept, jax.Array]:
        begun = _, _, inputs = self.begin(size, array)
        x, kept, snapshots = self._kept(size, begun, pool, snapshots, len(self._numbers))
        read = self._compiler.get(Kind.READ_ALL, size)
        return tuple(kept), snapshots, read(self._weights.ends, x, inputs, collected)

    def _kept(
        self, size: int, begun: tuple[jax.Array, Angles, Inputs], pool: jax.Array, snapshots: Kept, count: int
    ) -> tuple[jax.Array, list[jax.Array], Kept]:
        """The output of the first ``count`` layers, their keys and values, and the snapshots with theirs."""
        x, angles, inputs = begun
        layer = self._compiler.get(Kind.KEEP, size)
        kept: list[jax.Array] = []
        for number, weights in zip(self._numbers[:count], self._weights.layers[:count], strict=True):
            x, keys_values, snapshots = layer(weights, x, angles, inputs, pool, snapshots, number)
            kept.append(keys_values)
        return x, kept, snapshots

    def begin(self, size: int, array: Array) -> tuple[jax.Array, Angles, Inputs]:
        """The first layer's input, and what all layers take, on the device once for all of them."""
        return self._compiler.get(Kind.EMBED, size)(self._weights.ends, _put(self._model, array, CALLS))


@final
class LayersInLoop:
    """One launch for all layers; see ``model.computations``."""

    def __init__(self, model: Model, weights: Weights, compiler: Compiler) -> None:
        self._model, self._weights, self._compiler = model, weights, compiler

    def wanted(self) -> list[tuple[Kind, Size]]:
        layout = self._model.layout
        wanted: list[tuple[Kind, Size]] = [(Kind.SEGMENTS, shape) for shape in layout.ladder]
        return wanted + [(kind, size) for size in layout.sizes.chunks for kind in (Kind.PREFILL, Kind.PREFILL_READ)]

    def segments(self, shape: Shape, array: Array, pool: jax.Array, snapshots: Kept, collected: jax.Array) -> jax.Array:
        [stack] = self._weights.layers
        program = self._compiler.get(Kind.SEGMENTS, shape)
        return program(self._weights.ends, stack, _put(self._model, array, CALLS), pool, snapshots, collected)

    def prefill(self, size: int, array: Array, pool: jax.Array, snapshots: Kept) -> tuple[KeysValues, Kept]:
        [stack] = self._weights.layers
        program = self._compiler.get(Kind.PREFILL, size)
        return program(self._weights.ends, stack, _put(self._model, array, CALLS), pool, snapshots)

    def prefill_read(
        self, size: int, array: Array, pool: jax.Array, snapshots: Kept, collected: jax.Array
    ) -> tuple[KeysValues, Kept, jax.Array]:
        [stack] = self._weights.layers
        program = self._compiler.get(Kind.PREFILL_READ, size)
        return program(self._weights.ends, stack, _put(self._model, array, CALLS), pool, snapshots, collected)


@final
class Programs:
    """All programs of an engine: of the layers, of the head, and the one that fills pages.

    Args:
        folder: of compiled programs, see ``model.compiled``.
        compiler: of the programs; None: one that compiles them for the model's devices.
    """

    def __init__(
        self, model: Model, weights: Weights, folder: Path | None = None, compiler: Compiler | None = None
    ) -> None:
        self.model, self.weights = model, weights
        self.compiler = compiler or Compiler(model, weights, folder)
        layers = LayerByLayer if model.by_layer else LayersInLoop
        self.layers: Layers = layers(model, weights, self.compiler)

    @property
    def weight_bytes(self) -> int:
        """Size of all parameters."""
        leaves = jax.tree.leaves((self.weights.ends, self.weights.layers))
        return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)

    def wanted(self) -> list[tuple[Kind, Size]]:
        """Kinds and sizes of all programs that can be called."""
        sizes = self.model.layout.sizes
        head = [(Kind.TARGETS, sizes.target_sizes)]
        if self.model.config.decision_head:
            head = [(Kind.WRITE, sizes.chunks), (Kind.FEATURES, sizes.head_sizes)]
        elif not self.model.layout.whole:
            head += [
                (Kind.WRITE, sizes.chunks),
                (Kind.NORMALIZER, sizes.head_sizes),
                (Kind.ARGMAX, sizes.argmax_sizes),
                (Kind.TOP, sizes.top_counts),
            ]
        return self.layers.wanted() + [(kind, size) for kind, calls in head for size in calls]

    def empty_pool(self) -> jax.Array:
        """The page pool, zeros."""
        return self._zeros(self.model.layout.pool, POOL)

    def empty_snapshots(self) -> Kept:
        """The snapshots of a hybrid, zeros; None: it is none."""
        parts = self.model.layout.snapshots
        return parts and Snapshots(*(self._zeros(part, WHOLE) for part in parts))

    def none_collected(self) -> jax.Array:
        """Room for collected hidden states, zeros."""
        shape = self.model.collected, self.model.config.width
        return self._zeros(jax.ShapeDtypeStruct(shape, jnp.float32), WHOLE)

    def _zeros(self, part: jax.ShapeDtypeStruct, spec: P) -> jax.Array:
        whole = part if self.model.mesh is None else abstract(part, spec, self.model.mesh)
        return jnp.zeros(whole.shape, whole.dtype, device=whole.sharding)

    def write(self, pool: jax.Array, keys_values: KeysValues, size: int, spans: Sequence[Span]) -> jax.Array:
        """The pool with keys and values of a prefill in its pages; ``pool`` is given away. Returns when launched."""
        table = np.zeros((spans_of(size), len(Span._fields)), np.int32)
        table[: len(spans)] = np.array(spans)
        places = _put(self.model, (table, np.array(len(spans), np.int32)), WHOLE)
        return self.compiler.get(Kind.WRITE, size)(pool, keys_values, *places)

    def targets(self, collected: jax.Array, pairs: Array) -> jax.Array:
        """Logits of pairs of a hidden state's number and an id. Returns when launched, as those below."""
        program = self.compiler.get(Kind.TARGETS, pairs.shape[1])
        return program(self.weights.ends, collected, _put(self.model, pairs, WHOLE))

    def normalizer(self, collected: jax.Array, numbers: Array) -> jax.Array:
        """Log of the summed exponentials of all logits, of the hidden states of these numbers."""
        program = self.compiler.get(Kind.NORMALIZER, len(numbers))
        return program(self.weights.ends, collected, _put(self.model, numbers, WHOLE))

    def argmax(self, collected: jax.Array, numbers: Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """``normalizer``'s values, and for each of these hidden states the id of the highest logit, and that logit."""
        program = self.compiler.get(Kind.ARGMAX, len(numbers))
        return program(self.weights.ends, collected, _put(self.model, numbers, WHOLE))

    def top(
        self, collected: jax.Array, numbers: Array, count: int, states: int, scale: float
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Of scaled logits: ``normalizer``'s values, and ids and values of the ``count`` highest, perhaps followed by
        others; of the first ``states`` of these hidden states."""
        program = self.compiler.get(Kind.TOP, plan.bucket(count, self.model.layout.sizes.top_counts))
        asked = np.array([count, states], np.int32), np.array(scale, np.float32)
        return program(self.weights.ends, collected, *_put(self.model, (numbers, *asked), (WHOLE, WHOLE, WHOLE)))

    def decision_scalar(self) -> npt.NDArray[np.float32] | None:
        """``decision_heads.CandidateHead.scalar``, which the host takes; None: there is no such head."""
        head = self.model.config.decision_head
        if head is None or head.kind != "candidate":
            return None
        return np.asarray(dict(nnx.to_flat_state(self.weights.ends))["decision_head", "scalar"][...])

    def features(self, collected: jax.Array, numbers: Array) -> jax.Array:
        """What a decision head makes of the hidden states of these numbers: [states, features]."""
        program = self.compiler.get(Kind.FEATURES, len(numbers))
        return program(self.weights.ends, collected, _put(self.model, numbers, WHOLE))


def _put(model: Model, host: Any, spec: P | tuple[P, ...]) -> Any:
    """Host arrays on the device, or on all devices.

    Args:
        spec: for all of ``host``, or of each array.
    """
    return jax.device_put(host) if model.mesh is None else put(host, spec, model.mesh)
