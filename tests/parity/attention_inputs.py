"""Random inputs of attention, for the tests of its kernels."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from model.attention import AttentionContext, MaskSpec, attend
from model.contract import PAGE_TOKENS

Attend = Callable[..., jax.Array]

PAGES, SLOTS, LAYERS = 9, 8, 2


def inputs(
    *,
    bins: int,
    width: int,
    head_width: int,
    longest: int,
    heads: int = 4,
    kv_heads: int = 2,
    stored: int | None = None,
    seed: int = 0,
) -> tuple[jax.Array, jax.Array, jax.Array, AttentionContext]:
    """Make segments of 1 to ``longest`` tokens in every bin, with empty last positions, and a full page table.

    Args:
        stored: width of a head in the pool, zeros beyond ``head_width``; None: ``head_width``.
    """
    rng = np.random.default_rng(seed)
    segments, positions = np.full((bins, width), -1, np.int32), np.zeros((bins, width), np.int32)
    for number, row in enumerate(segments):
        ends = np.cumsum(rng.integers(1, longest + 1, width))
        filled = int(ends[ends < width][-1])
        rows = np.searchsorted(ends, np.arange(filled), "right")
        row[:filled] = 1000 * number + rows
        positions[number, :filled] = np.arange(filled) - np.concatenate([[0], ends])[rows]

    def normal(*shape: int) -> np.ndarray:
        return rng.normal(0, 1, shape).astype(np.float32)

    pool = normal(PAGES, LAYERS, 2, kv_heads, PAGE_TOKENS, stored or head_width)
    pool[..., head_width:] = 0
    table = rng.permutation(PAGES - 1)[:SLOTS].astype(np.int32) + 1
    q = normal(bins * width, heads, head_width) * 2 * head_width**-0.5
    k, v = (normal(bins * width, kv_heads, head_width) for _ in range(2))
    places, none = positions.reshape(-1), np.zeros(bins * width, np.int32)
    context = AttentionContext(*map(jnp.asarray, (segments, places, none, pool, table[None], np.zeros(1, np.int32))))
    return jnp.asarray(q), jnp.asarray(k), jnp.asarray(v), context


def over_prefix(context: AttentionContext, length: int) -> AttentionContext:
    """The same segments over a prefix."""
    return context._replace(prefix_lengths=jnp.array([length], jnp.int32), positions=context.positions + length)


def kernel_and_reference(
    implementation: str, head_width: int, window: int | None = None, softcap: float | None = None
) -> tuple[Attend, Attend]:
    """Kernel and reference, compiled once for all prefix lengths; the reference's pool has unpadded heads."""
    spec = MaskSpec(None if window is None else jnp.int32(window), softcap)

    def kernel(
        q: jax.Array, k: jax.Array, v: jax.Array, context: AttentionContext, reads: jax.Array | None = None
    ) -> jax.Array:
        query = q if reads is None else q[reads]
        return attend(query, k, v, context, 1, spec, implementation=implementation, reads=reads)

    def reference(
        q: jax.Array, k: jax.Array, v: jax.Array, context: AttentionContext, reads: jax.Array | None = None
    ) -> jax.Array:
        query = q if reads is None else q[reads]
        narrow = context._replace(pool=context.pool[..., :head_width])
        return attend(query, k, v, narrow, 1, spec, implementation="reference", reads=reads)

    return jax.jit(kernel), jax.jit(reference)
