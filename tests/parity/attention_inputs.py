"""Random inputs of attention, for the tests of its kernels."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from model.attention import AttentionContext, MaskSpec, attend, query_factor
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


def with_far_keys(k: jax.Array, context: AttentionContext) -> tuple[jax.Array, AttentionContext]:
    """Keys of which a few, in the pool too, are 25 times as long: their scores are 100 above and below the others'."""
    own = jnp.arange(len(k))[:, None, None] % 7 == 3
    far = jnp.arange(PAGE_TOKENS)[:, None] % 50 == 9
    pool = context.pool.at[:, :, 0].set(jnp.where(far, 25 * context.pool[:, :, 0], context.pool[:, :, 0]))
    return jnp.where(own, 25 * k, k), context._replace(pool=pool)


def over_prefix(context: AttentionContext, length: int) -> AttentionContext:
    """The same segments over a prefix."""
    return context._replace(prefix_lengths=jnp.array([length], jnp.int32), positions=context.positions + length)


def over_prefixes(context: AttentionContext, which: np.ndarray, lengths: tuple[int, ...]) -> AttentionContext:
    """The same segments, each over one of several prefixes that lie in pages of their own.

    Args:
        which: of each token.
    """
    tables, free = np.zeros((len(lengths), SLOTS), np.int32), iter(np.asarray(context.page_table).tolist())
    for row, length in zip(tables, lengths, strict=True):
        pages = -(-length // PAGE_TOKENS)
        row[:pages] = [next(free) for _ in range(pages)]
    return context._replace(
        prefixes=jnp.asarray(which, jnp.int32),
        positions=context.positions + np.array(lengths, np.int32)[which],
        page_tables=jnp.asarray(tables),
        prefix_lengths=jnp.asarray(lengths, jnp.int32),
    )


def assert_as_alone(
    kernel: Attend,
    reference: Attend,
    vectors: tuple[jax.Array, jax.Array, jax.Array],
    context: AttentionContext,
    which: np.ndarray,
    lengths: tuple[int, ...],
    broken: int,
    atol: float = 6e-6,
) -> None:
    """Compare the kernel, over several prefixes, with each prefix's segments by themselves.

    Args:
        vectors: queries, keys and values.
        which: the prefix of each token.
        broken: a prefix with NaN in its first page's values; what its segments get is not compared.
    """
    several = over_prefixes(context, which, lengths)
    pool = several.pool.at[several.page_tables[broken, 0], :, 1].set(jnp.nan)
    got = np.asarray(kernel(*vectors, several._replace(pool=pool)))
    real = np.asarray(context.segments).reshape(-1) >= 0
    for prefix, length in enumerate(lengths):
        mine = (which == prefix) & real
        assert mine.any()
        if prefix != broken:
            alone = over_prefix(context._replace(page_tables=several.page_tables[prefix][None]), length)
            wanted = np.asarray(reference(*vectors, alone))
            np.testing.assert_allclose(got[mine], wanted[mine], rtol=2e-6, atol=atol, err_msg=f"prefix {prefix}")


def kernel_and_reference(
    implementation: str, head_width: int, window: int | None = None, softcap: float | None = None
) -> tuple[Attend, Attend]:
    """Kernel and reference, compiled once for all prefix lengths; the reference's pool has unpadded heads."""
    spec = MaskSpec(None if window is None else jnp.int32(window), softcap)

    def kernel(
        q: jax.Array, k: jax.Array, v: jax.Array, context: AttentionContext, reads: jax.Array | None = None
    ) -> jax.Array:
        query = (q if reads is None else q[reads]) * query_factor(implementation)
        return attend(query, k, v, context, 1, spec, implementation=implementation, reads=reads)

    def reference(
        q: jax.Array, k: jax.Array, v: jax.Array, context: AttentionContext, reads: jax.Array | None = None
    ) -> jax.Array:
        query = q if reads is None else q[reads]
        narrow = context._replace(pool=context.pool[..., :head_width])
        return attend(query, k, v, narrow, 1, spec, implementation="reference", reads=reads)

    return jax.jit(kernel), jax.jit(reference)
