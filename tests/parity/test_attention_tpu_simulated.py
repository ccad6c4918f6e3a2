"""The TPU kernel in a simulator of the chip's memories, copies and semaphores, against a softmax in float64.

``test_attention_tpu`` runs the same kernel on plain arrays, where every copy has arrived and all memory is zero.
"""

from collections.abc import Sequence
from itertools import product
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from model.attention import AttentionContext, MaskSpec, attend, from_pool, to_pool
from model.attention_tpu import LOG2_E, stored_width
from model.contract import PAGE_TOKENS
from tests.parity.attention_inputs import SLOTS, inputs, over_prefix, over_prefixes, with_far_keys
from tests.simulated_tpu import simulated

LAYER = 1


class Case(NamedTuple):
    """What one program is compiled for, and how full its bins are."""

    head_width: int
    groups: int
    dtype: str
    bins: int
    width: int
    longest: int
    window: int | None
    softcap: float | None
    kv_heads: int = 2
    cores: int = 1
    far: bool = False

    def __str__(self) -> str:
        rule = f"window {self.window}, cap {self.softcap}, {self.cores} cores"
        return f"{self.dtype}, head {self.head_width}, groups {self.groups}, {self.bins} x {self.width}, {rule}"


PREFIXES = (0, 1, PAGE_TOKENS + 2, 4 * PAGE_TOKENS, 4 * PAGE_TOKENS + 1, 600, 900, SLOTS * PAGE_TOKENS)
"""None, page edges, edges of a step of several pages, and the whole page table."""
SHAPES = ((1, 128, 40), (9, 128, 60), (3, 384, 300), (1, 2048, 1500), (2, 1024, 900), (5, 256, 30), (17, 128, 128))
"""Bins, their width and their longest segment: a bin of two tiles, and last tiles that are filled in part."""
LONG = 900
"""Tokens of a longest segment with which a call has too few segments for three prefixes."""
WINDOWS, SOFTCAPS = (None, 40, 700), (None, 1.5)
# The lengths of the tables have no common factor with those that they are combined with, so all pairs come up.
CASES = [
    Case(*kind, *SHAPES[n % 7], WINDOWS[n % 3], SOFTCAPS[n // 3 % 2], kv_heads=1 + n // 5 % 2, cores=1 + n // 7 % 2)
    for n, kind in enumerate(product((64, 80, 128, 256), (1, 2, 4, 7, 8), ("float32", "bfloat16")))
]


def expected(q: Any, k: Any, v: Any, context: AttentionContext, rule: MaskSpec) -> np.ndarray:
    """Each real token's softmax over its prefix and over its segment up to itself, in float64; NaN for padding."""
    length, head_width = int(context.prefix_length), q.shape[2]
    q, k, v, pool = (np.asarray(x.astype(jnp.float32), np.float64) for x in (q, k, v, from_pool(context.pool)))
    q /= LOG2_E
    prefix = pool[np.asarray(context.page_table), LAYER, ..., :head_width]  # slots 2 K page H
    prefix = np.moveaxis(prefix, 0, 2).reshape(2, k.shape[1], -1, head_width)[:, :, :length]
    segments, positions = np.asarray(context.segments).reshape(-1), np.asarray(context.positions)
    result = np.full(q.shape, np.nan)
    for segment in np.unique(segments[segments >= 0]):
        tokens = np.flatnonzero(segments == segment)
        places = np.concatenate([np.arange(length), positions[tokens]])
        back = positions[tokens][:, None] - places
        visible = (back >= 0) & (back < (np.inf if rule.window is None else int(rule.window)))
        for head in range(q.shape[1]):
            of_head = head // (q.shape[1] // k.shape[1])
            keys, values = (
                np.concatenate([prefix[part, of_head], own[tokens, of_head]]) for part, own in enumerate((k, v))
            )
            scores = q[tokens, head] @ keys.T
            if rule.softcap is not None:
                scores = rule.softcap * np.tanh(scores / rule.softcap)
            scores = np.where(visible, scores, -np.inf)
            weights = np.exp(scores - scores.max(axis=1, keepdims=True))
            result[tokens, head] = weights / weights.sum(axis=1, keepdims=True) @ values
    return result


def with_neighbours(context: AttentionContext) -> AttentionContext:
    """NaN where no token may see it: other pages, and the rest of the last. A table ends as the engine fills it."""
    tables, pool = np.array(context.page_tables), np.full(context.pool.shape, np.nan, np.float32)
    for table, length in zip(tables, np.asarray(context.prefix_lengths).tolist(), strict=True):
        table[-(-length // PAGE_TOKENS) :] = 0
        for number, page in enumerate(table[: -(-length // PAGE_TOKENS)]):
            filled = min(PAGE_TOKENS, length - number * PAGE_TOKENS)
            pool[page, LAYER, ..., :filled, :] = context.pool[page, LAYER, ..., :filled, :]
    return context._replace(pool=jnp.asarray(pool), page_tables=jnp.asarray(tables, jnp.int32))


def vectors_of(case: Case) -> tuple[jax.Array, jax.Array, jax.Array, AttentionContext]:
    """Queries, keys and values, in the case's dtype, and their segments."""
    q, k, v, context = inputs(
        bins=case.bins,
        width=case.width,
        head_width=case.head_width,
        longest=case.longest,
        heads=case.groups * case.kv_heads,
        kv_heads=case.kv_heads,
        stored=stored_width(case.head_width),
    )
    if case.far:
        k, context = with_far_keys(k, context)
    q, k, v = (x.astype(jnp.dtype(case.dtype)) for x in (q * LOG2_E, k, v))
    return q, k, v, context


def check(case: Case, prefixes: Sequence[tuple[int, ...]]) -> None:
    """Compare the kernel with ``expected``, over prefixes of these lengths in each call; one program serves all calls
    of as many prefixes.

    The call's first half of segments sees the first prefix, and the others the rest in turn.
    """
    q, k, v, context = vectors_of(case)
    rule = MaskSpec(None if case.window is None else jnp.int32(case.window), case.softcap)
    run = jax.jit(lambda q, k, v, context: attend(q, k, v, context, LAYER, rule, implementation="fused"))
    segments = np.asarray(context.segments).reshape(-1)
    order = np.unique(segments, return_inverse=True)[1] - (segments.min() < 0)
    # A float32 score of 10 is rounded by 1e-6 and more, and its weight in proportion; weights and results of
    # bfloat16 to eight bits.
    bounds = {"rtol": 2e-6, "atol": 1e-5} if case.dtype == "float32" else {"rtol": 2**-7, "atol": 2**-7}
    if case.far:  # of scores of 200
        bounds["atol"] = 2e-4
    for lengths in prefixes:
        half, count = order.max() // 2, len(lengths)
        which = np.zeros_like(order)
        if count > 1:
            which = np.where(order > half, 1 + (order - half - 1) * (count - 1) // (order.max() - half), 0)
        here = with_neighbours(over_prefixes(context, which, lengths))
        here = here._replace(pool=to_pool(here.pool.astype(q.dtype)))
        with simulated(num_cores_or_threads=case.cores, random_seed=lengths[0]):
            got = np.asarray(run(q, k, v, here).astype(jnp.float32))
        for number in range(count):
            mine = (which == number) & (segments >= 0)
            assert mine.any()
            own = slice(number, number + 1)
            alone = here._replace(page_tables=here.page_tables[own], prefix_lengths=here.prefix_lengths[own])
            np.testing.assert_allclose(
                got[mine], expected(q, k, v, alone, rule)[mine], **bounds, err_msg=f"prefix {number} of {lengths}"
            )


@pytest.mark.parametrize(
    ("case", "prefixes"),
    [
        pytest.param(
            Case(80, 1, "bfloat16", *SHAPES[1], window=40, softcap=1.5, cores=2),
            [(900,)],
            id="bfloat16, a last tile that is filled in part, a window shorter than a segment, a soft cap, two cores",
        ),
        pytest.param(
            Case(128, 2, "float32", *SHAPES[3], window=None, softcap=None, kv_heads=1),
            [(0,), (4 * PAGE_TOKENS + 1,)],
            id="float32, two heads, a bin of two tiles",
        ),
        pytest.param(
            Case(64, 2, "float32", *SHAPES[6], window=None, softcap=None, kv_heads=1),
            [(530, 131, 0, 5)],
            id="float32, three tiles: one of one prefix, the others of several",
        ),
        pytest.param(
            Case(128, 1, "bfloat16", *SHAPES[1], window=40, softcap=None, kv_heads=1, cores=2),
            [(PAGE_TOKENS, 300)],
            id="bfloat16, two prefixes, a window",
        ),
        pytest.param(
            Case(128, 2, "float32", *SHAPES[3], window=None, softcap=None, kv_heads=1, far=True),
            [(4 * PAGE_TOKENS + 1,)],
            id="scores far above those before, in an earlier tile and in the prefix",
        ),
    ],
)
def test_kernel_equals_a_softmax(case: Case, prefixes: Sequence[tuple[int, ...]]) -> None:
    check(case, prefixes)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("number", range(len(CASES)), ids=lambda number: str(CASES[number]))
def test_every_kind_of_kernel_equals_a_softmax(number: int) -> None:
    alone = PREFIXES[number // 2 % 4 :: 4]
    several = [] if CASES[number].longest >= LONG else [(600 + number, 0, 131)]
    check(CASES[number], [*((length,) for length in alone), *several])


def test_a_page_that_does_not_exist_is_an_error() -> None:
    """So every page number that the kernel has read in these tests was one of the pool."""
    q, k, v, context = inputs(bins=1, width=128, head_width=128, longest=40, heads=1, kv_heads=1)
    context = over_prefix(context, 3 * PAGE_TOKENS)
    context = context._replace(page_tables=context.page_tables.at[0, 2].set(len(context.pool)))
    with pytest.raises(jax.errors.JaxRuntimeError, match="Out-of-bounds block index"), simulated():
        attend(q, k, v, context, LAYER, MaskSpec(), implementation="fused").block_until_ready()


def through_a_buffer(x: jax.Array, copy: Literal["awaited", "not awaited", "forgotten"]) -> np.ndarray:
    """What a kernel reads from a buffer on the chip that ``x`` is copied to."""

    def kernel(x_ref: Any, out_ref: Any, buffer_ref: Any, semaphore: Any) -> None:
        if copy != "forgotten":
            copying = pltpu.make_async_copy(x_ref, buffer_ref, semaphore)
            copying.start()
            if copy == "awaited":
                copying.wait()
        out_ref[...] = buffer_ref[...]
        if copy == "not awaited":
            copying.wait()

    call = pl.pallas_call(
        kernel,
        out_shape=x,
        in_specs=[pl.BlockSpec(memory_space=pl.ANY)],
        scratch_shapes=[pltpu.VMEM(x.shape, x.dtype), pltpu.SemaphoreType.DMA],
    )
    return np.asarray(call(x))


def test_races_and_memory_that_was_not_written_are_seen() -> None:
    x = jnp.ones((8, 128))
    with simulated():
        assert (through_a_buffer(x, "awaited") == 1).all()
    with simulated():
        assert np.isnan(through_a_buffer(x, "forgotten")).all()
    with pytest.raises(AssertionError, match="RACE DETECTED"), simulated():
        through_a_buffer(x, "not awaited")
