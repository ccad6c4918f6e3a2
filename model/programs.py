"""The programs over the weights: how their launches follow each other, and what goes onto the device before them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, final

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from jax.sharding import PartitionSpec as P

from model.attention import AttentionContext
from model.compiler import Compiler
from model.computations import CALLS, POOL, WHOLE, Angles, KeysValues, Kind, Model, Size, Span, Weights, spans_of
from model.plan import Shape
from model.sharding import abstract, put


class Inputs(NamedTuple):
    """Host arrays of one call.

    Attributes:
        tokens: [M] ids; -1 for padding.
        positions: [M], each token's place in its sequence.
        prefixes: [M], which of the call's prefixes each token sees.
        segments: [B, T], see ``attention.AttentionContext``.
        reads: [R] flat indices of the tokens to return the hidden states of; not used by ``prefill``.
    """

    tokens: npt.NDArray[np.int32]
    positions: npt.NDArray[np.int32]
    prefixes: npt.NDArray[np.int32]
    segments: npt.NDArray[np.int32]
    reads: npt.NDArray[np.int32]


class Prefixes(NamedTuple):
    """The prefixes that the segments of a call attend to.

    Attributes:
        pool: the page pool, on the device.
        tables: [P, slots], the pages of each prefix.
        lengths: [P], each prefix's tokens.
    """

    pool: jax.Array
    tables: npt.NDArray[np.int32]
    lengths: npt.NDArray[np.int32]


class Layers(Protocol):
    """The layers of a model. Calls return when launched."""

    def wanted(self) -> list[tuple[Kind, Size]]:
        """Kinds and sizes of all programs that the two others can call."""
        ...

    def segments(self, shape: Shape, inputs: Sequence[Inputs], prefixes: Prefixes) -> jax.Array:
        """Final normalised hidden states at the reads of up to ``Model.at_once`` calls: float32 [calls * R, D]."""
        ...

    def prefill(self, size: int, inputs: Inputs, prefixes: Prefixes) -> KeysValues:
        """Keys and values of ``size`` tokens in one bin."""
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
        wanted += [(kind, size) for size in layout.sizes.chunks for kind in (Kind.KEEP, Kind.LAST)]
        wanted += [(Kind.READ, tokens) for tokens in called]
        return wanted + [(Kind.EMBED, tokens) for tokens in sorted({*layout.sizes.chunks, *called})]

    def segments(self, shape: Shape, inputs: Sequence[Inputs], prefixes: Prefixes) -> jax.Array:
        stacked = _stacked(self._model, inputs)
        x, angles, context = self.begin(stacked, prefixes)
        # What is read sees no bins, only segments: one program serves all shapes of as many tokens.
        flat = stacked.segments.reshape(self._model.at_once, -1)
        reads, flat = _put(self._model, (stacked.reads, flat), CALLS)
        layer = self._compiler.get(Kind.LAYER, shape)
        for number, weights in zip(self._numbers[:-1], self._weights.layers[:-1], strict=True):
            x = layer(weights, x, angles, context, number)
        context, read = context._replace(segments=flat), self._compiler.get(Kind.READ, shape.tokens)
        return read(self._weights.ends, self._weights.layers[-1], x, angles, context, self._numbers[-1], reads)

    def prefill(self, size: int, inputs: Inputs, prefixes: Prefixes) -> KeysValues:
        x, angles, context = self.begin(_stacked(self._model, [inputs] * self._model.at_once), prefixes)
        layer = self._compiler.get(Kind.KEEP, size)
        kept: list[jax.Array] = []
        for number, weights in zip(self._numbers[:-1], self._weights.layers[:-1], strict=True):
            x, keys_values = layer(weights, x, angles, context, number)
            kept.append(keys_values)
        return (*kept, self._compiler.get(Kind.LAST, size)(self._weights.layers[-1], x, angles))

    def begin(self, inputs: Inputs, prefixes: Prefixes) -> tuple[jax.Array, Angles, AttentionContext]:
        """The first layer's input, and what all layers take, on the device once for all of them."""
        tokens, context = _on_device(self._model, inputs, prefixes)
        embed = self._compiler.get(Kind.EMBED, len(inputs.tokens) // self._model.at_once)
        x, angles = embed(self._weights.ends, tokens, context.positions)
        return x, angles, context


@final
class LayersInLoop:
    """One launch for all layers; see ``model.computations``."""

    def __init__(self, model: Model, weights: Weights, compiler: Compiler) -> None:
        self._model, self._weights, self._compiler = model, weights, compiler

    def wanted(self) -> list[tuple[Kind, Size]]:
        layout = self._model.layout
        wanted: list[tuple[Kind, Size]] = [(Kind.SEGMENTS, shape) for shape in layout.ladder]
        return wanted + [(Kind.PREFILL, size) for size in layout.sizes.chunks]

    def segments(self, shape: Shape, inputs: Sequence[Inputs], prefixes: Prefixes) -> jax.Array:
        stacked = _stacked(self._model, inputs)
        reads = _put(self._model, stacked.reads, CALLS)
        return self._compiler.get(Kind.SEGMENTS, shape)(*self._arguments(stacked, prefixes), reads)

    def prefill(self, size: int, inputs: Inputs, prefixes: Prefixes) -> KeysValues:
        stacked = _stacked(self._model, [inputs] * self._model.at_once)
        return self._compiler.get(Kind.PREFILL, size)(*self._arguments(stacked, prefixes))

    def _arguments(self, inputs: Inputs, prefixes: Prefixes) -> tuple[Any, ...]:
        """The arguments that ``segments`` and ``prefill`` share."""
        tokens, context = _on_device(self._model, inputs, prefixes)
        [stack] = self._weights.layers
        return self._weights.ends, stack, tokens, context.positions, context


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
        head = (
            (Kind.WRITE, sizes.chunks),
            (Kind.NORMALIZER, sizes.head_sizes),
            (Kind.ARGMAX, sizes.argmax_sizes),
            (Kind.TARGETS, sizes.target_sizes),
        )
        return self.layers.wanted() + [(kind, size) for kind, calls in head for size in calls]

    def empty_pool(self) -> jax.Array:
        """The page pool, zeros."""
        pool, mesh = self.model.layout.pool, self.model.mesh
        whole = pool if mesh is None else abstract(pool, POOL, mesh)
        return jnp.zeros(whole.shape, whole.dtype, device=whole.sharding)

    def write(self, pool: jax.Array, keys_values: KeysValues, size: int, spans: Sequence[Span]) -> jax.Array:
        """The pool with keys and values of a prefill in its pages; ``pool`` is given away. Returns when launched."""
        table = np.zeros((spans_of(size), len(Span._fields)), np.int32)
        table[: len(spans)] = np.array(spans)
        places = _put(self.model, (table, np.array(len(spans), np.int32)), WHOLE)
        return self.compiler.get(Kind.WRITE, size)(pool, keys_values, *places)

    def targets(self, hidden: npt.NDArray[np.float32], ids: npt.NDArray[np.int32]) -> jax.Array:
        """Logits of one id per hidden state."""
        of_head = _put(self.model, (hidden, ids), WHOLE)
        return self.compiler.get(Kind.TARGETS, len(ids))(self.weights.ends, *of_head)

    def normalizer(self, hidden: npt.NDArray[np.float32]) -> jax.Array:
        """Log of the summed exponentials of all logits, per hidden state."""
        program = self.compiler.get(Kind.NORMALIZER, len(hidden))
        return program(self.weights.ends, _put(self.model, hidden, WHOLE))

    def argmax(self, hidden: npt.NDArray[np.float32]) -> tuple[jax.Array, jax.Array, jax.Array]:
        """``normalizer``'s values, and per hidden state the id of the highest logit, and that logit."""
        program = self.compiler.get(Kind.ARGMAX, len(hidden))
        return program(self.weights.ends, _put(self.model, hidden, WHOLE))


def _on_device(model: Model, inputs: Inputs, prefixes: Prefixes) -> tuple[jax.Array, AttentionContext]:
    """A launch's token ids and context, on the device."""
    of_calls = (inputs.tokens, inputs.segments, inputs.positions, inputs.prefixes)
    host = (*of_calls, prefixes.tables, prefixes.lengths)
    tokens, segments, positions, seen, tables, lengths = _put(model, host, (*[CALLS] * len(of_calls), WHOLE, WHOLE))
    return tokens, AttentionContext(segments, positions, seen, prefixes.pool, tables, lengths)


def _stacked(model: Model, calls: Sequence[Inputs]) -> Inputs:
    """The inputs of one launch; where there are fewer calls than it runs, the others are padding."""
    if model.at_once == 1:
        return calls[0]
    idle = Inputs(*(np.full_like(array, fill) for array, fill in zip(calls[0], (-1, 0, 0, -1, 0), strict=True)))
    return Inputs(
        *(np.concatenate(arrays) for arrays in zip(*calls, *[idle] * (model.at_once - len(calls)), strict=True))
    )


def _put(model: Model, host: Any, spec: P | tuple[P, ...]) -> Any:
    """Host arrays on the device, or on all devices.

    Args:
        spec: for all of ``host``, or of each array.
    """
    return jax.device_put(host) if model.mesh is None else put(host, spec, model.mesh)
