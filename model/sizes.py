"""How large calls, the page pool and the head's programs are: by platform, and what follows from it for one model."""

import bisect
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from model import plan
from model.attention import FUSED, NATIVE, PARTIAL_PAGES, TRITON, pool_head_width, segment_step
from model.attention_tpu import FOLD_TOKENS
from model.config import ModelConfig
from model.contract import MOST_TOP, PAGE_TOKENS
from model.delta import Snapshots
from model.inputs import Room
from model.lora import CALL_ADAPTERS
from model.plan import Shape

CALL_PREFIXES = 64
"""Prefixes that one call sees at most: a full call of a CPU has 16 tokens for each, and of a TPU 64."""

LEAST_SNAPSHOTS = 8
"""Snapshots that a hybrid keeps at least, see ``model.delta``. A prefix needs up to three at once: what it begins with,
what it leaves, and one on the way."""

CHUNKS = (64, 128, 192, 256, 288, 320, 384, 448, 512)
CHUNKS_WITH_CHEAP_PADDING = (64, 128, 192, 256, 384, 512, 1024)

FUSED_PACE = 3.0
"""The time of a FLOP of the TPU kernel in a wide bin over that of a FLOP of a matmul: on a v6e, by instructions."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """What an engine compiles and keeps. The defaults are a CPU's.

    Attributes:
        max_segment_tokens: tokens of the longest segment; earlier tokens of a prompt are computed in chunks.
        call_tokens: tokens in a full call.
        chunks: sizes of prefix prefill calls, in tokens, ascending; empty: by what padding costs.
        head_sizes: sizes of head calls, in hidden states, ascending.
        argmax_sizes: the same for head calls that also find the top-1 tokens.
        top_counts: how many of the highest logits a program finds, ascending, ``MOST_TOP`` among them; its head calls
            have the largest of ``argmax_sizes``. None for a model with classes, nor more than a vocabulary has.
        target_sizes: sizes of target-logit calls, in (hidden state, target) pairs, ascending.
        prefix_cache_bytes: device memory for prefixes, of which a hybrid's snapshots take half; more where one prompt
            of the longest kind needs it, and less where not so much is free, see ``model.memory``.
        costs: what the planner weighs.
        large_calls: the smallest calls are an eighth of a full one, see ``plan.large_shapes``.
        share_tokens: of a model over several devices: the least tokens of a device's share in calls whose tokens are
            divided among them, see ``model.overlap``.
        fill_memory: the prefix cache takes its share of the free memory, however much; see ``model.memory``.
    """

    max_segment_tokens: int = 512
    call_tokens: int = 1024
    chunks: tuple[int, ...] = ()
    head_sizes: tuple[int, ...] = (1, 8, 32, 128)
    argmax_sizes: tuple[int, ...] = (8, 128)
    top_counts: tuple[int, ...] = (64, MOST_TOP)
    target_sizes: tuple[int, ...] = (8, 64, 512)
    prefix_cache_bytes: int = 384 * 2**20
    costs: plan.Costs = plan.CPU_COSTS
    large_calls: bool = False
    share_tokens: int = 1024
    fill_memory: bool = False


BY_PLATFORM = {
    "cpu": Sizes(),
    # A v6e chip needs 560 tokens to a call before the matmuls take longer than reading the weights. Of a call of 4,160
    # tokens XLA keeps what is between matmuls on the chip: 1.1 MB a token go to and from HBM (Qwen3-0.6B's sizes), and
    # 2.5 MB of a call of 10,080.
    "tpu": Sizes(
        max_segment_tokens=1024,
        call_tokens=4096,
        chunks=(256, 512, 1024, 2048),
        head_sizes=(8, 64, 512),
        argmax_sizes=(64, 512),
        target_sizes=(64, 512, 1024, 2048, 4096),
        prefix_cache_bytes=4 * 2**30,
        costs=plan.Costs(call=560),
        large_calls=True,
        fill_memory=True,
    ),
    # An H100 needs 300 tokens to a call before the matmuls take longer than reading the weights, and the copy of each
    # layer's weights that the loop makes costs a call of 8,192 tokens 6%.
    "gpu": Sizes(
        max_segment_tokens=1024,
        call_tokens=8192,
        chunks=(256, 512, 1024, 2048),
        head_sizes=(8, 64, 512),
        argmax_sizes=(64, 512),
        target_sizes=(64, 512, 4096),
        prefix_cache_bytes=4 * 2**30,
        large_calls=True,
        fill_memory=True,
    ),
}
"""Others take the TPU's."""


