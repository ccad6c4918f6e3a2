"""The CPU's attention kernel against a plain softmax over everything in float64."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model.attention import AttentionContext, MaskSpec, attend, to_pool
from model.contract import PAGE_TOKENS
from tests.parity.attention_inputs import inputs, over_prefix

pytestmark = [
    pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler is installed"),
    pytest.mark.usefixtures("kernels"),
]


def attended(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    context: AttentionContext,
    rule: MaskSpec | None = None,
    reads: jax.Array | None = None,
    implementation: str = "native",
) -> np.ndarray:
    """Attention by the kernel, in layer 1; the pool is stored as the engine stores it."""
    context = context._replace(pool=to_pool(context.pool))
    query, asked = q if reads is None else q[reads], rule or MaskSpec()
    result = jax.jit(lambda *a: attend(*a, 1, asked, implementation=implementation, reads=reads))(query, k, v, context)
    return np.asarray(result, np.float32)


def exact(q: jax.Array, k: jax.Array, v: jax.Array, context: AttentionContext, rule: MaskSpec) -> np.ndarray:
    """Attention of all tokens in float64."""
    segments, positions = (np.asarray(x).reshape(-1) for x in (context.segments, context.positions))
    length = int(context.prefix_length)
    pages = np.asarray(context.pool, np.float64)[np.asarray(context.page_table), 1]
    prefix = pages.transpose(1, 2, 0, 3, 4).reshape(2, k.shape[1], -1, k.shape[2])[:, :, :length]
    own = np.stack([np.asarray(x, np.float64).transpose(1, 0, 2) for x in (k, v)])
    keys, values = np.concatenate([prefix, own], axis=2).repeat(q.shape[1] // k.shape[1], axis=1)
    distance = positions[:, None] - np.concatenate([np.arange(length), positions])
    of_row = np.concatenate([np.ones((len(segments), length), bool), segments[:, None] == segments], axis=1)
    window = rule.window if rule.window is not None else len(of_row[0])
    visible = of_row & ((distance >= 0) & (distance < window) if rule.causal else abs(distance) < window)
    scores = np.asarray(q, np.float64).transpose(1, 0, 2) @ keys.transpose(0, 2, 1)
    if rule.softcap is not None:
        scores = rule.softcap * np.tanh(scores / rule.softcap)
    scores = np.where(visible, scores, -np.inf)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return (weights / weights.sum(axis=-1, keepdims=True) @ values).transpose(1, 0, 2)


@pytest.mark.parametrize(
    ("shape", "heads", "kv_heads", "head_width", "longest", "window", "softcap"),
    [
        pytest.param((1, 1024), 9, 3, 64, 60, None, None, id="the demo model's heads"),
        pytest.param((5, 96), 4, 4, 80, 40, 20, 1.5, id="a window shorter than a segment, and a soft cap"),
        pytest.param((1, 700), 8, 1, 72, 600, 300, None, id="a segment longer than a window, one key for all heads"),
        pytest.param((3, 64), 2, 2, 24, 30, None, 5.0, id="narrow heads"),
        pytest.param((2, 256), 4, 2, 256, 200, None, None, id="wide heads"),
    ],
)
def test_kernel_equals_float64(
    shape: tuple[int, int],
    heads: int,
    kv_heads: int,
    head_width: int,
    longest: int,
    window: int | None,
    softcap: float | None,
) -> None:
    sizes = {"bins": shape[0], "width": shape[1], "head_width": head_width, "longest": longest}
    q, k, v, context = inputs(**sizes, heads=heads, kv_heads=kv_heads)
    real = np.asarray(context.segments).reshape(-1) >= 0
    rule = MaskSpec(None if window is None else jnp.int32(window), softcap)
    reads = jnp.asarray([3, 17, 18, 18, 60, 0])
    for length in (0, 65, 5 * PAGE_TOKENS + 3):
        here = over_prefix(context, length)
        got = attended(q, k, v, here, rule)
        np.testing.assert_allclose(got[real], exact(q, k, v, here, rule)[real], rtol=3e-6, atol=3e-6)
        assert not got[~real].any()
        np.testing.assert_array_equal(attended(q, k, v, here, rule, reads), got[np.asarray(reads)])
        rounded = [x.astype(jnp.bfloat16) for x in (q, k, v)]
        stored = here._replace(pool=here.pool.astype(jnp.bfloat16))
        got = attended(*rounded, stored, rule)
        np.testing.assert_allclose(got[real], exact(*rounded, stored, rule)[real], rtol=0.004, atol=0.01)


@pytest.mark.parametrize("window", [None, 20, 90])
@pytest.mark.parametrize(("shape", "longest"), [((1, 700), 600), ((3, 64), 30)])
def test_an_encoder_s_tokens_see_what_is_after_them(shape: tuple[int, int], longest: int, window: int | None) -> None:
    """Of their own segment and within the window on both sides, by every attention that knows no more than that."""
    q, k, v, context = inputs(bins=shape[0], width=shape[1], head_width=24, longest=longest, heads=4, kv_heads=4)
    real = np.asarray(context.segments).reshape(-1) >= 0
    rule = MaskSpec(None if window is None else jnp.int32(window), causal=False)
    reads = jnp.asarray([3, 17, 18, 18, 60, 0])
    wanted = exact(q, k, v, context, rule)
    for implementation in ("native", "paged"):
        got = attended(q, k, v, context, rule, implementation=implementation)
        np.testing.assert_allclose(got[real], wanted[real], rtol=3e-6, atol=3e-6)
        read = attended(q, k, v, context, rule, reads, implementation=implementation)
        np.testing.assert_allclose(read, wanted[np.asarray(reads)], rtol=3e-6, atol=3e-6)
    with pytest.raises(ValueError, match="'fused' is causal"):
        attended(q, k, v, context, rule, implementation="fused")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_segment_has_the_same_bits_among_any_others(dtype: str) -> None:
    q, k, v, context = inputs(bins=1, width=640, head_width=64, longest=90, heads=6, kv_heads=2)
    q, k, v = (x.astype(dtype) for x in (q, k, v))
    context = over_prefix(context._replace(pool=context.pool.astype(dtype)), 200)
    among = attended(q, k, v, context)
    segments = np.asarray(context.segments)[0]
    for segment in range(segments.max() + 1):
        (own,) = np.nonzero(segments == segment)
        alone = context._replace(
            segments=jnp.zeros((1, len(own)), jnp.int32),
            positions=context.positions[own],
            prefixes=context.prefixes[own],
        )
        np.testing.assert_array_equal(attended(q[own], k[own], v[own], alone), among[own])


@pytest.mark.parametrize("window", [None, 90])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_segments_over_several_prefixes_have_the_bits_of_a_call_with_one(dtype: str, window: int | None) -> None:
    q, k, v, context = inputs(bins=1, width=640, head_width=64, longest=90, heads=6, kv_heads=2)
    q, k, v = (x.astype(dtype) for x in (q, k, v))
    lengths, rule = (0, 65, 5 * PAGE_TOKENS + 3, 200), MaskSpec(None if window is None else jnp.int32(window))
    tables = jnp.stack([jnp.roll(context.page_table, number) for number in range(len(lengths))])
    segments = np.asarray(context.segments)[0]
    seen = np.where(segments < 0, 0, np.array([2, 2, 0, 1, 3, 1])[segments % 6])
    together = context._replace(
        pool=context.pool.astype(dtype),
        positions=context.positions + np.array(lengths)[seen],
        prefixes=jnp.asarray(seen, jnp.int32),
        page_tables=tables,
        prefix_lengths=jnp.array(lengths, jnp.int32),
    )
    got = attended(q, k, v, together, rule)
    reads = jnp.asarray([9, 11, 100, 300, 301, 500, 0, 0])
    np.testing.assert_array_equal(attended(q, k, v, together, rule, reads), got[np.asarray(reads)])
    for number, length in enumerate(lengths):
        own = (seen == number) & (segments >= 0)
        assert own.sum() > 60
        alone = over_prefix(context._replace(pool=together.pool, page_tables=tables[number : number + 1]), length)
        np.testing.assert_array_equal(attended(q, k, v, alone, rule)[own], got[own])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_broken_segment_harms_only_itself(dtype: str) -> None:
    q, k, v, context = inputs(bins=2, width=128, head_width=64, longest=40)
    q, k, v = (x.astype(dtype) for x in (q, k, v))
    context = over_prefix(context._replace(pool=context.pool.astype(dtype)), 130)
    segments = np.asarray(context.segments).reshape(-1)
    whole = attended(q, k, v, context)
    broken = segments == segments[0]
    for value in (np.nan, np.inf):
        spoilt = [x.at[np.flatnonzero(broken)].set(value) for x in (q, k, v)]
        got = attended(*spoilt, context)
        assert np.isnan(got[broken]).all()
        np.testing.assert_array_equal(got[~broken], whole[~broken])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_broken_token_harms_none_before_it(dtype: str) -> None:
    """Queries multiplied together see different keys: a masked key is not in a query's sum, not even as 0 * NaN."""
    q, k, v, context = inputs(bins=1, width=64, head_width=64, longest=60)
    q, k, v = (x.astype(dtype) for x in (q, k, v))
    context = context._replace(segments=jnp.zeros((1, 64), jnp.int32), pool=context.pool.astype(dtype))
    whole = attended(q, k, v, context)
    for token in (31, 32, 33):
        got = attended(*(x.at[token].set(jnp.nan) for x in (q, k, v)), context)
        np.testing.assert_array_equal(got[:token], whole[:token])
        assert np.isnan(got[token:]).all()


