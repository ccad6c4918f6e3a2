"""For every model family, a sequence's values depend only on its own tokens. ``test_engine`` has more cases."""

from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from model import loading, sharding
from model.engine import Engine
from tests.invariance.rows import BITS, TOLERANCE, prompts, values
from tests.tiny_families import DIFFERENT, TESTED, make_family

Families = Callable[[str], tuple[Path, Engine]]


@pytest.mark.parametrize("family", TESTED)
def test_alone_cold_and_warm_equal_among_many(family: str, families: Families) -> None:
    """After a query of two pages and a half, longer than any window, and without a query."""
    _, scorer = families(family)
    sequences = [*prompts(7, query=310, longest=30, seed=1), *prompts(7, query=0, longest=60, seed=2)]
    cold = values(scorer, sequences)
    hits = scorer.cache_stats.hit_tokens
    warm = values(scorer, sequences[::-1])[::-1]
    assert scorer.cache_stats.hit_tokens > hits
    np.testing.assert_allclose(warm, cold, rtol=0, atol=BITS)
    scorer._forget_prefixes()  # pyright: ignore[reportPrivateUsage]
    alone = np.concatenate([values(scorer, [sequence]) for sequence in sequences[::4]])
    np.testing.assert_allclose(alone, cold[::4], rtol=0, atol=BITS)


@pytest.mark.parametrize("family", DIFFERENT)
def test_whole_segments_in_one_loop_equal_chunks_by_layer(family: str, families: Families) -> None:
    folder, scorer = families(family)
    looped = loading.load(
        folder, by_layer=False, max_segment_tokens=304, call_tokens=304, chunks=(64,), prefix_cache_bytes=2**21
    )
    tail = prompts(1, query=280, longest=1, seed=3)[0]
    sequences = [tail, *(prompt + tail for prompt in prompts(2, query=128, longest=9, seed=4))]
    np.testing.assert_allclose(values(looped, sequences), values(scorer, sequences), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("family", DIFFERENT)
def test_spread_over_four_devices_equals_one(family: str, families: Families) -> None:
    """Two calls run at once, each over two devices; a mesh of one device multiplies as they do."""
    folder, _ = families(family)
    sizes = {"max_segment_tokens": 32, "call_tokens": 64, "chunks": (64,), "prefix_cache_bytes": 2**21}
    one, spread = (
        loading.load(folder, mesh=sharding.mesh(size, size, jax.devices()[: size * size]), **sizes) for size in (1, 2)
    )
    sequences = prompts(7, query=310, longest=30, seed=1)
    np.testing.assert_allclose(values(spread, sequences), values(one, sequences), rtol=0, atol=TOLERANCE)


def test_a_prompt_with_broken_arithmetic_spoils_no_neighbour_in_its_experts(families: Families, tmp_path: Path) -> None:
    """Token 5's embedding is NaN."""
    _, clean = families("qwen3_moe")
    folder = make_family(tmp_path, "qwen3_moe")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.embed_tokens.weight"][5] = np.nan
    save_file(tensors, folder / "model.safetensors")
    broken = loading.load(folder, max_segment_tokens=32, call_tokens=64, chunks=(64,), prefix_cache_bytes=2**21)
    sequences = [[token for token in prompt if token != 5] + [1] for prompt in prompts(6, query=0, longest=20, seed=6)]
    wanted = values(clean, sequences)
    sequences[2].insert(0, 5)
    got = values(broken, sequences)
    assert np.isnan(got[2]).all()
    others = [0, 1, 3, 4, 5]
    np.testing.assert_allclose(got[others], wanted[others], rtol=0, atol=BITS)
