"""Logprobs of every position have the same bits in any order, in any batch and whatever is in the cache.

The test is the one that vllm-project/vllm #42019 asks for: the same prompts, which share their beginnings, are scored
in other orders, and every difference is exactly zero.
"""

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from model import loading
from model.engine import Engine
from serve_app.contract import TokenBatch
from tests.batches import reads_batch
from tests.tiny import make_llama
from tests.tiny_families import make_family

pytestmark = pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler is installed")

VOCAB = 300
Found = list[np.ndarray]


def asked(prompts: Sequence[Sequence[int]], starts: Sequence[int]) -> TokenBatch:
    reads = [
        [(at - 1, [tokens[at], at % 7]) for at in range(start, len(tokens))]
        for tokens, start in zip(prompts, starts, strict=True)
    ]
    return replace(reads_batch(prompts, reads), top=9, temperature=0.9)


def found(scorer: Engine, prompts: Sequence[Sequence[int]], starts: Sequence[int]) -> list[Found]:
    """Of each prompt all that is read."""
    batch = asked(prompts, starts)
    result = scorer.score(batch)
    counts = np.cumsum([len(tokens) - start for tokens, start in zip(prompts, starts, strict=True)])[:-1]
    columns = (result.values.reshape(-1, 2), result.top_ids, result.top_values)
    return [list(parts) for parts in zip(*(np.split(column, counts) for column in columns), strict=True)]


@pytest.mark.parametrize("name", ["float32", "bfloat16", "windows and soft caps"])
def test_every_difference_is_zero(name: str, tmp_path: Path) -> None:
    sizes: dict[str, Any] = {
        "max_segment_tokens": 96,
        "call_tokens": 160,
        "chunks": (64, 160),
        "target_sizes": (512,),
        "prefix_cache_bytes": 2**24,
    }
    if name in ("float32", "bfloat16"):
        scorer = loading.load(make_llama(tmp_path), dtype=name, implementation="native", **sizes)
    else:
        scorer = loading.load(make_family(tmp_path, "gemma2"), implementation="native", **sizes)
    rng = np.random.default_rng(42019)
    longest = min(400, scorer.info.max_prompt_tokens)
    vocabulary = min(VOCAB, scorer.info.vocab_size)
    stem = rng.integers(0, vocabulary, longest - 90).tolist()
    prompts = [
        stem[:cut] + rng.integers(0, vocabulary, more).tolist() for cut in (64, 128, len(stem)) for more in (5, 88)
    ]
    starts = [1, 1, 1, 100, 1, 130]
    alone: list[Found] = []
    for tokens, start in zip(prompts, starts, strict=True):
        scorer._forget_prefixes()  # pyright: ignore[reportPrivateUsage]
        alone += found(scorer, [tokens], [start])
    for turn in range(6):
        order = rng.permutation(len(prompts)).tolist()[: 2 + turn]
        if turn == 3:
            scorer._forget_prefixes()  # pyright: ignore[reportPrivateUsage]
        again = found(scorer, [prompts[i] for i in order], [starts[i] for i in order])
        for i, own in zip(order, again, strict=True):
            for column, wanted in zip(own, alone[i], strict=True):
                np.testing.assert_array_equal(column, wanted)