@pytest.mark.parametrize("rule", [(None, None), (20, None), (90, 1.5), (300, None)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_bits_do_not_depend_on_where_a_sequence_is_cut(dtype: str, rule: tuple[int | None, float | None]) -> None:
    """Into a prefix in pages and a segment, of which a query of one token is another."""
    window, softcap = rule
    asked = MaskSpec(None if window is None else jnp.int32(window), softcap)
    length, kv_heads = 3 * PAGE_TOKENS + 9, 2
    q, k, v, context = inputs(bins=1, width=length, head_width=24, longest=60, heads=6, kv_heads=kv_heads)
    q, k, v = (x.astype(dtype) for x in (q, k, v))
    stored = np.array(context.pool)
    for page, at in zip(np.asarray(context.page_table), range(0, length, PAGE_TOKENS), strict=False):
        for half, x in enumerate((k, v)):
            own = np.asarray(x[at : at + PAGE_TOKENS], np.float32)
            stored[page, 1, half, :, : len(own)] = own.transpose(1, 0, 2)

    def behind_a_prefix(cut: int, *, beside: int) -> np.ndarray:
        """The tokens from ``cut`` on, behind those before it, twice, after another segment of ``beside`` tokens."""
        tokens = np.concatenate([np.arange(beside), np.arange(cut, length), np.arange(cut, length)])
        segments = np.repeat([0, 1, 2], [beside, length - cut, length - cut])
        here = context._replace(
            segments=jnp.asarray(segments[None], jnp.int32),
            positions=jnp.asarray(tokens, jnp.int32),
            prefixes=jnp.asarray(segments > 0, jnp.int32),
            pool=jnp.asarray(stored).astype(dtype),
            page_tables=jnp.tile(context.page_table, (2, 1)),
            prefix_lengths=jnp.array([0, cut], jnp.int32),
        )
        _, first, second = np.split(
            attended(q[tokens], k[tokens], v[tokens], here, asked), [beside, beside + length - cut]
        )
        np.testing.assert_array_equal(first, second)
        return first

    whole = behind_a_prefix(0, beside=0)
    for cut in (1, 5, 63, 64, 65, 127, PAGE_TOKENS, 191, 2 * PAGE_TOKENS + 33, length - 1):
        np.testing.assert_array_equal(behind_a_prefix(cut, beside=cut % 50), whole[cut:])
