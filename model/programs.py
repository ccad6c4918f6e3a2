"""The programs on the device: compiled ahead of time, one per kind and size, and how they follow each other.

The layers run in one of two ways. ``LayerPrograms``: one launch per layer, each layer's weights an argument of their
own; launches are cheap on a CPU, and XLA there copies whatever a loop cuts from stacked weights. ``ModelPrograms``: a
loop over stacked layers within one program, for devices where a launch is dear and a cut is free.

On a mesh of devices (``model.sharding``) the same functions run on every device's part of the arrays.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from flax import nnx
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from model import compiled, decoder
from model.attention import AttentionContext, to_pool
from model.config import ModelConfig
from model.contract import PAGE_TOKENS
from model.cpu import linear
from model.families.registry import Abstract
from model.logprobs import argmax, log_normalizer, target_logits
from model.plan import Shape, reads_of
from model.sharding import DATA, RULES, abstract, put

Size = Shape | int
State = nnx.State[Any, Any]


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


class Span(NamedTuple):
    """Tokens ``start`` to ``start + length`` of a prefill call, which belong into page ``page`` from ``offset`` on."""

    page: int
    offset: int
    start: int
    length: int


class Definition(NamedTuple):
    """What one program computes, for one device.

    Attributes:
        arguments: shapes of one device's part.
        specs: how each argument lies on a mesh.
        results: the same of what is returned.
        donated: numbers of the arguments that it may overwrite.
    """

    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    specs: tuple[Any, ...]
    results: Any
    donated: tuple[int, ...] = ()


WHOLE, CALLS = RULES.spec(), RULES.spec("calls")
POOL = RULES.spec(None, None, None, "kv_heads", None, None)
_CONTEXT: Any = (CALLS, CALLS, CALLS, POOL, WHOLE, WHOLE)
CONTEXT = AttentionContext(*_CONTEXT)
"""How the fields of a ``AttentionContext`` lie on a mesh."""


class Programs:
    """Programs that do not depend on how the layers run: the head's, and the one that fills pages.

    Args:
        ends: parameters of ``decoder.EmbeddingAndHead``.
        pool: shape and dtype of the page pool on one device, [pages, L, 2, K, page, H].
        tables: how many prefixes a call has, and the entries of each one's page table.
        folder: of compiled programs, see ``model.compiled``.
        mesh: that the parameters lie on; ``config``, ``abstract`` and ``pool`` are of one device's part. None: one
            device.
    """

    def __init__(
        self,
        config: ModelConfig,
        abstract: Abstract,
        ends: State,
        pool: jax.ShapeDtypeStruct,
        tables: tuple[int, int],
        folder: Path | None,
        mesh: Mesh | None,
    ) -> None:
        self._config = config
        self._ends_graph, self._block_graph = abstract.ends[0], abstract.block[0]
        self._code = f"{type(self).__name__} {self._ends_graph} {self._block_graph}"
        """With a program's kind and size it tells what is computed; the graphs hold all constants of the config."""
        self._ends = ends
        self._layers: Any
        self._abstract = abstract
        self._dtype = jax.tree.leaves(ends)[0].dtype
        self._pool = pool
        self._tables = tables
        self._folder = folder
        self._mesh = mesh
        self._compiled: dict[tuple[str, Size], Callable[..., Any]] = {}
        self.compilations = 0

    @property
    def weight_bytes(self) -> int:
        """Size of all parameters."""
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves((self._ends, self._layers)))

    @property
    def shards(self) -> int:
        """Devices that every layer is split over."""
        return self._config.shards

    @property
    def at_once(self) -> int:
        """Calls that one launch runs, each on other devices."""
        return 1 if self._mesh is None else self._mesh.shape[DATA]

    def empty_pool(self) -> jax.Array:
        """The page pool, zeros."""
        whole = self._pool if self._mesh is None else abstract(self._pool, POOL, self._mesh)
        return jnp.zeros(whole.shape, whole.dtype, device=whole.sharding)

    def rows(self, shape: Shape, inputs: Sequence[Inputs], prefixes: Prefixes) -> jax.Array:
        """Final normalised hidden states at the reads of up to ``at_once`` calls: float32 [calls * R, D]. Returns when
        launched."""
        raise NotImplementedError

    def prefill(self, size: int, inputs: Inputs, prefixes: Prefixes) -> Any:
        """Keys and values of ``size`` tokens in one bin, as ``write`` takes them. Returns when launched."""
        raise NotImplementedError

    def wanted(self, ladder: Sequence[Shape], chunks: Sequence[int]) -> list[tuple[str, Size]]:
        """Kinds and sizes that calls of these shapes and prefill chunks need."""
        raise NotImplementedError

    def write(self, pool: jax.Array, keys_values: Any, size: int, spans: Sequence[Span]) -> jax.Array:
        """The pool with keys and values of a prefill in its pages; ``pool`` is given away."""
        table = np.zeros((spans_of(size), len(Span._fields)), np.int32)
        table[: len(spans)] = np.array(spans)
        return self.get("write", size)(pool, keys_values, *self._put((table, np.array(len(spans), np.int32)), WHOLE))

    def targets(self, hidden: npt.NDArray[np.float32], ids: npt.NDArray[np.int32]) -> jax.Array:
        """Logits of one id per hidden state."""
        return self.get("targets", len(ids))(self._ends, *self._put((hidden, ids), WHOLE))

    def normalizer(self, hidden: npt.NDArray[np.float32]) -> jax.Array:
        """Log of the summed exponentials of all logits, per hidden state."""
        return self.get("normalizer", len(hidden))(self._ends, self._put(hidden, WHOLE))

    def argmax(self, hidden: npt.NDArray[np.float32]) -> tuple[jax.Array, jax.Array, jax.Array]:
        """``normalizer``'s values, and per hidden state the id of the highest logit, and that logit."""
        return self.get("argmax", len(hidden))(self._ends, self._put(hidden, WHOLE))

    def get(self, kind: str, size: Size) -> Callable[..., Any]:
        """The program, compiled now if ``warmup`` did not."""
        return self._compiled.get((kind, size)) or self.compile(kind, size)

    def compile(self, kind: str, size: Size) -> Callable[..., Any]:
        """Build, or find on disk, one program for one size."""
        function, arguments, donated = self._whole(self._definition(kind, size))
        with self._precision():
            program = compiled.program(f"{kind} {size} {self._code}", function, arguments, donated, self._folder)
        self.compilations += 1
        self._compiled[kind, size] = program
        return program

    def trace(self, kind: str, size: Size) -> jax.stages.Traced:
        """One program for one size, before it is lowered."""
        function, arguments, donated = self._whole(self._definition(kind, size))
        with self._precision():
            return jax.jit(function, donate_argnums=donated).trace(*arguments)

    def _precision(self) -> AbstractContextManager[None]:
        return jax.default_matmul_precision("highest" if self._dtype == jnp.float32 else "default")

    def _whole(self, made: Definition) -> tuple[Callable[..., Any], tuple[Any, ...], tuple[int, ...]]:
        """A program over all devices: its function, the shapes of its arguments, and which of them it may overwrite."""
        if self._mesh is None:
            return made.function, made.arguments, made.donated
        function = jax.shard_map(
            made.function, mesh=self._mesh, in_specs=made.specs, out_specs=made.results, check_vma=False
        )
        return function, abstract(made.arguments, made.specs, self._mesh), made.donated

    def _put(self, host: Any, spec: Any) -> Any:
        """Host arrays on the device, or on all devices.

        Args:
            spec: for all of ``host``, or of each array.
        """
        return jax.device_put(host) if self._mesh is None else put(host, spec, self._mesh)

    def _on_device(self, inputs: Inputs, prefixes: Prefixes) -> tuple[jax.Array, AttentionContext]:
        """A launch's token ids and context, on the device."""
        of_calls = (inputs.tokens, inputs.segments, inputs.positions, inputs.prefixes)
        host = (*of_calls, prefixes.tables, prefixes.lengths)
        tokens, segments, positions, seen, tables, lengths = self._put(host, (*[CALLS] * len(of_calls), WHOLE, WHOLE))
        return tokens, AttentionContext(segments, positions, seen, prefixes.pool, tables, lengths)

    def _parameters(self, held: State, part: State, *leading: None) -> tuple[Any, Any]:
        """Parameters as a program's argument, and how they lie on a mesh.

        Args:
            held: on the device.
            part: shapes of one device's.
            leading: axes before those that the parameters name.
        """
        flat: Any = nnx.to_flat_state(part)
        specs = nnx.from_flat_state([(path, leaf.replace(RULES.spec(*leading, *leaf.axes))) for path, leaf in flat])
        return (held if self._mesh is None else part), specs

    def _stacked(self, calls: Sequence[Inputs]) -> Inputs:
        """The inputs of one launch; where there are fewer calls than it runs, the others are padding."""
        if self.at_once == 1:
            return calls[0]
        idle = Inputs(*(np.full_like(array, fill) for array, fill in zip(calls[0], (-1, 0, 0, -1, 0), strict=True)))
        return Inputs(
            *(np.concatenate(arrays) for arrays in zip(*calls, *[idle] * (self.at_once - len(calls)), strict=True))
        )

    def _of_all_calls(self, hidden: jax.Array) -> jax.Array:
        """Every device, and so every host, has the results of all calls."""
        return hidden if self.at_once == 1 else lax.all_gather(hidden, DATA, tiled=True)

    def _definition(self, kind: str, size: Any) -> Definition:
        ends_graph, width, softcap = self._ends_graph, self._config.width, self._config.logit_softcap

        def targets(ends: Any, hidden: Any, ids: Any) -> jax.Array:
            merged = nnx.merge(ends_graph, ends)
            return target_logits(hidden, ids, merged.head_weights(), softcap, merged.head_split())

        def normalizer(ends: Any, hidden: Any) -> jax.Array:
            merged = nnx.merge(ends_graph, ends)
            if self._config.native:
                head = merged.head_weights()
                return linear.log_normalizer(hidden.astype(head.dtype), head, softcap)
            return log_normalizer(hidden, merged.head_weights(), softcap, merged.head_split())

        def highest(ends: Any, hidden: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
            merged = nnx.merge(ends_graph, ends)
            return argmax(hidden, merged.head_weights(), softcap, merged.head_split())

        ends, specs = self._parameters(self._ends, self._abstract.ends[1])
        match kind:
            case "targets":
                return Definition(
                    targets, (ends, _float32(size, width), _int32(size)), (specs, WHOLE, WHOLE), results=WHOLE
                )
            case "normalizer":
                return Definition(normalizer, (ends, _float32(size, width)), (specs, WHOLE), results=WHOLE)
            case "argmax":
                return Definition(highest, (ends, _float32(size, width)), (specs, WHOLE), results=WHOLE)
            case "write":
                arguments = (self._pool, self._written(size), _int32(spans_of(size), len(Span._fields)), _int32())
                return Definition(_write, arguments, (POOL, self._kept, WHOLE, WHOLE), POOL, donated=(0,))
            case _:
                raise ValueError(f"no program {kind!r}")

    _kept: P
    """How each array that ``prefill`` returns lies on a mesh."""

    def _written(self, size: int) -> Any:
        """Shapes of what ``prefill`` returns."""
        raise NotImplementedError

    def _context(self, segments: jax.ShapeDtypeStruct) -> AttentionContext:
        tokens = _int32(segments.shape[0] * segments.shape[1])
        stored: Any = (self._pool, _int32(*self._tables), _int32(self._tables[0]))
        shapes: Any = AttentionContext(segments, tokens, tokens, *stored)  # pyright: ignore[reportArgumentType]
        return shapes


class LayerPrograms(Programs):
    """One program launch per layer.

    Args:
        layers: each layer's parameters.
    """

    _kept = RULES.spec(None, None, "kv_heads", None)

    def __init__(self, *args: Any, layers: Sequence[State]) -> None:
        super().__init__(*args)
        self._layers = layers
        self._numbers = [self._put(np.array(number, np.int32), WHOLE) for number in range(len(layers))]

    def rows(self, shape: Shape, inputs: Sequence[Inputs], prefixes: Prefixes) -> jax.Array:
        stacked = self._stacked(inputs)
        x, angles, context = self._begin(stacked, prefixes)
        # What is read sees no bins, only rows: one program serves all shapes of as many tokens.
        reads, flat = self._put((stacked.reads, stacked.segments.reshape(self.at_once, -1)), CALLS)
        layer = self.get("layer", shape)
        for number, weights in zip(self._numbers[:-1], self._layers[:-1], strict=True):
            x = layer(weights, x, angles, context, number)
        context, read = context._replace(segments=flat), self.get("read", shape.tokens)
        return read(self._ends, self._layers[-1], x, angles, context, self._numbers[-1], reads)

    def prefill(self, size: int, inputs: Inputs, prefixes: Prefixes) -> Any:
        x, angles, context = self._begin(self._stacked([inputs] * self.at_once), prefixes)
        layer = self.get("keep", size)
        kept: list[jax.Array] = []
        for number, weights in zip(self._numbers[:-1], self._layers[:-1], strict=True):
            x, keys_values = layer(weights, x, angles, context, number)
            kept.append(keys_values)
        return (*kept, self.get("last", size)(self._layers[-1], x, angles))

    def wanted(self, ladder: Sequence[Shape], chunks: Sequence[int]) -> list[tuple[str, Size]]:
        called = sorted({shape.tokens for shape in ladder})
        wanted: list[tuple[str, Size]] = [("layer", shape) for shape in ladder]
        wanted += [(kind, size) for size in chunks for kind in ("keep", "last", "write")]
        wanted += [("read", tokens) for tokens in called]
        return wanted + [("embed", tokens) for tokens in sorted({*chunks, *called})]

    def _begin(self, inputs: Inputs, prefixes: Prefixes) -> tuple[Any, Any, AttentionContext]:
        """The first layer's input, and what all layers take, on the device once for all of them."""
        tokens, context = self._on_device(inputs, prefixes)
        embed = self.get("embed", len(inputs.tokens) // self.at_once)
        x, angles = embed(self._ends, tokens, context.positions)
        return x, angles, context

    def _definition(self, kind: str, size: Any) -> Definition:
        ends_graph, block_graph, final = self._ends_graph, self._block_graph, self._config.layers - 1
        tokens = int(size.tokens if isinstance(size, Shape) else size)
        segments = _int32(size.bins, size.width) if isinstance(size, Shape) else _int32(1, size)

        def embed(ends: Any, tokens: Any, positions: Any) -> Any:
            return nnx.merge(ends_graph, ends).embed(tokens, positions)

        def layer(weights: Any, x: Any, angles: Any, context: Any, number: Any) -> Any:
            return nnx.merge(block_graph, weights)(x, angles, context, number)[0]

        def keep(weights: Any, x: Any, angles: Any, context: Any, number: Any) -> Any:
            return nnx.merge(block_graph, weights)(x, angles, context, number)

        def last(weights: Any, x: Any, angles: Any) -> Any:
            return nnx.merge(block_graph, weights).keys_values(x, angles, final)

        def read(ends: Any, weights: Any, x: Any, angles: Any, context: Any, number: Any, reads: Any) -> Any:
            hidden = nnx.merge(block_graph, weights).forward_reads(x, angles, context, number, reads)
            return self._of_all_calls(nnx.merge(ends_graph, ends).norm(hidden))

        ends, ends_specs = self._parameters(self._ends, self._abstract.ends[1])
        weights, specs = self._parameters(self._layers[0], self._abstract.block[1])
        angles = jax.eval_shape(lambda positions: decoder.all_angles(self._config, positions), _int32(tokens))
        turned = RULES.spec(*[None] * (angles[0].ndim - 2), "calls", None)
        x = _float32(tokens, self._config.width)
        context = self._context(segments)
        arguments = (weights, x, angles, context, _int32())
        places = (specs, CALLS, turned, CONTEXT, WHOLE)
        match kind:
            case "embed":
                arguments = (ends, _int32(tokens), _int32(tokens))
                return Definition(embed, arguments, (ends_specs, CALLS, CALLS), (CALLS, turned))
            case "layer":
                return Definition(layer, arguments, places, CALLS, donated=(1,))
            case "keep":
                return Definition(keep, arguments, places, (CALLS, self._kept), donated=(1,))
            case "last":
                return Definition(last, arguments[:3], places[:3], self._kept)
            case "read":
                arguments = (ends, *arguments, _int32(reads_of(tokens)))
                return Definition(read, arguments, (ends_specs, *places, CALLS), WHOLE)
            case _:
                return super()._definition(kind, size)

    def _written(self, size: int) -> Any:
        one = jax.ShapeDtypeStruct((2, size, self._config.kv_heads, self._config.head_width), self._dtype)
        return (one,) * self._config.layers


class ModelPrograms(Programs):
    """One program launch for all layers, by a loop over stacked parameters: it compiles in the time of one layer.

    Args:
        layers: parameters of all layers, each array with a leading axis [L].
    """

    _kept = RULES.spec(None, None, None, "kv_heads", None)

    def __init__(self, *args: Any, layers: State) -> None:
        super().__init__(*args)
        self._layers = layers

    def rows(self, shape: Shape, inputs: Sequence[Inputs], prefixes: Prefixes) -> jax.Array:
        stacked = self._stacked(inputs)
        reads = self._put(stacked.reads, CALLS)
        return self.get("rows", shape)(*self._arguments(stacked, prefixes), reads)

    def prefill(self, size: int, inputs: Inputs, prefixes: Prefixes) -> Any:
        return self.get("prefill", size)(*self._arguments(self._stacked([inputs] * self.at_once), prefixes))

    def wanted(self, ladder: Sequence[Shape], chunks: Sequence[int]) -> list[tuple[str, Size]]:
        wanted: list[tuple[str, Size]] = [("rows", shape) for shape in ladder]
        return wanted + [(kind, size) for size in chunks for kind in ("prefill", "write")]

    def _arguments(self, inputs: Inputs, prefixes: Prefixes) -> tuple[Any, ...]:
        """What ``rows`` and ``prefill`` both take."""
        tokens, context = self._on_device(inputs, prefixes)
        return self._ends, self._layers, tokens, context.positions, context

    def _definition(self, kind: str, size: Any) -> Definition:
        ends_graph, block_graph, last = self._ends_graph, self._block_graph, self._config.layers - 1

        def block(layers: Any, number: Any) -> Any:
            cut = jax.tree.map(lambda p: lax.dynamic_index_in_dim(p, number, keepdims=False), layers)
            return nnx.merge(block_graph, cut)

        def rows(ends: Any, layers: Any, tokens: Any, positions: Any, context: Any, reads: Any) -> Any:
            x, angles = nnx.merge(ends_graph, ends).embed(tokens, positions)
            x = lax.fori_loop(0, last, lambda n, x: block(layers, n)(x, angles, context, n)[0], x)
            hidden = block(layers, last).forward_reads(x, angles, context, last, reads)
            return self._of_all_calls(nnx.merge(ends_graph, ends).norm(hidden))

        def prefill(ends: Any, layers: Any, tokens: Any, positions: Any, context: Any) -> Any:
            x, angles = nnx.merge(ends_graph, ends).embed(tokens, positions)
            kept = jnp.zeros((last + 1, *self._written(len(tokens)).shape[1:]), self._dtype)

            def step(n: Any, carry: Any) -> Any:
                x, kept = carry
                x, keys_values = block(layers, n)(x, angles, context, n)
                return x, lax.dynamic_update_index_in_dim(kept, keys_values, n, 0)

            x, kept = lax.fori_loop(0, last, step, (x, kept))
            return lax.dynamic_update_index_in_dim(kept, block(layers, last).keys_values(x, angles, last), last, 0)

        if kind not in ("rows", "prefill"):
            return super()._definition(kind, size)
        ends, ends_specs = self._parameters(self._ends, self._abstract.ends[1])
        stack = stack_of(self._abstract.block[1], last + 1)
        layers, specs = self._parameters(self._layers, stack, None)
        tokens = _int32(size.tokens if isinstance(size, Shape) else size)
        segments = _int32(size.bins, size.width) if isinstance(size, Shape) else _int32(1, size)
        arguments = (ends, layers, tokens, tokens, self._context(segments))
        places = (ends_specs, specs, CALLS, CALLS, CONTEXT)
        if kind == "rows":
            return Definition(rows, (*arguments, _int32(size.reads)), (*places, CALLS), WHOLE)
        return Definition(prefill, arguments, places, self._kept)

    def _written(self, size: int) -> Any:
        c = self._config
        return jax.ShapeDtypeStruct((c.layers, 2, size, c.kv_heads, c.head_width), self._dtype)


def stack_of(layer: State, count: int) -> State:
    """Shapes of ``count`` layers' parameters, stacked, from one's."""
    return jax.tree.map(lambda p: jax.ShapeDtypeStruct((count, *p.shape), p.dtype), layer)


def spans_of(size: int) -> int:
    """Spans that a prefill call of ``size`` tokens has room for: of one prefix, wherever it begins in a page, or of
    several shorter ones."""
    return max((size + PAGE_TOKENS - 2) // PAGE_TOKENS + 1, size // 16)


def _write(pool: Any, keys_values: Any, spans: Any, count: Any) -> Any:
    """See ``Programs.write``; ``keys_values`` is [L, 2, M, K, H], or a tuple of its L parts."""
    stacked = jnp.stack(keys_values) if isinstance(keys_values, tuple) else keys_values
    by_head = to_pool(stacked).transpose(0, 1, 3, 2, 4)  # L 2 K M H
    around = [(0, 0)] * 3 + [(PAGE_TOKENS, PAGE_TOKENS), (0, pool.shape[5] - by_head.shape[4])]
    padded = jnp.pad(by_head, around)
    places = jnp.arange(PAGE_TOKENS)

    def step(number: Any, pool: Any) -> Any:
        page, offset, start, length = spans[number]
        first = (0, 0, 0, PAGE_TOKENS + start - offset, 0)
        new = lax.dynamic_slice(padded, first, (*padded.shape[:3], PAGE_TOKENS, padded.shape[4]))
        old = lax.dynamic_slice(pool, (page, 0, 0, 0, 0, 0), (1, *pool.shape[1:]))
        written = (places >= offset) & (places < offset + length)
        kept = jnp.where(written[None, None, None, None, :, None], new[None], old)
        return lax.dynamic_update_slice(pool, kept, (page, 0, 0, 0, 0, 0))

    return lax.fori_loop(0, count, step, pool)


def _int32(*dims: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(dims, jnp.int32)


def _float32(*dims: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(dims, jnp.float32)