@dataclass(frozen=True, slots=True)
class Layout:
    """What follows from ``Sizes`` for one model.

    Attributes:
        sizes: as they were given, without chunks that no prompt fills.
        longest: the longest sequence, in tokens.
        ladder: shapes of the calls that compute segments, ascending.
        segment_tokens: tokens of the longest segment.
        prefixes: how many prefixes the segments of a call see at most.
        slots: entries of a page table.
        adapters: that the tokens of a call take at most; 0: there are none.
        divided_tokens: the smallest calls whose tokens are divided among devices, see ``model.overlap``.
        flat: segments follow each other in one bin, since attention looks at each by itself.
        whole: sequences share no prefix, and each is one segment: an encoder's.
        pool: shape and dtype of the page pool, [pages, L, 2, K, page, H].
        snapshots: of a hybrid: shapes of the pool of snapshots.
    """

    sizes: Sizes
    longest: int
    ladder: tuple[Shape, ...]
    segment_tokens: int
    prefixes: int
    slots: int
    pool: jax.ShapeDtypeStruct
    adapters: int = 0
    divided_tokens: int = 0
    flat: bool = False
    whole: bool = False
    snapshots: Snapshots | None = None

    @property
    def room(self) -> Room:
        """What every call has room for."""
        return Room(self.prefixes, self.slots, self.adapters)

    @property
    def page_bytes(self) -> int:
        return int(np.prod(self.pool.shape[1:])) * self.pool.dtype.itemsize

    @property
    def snapshot_bytes(self) -> int:
        """Of one snapshot; 0: there are none."""
        return sum(4 * int(np.prod(part.shape[1:])) for part in self.snapshots or ())

    @property
    def snapshot_slots(self) -> int:
        """Slots of snapshots, that of zeros included."""
        return self.snapshots.memories.shape[0] if self.snapshots else 0

    @property
    def page_share_bytes(self) -> int:
        """What one more page takes of the prefix cache: with snapshots, as much again for them."""
        return self.page_bytes * (2 if self.snapshots else 1)

    @property
    def pool_bytes(self) -> int:
        """Of pages and snapshots."""
        return self.pool.shape[0] * self.page_bytes + self.snapshot_slots * self.snapshot_bytes

    def groups(
        self,
        sequences: Sequence[plan.Tokens],
        reads: Sequence[Sequence[int]],
        common: Sequence[Sequence[int]] = (),
        salts: Sequence[int] = (),
        known: int = 0,
    ) -> list[plan.Group]:
        """See ``plan.groups``."""
        if self.whole:
            return [plan.whole(sequences, reads)] if sequences else []
        # Attention that looks at each segment by itself reads no more of a page than there is.
        partial_sizes = range(1, PAGE_TOKENS + 1) if self.flat else PARTIAL_PAGES
        return plan.groups(
            sequences,
            reads,
            max_width=self.segment_tokens,
            max_reads=min(shape.reads for shape in self.ladder),
            min_saving=PAGE_TOKENS,
            page=PAGE_TOKENS,
            partial_sizes=partial_sizes,
            common=common,
            salts=salts,
            known=known,
            prefixes=self.prefixes,
            costs=self.sizes.costs,
        )

    def calls(self, groups: Sequence[plan.Group]) -> list[plan.Call]:
        """Calls for the segments of at most ``prefixes`` groups."""
        if not self.flat:
            return plan.pack_bins(groups, self.ladder, self.sizes.costs)
        if self.whole:
            return plan.pack_whole(groups, self.ladder, self.sizes.call_tokens)
        return plan.pack_flat(groups, self.ladder)


