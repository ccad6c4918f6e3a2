"""Attention of packed rows over a shared paged prefix and over themselves.

A program call holds M = B * T tokens: B bins of T positions, each bin packed with whole rows one after the other. A
token sees (1) the first ``prefix_length`` positions of the prefix that all rows of the call share, kept as pages of a
pool, and (2) the tokens of its own row up to itself.

Two implementations with one signature: ``reference`` gathers the prefix and takes one softmax over everything;
``paged`` walks the prefix page by page, all rows in one matmul per key/value head, and merges by the running
log-sum-exp, so one compiled program serves every prefix length and no [tokens, prefix] array exists.

Source: the merge is that of FlashAttention (arXiv 2205.14135), section 3.1.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from model.pages import PAGE_TOKENS


class Context(NamedTuple):
    """What the tokens of one program call may attend to.

    Attributes:
        segments: row number of each token within the call; -1 for padding, which sees only itself and its like.
        pool: keys (index 0) and values (1) of all pages, for all layers.
        page_table: page numbers of the prefix in order; entries past the prefix are not read.
        prefix_length: tokens in the prefix; 0 for none.
    """

    segments: Int[Array, "B T"]
    pool: Float[Array, "pages L 2 K page H"]
    page_table: Int[Array, " slots"]
    prefix_length: Int[Array, ""]


class Partial(NamedTuple):
    """A softmax not yet normalised: running maximum, sum of exponentials, weighted sum of values."""

    maximum: Float[Array, "K Q"]
    total: Float[Array, "K Q"]
    values: Float[Array, "K Q H"]


Layer = int | Int[Array, ""]


def _causal_mask(segments: Int[Array, "B T"]) -> Bool[Array, "B T T"]:
    """True where the query (axis 1) may see the key (axis 2): same row, not later."""
    width = segments.shape[1]
    causal = jnp.tril(jnp.ones((width, width), bool))
    return (segments[:, :, None] == segments[:, None, :]) & causal[None, :, :]


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

    A masked key has weight 0, but 0 * NaN is NaN: without this, one row whose arithmetic broke would spoil the rows
    packed beside it. The broken row itself still ends as NaN through its own residual stream and keys.
    """
    return jnp.where(jnp.isfinite(v), v, jnp.zeros_like(v))


def _own_bins(
    q: Float[Array, "M N H"], k: Float[Array, "M K H"], v: Float[Array, "M K H"], segments: Int[Array, "B T"]
) -> Partial:
    """Each token over its own row, bin by bin."""
    bins, width = segments.shape
    m, n, h = q.shape
    kv_heads = k.shape[1]
    groups = n // kv_heads
    grouped = q.reshape(bins, width, kv_heads, groups, h).transpose(0, 2, 3, 1, 4)  # B K G T H
    grouped = grouped.reshape(bins, kv_heads, groups * width, h)
    keys = k.reshape(bins, width, kv_heads, h).transpose(0, 2, 1, 3)
    values = _finite(v).reshape(bins, width, kv_heads, h).transpose(0, 2, 1, 3)
    batch = ((0, 1), (0, 1))
    scores = lax.dot_general(grouped, keys, (((3,), (3,)), batch), preferred_element_type=jnp.float32)
    scores = scores.reshape(bins, kv_heads, groups, width, width)
    scores = jnp.where(_causal_mask(segments)[:, None, None], scores, -jnp.inf)
    maximum = scores.max(axis=-1, keepdims=True)
    weights = jnp.exp(scores - maximum)
    total = weights.sum(axis=-1)
    weights = weights.astype(v.dtype).reshape(bins, kv_heads, groups * width, width)
    summed = lax.dot_general(weights, values, (((3,), (2,)), batch), preferred_element_type=jnp.float32)

    def by_head(x: Float[Array, "B K G T"]) -> Float[Array, "K Q"]:
        return x.transpose(1, 2, 0, 3).reshape(kv_heads, groups * m)

    summed = summed.reshape(bins, kv_heads, groups, width, h).transpose(1, 2, 0, 3, 4)
    return Partial(by_head(maximum[..., 0]), by_head(total), summed.reshape(kv_heads, groups * m, h))


