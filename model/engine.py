"""A loaded model as a scorer of token batches: one compiled program per shape, nothing compiled late.

Life of a batch: ``plan.groups`` finds shared prefixes and rows; each group's prefix is looked up in, or prefilled into,
the pages of the prefix cache; the group's rows run in packed calls that return hidden states at the read positions;
the head turns those into logits and, where asked, log-probabilities.
"""

import concurrent.futures
import itertools
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from flax import nnx

from model import checkpoint, config, plan, registry
from model.attention import Context
from model.logprobs import log_normalizer, target_logits
from model.pages import PAGE_TOKENS, CacheStats, Node, PrefixCache

Dtype = Literal["float32", "bfloat16"]
Progress = Callable[[int, int, str], None]

CHUNKS = (PAGE_TOKENS, 2 * PAGE_TOKENS, 4 * PAGE_TOKENS)
"""Sizes of prefix prefill calls, in tokens."""
HEAD_ROWS = (1, 8, 32, 128)
"""Sizes of head calls, in hidden states."""
TARGET_ROWS = (8, 64, 512)
"""Sizes of target-logit calls, in (hidden state, target) pairs."""


class Batch(Protocol):
    """Packed sequences and reads, as ``serve_app.contract.TokenBatch`` defines them."""

    @property
    def tokens(self) -> npt.NDArray[np.int32]: ...
    @property
    def offsets(self) -> npt.NDArray[np.int64]: ...
    @property
    def read_sequences(self) -> npt.NDArray[np.int32]: ...
    @property
    def read_positions(self) -> npt.NDArray[np.int32]: ...
    @property
    def targets(self) -> npt.NDArray[np.int32]: ...
    @property
    def target_offsets(self) -> npt.NDArray[np.int64]: ...
    @property
    def vocab_logprobs(self) -> bool: ...


@dataclass(frozen=True, slots=True)
class Result:
    """See ``serve_app.contract.BatchResult``."""

    values: npt.NDArray[np.float32]
    computed_tokens: npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class Info:
    """See ``serve_app.contract.ModelInfo``."""

    vocab_size: int
    max_prompt_tokens: int
    context_length: int
    dtype: str
    architecture: str
    platform: str
    buckets: tuple[str, ...]


