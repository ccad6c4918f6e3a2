"""The TPU kernel, interpreted on this machine, against a plain softmax over all keys."""

from functools import partial

import jax.numpy as jnp
import numpy as np
import pytest

from model.attention import MaskSpec, attend, to_pool
from model.attention_tpu import stored_width
from model.contract import PAGE_TOKENS
from tests.parity.attention_inputs import assert_as_alone, inputs, kernel_and_reference, over_prefix, with_far_keys

both = partial(kernel_and_reference, "fused-interpreted")


@pytest.mark.parametrize(
    ("bins", "width", "head_width", "longest", "window", "softcap"),
    [
        pytest.param(9, 128, 80, 60, None, None, id="narrow heads, a tile that is not filled"),
        pytest.param(9, 128, 80, 60, 40, 1.5, id="a window shorter than a segment, and a soft cap"),
        pytest.param(3, 384, 128, 300, None, None, id="folds over the prefix that end within a bin"),
        pytest.param(1, 2048, 128, 1500, 700, None, id="a bin of two tiles, a window over both"),
    ],
)
def test_kernel_equals_reference(
    bins: int, width: int, head_width: int, longest: int, window: int | None, softcap: float | None
) -> None:
    q, k, v, context = inputs(
        bins=bins, width=width, head_width=head_width, longest=longest, stored=stored_width(head_width)
    )
    real = np.asarray(context.segments).reshape(-1) >= 0
    kernel, reference = both(head_width, window, softcap)
    for length in (0, 1, 4 * PAGE_TOKENS, 5 * PAGE_TOKENS + 3, 8 * PAGE_TOKENS - 5):
        here = over_prefix(context, length)
        got, wanted = (np.asarray(run(q, k, v, here))[real] for run in (kernel, reference))
        # Sums over a thousand keys in another order differ by the square root of that many roundings; and of a score of
        # 10, whose query is rounded once more by its factor, the weight differs by 1e-6 and more.
        np.testing.assert_allclose(got, wanted, rtol=2e-6, atol=6e-6)


@pytest.mark.parametrize(
    ("bins", "width", "longest", "window"),
    [
        pytest.param(5, 256, 30, None, id="own scores below all of the prefix's, and above"),
        pytest.param(1, 2048, 1500, None, id="far keys in an earlier tile"),
        pytest.param(1, 2048, 1500, 700, id="a window", marks=pytest.mark.slow),
    ],
)
def test_scores_far_above_those_before(bins: int, width: int, longest: int, window: int | None) -> None:
    """Their folds are done again: 2 to the power of their distance is no float32."""
    q, k, v, context = inputs(bins=bins, width=width, head_width=128, longest=longest)
    k, context = with_far_keys(k, context)
    real = np.asarray(context.segments).reshape(-1) >= 0
    kernel, reference = both(128, window)
    for length in (0, 5 * PAGE_TOKENS + 3):
        got, wanted = (np.asarray(run(q, k, v, over_prefix(context, length)))[real] for run in (kernel, reference))
        # A score of 200 is rounded by 1e-5 and more.
        np.testing.assert_allclose(got, wanted, rtol=0, atol=2e-4)


@pytest.mark.parametrize(
    ("bins", "width", "window", "softcap", "ends"),
    [
        # In a tile of 1,024 queries: one prefix; this one and two others, of which one ends within a fold; padding.
        pytest.param(17, 128, None, None, (1400, 1500, 2080), id="a tile of one prefix, and tiles of several"),
        pytest.param(9, 128, 40, 1.5, (300, 500, 700), id="a window, and a soft cap"),
        pytest.param(1, 2048, 300, None, (100, 1500, 1700), id="a bin of two tiles, a window", marks=pytest.mark.slow),
    ],
)
def test_segments_over_several_prefixes(
    bins: int, width: int, window: int | None, softcap: float | None, ends: tuple[int, ...]
) -> None:
    """As each prefix's segments come out alone. One prefix is empty, and one has NaN in its values."""
    *vectors, context = inputs(bins=bins, width=width, head_width=128, longest=60)
    segments = np.asarray(context.segments).reshape(-1)
    first = np.maximum.accumulate(np.where(np.diff(segments, prepend=-2) != 0, np.arange(len(segments)), 0))
    which = np.searchsorted(ends, first, "right")
    assert_as_alone(*both(128, window, softcap), vectors, context, which, (530, 131, 60, 0), broken=2)


def test_several_prefixes_after_a_far_score() -> None:
    """In one of the two parts in which the earlier tile is folded, so that these sums and the others' lie apart."""
    q, k, v, context = inputs(bins=1, width=2048, head_width=128, longest=60)
    place, ends = np.arange(2048), np.array([1200, 1600, 2000])
    which = np.searchsorted(ends, place, "right")
    segments, positions = np.where(place < 2000, which, -1), place - np.append(0, ends)[which]
    context = context._replace(
        segments=jnp.asarray(segments, jnp.int32)[None], positions=jnp.asarray(positions, jnp.int32)
    )
    vectors = q, k.at[700].mul(25), v
    seen = np.minimum(which, 2)
    assert_as_alone(*both(128), vectors, context, seen, (530, 60, 131), broken=2, atol=2e-4)


def test_bfloat16_reads_and_a_broken_neighbour() -> None:
    """Only reads are compared, in bfloat16; one segment's values are NaN, and no other result is."""
    q, k, v, context = inputs(bins=3, width=128, head_width=64, longest=40, stored=stored_width(64))
    segments = np.asarray(context.segments).reshape(-1)
    broken = segments == segments[0]
    v = v.at[np.flatnonzero(broken)].set(jnp.nan)
    reads = jnp.asarray([50, 51, 127 + 30, 300])
    context = over_prefix(context, 130)
    kernel, reference = both(64)
    wanted = np.asarray(reference(q, k, v, context, reads))
    q, k, v = (x.astype(jnp.bfloat16) for x in (q, k, v))
    stored = context._replace(pool=to_pool(context.pool.astype(jnp.bfloat16)))
    got = kernel(q, k, v, stored, reads)
    assert got.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(got, np.float32), wanted, rtol=0, atol=0.03)


def test_a_bin_that_no_tile_divides_is_refused() -> None:
    q, k, v, context = inputs(bins=1, width=1040, head_width=128, longest=1000)
    with pytest.raises(ValueError, match="1040 positions"):
        attend(q, k, v, context, 0, MaskSpec(), implementation="fused-interpreted")
