"""The CPU's kernel that puts keys and values into their pages."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model.computations import Span
from model.contract import PAGE_TOKENS
from model.cpu import pages

pytestmark = pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler is installed")

LAYERS, HEADS, WIDTH, TOKENS = 3, 2, 4, 300
SPANS = [Span(2, 5, 3, 100), Span(7, 0, 103, PAGE_TOKENS), Span(5, 0, 231, 1), Span(5, 1, 299, 1), Span(0, 0, 0, 9)]
COUNT = 4
"""The last of these is none of this call's."""


@pytest.mark.parametrize("dtype", ["float32", "uint16"])
@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.usefixtures("kernels")
def test_spans_are_written_and_nothing_else(dtype: str, *, in_place: bool) -> None:
    """A span in the middle of a page, a whole page, and two of one token in one page."""
    rng = np.random.default_rng(0)
    pool = rng.integers(0, 60000, (9, LAYERS, 2, HEADS, PAGE_TOKENS, WIDTH)).astype(dtype)
    parts = [rng.integers(0, 60000, (2, TOKENS, HEADS, WIDTH)).astype(dtype) for _ in range(LAYERS)]
    wanted = pool.copy()
    for page, offset, start, length in SPANS[:COUNT]:
        for layer, part in enumerate(parts):
            own = part[:, start : start + length].transpose(0, 2, 1, 3)
            wanted[page, layer, :, :, offset : offset + length] = own
    write = jax.jit(lambda *operands: pages.write(*operands), donate_argnums=0 if in_place else ())
    given = jnp.asarray(pool)
    got = write(given, [jnp.asarray(part) for part in parts], jnp.asarray(SPANS, jnp.int32), jnp.int32(COUNT))
    np.testing.assert_array_equal(got, wanted)
    assert given.is_deleted() == in_place
    if not in_place:
        np.testing.assert_array_equal(given, pool)
