"""The attention of ``model.attention`` as one Pallas kernel for GPU, which Triton compiles.

A program of the grid holds a block of queries of one head. The softmax is folded over the prefixes that the block sees,
whose pages are read straight from the pool through the page tables, then over the tokens of the block's own segments.
The numbers of steps are part of the call, not of the program: one program serves every prefix length and computes no
more than it holds, with a sliding window no more than the window lets see, and of a call no more than the block's
segments reach back.

Source: the folding is FlashAttention's (arXiv 2205.14135); ``tests/parity`` compares with ``reference``.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int, Shaped

from model.logprobs import softcapped

KERNEL = "paged_attention"
"""Name of the kernel in compiled programs."""
LEAST_WIDTH = 16
"""Channels of the narrowest matrix product on a tensor core."""
LEAST_CAPABILITY = 8.0
"""Compute capability of the first cards that Triton compiles for: Ampere's."""
MASKED = -1e30
"""A score that weighs nothing; finite, so that the difference of two is a number."""


def stored_width(head_width: int) -> int:
    """Width of a head in the pool: the next power of two, since Triton has no other blocks."""
    return max(LEAST_WIDTH, pl.next_power_of_2(head_width))


class Blocks(NamedTuple):
    """How a call is cut.

    Attributes:
        queries: rows of one program; each step's keys are read once for all of them.
        keys: of one step; a divisor of a page.
        warps: of 32 threads, that share a program.
        stages: steps whose keys are on their way at the same time.
    """

    queries: int
    keys: int
    warps: int
    stages: int


def blocks(width: int, dtype: Any) -> Blocks:
    """The cut for heads of this stored width: the largest that leaves everything in registers, and the keys of all
    stages in the 99 KB of shared memory that the smaller cards have."""
    if dtype == jnp.float32:  # without tensor cores, each thread multiplies what it holds
        return Blocks(32, 16, 8, 1)
    return Blocks(128, 64, 8, 2) if width <= 128 else Blocks(64, 32, 4, 2)


