"""The GPU kernel, interpreted on this machine, against a plain softmax over all keys."""

from functools import partial

import jax.numpy as jnp
import numpy as np
import pytest

from model.attention import to_pool
from model.attention_gpu import stored_width
from model.contract import PAGE_TOKENS
from tests.parity.attention_inputs import assert_as_alone, inputs, kernel_and_reference, over_prefix

both = partial(kernel_and_reference, "triton-interpreted")


def case(
    *sizes: int, heads: tuple[int, int], window: int | None = None, softcap: float | None = None, slow: bool = False
) -> object:
    """Bins, their width, a head's width and the longest segment; query and key/value heads."""
    name = f"{sizes} heads {heads} window {window} softcap {softcap}"
    return pytest.param(*sizes, heads, window, softcap, id=name, marks=[pytest.mark.slow] if slow else [])


@pytest.mark.parametrize(
    ("bins", "width", "head_width", "longest", "heads", "window", "softcap"),
    [
        case(3, 80, 80, 60, heads=(6, 2), window=40, softcap=1.5),
        case(1, 240, 64, 200, heads=(2, 2)),
        *(
            case(3, 144, width, 100, heads=heads, window=window, softcap=softcap, slow=True)
            for width in (16, 64, 80, 96, 128, 256)
            for heads in ((2, 2), (4, 2), (7, 1), (8, 1))
            for window, softcap in ((None, None), (50, None), (300, 30.0))
        ),
        case(1, 1040, 64, 900, heads=(2, 1), window=700, slow=True),
    ],
)
def test_kernel_equals_reference(
    bins: int,
    width: int,
    head_width: int,
    longest: int,
    heads: tuple[int, int],
    window: int | None,
    softcap: float | None,
) -> None:
    q, k, v, context = inputs(
        bins=bins,
        width=width,
        head_width=head_width,
        longest=longest,
        heads=heads[0],
        kv_heads=heads[1],
        stored=stored_width(head_width),
    )
    real = np.asarray(context.segments).reshape(-1) >= 0
    kernel, reference = both(head_width, window, softcap)
    for length in (0, 1, 2 * PAGE_TOKENS, 5 * PAGE_TOKENS + 3):
        here = over_prefix(context, length)
        got, wanted = (np.asarray(run(q, k, v, here))[real] for run in (kernel, reference))
        # Sums over a thousand keys in another order differ by the square root of that many roundings.
        np.testing.assert_allclose(got, wanted, rtol=2e-6, atol=6e-6)


@pytest.mark.parametrize("window", [None, pytest.param(100, marks=pytest.mark.slow)])
def test_segments_over_several_prefixes(window: int | None) -> None:
    """As each prefix's segments come out alone: several prefixes within a block, one of them with NaN in its values."""
    *vectors, context = inputs(bins=1, width=160, head_width=64, longest=12)
    segments = np.asarray(context.segments).reshape(-1)
    which = np.where(segments >= 0, np.minimum(segments // 3, 3), 0)
    assert np.unique(which[:32]).size > 1, "the kernel's block of float32 queries sees one prefix alone"
    assert_as_alone(*both(64, window), vectors, context, which, (0, 130, 131, 500), broken=2)


def test_bfloat16_reads_and_a_broken_neighbour() -> None:
    """Only reads are compared, in bfloat16; one segment's values are NaN, and no other result is."""
    q, k, v, context = inputs(bins=3, width=80, head_width=80, longest=40, stored=stored_width(80))
    segments = np.asarray(context.segments).reshape(-1)
    v = v.at[np.flatnonzero(segments == segments[0])].set(jnp.nan)
    reads = jnp.asarray([50, 51, 100, 170])
    assert (segments[np.asarray(reads)] > 0).all()
    context = over_prefix(context, 130)
    kernel, reference = both(80)
    wanted = np.asarray(reference(q, k, v, context, reads))
    q, k, v = (x.astype(jnp.bfloat16) for x in (q, k, v))
    got = kernel(q, k, v, context._replace(pool=to_pool(context.pool.astype(jnp.bfloat16))), reads)
    assert got.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(got, np.float32), wanted, rtol=0, atol=0.03)
