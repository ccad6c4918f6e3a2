"""Attention of packed segments over paged prefixes and over themselves.

A program call holds M = B * T tokens: B bins of T positions, each bin packed with whole segments one after the other.
A token attends to (1) its segment's prefix, kept as pages of a pool, and (2) the tokens of its own segment up to
itself. Each segment may have a prefix of its own; with ``reference`` and ``paged`` all segments of a call share one.

Five implementations with one signature: ``reference`` gathers the prefix and takes one softmax over everything;
``paged`` walks the prefix page by page, all tokens in one matmul per key/value head, and merges by the running
log-sum-exp, so one compiled program serves every prefix length and no [tokens, prefix] array exists; ``native``,
``fused`` and ``triton`` do the same in one kernel, for CPU (``model.cpu.attention``), TPU (``model.attention_tpu``)
and GPU (``model.attention_gpu``), and ``fused-interpreted`` and ``triton-interpreted`` run the latter two elsewhere.

Source: the merge is that of FlashAttention (arXiv 2205.14135), section 3.1.
"""

from functools import partial
from itertools import pairwise
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Shaped

from model import attention_gpu
from model.attention_tpu import LANES, LOG2_E, Steps, fused, steps, stored_width
from model.contract import PAGE_TOKENS
from model.cpu.attention import attend_native
from model.delta import Snapshots
from model.logprobs import softcapped
from model.lora import Rows


class AttentionContext(NamedTuple):
    """The keys that the tokens of one program call may attend to.

    Attributes:
        segments: number of each token's segment within the call; -1 for padding, which sees only padding.
        positions: each token's place in its sequence; any for padding. A segment's first is its prefix's length.
        prefixes: which of the P prefixes each token sees.
        pool: keys (index 0) and values (1) of all pages, for all layers, stored as by ``to_pool``.
        page_tables: each prefix's page numbers in order; entries past the prefix are not read.
        prefix_lengths: tokens in each prefix; 0 for none.
        snapshots: of a hybrid's recurrent layers, see ``model.delta``.
        slots: of each prefix, see ``delta.Packed``.
        adapters: of the tokens, see ``model.lora``; None: there are none.
        steps: of the TPU's kernel in layers without a window, see ``prepared``; None: each layer finds its own.
    """

    segments: Int[Array, "B T"]
    positions: Int[Array, " M"]
    prefixes: Int[Array, " M"]
    pool: Shaped[Array, "pages L 2 K page H"]
    page_tables: Int[Array, "P slots"]
    prefix_lengths: Int[Array, " P"]
    snapshots: Snapshots | None = None
    slots: Int[Array, "P 2"] | None = None
    adapters: Rows | None = None
    steps: Steps | None = None

    @property
    def page_table(self) -> Int[Array, " slots"]:
        """The page numbers of the only prefix."""
        return self.page_tables[0]

    @property
    def prefix_length(self) -> Int[Array, ""]:
        """The tokens in the only prefix."""
        return self.prefix_lengths[0]


class MaskSpec(NamedTuple):
    """What a layer's attention masks or caps beyond plain causal attention.

    Attributes:
        window: a token at position p sees the keys after p - window; None: all before it.
        softcap: bound of the scores, see ``logprobs.softcapped``; None: none.
        causal: a token sees no key after it. False: it sees its whole segment, or what is before p + window too, and
            there are no prefixes.
    """

    window: Int[Array, ""] | None = None
    softcap: float | None = None
    causal: bool = True


class SoftmaxState(NamedTuple):
    """A softmax not yet normalised: running maximum, sum of exponentials, weighted sum of values."""

    maximum: Float[Array, "K Q"]
    total: Float[Array, "K Q"]
    values: Float[Array, "K Q H"]


Layer = int | Int[Array, ""]


def to_pool(x: Array) -> Array:
    """Convert to the pool's storage: bfloat16 as its bits. XLA's CPU backend widens a whole bfloat16 array to float32
    before it cuts a slice from it, which for a pool takes longer than the layer; it leaves integers alone."""
    return lax.bitcast_convert_type(x, jnp.uint16) if x.dtype == jnp.bfloat16 else x