def _own_reads(
    q: Float[Array, "R N H"],
    k: Float[Array, "M K H"],
    v: Float[Array, "M K H"],
    segments: Int[Array, "B T"],
    reads: Int[Array, " R"],
) -> Partial:
    """Only the tokens at flat indices ``reads``, each over its own row."""
    kv_heads = k.shape[1]
    flat = segments.reshape(-1)
    visible = (flat[reads][:, None] == flat[None, :]) & (jnp.arange(flat.size)[None, :] <= reads[:, None])  # R M
    queries = _split_heads(q, kv_heads)  # K G*R H
    scores = _scores(queries, k.transpose(1, 0, 2)).reshape(kv_heads, -1, *visible.shape)
    scores = jnp.where(visible[None, None], scores, -jnp.inf).reshape(kv_heads, -1, flat.size)
    maximum = scores.max(axis=-1)
    weights = jnp.exp(scores - maximum[..., None])
    return Partial(maximum, weights.sum(axis=-1), _weighted(weights, _finite(v).transpose(1, 0, 2)))


def _scores(queries: Float[Array, "K Q H"], keys: Float[Array, "K S H"]) -> Float[Array, "K Q S"]:
    """Float32 products, one matmul per key/value head."""
    return lax.dot_general(queries, keys, (((2,), (2,)), ((0,), (0,))), preferred_element_type=jnp.float32)


def _weighted(weights: Float[Array, "K Q S"], values: Float[Array, "K S H"]) -> Float[Array, "K Q H"]:
    """Float32 weighted sums, one matmul per key/value head."""
    operand = weights.astype(values.dtype)
    return lax.dot_general(operand, values, (((2,), (1,)), ((0,), (0,))), preferred_element_type=jnp.float32)


def _fold(
    queries: Float[Array, "K Q H"],
    partial: Partial,
    keys: Float[Array, "K P H"],
    values: Float[Array, "K P H"],
    valid: Bool[Array, " P"],
) -> Partial:
    """Add keys and values that all queries see, where ``valid``, to a partial softmax."""
    scores = jnp.where(valid[None, None, :], _scores(queries, keys), -jnp.inf)
    maximum = jnp.maximum(partial.maximum, scores.max(axis=-1))
    weights = jnp.exp(scores - maximum[..., None])
    scale = jnp.exp(partial.maximum - maximum)
    total = partial.total * scale + weights.sum(axis=-1)
    # A page's tail may be another prefix's, and 0 * NaN is NaN.
    values = jnp.where(valid[None, :, None], values, jnp.zeros_like(values))
    return Partial(maximum, total, partial.values * scale[..., None] + _weighted(weights, values))


def _fold_prefix_paged(queries: Float[Array, "K Q H"], own: Partial, context: Context, layer: Layer) -> Partial:
    """Add the prefix to a partial softmax, one page a step."""
    page_shape = (1, 1, *context.pool.shape[2:])

    def step(number: Int[Array, ""], partial: Partial) -> Partial:
        start = (context.page_table[number], layer, 0, 0, 0, 0)
        keys, values = lax.dynamic_slice(context.pool, start, page_shape)[0, 0]
        valid = number * PAGE_TOKENS + jnp.arange(PAGE_TOKENS) < context.prefix_length
        return _fold(queries, partial, keys, values, valid)

    pages = (context.prefix_length + PAGE_TOKENS - 1) // PAGE_TOKENS
    return lax.fori_loop(0, pages, step, own)


def _fold_prefix_reference(queries: Float[Array, "K Q H"], own: Partial, context: Context, layer: Layer) -> Partial:
    """Add the whole prefix at once: gathers all page slots and masks those past the prefix."""
    prefix = context.pool[context.page_table, layer]  # slots 2 K page H
    keys, values = prefix.transpose(1, 2, 0, 3, 4).reshape(2, queries.shape[0], -1, queries.shape[2])
    return _fold(queries, own, keys, values, jnp.arange(keys.shape[1]) < context.prefix_length)


FOLD_PREFIX = {"paged": _fold_prefix_paged, "reference": _fold_prefix_reference}


def attend(
    q: Float[Array, "Q N H"],
    k: Float[Array, "M K H"],
    v: Float[Array, "M K H"],
    context: Context,
    layer: Layer,
    *,
    implementation: str,
    reads: Int[Array, " Q"] | None = None,
) -> Float[Array, "Q N H"]:
    """Softmax attention of every token, or of the tokens at ``reads`` alone; float32.

    Args:
        q: queries, already rotated and scaled by 1 / sqrt(H); of all M tokens, or of the R tokens at ``reads``.
        k: keys of all M tokens, rotated.
        v: values of all M tokens.
        layer: which layer of the pool holds this layer's prefix.
        implementation: ``"paged"`` or ``"reference"``.
        reads: flat indices into the M tokens.
    """
    own = _own_bins(q, k, v, context.segments) if reads is None else _own_reads(q, k, v, context.segments, reads)
    queries = _split_heads(q, k.shape[1])
    partial = FOLD_PREFIX[implementation](queries, own, context, layer)
    return _merge_heads(partial.values / partial.total[..., None], q.shape[0])
