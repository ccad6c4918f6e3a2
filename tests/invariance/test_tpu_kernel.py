"""With the TPU's attention kernel, interpreted, a sequence's values depend on its own tokens alone.

Prefix, segment and calls of other shapes are summed in other orders, so values agree within float32's rounding, see
docs/engine.md.
"""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np
import pytest

from model import loading
from model.contract import PAGE_TOKENS
from model.engine import Engine
from tests.invariance.rows import TOLERANCE, make_model, prompts, values
from tests.tiny_families import make_family

AS_ON_A_TPU: dict[str, Any] = {"implementation": "fused-interpreted", "by_layer": False, "large_calls": True}
SMALL: dict[str, Any] = {"max_segment_tokens": 128, "call_tokens": 256, "chunks": (128, 256), "prefix_cache_bytes": 0}
OTHER: dict[str, Any] = {"max_segment_tokens": 256, "call_tokens": 256, "chunks": (256,), "prefix_cache_bytes": 0}

Load = Callable[..., Engine]


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Load:
    """An engine of a family, made once for each of its options."""

    @cache
    def folder(family: str) -> Any:
        made = tmp_path_factory.mktemp(family)
        return make_model(made) if family == "llama" else make_family(made, family)

    @cache
    def engine(family: str, other: bool) -> Engine:
        return loading.load(folder(family), **AS_ON_A_TPU, **(OTHER if other else SMALL))

    return engine


def alone(scorer: Engine, sequences: Sequence[list[int]]) -> np.ndarray:
    """Each sequence's values in a batch of its own, over an empty cache."""
    found: list[np.ndarray] = []
    for sequence in sequences:
        scorer._forget_prefixes()  # pyright: ignore[reportPrivateUsage]
        found.append(values(scorer, [sequence]))
    scorer._forget_prefixes()  # pyright: ignore[reportPrivateUsage]
    return np.concatenate(found)


def check(scorer: Engine, sequences: list[list[int]]) -> None:
    """Compare values alone with those among others: cold, warm, in another order, and after other pages were used."""
    wanted = alone(scorer, sequences)
    cold = values(scorer, sequences)
    np.testing.assert_allclose(cold, wanted, rtol=0, atol=TOLERANCE)
    hits = scorer.cache_stats.hit_tokens
    warm = values(scorer, sequences)
    assert scorer.cache_stats.hit_tokens > hits
    np.testing.assert_array_equal(warm, cold)  # the same calls over the same pages
    order = np.random.default_rng(1).permutation(len(sequences))
    shuffled = values(scorer, [sequences[i] for i in order])
    np.testing.assert_allclose(shuffled, wanted[order], rtol=0, atol=TOLERANCE)
    for seed in (7, 8, 9):
        values(scorer, prompts(3, seed=seed, query=470, longest=9))
    assert scorer.cache_stats.evicted_pages > 0
    np.testing.assert_allclose(values(scorer, sequences), wanted, rtol=0, atol=TOLERANCE)


def test_alone_equals_among_others(load: Load) -> None:
    check(load("llama", False), prompts(6, query=2 * PAGE_TOKENS + 3))


@pytest.mark.parametrize("family", ["llama", pytest.param("gemma2", marks=pytest.mark.slow)])
def test_callers_that_share_calls_get_what_they_get_alone(load: Load, family: str) -> None:
    """Four queries with two short items each: their prefixes share calls, and their items do."""
    scorer = load(family, False)
    sequences = [each for n in range(4) for each in prompts(2, seed=20 + n, query=PAGE_TOKENS + n, longest=20)]

    def positions(batches: Sequence[list[list[int]]]) -> int:
        before = scorer.stats
        for batch in batches:
            values(scorer, batch)
        after = scorer.stats
        scorer._forget_prefixes()  # pyright: ignore[reportPrivateUsage]
        return after.computed_tokens + after.padded_tokens - before.computed_tokens - before.padded_tokens

    assert positions([sequences[at : at + 2] for at in range(0, 8, 2)]) == 4 * 128 + 4 * 128
    assert positions([sequences]) == 2 * 256 + 128
    check(scorer, sequences)


@pytest.mark.slow
def test_windows_and_caps_agree_alone_among_others_and_in_other_shapes(load: Load) -> None:
    """Queries around the edges of pages; the last ends within a page, beyond every window."""
    small, other = load("gemma2", False), load("gemma2", True)
    for query in (0, PAGE_TOKENS - 1, PAGE_TOKENS, PAGE_TOKENS + 1, 3 * PAGE_TOKENS + 60):
        sequences = prompts(12, seed=query, query=query, longest=60)
        wanted = alone(small, sequences)
        np.testing.assert_allclose(values(small, sequences), wanted, rtol=0, atol=TOLERANCE)
        np.testing.assert_allclose(values(other, sequences), wanted, rtol=0, atol=TOLERANCE)
    check(small, prompts(10, seed=2, query=PAGE_TOKENS + 9))