def paged_attention(
    q: Float[Array, "Q N H"],
    k: Float[Array, "M K H"],
    v: Float[Array, "M K H"],
    segments: Int[Array, " Q"],
    positions: Int[Array, " Q"],
    prefixes: Int[Array, " Q"],
    places: Int[Array, " Q"],
    pool: Shaped[Array, "pages L 2 K page stored"],
    page_tables: Int[Array, "P slots"],
    prefix_lengths: Int[Array, " P"],
    layer: int | Int[Array, ""],
    window: Int[Array, ""] | None,
    softcap: float | None,
    *,
    interpret: bool,
) -> Float[Array, "Q N H"]:
    """Softmax attention of every query, in q's dtype.

    Args are those of ``attention.attend``, the fields of its ``AttentionContext`` and of its ``MaskSpec``, and:
        segments, positions, prefixes: of the queries' tokens. Those that see one prefix should be next to each other.
        places: flat indices of the queries' tokens among the M, for speed ascending.
        interpret: run step by step on any platform, for tests.
    """
    count, heads, head_width = q.shape
    tokens, kv_heads, page, width = len(k), k.shape[1], *pool.shape[4:]
    cut = blocks(width, q.dtype)
    padding = segments < 0
    # Where a token's segment begins. Segments lie one after the other, so this tells which keys are its own. Padding
    # sees itself, and no prefix.
    begins = places - jnp.where(padding, 0, positions - prefix_lengths[prefixes])
    seen = jnp.where(padding, len(prefix_lengths), prefixes)
    numbers = (layer, 0 if window is None else window)
    scalars = jnp.stack([jnp.asarray(number, jnp.int32) for number in numbers])

    def widened(x: Float[Array, "M heads H"]) -> Float[Array, "M heads stored"]:
        return x if width == head_width else jnp.pad(x, ((0, 0), (0, 0), (0, width - head_width)))

    of_queries = pl.BlockSpec((cut.queries,), lambda i, _: (i,))
    vectors = pl.BlockSpec((cut.queries, None, width), lambda i, head: (i, head, 0))
    of_head = pl.BlockSpec((tokens, None, width), lambda _, head: (0, lax.div(head, heads // kv_heads), 0))
    whole = pl.BlockSpec()
    result = pl.pallas_call(
        partial(_kernel, cut, count, pool.shape[1], kv_heads, window is not None, softcap),
        grid=(pl.cdiv(count, cut.queries), heads),
        in_specs=[*[whole] * 3, *[of_queries] * 3, vectors, of_head, of_head, whole],
        out_specs=vectors,
        out_shape=jax.ShapeDtypeStruct((count, heads, width), q.dtype),
        compiler_params=plgpu.CompilerParams(num_warps=cut.warps, num_stages=cut.stages),
        interpret=interpret,
        name=KERNEL,
    )(
        scalars,
        page_tables,
        prefix_lengths,
        begins,
        places,
        seen,
        *map(widened, (q, k, v)),
        pool.reshape(-1, page, width),
    )
    return result[:, :, :head_width]


class Softmax(NamedTuple):
    """A softmax not yet normalised, see ``attention.SoftmaxState``."""

    maximum: Float[Array, " queries"]
    total: Float[Array, " queries"]
    values: Float[Array, "queries stored"]


def _kernel(
    cut: Blocks,
    count: int,
    layers: int,
    kv_heads: int,
    windowed: bool,
    softcap: float | None,
    scalars_ref: Any,
    tables_ref: Any,
    lengths_ref: Any,
    begins_ref: Any,
    places_ref: Any,
    seen_ref: Any,
    q_ref: Any,
    k_ref: Any,
    v_ref: Any,
    pool_ref: Any,
    out_ref: Any,
) -> None:
    """One block of queries of one head."""
    tokens, page = k_ref.shape[0], pool_ref.shape[1]
    head = lax.div(pl.program_id(1), pl.num_programs(1) // kv_heads)
    layer, window = scalars_ref[0], scalars_ref[1]
    none = lengths_ref.shape[0]
    filled = pl.program_id(0) * cut.queries + jnp.arange(cut.queries) < count
    queries = plgpu.load(q_ref, mask=filled[:, None], other=0.0)
    begins = plgpu.load(begins_ref, mask=filled, other=tokens)
    places = plgpu.load(places_ref, mask=filled, other=-1)
    seen = plgpu.load(seen_ref, mask=filled, other=none)

    def add(softmax: Softmax, keys: Array, values: Array, mask: Array | None) -> Softmax:
        """Fold keys and values, visible where ``mask`` (None: everywhere), into the softmax."""
        scores = softcapped(_product(queries, keys.T), softcap)
        if mask is not None:
            scores = jnp.where(mask, scores, MASKED)
        maximum = jnp.maximum(softmax.maximum, scores.max(axis=1))
        weights, scale = jnp.exp(scores - maximum[:, None]), jnp.exp(softmax.maximum - maximum)
        summed = softmax.values * scale[:, None] + _product(weights.astype(values.dtype), values)
        return Softmax(maximum, softmax.total * scale + weights.sum(axis=1), summed)

    def over(prefix: Array, number: Array, softmax: Softmax, *, masked: bool) -> Softmax:
        """The step of this number over a prefix; one that is not ``masked`` is for all queries and ends in it."""
        slot = lax.div(number, page // cut.keys)
        pane = (tables_ref[prefix, slot] * layers + layer) * 2 * kv_heads + head
        rows = pl.ds((number - slot * (page // cut.keys)) * cut.keys, cut.keys)
        length, positions = lengths_ref[prefix], number * cut.keys + jnp.arange(cut.keys)
        # What lies past the prefix may be another's, and 0 * NaN is NaN: it is not loaded.
        within: dict[str, Any] = {"mask": (positions < length)[:, None], "other": 0} if masked else {}
        keys, values = (
            _as(plgpu.load(pool_ref.at[pane + part * kv_heads, rows], **within), queries.dtype) for part in (0, 1)
        )
        if masked:  # the block's other queries see another prefix, see ``attention._finite``
            values = jnp.where(jnp.isfinite(values), values, jnp.zeros_like(values))
        mask = (seen == prefix)[:, None] & (positions < length)[None, :] if masked else None
        if windowed:
            reached = positions[None, :] > (length + places - begins - window)[:, None]
            mask = reached if mask is None else mask & reached
        return add(softmax, keys, values, mask)

    def bounds(prefix: Array) -> tuple[Array, Array, Array]:
        """The first step over a prefix, and the ends of those that it fills and of all."""
        length = lengths_ref[prefix]
        # No query is before the prefix's end, and none sees further back than its window.
        first = lax.div(jnp.maximum(length + 1 - window, 0), cut.keys) if windowed else jnp.int32(0)
        return first, jnp.maximum(lax.div(length, cut.keys), first), pl.cdiv(length, cut.keys)

    def own(number: Array, softmax: Softmax) -> Softmax:
        """The step over the call's own keys of this number."""
        rows, at = pl.ds(number * cut.keys, cut.keys), number * cut.keys + jnp.arange(cut.keys)
        keys, values = (plgpu.load(ref.at[rows], mask=(at < tokens)[:, None], other=0.0) for ref in (k_ref, v_ref))
        mask = (begins[:, None] <= at[None, :]) & (at[None, :] <= places[:, None])
        if windowed:
            mask &= places[:, None] - at[None, :] < window
        return add(softmax, keys, values, mask)

    shape = queries.shape
    softmax = Softmax(jnp.full(shape[:1], MASKED), jnp.zeros(shape[:1]), jnp.zeros(shape))
    first_prefix, last_prefix = jnp.min(seen), jnp.max(jnp.where(seen == none, -1, seen))

    def rest(prefix: Array, softmax: Softmax) -> Softmax:
        """What one prefix ends in; of several all of each, masked."""
        first, filled, end = bounds(prefix)
        start = jnp.where(first_prefix == last_prefix, filled, first)
        return lax.fori_loop(start, end, partial(over, prefix, masked=True), softmax)

    # The loop that most of the time goes into is not within another: Triton would not overlap its matrix products.
    only = jnp.maximum(last_prefix, 0)
    start, end, _ = bounds(only)
    end = jnp.where(first_prefix == last_prefix, end, start)
    softmax = lax.fori_loop(start, end, partial(over, only, masked=False), softmax)
    softmax = lax.fori_loop(first_prefix, last_prefix + 1, rest, softmax)
    first, last = lax.div(jnp.min(begins), cut.keys), lax.div(jnp.max(places), cut.keys)
    softmax = lax.fori_loop(first, last + 1, own, softmax)
    plgpu.store(out_ref, (softmax.values / softmax.total[:, None]).astype(out_ref.dtype), mask=filled[:, None])


def _product(a: Array, b: Array) -> Array:
    """The matrix product with float32 sums; of float32 in full precision, where Triton's default would be TF32."""
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else lax.Precision.DEFAULT
    return lax.dot(a, b, precision=precision, preferred_element_type=jnp.float32)


def _as(x: Array, dtype: Any) -> Array:
    """A page's values; bfloat16 is stored as its bits, see ``attention.to_pool``."""
    return lax.bitcast_convert_type(x, jnp.bfloat16) if x.dtype == jnp.uint16 else x.astype(dtype)
