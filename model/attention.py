"""Attention of packed rows over a shared paged prefix and over themselves.

A program call holds M = B * T tokens: B bins of T positions, each bin packed with whole rows one after the other. A
token sees (1) the first ``prefix_length`` positions of the prefix that all rows of the call share, kept as pages of a
pool, and (2) the tokens of its own row up to itself.

Two implementations with one signature: ``reference`` gathers the prefix and takes one softmax over everything;
``paged`` walks the prefix page by page, one plain 2-D matmul per key/value head, and merges by the running log-sum-exp,
so one compiled program serves every prefix length and no [tokens, prefix] array exists.

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
    values = _finite(v)
    scores = jnp.stack([_matmul_t(queries[i], k[:, i]) for i in range(kv_heads)])  # K G*R M
    scores = scores.reshape(kv_heads, -1, *visible.shape)
    scores = jnp.where(visible[None, None], scores, -jnp.inf).reshape(kv_heads, -1, flat.size)
    maximum = scores.max(axis=-1)
    weights = jnp.exp(scores - maximum[..., None])
    total = weights.sum(axis=-1)
    summed = jnp.stack([_matmul(weights[i].astype(v.dtype), values[:, i]) for i in range(kv_heads)])
    return Partial(maximum, total, summed)


def _matmul(a: Float[Array, "x y"], b: Float[Array, "y z"]) -> Float[Array, "x z"]:
    return lax.dot(a, b, preferred_element_type=jnp.float32)


def _matmul_t(a: Float[Array, "x y"], b: Float[Array, "z y"]) -> Float[Array, "x z"]:
    return lax.dot_general(a, b, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)


def _fold_prefix_paged(queries: Float[Array, "K Q H"], own: Partial, context: Context, layer: Layer) -> Partial:
    """Add the prefix to a partial softmax, one page a step."""
    kv_heads = queries.shape[0]
    page_shape = (1, 1, 2, *context.pool.shape[3:])

    def fold(step: Int[Array, ""], partial: Partial) -> Partial:
        start = (context.page_table[step], layer, 0, 0, 0, 0)
        page = lax.dynamic_slice(context.pool, start, page_shape)[0, 0]  # 2 K page H
        valid = step * PAGE_TOKENS + jnp.arange(PAGE_TOKENS) < context.prefix_length
        parts: list[Partial] = []
        for i in range(kv_heads):
            scores = jnp.where(valid[None, :], _matmul_t(queries[i], page[0, i]), -jnp.inf)
            maximum = jnp.maximum(partial.maximum[i], scores.max(axis=-1))
            weights = jnp.exp(scores - maximum[:, None])
            scale = jnp.exp(partial.maximum[i] - maximum)
            summed = _matmul(weights.astype(page.dtype), page[1, i])
            parts.append(
                Partial(
                    maximum,
                    partial.total[i] * scale + weights.sum(axis=-1),
                    partial.values[i] * scale[:, None] + summed,
                )
            )
        return Partial(*(jnp.stack(x) for x in zip(*parts, strict=True)))

    pages = (context.prefix_length + PAGE_TOKENS - 1) // PAGE_TOKENS
    return lax.fori_loop(0, pages, fold, own)


def _fold_prefix_reference(queries: Float[Array, "K Q H"], own: Partial, context: Context, layer: Layer) -> Partial:
    """Add the whole prefix at once: gathers all page slots and masks those past the prefix."""
    prefix = context.pool[context.page_table, layer]  # slots 2 K page H
    keys, values = (prefix[:, i].transpose(1, 0, 2, 3).reshape(queries.shape[0], -1, queries.shape[2]) for i in (0, 1))
    valid = jnp.arange(keys.shape[1]) < context.prefix_length
    scores = jnp.einsum("kqh,kph->kqp", queries, keys, preferred_element_type=jnp.float32)
    scores = jnp.where(valid[None, None, :], scores, -jnp.inf)
    maximum = jnp.maximum(own.maximum, scores.max(axis=-1))
    weights = jnp.exp(scores - maximum[..., None])
    scale = jnp.exp(own.maximum - maximum)
    summed = jnp.einsum("kqp,kph->kqh", weights.astype(values.dtype), values, preferred_element_type=jnp.float32)
    return Partial(maximum, own.total * scale + weights.sum(axis=-1), own.values * scale[..., None] + summed)


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