def from_pool(x: Array) -> Array:
    """The inverse of ``to_pool``."""
    return lax.bitcast_convert_type(x, jnp.bfloat16) if x.dtype == jnp.uint16 else x


def _in_reach(distance: Int[Array, "*shape"], spec: MaskSpec) -> Bool[Array, "*shape"]:
    """True where the key that is ``distance`` tokens before the query is not later than it, nor beyond the window."""
    reach = distance >= 0 if spec.causal else jnp.ones_like(distance, bool)
    if spec.window is not None:
        reach &= (distance if spec.causal else jnp.abs(distance)) < spec.window
    return reach


def _mask(segments: Int[Array, "B T"], spec: MaskSpec) -> Bool[Array, "B T T"]:
    """True where the query (axis 1) may see the key (axis 2): in the same segment, and in reach."""
    place = jnp.arange(segments.shape[1])
    in_reach = _in_reach(place[:, None] - place[None, :], spec)
    return (segments[:, :, None] == segments[:, None, :]) & in_reach[None, :, :]


def _split_heads(q: Float[Array, "M N H"], kv_heads: int) -> Float[Array, "K Q H"]:
    """Queries ordered by key/value head, then query head, then token: Q = G * M."""
    m, n, h = q.shape
    return q.reshape(m, kv_heads, n // kv_heads, h).transpose(1, 2, 0, 3).reshape(kv_heads, -1, h)


def _merge_heads(x: Float[Array, "K Q H"], tokens: int) -> Float[Array, "M N H"]:
    """The inverse of ``_split_heads``."""
    k, q, h = x.shape
    return x.reshape(k, q // tokens, tokens, h).transpose(2, 0, 1, 3).reshape(tokens, -1, h)


def _finite(v: Float[Array, "M K H"]) -> Float[Array, "M K H"]:
    """Values with NaN and infinity replaced by 0.

    A masked key has weight 0, but 0 * NaN is NaN: without this, one segment whose arithmetic broke would spoil the
    segments beside it. The broken segment itself still ends as NaN through its own residual stream and keys.
    """
    return jnp.where(jnp.isfinite(v), v, jnp.zeros_like(v))


def _cuts(width: int) -> list[int]:
    """Bounds that cut a bin's queries into parts, 0 to ``width``: each part looks only at the keys up to its end, if
    attention is causal.

    Two to four parts of about 100 and more spare a quarter to three eighths of a wide bin's scores; more parts are
    more, and smaller, matmuls.
    """
    parts = max(1, min(4, width // 96))
    return [0, *(-(-width * part // (parts * 8)) * 8 for part in range(1, parts)), width]


def _own_bins(
    q: Float[Array, "M N H"],
    k: Float[Array, "M K H"],
    v: Float[Array, "M K H"],
    segments: Int[Array, "B T"],
    spec: MaskSpec,
) -> SoftmaxState:
    """Each token over its own segment, bin by bin."""
    bins, width = segments.shape
    m, n, h = q.shape
    kv_heads = k.shape[1]
    groups = n // kv_heads
    grouped = q.reshape(bins, width, kv_heads, groups, h).transpose(0, 2, 3, 1, 4)  # B K G T H

    def batched(x: Float[Array, "M K H"]) -> Float[Array, "BK T H"]:
        """Bin and head in one axis: with more batch axes XLA's CPU backend multiplies bfloat16 as float32."""
        return x.reshape(bins, width, kv_heads, h).transpose(0, 2, 1, 3).reshape(bins * kv_heads, width, h)

    keys, values = batched(k), batched(_finite(v))
    visible = _mask(segments, spec)
    parts: list[tuple[Array, Array, Array]] = []
    for start, stop in pairwise(_cuts(width)):
        seen = stop if spec.causal else width
        part = grouped[:, :, :, start:stop].reshape(bins * kv_heads, -1, h)
        scores = _scores(part, keys[:, :seen], spec).reshape(bins, kv_heads, groups, stop - start, seen)
        scores = jnp.where(visible[:, None, None, start:stop, :seen], scores, -jnp.inf)
        maximum = scores.max(axis=-1, keepdims=True)
        weights = _weights(scores, maximum, v.dtype)
        summed = _weighted(weights.reshape(bins * kv_heads, -1, seen), values[:, :seen])
        parts.append((maximum[..., 0], _total(weights), summed.reshape(bins, kv_heads, groups, -1, h)))
    maximum, total, summed = (jnp.concatenate(pieces, axis=3) for pieces in zip(*parts, strict=True))

    def by_head(x: Float[Array, "B K G T"]) -> Float[Array, "K Q"]:
        return x.transpose(1, 2, 0, 3).reshape(kv_heads, groups * m)

    summed = summed.transpose(1, 2, 0, 3, 4).reshape(kv_heads, groups * m, h)
    return SoftmaxState(by_head(maximum), by_head(total), summed)


def _own_reads(
    q: Float[Array, "R N H"],
    k: Float[Array, "M K H"],
    v: Float[Array, "M K H"],
    segments: Int[Array, "B T"],
    reads: Int[Array, " R"],
    spec: MaskSpec,
) -> SoftmaxState:
    """Only the tokens at flat indices ``reads``, each over its own segment."""
    kv_heads = k.shape[1]
    flat = segments.reshape(-1)
    place = jnp.arange(flat.size)[None, :]
    visible = (flat[reads][:, None] == flat[None, :]) & _in_reach(reads[:, None] - place, spec)  # R M
    queries = _split_heads(q, kv_heads)  # K G*R H
    scores = _scores(queries, k.transpose(1, 0, 2), spec).reshape(kv_heads, -1, *visible.shape)
    scores = jnp.where(visible[None, None], scores, -jnp.inf).reshape(kv_heads, -1, flat.size)
    maximum = scores.max(axis=-1)
    weights = _weights(scores, maximum[..., None], v.dtype)
    return SoftmaxState(maximum, _total(weights), _weighted(weights, _finite(v).transpose(1, 0, 2)))


def _scores(queries: Float[Array, "K Q H"], keys: Float[Array, "K S H"], spec: MaskSpec) -> Float[Array, "K Q S"]:
    """Float32 products, one matmul per key/value head."""
    products = lax.dot_general(queries, keys, (((2,), (2,)), ((0,), (0,))), preferred_element_type=jnp.float32)
    return softcapped(products, spec.softcap)


def _weights(
    scores: Float[Array, "*shape S"], maximum: Float[Array, "*shape 1"], dtype: jnp.dtype
) -> Float[Array, "*shape S"]:
    """Not yet normalised, in the dtype that the values are multiplied by: the float32 ones never reach memory."""
    return jnp.exp(scores - maximum).astype(dtype)


def _total(weights: Float[Array, "*shape S"]) -> Float[Array, "*shape"]:
    """Float32 sum of the weights as they are multiplied, so that the normalised ones sum to 1."""
    return weights.astype(jnp.float32).sum(axis=-1)


def _weighted(weights: Float[Array, "K Q S"], values: Float[Array, "K S H"]) -> Float[Array, "K Q H"]:
    """Float32 weighted sums, one matmul per key/value head."""
    return lax.dot_general(weights, values, (((2,), (1,)), ((0,), (0,))), preferred_element_type=jnp.float32)


class Queries(NamedTuple):
    """Queries of one call, by key/value head, and what says which keys they see.

    Attributes:
        vectors: as by ``_split_heads``.
        positions: each query's position in its sequence.
    """

    vectors: Float[Array, "K Q H"]
    positions: Int[Array, " Q"]
    spec: MaskSpec


def _fold(
    queries: Queries,
    partial: SoftmaxState,
    keys: Float[Array, "K P H"],
    values: Float[Array, "K P H"],
    first: int | Int[Array, ""],
    valid: Bool[Array, " P"] | None = None,
) -> SoftmaxState:
    """Add the prefix's keys and values from position ``first`` on, but what is not ``valid``, to a partial softmax."""
    scores = _scores(queries.vectors, keys, queries.spec)
    if queries.spec.window is not None:
        visible = first + jnp.arange(keys.shape[1])[None, :] > queries.positions[:, None] - queries.spec.window
        scores = jnp.where(visible[None], scores, -jnp.inf)
    if valid is not None:
        scores = jnp.where(valid[None, None, :], scores, -jnp.inf)
        # What is not valid may be another prefix's, and 0 * NaN is NaN.
        values = jnp.where(valid[None, :, None], values, jnp.zeros_like(values))
    maximum = jnp.maximum(partial.maximum, scores.max(axis=-1))
    weights = _weights(scores, maximum[..., None], values.dtype)
    scale = jnp.exp(partial.maximum - maximum)
    total = partial.total * scale + _total(weights)
    return SoftmaxState(maximum, total, partial.values * scale[..., None] + _weighted(weights, values))


PARTIAL_PAGES = (PAGE_TOKENS // 4, PAGE_TOKENS)
"""Tokens of a prefix's last, partial page that are looked at: the smallest of these that holds the rest."""


def _fold_prefix_paged(queries: Queries, own: SoftmaxState, context: AttentionContext, layer: Layer) -> SoftmaxState:
    """Add the prefix to a partial softmax: a step for each whole page, and a shorter one for a partial page."""
    page_shape = (1, 1, *context.pool.shape[2:])

    def page(number: Int[Array, ""]) -> Float[Array, "2 K page H"]:
        cut = lax.dynamic_slice(context.pool, (context.page_table[number], layer, 0, 0, 0, 0), page_shape)
        return from_pool(cut[0, 0])

    pages, rest = context.prefix_length // PAGE_TOKENS, context.prefix_length % PAGE_TOKENS

    def whole(number: Int[Array, ""], folded: SoftmaxState) -> SoftmaxState:
        keys, values = page(number)
        return _fold(queries, folded, keys, values, number * PAGE_TOKENS)

    first = 0
    if queries.spec.window is not None:  # no query is before the prefix's end, and none sees further back than that
        first = jnp.maximum(context.prefix_length + 1 - queries.spec.window, 0) // PAGE_TOKENS
    folded = lax.fori_loop(first, pages, whole, own)

    def partial_page(size: int, folded: SoftmaxState) -> SoftmaxState:
        keys, values = page(pages)[:, :, :size]
        return _fold(queries, folded, keys, values, pages * PAGE_TOKENS, jnp.arange(size) < rest)

    branches = [lambda folded: folded, *(partial(partial_page, size) for size in PARTIAL_PAGES)]  # pyright: ignore[reportUnknownLambdaType]
    return lax.switch((rest > 0).astype(jnp.int32) + (rest > PARTIAL_PAGES[0]).astype(jnp.int32), branches, folded)


def _fold_prefix_reference(
    queries: Queries, own: SoftmaxState, context: AttentionContext, layer: Layer
) -> SoftmaxState:
    """Add the whole prefix at once: gathers all page slots and masks those past the prefix."""
    prefix = from_pool(context.pool[context.page_table, layer])  # slots 2 K page H
    kv_heads, _, width = queries.vectors.shape
    keys, values = prefix.transpose(1, 2, 0, 3, 4).reshape(2, kv_heads, -1, width)
    valid = jnp.arange(keys.shape[1]) < context.prefix_length
    return _fold(queries, own, keys, values, 0, valid)


NATIVE = "native"
FUSED_INTERPRETED = "fused-interpreted"
FUSED = ("fused", FUSED_INTERPRETED)
TRITON = ("triton", "triton-interpreted")
FOLD_PREFIX = {"paged": _fold_prefix_paged, "reference": _fold_prefix_reference}


def segment_step(implementation: str) -> int:
    """What the width of a bin is a multiple of."""
    return LANES if implementation in FUSED else 16


def query_factor(implementation: str) -> float:
    """What an implementation takes queries multiplied by, beside their scale."""
    return LOG2_E if implementation in FUSED else 1.0


def pool_head_width(implementation: str, head_width: int) -> int:
    """Width of a head in the pool that an implementation reads."""
    if implementation in TRITON:
        return attention_gpu.stored_width(head_width)
    return stored_width(head_width) if implementation in FUSED else head_width


def prepared(context: AttentionContext, implementation: str) -> AttentionContext:
    """The context with what all layers without a window would find for themselves."""
    return context._replace(steps=_steps(context, None)) if implementation in FUSED else context


def _steps(context: AttentionContext, window: Int[Array, ""] | None) -> Steps:
    return steps(context.segments, context.prefixes, context.page_tables, context.prefix_lengths, PAGE_TOKENS, window)


def attend(
    q: Float[Array, "Q N W"],
    k: Float[Array, "M K W"],
    v: Float[Array, "M K H"],
    context: AttentionContext,
    layer: Layer,
    spec: MaskSpec,
    *,
    implementation: str,
    reads: Int[Array, " Q"] | None = None,
) -> Float[Array, "Q N H"]:
    """Softmax attention of every token, or of the tokens at ``reads`` alone; float32, or from a kernel in q's dtype.

    Args:
        q: queries, already rotated, scaled and multiplied by ``query_factor``; of all M tokens, or of the R tokens at
            ``reads``. For one of ``FUSED`` the heads of queries and keys may be as wide as in the pool.
        k: keys of all M tokens, rotated.
        v: values of all M tokens.
        layer: which layer of the pool holds this layer's prefix.
        spec: this layer's mask.
        implementation: ``NATIVE``, one of ``FUSED`` or ``TRITON``, or a key of ``FOLD_PREFIX``.
        reads: flat indices into the M tokens.
    """
    if implementation == NATIVE:
        stored = context.prefixes, context.pool, context.page_tables, context.prefix_lengths
        return attend_native(q, k, v, context.segments, *stored, layer, *spec, reads)
    if not spec.causal and implementation not in FOLD_PREFIX:
        raise ValueError(f"attention {implementation!r} is causal; take {NATIVE!r} or one of {', '.join(FOLD_PREFIX)}")
    if implementation in FUSED:
        # The kernel takes whole bins: in the one layer that asks for reads alone, queries that are not read are zeros.
        queries = q
        if reads is not None:  # by rows: XLA would turn around what it scatters and gathers by heads
            rows = q.reshape(len(q), -1)
            queries = jnp.zeros((len(k), rows.shape[1]), q.dtype).at[reads].set(rows).reshape(-1, *q.shape[1:])
        interpret = implementation == FUSED_INTERPRETED
        of_tokens = context.segments, context.positions, context.prefixes
        found = context.steps if spec.window is None and context.steps else _steps(context, spec.window)
        attended = fused(queries, k, _finite(v), *of_tokens, context.pool, found, layer, *spec[:2], interpret=interpret)
        return attended if reads is None else attended.reshape(len(k), -1)[reads].reshape(-1, *attended.shape[1:])
    if implementation in TRITON:
        flat, places = context.segments.reshape(-1), jnp.arange(k.shape[0]) if reads is None else reads
        return attention_gpu.paged_attention(
            q,
            k,
            _finite(v),
            flat[places],
            context.positions[places],
            context.prefixes[places],
            places,
            context.pool,
            context.page_tables,
            context.prefix_lengths,
            layer,
            *spec[:2],
            interpret=implementation == "triton-interpreted",
        )
    if reads is None:
        own, positions = _own_bins(q, k, v, context.segments, spec), context.positions
    else:
        own, positions = _own_reads(q, k, v, context.segments, reads, spec), context.positions[reads]
    kv_heads = k.shape[1]
    partial = own
    if spec.causal:
        queries = Queries(_split_heads(q, kv_heads), jnp.tile(positions, q.shape[1] // kv_heads), spec)
        partial = FOLD_PREFIX[implementation](queries, own, context, layer)
    return _merge_heads(partial.values / partial.total[..., None], q.shape[0])