class Engine:
    """Scores token batches. One thread calls it.

    Args:
        model_config: of the architecture.
        graph: of the NNX model, see ``nnx.split``.
        state: its parameters, on the device.
        max_row_tokens: the widest bin; longer rows are computed in chunks.
        call_tokens: tokens in a full call.
        prefix_cache_bytes: device memory for prefixes; more where one prompt of ``max_prompt_tokens`` needs it.
        max_prompt_tokens: the longest sequence; None: the model's context. A long context costs memory at start-up.
    """

    def __init__(
        self,
        model_config: config.ModelConfig,
        graph: nnx.GraphDef[Any],
        state: nnx.State[Any, Any],
        *,
        max_row_tokens: int = 512,
        call_tokens: int = 1024,
        prefix_cache_bytes: int = 384 * 2**20,
        max_prompt_tokens: int | None = None,
    ) -> None:
        self._config = model_config
        self._graph = graph
        self._state = state
        self._dtype = jax.tree.leaves(state)[0].dtype
        self._longest = min(model_config.context_length, max_prompt_tokens or model_config.context_length)
        width = min(max_row_tokens, -(-self._longest // 16) * 16)
        self._ladder = plan.shapes(width, max(call_tokens, width))
        self._slots = -(-self._longest // PAGE_TOKENS) + max(CHUNKS) // PAGE_TOKENS
        page = (model_config.layers, 2, model_config.kv_heads, PAGE_TOKENS, model_config.head_width)
        pages = 1 + max(self._slots, prefix_cache_bytes // (int(np.prod(page)) * self._dtype.itemsize))
        self._pool_shape = (pages, *page)
        self._forget_prefixes()
        self._programs: dict[tuple[str, object], Callable[..., Any]] = {}
        self.compilations = 0

    @property
    def info(self) -> Info:
        return Info(
            vocab_size=self._config.vocab_size,
            max_prompt_tokens=self._longest,
            context_length=self._config.context_length,
            dtype=self._dtype.name,
            architecture=self._config.architecture,
            platform=jax.default_backend(),
            buckets=tuple(map(str, self._ladder)),
        )

    @property
    def cache_stats(self) -> CacheStats:
        return self._cache.stats

    def warmup(self, progress: Progress | None = None) -> None:
        """Compile every program that ``score`` can call, several at a time."""
        wanted: list[tuple[str, Any]] = [("rows", shape) for shape in self._ladder]
        wanted += [(kind, size) for kind in ("prefill", "write") for size in CHUNKS]
        wanted += [("normalizer", size) for size in HEAD_ROWS] + [("targets", size) for size in TARGET_ROWS]
        with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
            compiling = {pool.submit(self._compile, kind, size): f"{kind} {size}" for kind, size in wanted}
            for done, future in enumerate(concurrent.futures.as_completed(compiling), 1):
                future.result()
                if progress is not None:
                    progress(done, len(wanted), compiling[future])

    def score(self, batch: Batch) -> Result:
        """Values of all targets of all reads; see ``serve_app.contract.TokenBatch``.

        Raises:
            ValueError: a sequence is empty or longer than the model's context.
        """
        bounds = batch.offsets.tolist()
        sequences = [batch.tokens[a:b] for a, b in itertools.pairwise(bounds)]
        for number, tokens in enumerate(sequences):
            if not 0 < len(tokens) <= self._longest:
                raise ValueError(f"sequence {number} has {len(tokens)} tokens; this model reads 1 to {self._longest}")
        reads: list[list[int]] = [[] for _ in sequences]
        first_read = np.full(len(sequences), -1, np.int64)
        for number, (sequence, position) in enumerate(
            zip(batch.read_sequences.tolist(), batch.read_positions.tolist(), strict=True)
        ):
            if first_read[sequence] < 0:
                first_read[sequence] = number
            if reads[sequence] and reads[sequence][-1] >= position:
                raise ValueError(f"the reads of sequence {sequence} are not at ascending positions: {position}")
            reads[sequence].append(position)
        read_sequences = [number for number, positions in enumerate(reads) if positions]
        try:
            hidden, computed = self._hidden(sequences, reads, read_sequences, first_read)
            return Result(self._read(hidden, batch), np.minimum(computed, np.diff(batch.offsets)).astype(np.int32))
        except Exception:
            # The pool may have been given away to a call that failed, or hold pages that were never written.
            self._forget_prefixes()
            raise

    def _forget_prefixes(self) -> None:
        """Start with an empty pool."""
        self._pool = jnp.zeros(self._pool_shape, self._dtype)
        self._cache = PrefixCache(self._pool_shape[0])

    def _hidden(
        self,
        sequences: Sequence[plan.Tokens],
        reads: Sequence[Sequence[int]],
        read_sequences: Sequence[int],
        first_read: npt.NDArray[np.int64],
    ) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int32]]:
        """Hidden states of all reads, and the tokens computed for each sequence."""
        hidden = np.zeros((sum(map(len, reads)), self._config.width), np.float32)
        computed = np.zeros(len(sequences), np.int32)
        groups = plan.groups(
            [sequences[i] for i in read_sequences],
            [reads[i] for i in read_sequences],
            max_width=self._ladder[-1].width,
            max_reads=self._ladder[0].reads,
            min_saving=PAGE_TOKENS,
            page=PAGE_TOKENS,
        )
        pending: list[tuple[jax.Array, list[int]]] = []
        for group in groups:
            owner = read_sequences[group.prefix_of]
            prefix = sequences[owner][: group.prefix_length]
            path, missed = self._prefix(prefix)
            computed[owner] += missed
            table = np.zeros(self._slots, np.int32)
            table[: len(path)] = [node.page for node in path]
            context = (self._pool, table, np.int32(group.prefix_length))
            for call in plan.pack(group.rows, self._ladder):
                numbers: list[int] = []
                arrays = self._call_arrays(call, sequences, reads, read_sequences, first_read, numbers)
                pending.append((self._program("rows", call.shape)(self._state, *arrays, *context), numbers))
                for placement in call.placements:
                    computed[read_sequences[placement.row.sequence]] += placement.row.length
        for values, numbers in pending:
            hidden[numbers] = np.asarray(values)[: len(numbers)]
        return hidden, computed

    def _call_arrays(
        self,
        call: plan.Call,
        sequences: Sequence[plan.Tokens],
        reads: Sequence[Sequence[int]],
        numbering: Sequence[int],
        first_read: npt.NDArray[np.int64],
        numbers: list[int],
    ) -> tuple[npt.NDArray[np.int32], ...]:
        """A call's tokens, positions, segments and read indices; appends the batch's read numbers to ``numbers``."""
        shape = call.shape
        tokens, positions = np.zeros(shape.tokens, np.int32), np.zeros(shape.tokens, np.int32)
        segments = np.full(shape.tokens, -1, np.int32)
        indices = np.zeros(shape.reads, np.int32)
        for segment, placement in enumerate(call.placements):
            row = placement.row
            sequence = numbering[row.sequence]
            at = placement.bin * shape.width + placement.offset
            tokens[at : at + row.length] = sequences[sequence][row.start : row.stop]
            positions[at : at + row.length] = np.arange(row.start, row.stop)
            segments[at : at + row.length] = segment
            for order, position in enumerate(reads[sequence]):
                if row.start <= position < row.stop:
                    indices[len(numbers)] = at + position - row.start
                    numbers.append(int(first_read[sequence]) + order)
        return tokens, positions, segments.reshape(shape.bins, shape.width), indices

    def _prefix(self, prefix: plan.Tokens) -> tuple[list[Node], int]:
        """Pages that hold the prefix, prefilled where they are not in the cache; and how many tokens that took."""
        path = self._cache.lookup(prefix)
        cached = min(len(prefix), len(path) * PAGE_TOKENS)
        self._cache.count(hit=cached, missed=len(prefix) - cached)
        start = cached
        for size in plan.chunks(len(prefix) - cached, CHUNKS):
            tokens = prefix[start : start + size]
            with self._cache.pinned(path):
                table = np.zeros(self._slots, np.int32)
                table[: len(path)] = [node.page for node in path]
                padded, segments = np.zeros(size, np.int32), np.full((1, size), -1, np.int32)
                padded[: len(tokens)] = tokens
                segments[0, : len(tokens)] = 0
                positions = np.arange(start, start + size, dtype=np.int32)
                written = self._program("prefill", size)(
                    self._state, padded, positions, segments, self._pool, table, np.int32(start)
                )
                new: list[Node] = []
                for at in range(0, len(tokens), PAGE_TOKENS):
                    with self._cache.pinned(new):
                        new.append(self._cache.extend([*path, *new], tokens[at : at + PAGE_TOKENS]))
            pages = np.zeros(size // PAGE_TOKENS, np.int32)  # page 0 takes what lies past the prefix
            pages[: len(new)] = [node.page for node in new]
            self._pool = self._program("write", size)(self._pool, written, pages)
            path = [*path, *new]
            start += len(tokens)
        return path, len(prefix) - cached

    def _read(self, hidden: npt.NDArray[np.float32], batch: Batch) -> npt.NDArray[np.float32]:
        """Target logits, less the log-normaliser where log-probabilities are asked."""
        repeats = np.diff(batch.target_offsets)
        values = np.empty(len(batch.targets), np.float32)
        rows = np.repeat(np.arange(len(hidden)), repeats)
        for at, size, count in _blocks(len(values), TARGET_ROWS):
            inputs, ids = np.zeros((size, hidden.shape[1]), np.float32), np.zeros(size, np.int32)
            inputs[:count] = hidden[rows[at : at + count]]
            ids[:count] = batch.targets[at : at + count]
            values[at : at + count] = np.asarray(self._program("targets", size)(self._state, inputs, ids))[:count]
        if batch.vocab_logprobs:
            normalizers = np.empty(len(hidden), np.float32)
            for at, size, count in _blocks(len(hidden), HEAD_ROWS):
                inputs = np.zeros((size, hidden.shape[1]), np.float32)
                inputs[:count] = hidden[at : at + count]
                normalizers[at : at + count] = np.asarray(self._program("normalizer", size)(self._state, inputs))[
                    :count
                ]
            values -= np.repeat(normalizers, repeats)
        return values

    def _program(self, kind: str, size: object) -> Callable[..., Any]:
        return self._programs.get((kind, size)) or self._compile(kind, size)

    def _compile(self, kind: str, size: Any) -> Callable[..., Any]:
        """Build one program for one size."""
        merge = nnx.merge
        graph, slots = self._graph, self._slots

        def int32(*dims: int) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(dims, jnp.int32)

        def rows(state: Any, tokens: Any, positions: Any, segments: Any, reads: Any, pool: Any, table: Any, n: Any):
            return merge(graph, state).hidden(tokens, positions, Context(segments, pool, table, n), reads)

        def prefill(state: Any, tokens: Any, positions: Any, segments: Any, pool: Any, table: Any, n: Any):
            return merge(graph, state).keys_values(tokens, positions, Context(segments, pool, table, n))

        def write(pool: Any, keys_values: Any, pages: Any):
            layers, two, heads, _, width = keys_values.shape
            paged = keys_values.reshape(layers, two, heads, -1, PAGE_TOKENS, width).transpose(3, 0, 1, 2, 4, 5)
            for i in range(paged.shape[0]):
                pool = jax.lax.dynamic_update_slice(pool, paged[i : i + 1], (pages[i], 0, 0, 0, 0, 0))
            return pool

        def targets(state: Any, hidden: Any, ids: Any):
            return target_logits(hidden, ids, merge(graph, state).head_weights())

        def normalizer(state: Any, hidden: Any):
            return log_normalizer(hidden, merge(graph, state).head_weights())

        prefix = (self._pool, int32(slots), int32())
        with jax.default_matmul_precision("highest" if self._dtype == jnp.float32 else "default"):
            match kind:
                case "rows":
                    m = size.tokens
                    arguments = (self._state, int32(m), int32(m), int32(size.bins, size.width), int32(size.reads))
                    lowered = jax.jit(rows).lower(*arguments, *prefix)
                case "prefill":
                    lowered = jax.jit(prefill).lower(self._state, int32(size), int32(size), int32(1, size), *prefix)
                case "write":
                    c = self._config
                    kv = jax.ShapeDtypeStruct((c.layers, 2, c.kv_heads, size, c.head_width), self._dtype)
                    lowered = jax.jit(write, donate_argnums=0).lower(self._pool, kv, int32(size // PAGE_TOKENS))
                case "targets":
                    hidden = jax.ShapeDtypeStruct((size, self._config.width), jnp.float32)
                    lowered = jax.jit(targets).lower(self._state, hidden, int32(size))
                case "normalizer":
                    hidden = jax.ShapeDtypeStruct((size, self._config.width), jnp.float32)
                    lowered = jax.jit(normalizer).lower(self._state, hidden)
                case _:
                    raise ValueError(f"no program {kind!r}")
        program = lowered.compile()
        self.compilations += 1
        self._programs[kind, size] = program
        return program


def load(
    folder: Path,
    *,
    dtype: Dtype = "float32",
    implementation: str = "paged",
    progress: Progress | None = None,
    max_prompt_tokens: int | None = None,
    **sizes: int,
) -> Engine:
    """Read a checkpoint in Hugging Face layout onto the device; ``warmup`` comes after.

    Args:
        folder: has ``config.json`` and safetensors.
        dtype: of weights and matmul operands.
        implementation: of attention, see ``model.attention``.
        max_prompt_tokens: see ``Engine``, as for ``sizes``.

    Raises:
        ConfigError: a config key or architecture that is not known.
        CheckpointError: a tensor missing, unexpected or mis-shaped, or a broken file.
    """
    parsed = config.from_hf(config.read_config(folder))
    target = jnp.dtype(dtype)
    family, module = registry.build(parsed, dtype=target, implementation=implementation)
    graph, abstract = nnx.split(module)

    leaves: dict[Any, Any] = dict(nnx.to_flat_state(abstract))
    arrays: dict[tuple[str | int, ...], jax.Array] = {}
    insert = jax.jit(jax.lax.dynamic_update_index_in_dim, donate_argnums=0, static_argnums=3)

    def put(path: tuple[str | int, ...], tensor: npt.NDArray[Any]) -> None:
        """Onto the device; a layer's tensor goes into its place in the stack of all layers."""
        stacked = tuple(part for part in path if isinstance(part, str))
        if stacked == path:
            arrays[path] = jnp.asarray(tensor, target)
        else:
            (layer,) = (part for part in path if isinstance(part, int))
            if stacked not in arrays:
                arrays[stacked] = jnp.zeros(leaves[stacked].shape, target)
            arrays[stacked] = insert(arrays[stacked], jnp.asarray(tensor, target), layer, 0)

    checkpoint.load(folder, family.weights(parsed), ignored=family.ignored(parsed), put=put, progress=progress)
    state = nnx.from_flat_state([(path, leaf.replace(arrays[path])) for path, leaf in leaves.items()])
    return Engine(parsed, graph, state, max_prompt_tokens=max_prompt_tokens, **sizes)


def _blocks(count: int, sizes: Sequence[int]) -> list[tuple[int, int, int]]:
    """(start, compiled size, how many of it are real) until ``count`` are covered."""
    result: list[tuple[int, int, int]] = []
    at = 0
    while at < count:
        size = plan.bucket(count - at, sizes)
        result.append((at, size, min(size, count - at)))
        at += size
    return result