def layout(
    config: ModelConfig, sizes: Sizes, *, dtype: Any, implementation: str, max_prompt_tokens: int | None = None
) -> Layout:
    """A model's ladder, page table and pool.

    Args:
        dtype: of keys and values.
        implementation: of attention, see ``model.attention``.
        max_prompt_tokens: the longest sequence; None: the model's context. The pool has room for one.
    """
    longest = min(config.context_length, max_prompt_tokens or config.context_length)
    if config.encoder:
        return _of_whole_sequences(config, sizes, longest, dtype, implementation)
    step = segment_step(implementation)
    width = -(-min(sizes.max_segment_tokens, longest) // step) * step
    slots = -(-longest // PAGE_TOKENS) + 1
    head_width = pool_head_width(implementation, config.head_width)
    page = (config.layers, 2, config.kv_heads, PAGE_TOKENS, head_width)
    stored = jnp.dtype(jnp.uint16 if dtype == jnp.bfloat16 else dtype)  # see attention.to_pool
    snapshots = _snapshots(config, sizes.prefix_cache_bytes // 2)
    for_pages = sizes.prefix_cache_bytes // (2 if snapshots else 1)
    pages = 1 + max(slots, for_pages // (int(np.prod(page)) * stored.itemsize))
    divided_tokens = sizes.share_tokens * config.shards
    call_tokens = max(sizes.call_tokens, width, divided_tokens if config.by_tokens else 0)
    cheap = config.packed and not config.experts  # ``cpu.linear`` passes over padding, XLA multiplies it
    flat = implementation in (NATIVE, *TRITON)
    if implementation == NATIVE:
        prefixes, ladder = CALL_PREFIXES, plan.flat_shapes(call_tokens, padding_is_cheap=cheap)
    elif implementation in TRITON:
        shapes = plan.flat_shapes(call_tokens, padding_is_cheap=True)
        prefixes, ladder = 4 * CALL_PREFIXES, tuple(s for s in shapes if s.tokens >= call_tokens // 32)
    else:
        # Recurrent layers by XLA know one prefix a call.
        prefixes = CALL_PREFIXES if implementation in FUSED and not config.recurrence else 1
        ladder = (plan.large_shapes if sizes.large_calls else plan.shapes)(width, call_tokens)
    chunks = sizes.chunks or (CHUNKS_WITH_CHEAP_PADDING if cheap else CHUNKS)
    if config.by_tokens and divided_tokens > chunks[-1]:
        chunks = (*chunks, divided_tokens)
    vocabulary = 0 if config.classes else config.vocab_size
    tops = tuple(sorted({min(count, vocabulary) for count in sizes.top_counts} - {0}))
    if implementation in FUSED:
        sizes = replace(sizes, costs=_fused_costs(config, head_width, sizes.costs))
    sizes = replace(sizes, chunks=chunks[: bisect.bisect_left(chunks, longest) + 1], top_counts=tops)
    if dtype == jnp.bfloat16:
        # XLA's CPU backend multiplies a single row in float32, and widens the whole head for it.
        sizes = replace(sizes, head_sizes=(max(2, sizes.head_sizes[0]), *sizes.head_sizes[1:]))
    pool = jax.ShapeDtypeStruct((pages, *page), stored)
    adapters = (config.lora.slots if config.packed else CALL_ADAPTERS) if config.lora else 0
    return Layout(
        sizes, longest, ladder, width, prefixes, slots, pool, adapters, divided_tokens, flat, snapshots=snapshots
    )


def _fused_costs(config: ModelConfig, head_width: int, costs: plan.Costs) -> plan.Costs:
    """What attention of the TPU kernel costs beside a layer's matmuls: in Llama-3.1-8B a seventh of what it does in
    Qwen3-0.6B, whose matmuls are small.

    Args:
        head_width: in the pool.
    """
    linears = 2 * config.width * config.head_width * (config.heads + config.kv_heads)
    linears += 3 * config.width * (config.ff_width * max(1, config.experts_per_token) + config.shared_ff_width)
    return replace(costs, attention=FUSED_PACE * 2 * config.heads * head_width / linears, fold=FOLD_TOKENS)


def _of_whole_sequences(config: ModelConfig, sizes: Sizes, longest: int, dtype: Any, implementation: str) -> Layout:
    """An encoder's layout: calls that hold its longest sequence, no chunks, and one page, which nothing reads."""
    step = segment_step(implementation)
    width = -(-longest // step) * step
    flat = implementation == NATIVE
    if flat:
        usual = plan.flat_shapes(sizes.call_tokens, padding_is_cheap=False)
        longer = [shape for shape in plan.flat_shapes(width, padding_is_cheap=True) if shape.tokens > usual[-1].tokens]
        prefixes, ladder = CALL_PREFIXES, (*usual, *longer)
    else:
        prefixes, ladder = 1, plan.large_shapes(width, max(sizes.call_tokens, width))
    page = (config.layers, 2, config.kv_heads, PAGE_TOKENS, config.head_width)
    pool = jax.ShapeDtypeStruct((1, *page), jnp.dtype(jnp.uint16 if dtype == jnp.bfloat16 else dtype))
    return Layout(replace(sizes, chunks=()), longest, ladder, width, prefixes, 1, pool, flat=flat, whole=True)


def _snapshots(config: ModelConfig, room: int) -> Snapshots | None:
    """Shapes of as many snapshots as the room has, in bytes; None: the model has no recurrent layers."""
    if (r := config.recurrence) is None:
        return None
    shapes = (r.taps - 1, r.channels), (r.value_heads, r.key_width, r.value_width)
    count = config.layers * r.parts
    slots = 1 + max(LEAST_SNAPSHOTS, room // (4 * count * sum(map(math.prod, shapes))))
    parts = (jax.ShapeDtypeStruct((slots, config.layers, r.parts, *shape), jnp.float32) for shape in shapes)
    return Snapshots(*parts)
