"""What runs on the device: programs compiled ahead of time, one per kind and size, and how they follow each other.

The layers run in one of two ways. ``LayerPrograms``: one launch per layer, each layer's weights an argument of their
own; launches are cheap on a CPU, and XLA there copies whatever a loop cuts from stacked weights. ``ModelPrograms``: a
loop over stacked layers within one program, for devices where a launch is dear and a cut is free.
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

from model import compiled
from model.attention import Context, to_pool
from model.config import ModelConfig
from model.logprobs import argmax, log_normalizer, target_logits
from model.pages import PAGE_TOKENS
from model.plan import Shape, reads_of
from model.registry import Abstract

Size = Shape | int
State = nnx.State[Any, Any]


class Inputs(NamedTuple):
    """Host arrays of one call.

    Attributes:
        tokens: [M] ids.
        positions: [M], each token's place in its sequence.
        segments: [B, T], see ``attention.Context``.
        reads: [R] flat indices of the tokens whose hidden state is wanted; not used by ``prefill``.
    """

    tokens: npt.NDArray[np.int32]
    positions: npt.NDArray[np.int32]
    segments: npt.NDArray[np.int32]
    reads: npt.NDArray[np.int32]


class Prefix(NamedTuple):
    """What all rows of a call attend to besides themselves: device pool, page table and length of the prefix."""

    pool: jax.Array
    table: npt.NDArray[np.int32]
    length: int


class Programs:
    """Programs that do not depend on how the layers run: the head's, and the one that fills pages.

    Args:
        ends: parameters of ``Family.ends``.
        pool: shape and dtype of the page pool, [pages, L, 2, K, page, H].
        slots: entries of a page table.
        folder: of compiled programs, see ``model.compiled``.
    """

    def __init__(
        self,
        config: ModelConfig,
        abstract: Abstract,
        ends: State,
        pool: jax.ShapeDtypeStruct,
        slots: int,
        folder: Path | None,
    ) -> None:
        self._config = config
        self._ends_graph, self._block_graph = abstract.ends[0], abstract.block[0]
        self._code = f"{type(self).__name__} {self._ends_graph} {self._block_graph}"
        """With a program's kind and size it tells what is computed; the graphs hold all constants of the config."""
        self._ends = ends
        self._layers: Any
        self._dtype = jax.tree.leaves(ends)[0].dtype
        self._pool = pool
        self._slots = slots
        self._folder = folder
        self._compiled: dict[tuple[str, Size], Callable[..., Any]] = {}
        self.compilations = 0

    @property
    def weight_bytes(self) -> int:
        """Of all parameters."""
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves((self._ends, self._layers)))

    def rows(self, shape: Shape, inputs: Inputs, prefix: Prefix) -> jax.Array:
        """Final normalised hidden states at the reads: float32 [R, D]. Returns when launched."""
        raise NotImplementedError

    def prefill(self, size: int, inputs: Inputs, prefix: Prefix) -> Any:
        """Keys and values of ``size`` tokens in one bin, as ``write`` takes them. Returns when launched."""
        raise NotImplementedError

    def wanted(self, ladder: Sequence[Shape], chunks: Sequence[int]) -> list[tuple[str, Size]]:
        """Kinds and sizes that calls of these shapes and prefill chunks need."""
        raise NotImplementedError

    def write(self, pool: jax.Array, keys_values: Any, size: int, pages: Sequence[int], offset: int, length: int):
        """The pool with the first ``length`` of a prefill's keys and values in ``pages``, from ``offset`` on.

        ``pool`` is given away. Pages that the chunk could touch but does not, write to page 0, which nobody reads.
        """
        table = np.zeros(touched_pages(size), np.int32)
        table[: len(pages)] = pages
        return self.get("write", size)(pool, keys_values, table, np.int32(offset), np.int32(length))

    def targets(self, hidden: npt.NDArray[np.float32], ids: npt.NDArray[np.int32]) -> jax.Array:
        """Logits of one id per hidden state."""
        return self.get("targets", len(ids))(self._ends, hidden, ids)

    def normalizer(self, hidden: npt.NDArray[np.float32]) -> jax.Array:
        """Log of the summed exponentials of all logits, per hidden state."""
        return self.get("normalizer", len(hidden))(self._ends, hidden)

    def argmax(self, hidden: npt.NDArray[np.float32]) -> tuple[jax.Array, jax.Array, jax.Array]:
        """``normalizer``'s values, and per hidden state the id of the highest logit, and that logit."""
        return self.get("argmax", len(hidden))(self._ends, hidden)

    def get(self, kind: str, size: Size) -> Callable[..., Any]:
        """The program, compiled now if ``warmup`` did not."""
        return self._compiled.get((kind, size)) or self.compile(kind, size)

    def compile(self, kind: str, size: Size) -> Callable[..., Any]:
        """Build, or find on disk, one program for one size."""
        function, arguments, donated = self._definition(kind, size)
        with self._precision():
            program = compiled.program(f"{kind} {size} {self._code}", function, arguments, donated, self._folder)
        self.compilations += 1
        self._compiled[kind, size] = program
        return program

    def trace(self, kind: str, size: Size) -> jax.stages.Traced:
        """One program for one size, before it is lowered."""
        function, arguments, donated = self._definition(kind, size)
        with self._precision():
            return jax.jit(function, donate_argnums=donated).trace(*arguments)

    def _precision(self) -> AbstractContextManager[None]:
        return jax.default_matmul_precision("highest" if self._dtype == jnp.float32 else "default")

    def _definition(self, kind: str, size: Any) -> tuple[Callable[..., Any], tuple[Any, ...], tuple[int, ...]]:
        """A program's function, the shapes of its arguments, and which of them it may overwrite."""
        ends_graph, width, softcap = self._ends_graph, self._config.width, self._config.logit_softcap

        def targets(ends: Any, hidden: Any, ids: Any) -> jax.Array:
            return target_logits(hidden, ids, nnx.merge(ends_graph, ends).head_weights(), softcap)

        def normalizer(ends: Any, hidden: Any) -> jax.Array:
            return log_normalizer(hidden, nnx.merge(ends_graph, ends).head_weights(), softcap)

        def highest(ends: Any, hidden: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
            return argmax(hidden, nnx.merge(ends_graph, ends).head_weights(), softcap)

        match kind:
            case "targets":
                return targets, (self._ends, _float32(size, width), _int32(size)), ()
            case "normalizer":
                return normalizer, (self._ends, _float32(size, width)), ()
            case "argmax":
                return highest, (self._ends, _float32(size, width)), ()
            case "write":
                arguments = (self._pool, self._written(size), _int32(touched_pages(size)), _int32(), _int32())
                return _write, arguments, (0,)
            case _:
                raise ValueError(f"no program {kind!r}")

    def _written(self, size: int) -> Any:
        """Shapes of what ``prefill`` returns."""
        raise NotImplementedError

    def _context(self, segments: jax.ShapeDtypeStruct) -> Context:
        tokens = _int32(segments.shape[0] * segments.shape[1])
        shapes: Any = Context(segments, tokens, self._pool, _int32(self._slots), _int32())  # pyright: ignore[reportArgumentType]
        return shapes


class LayerPrograms(Programs):
    """One program launch per layer.

    Args:
        layers: each layer's parameters.
    """

    def __init__(self, *args: Any, layers: Sequence[State]) -> None:
        super().__init__(*args)
        self._layers = layers
        self._numbers = [jnp.int32(number) for number in range(len(layers))]

    def rows(self, shape: Shape, inputs: Inputs, prefix: Prefix) -> jax.Array:
        x, angles, context = self._begin(inputs, prefix)
        reads, flat = jax.device_put((inputs.reads, inputs.segments.reshape(1, -1)))
        layer = self.get("layer", shape)
        for number, weights in zip(self._numbers[:-1], self._layers[:-1], strict=True):
            x = layer(weights, x, angles, context, number)
        # What is read sees no bins, only rows: one program serves all shapes of as many tokens.
        context, read = context._replace(segments=flat), self.get("read", shape.tokens)
        return read(self._ends, self._layers[-1], x, angles, context, self._numbers[-1], reads)

    def prefill(self, size: int, inputs: Inputs, prefix: Prefix) -> Any:
        x, angles, context = self._begin(inputs, prefix)
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

    def _begin(self, inputs: Inputs, prefix: Prefix) -> tuple[Any, Any, Context]:
        """The first layer's input, and what all layers take, on the device once for all of them."""
        host = (inputs.tokens, inputs.positions, inputs.segments, prefix.table, np.int32(prefix.length))
        tokens, positions, segments, table, length = jax.device_put(host)
        x, angles = self.get("embed", len(inputs.tokens))(self._ends, tokens, positions)
        return x, angles, Context(segments, positions, prefix.pool, table, length)

    def _definition(self, kind: str, size: Any) -> tuple[Callable[..., Any], tuple[Any, ...], tuple[int, ...]]:
        ends_graph, block_graph, final = self._ends_graph, self._block_graph, self._config.layers - 1
        weights, tokens = self._layers[0], int(size.tokens if isinstance(size, Shape) else size)
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
            hidden = nnx.merge(block_graph, weights).read(x, angles, context, number, reads)
            return nnx.merge(ends_graph, ends).norm(hidden)

        embedded = (self._ends, _int32(tokens), _int32(tokens))
        if kind == "embed":
            return embed, embedded, ()
        x, angles = jax.eval_shape(embed, *embedded)
        arguments = (weights, x, angles, self._context(segments), _int32())
        match kind:
            case "layer":
                return layer, arguments, (1,)
            case "keep":
                return keep, arguments, (1,)
            case "last":
                return last, (weights, x, angles), ()
            case "read":
                return read, (self._ends, *arguments, _int32(reads_of(tokens))), ()
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

    def __init__(self, *args: Any, layers: State) -> None:
        super().__init__(*args)
        self._layers = layers

    def rows(self, shape: Shape, inputs: Inputs, prefix: Prefix) -> jax.Array:
        return self.get("rows", shape)(*self._arguments(inputs, prefix), inputs.reads)

    def prefill(self, size: int, inputs: Inputs, prefix: Prefix) -> Any:
        return self.get("prefill", size)(*self._arguments(inputs, prefix))

    def wanted(self, ladder: Sequence[Shape], chunks: Sequence[int]) -> list[tuple[str, Size]]:
        wanted: list[tuple[str, Size]] = [("rows", shape) for shape in ladder]
        return wanted + [(kind, size) for size in chunks for kind in ("prefill", "write")]

    def _arguments(self, inputs: Inputs, prefix: Prefix) -> tuple[Any, ...]:
        """What ``rows`` and ``prefill`` both take."""
        host: Any = (inputs.segments, inputs.positions, prefix.pool, prefix.table, np.int32(prefix.length))
        context = Context(*host)
        return self._ends, self._layers, inputs.tokens, inputs.positions, context

    def _definition(self, kind: str, size: Any) -> tuple[Callable[..., Any], tuple[Any, ...], tuple[int, ...]]:
        ends_graph, block_graph, last = self._ends_graph, self._block_graph, self._config.layers - 1

        def block(layers: Any, number: Any) -> Any:
            cut = jax.tree.map(lambda p: lax.dynamic_index_in_dim(p, number, keepdims=False), layers)
            return nnx.merge(block_graph, cut)

        def rows(ends: Any, layers: Any, tokens: Any, positions: Any, context: Any, reads: Any) -> Any:
            x, angles = nnx.merge(ends_graph, ends).embed(tokens, positions)
            x = lax.fori_loop(0, last, lambda n, x: block(layers, n)(x, angles, context, n)[0], x)
            return nnx.merge(ends_graph, ends).norm(block(layers, last).read(x, angles, context, last, reads))

        def prefill(ends: Any, layers: Any, tokens: Any, positions: Any, context: Any) -> Any:
            x, angles = nnx.merge(ends_graph, ends).embed(tokens, positions)
            kept = jnp.zeros((last + 1, *self._written(len(tokens)).shape[1:]), self._dtype)

            def step(n: Any, carry: Any) -> Any:
                x, kept = carry
                x, keys_values = block(layers, n)(x, angles, context, n)
                return x, lax.dynamic_update_index_in_dim(kept, keys_values, n, 0)

            x, kept = lax.fori_loop(0, last, step, (x, kept))
            return lax.dynamic_update_index_in_dim(kept, block(layers, last).keys_values(x, angles, last), last, 0)

        match kind:
            case "rows":
                tokens, context = _int32(size.tokens), self._context(_int32(size.bins, size.width))
                return rows, (self._ends, self._layers, tokens, tokens, context, _int32(size.reads)), ()
            case "prefill":
                context = self._context(_int32(1, size))
                return prefill, (self._ends, self._layers, _int32(size), _int32(size), context), ()
            case _:
                return super()._definition(kind, size)

    def _written(self, size: int) -> Any:
        c = self._config
        return jax.ShapeDtypeStruct((c.layers, 2, size, c.kv_heads, c.head_width), self._dtype)


def touched_pages(size: int) -> int:
    """Pages that ``size`` tokens in a row may lie in, wherever they begin."""
    return (size + PAGE_TOKENS - 2) // PAGE_TOKENS + 1


def _write(pool: Any, keys_values: Any, pages: Any, offset: Any, length: Any) -> Any:
    """See ``Programs.write``; ``keys_values`` is [L, 2, M, K, H], or a tuple of its L parts."""
    stacked = jnp.stack(keys_values) if isinstance(keys_values, tuple) else keys_values
    by_head = to_pool(stacked).transpose(0, 1, 3, 2, 4)  # L 2 K M H
    count = pages.shape[0]
    room = jnp.zeros((*by_head.shape[:3], count * PAGE_TOKENS, pool.shape[5]), by_head.dtype)
    room = lax.dynamic_update_slice(room, by_head, (0, 0, 0, offset, 0))
    positions = jnp.arange(count * PAGE_TOKENS)
    new = (positions >= offset) & (positions < offset + length)
    for i in range(count):
        page = slice(i * PAGE_TOKENS, (i + 1) * PAGE_TOKENS)
        place = (pages[i], 0, 0, 0, 0, 0)
        old = lax.dynamic_slice(pool, place, (1, *pool.shape[1:]))
        kept = jnp.where(new[page][None, None, None, None, :, None], room[None, :, :, :, page], old)
        pool = lax.dynamic_update_slice(pool, kept, place)
    return pool


def _int32(*dims: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(dims, jnp.int32)


def _float32(*dims: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(dims, jnp.float32)
