"""Scores do not depend on whether a batch says what its sequences share, which an engine then does not compare."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from model import loading
from serve_app.batches import shared_tokens
from tests.batches import label_batch
from tests.invariance.rows import LABELS, VOCAB
from tests.tiny_families import make_family

QUERY = 100
"""Tokens that all prompts begin with."""


@pytest.mark.parametrize(
    ("family", "lengths"),
    [
        pytest.param("qwen3", (120, 130, 101, 140), id="one query"),
        pytest.param("phi3-longrope", (120, 260, 101, 240), id="a rope that differs by the prompt's length"),
    ],
)
def test_scores_are_those_of_tokens_that_are_compared(tmp_path: Path, family: str, lengths: tuple[int, ...]) -> None:
    rng = np.random.default_rng(2)
    query = rng.integers(0, VOCAB, QUERY).tolist()
    prompts = [query + rng.integers(0, VOCAB, length - QUERY).tolist() for length in lengths]
    engine = loading.load(make_family(tmp_path, family), chunks=(128, 256), call_tokens=256, prefix_cache_bytes=2**22)
    batch = label_batch(prompts, [LABELS] * len(prompts))
    alone = [engine.score(label_batch([prompt], [LABELS])).values for prompt in prompts]
    told = replace(batch, shared=shared_tokens(batch))
    assert told.shared is not None
    assert (told.shared[1:] == QUERY).all()
    for each in (batch, told, replace(told, shared=told.shared // 2)):
        np.testing.assert_allclose(engine.score(each).values, np.concatenate(alone), rtol=0, atol=1e-5)
