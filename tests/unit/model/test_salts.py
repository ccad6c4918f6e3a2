"""Sequences of different salts share no prefix: not in a batch, not by the cache, not as prompts that come again."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from model import loading
from model.contract import SALT_BITS, Engine, TokenBatch
from serve_app.batches import cut, join
from tests.batches import batch_of
from tests.tiny import make_llama

pytestmark = pytest.mark.heavy

ONE, OTHER = 1, 2**SALT_BITS - 1
QUERY = [*range(3, 290)]
PROMPTS = [[*QUERY, *range(start, start + 9)] for start in (20, 40, 60)]


@pytest.fixture
def engine(tmp_path: Path) -> Engine:
    return loading.load(
        make_llama(tmp_path), max_segment_tokens=320, call_tokens=320, chunks=(64,), prefix_cache_bytes=2**21
    )


def salted(salt: int | None, prompts: list[list[int]] = PROMPTS) -> TokenBatch:
    batch = batch_of(prompts)
    return batch if salt is None else replace(batch, salts=np.full(len(prompts), salt, np.int64))


def test_a_cached_prefix_serves_its_own_salt_alone(engine: Engine):
    cold = engine.score(salted(ONE))
    assert engine.score(salted(ONE)).computed_tokens.sum() < len(PROMPTS[0]) < cold.computed_tokens.sum()
    for other in (OTHER, None, 0b10):
        scored = engine.score(salted(other))
        assert scored.computed_tokens.tolist() == cold.computed_tokens.tolist()
        assert np.array_equal(scored.values, cold.values)
    unsalted = engine.score(salted(0))
    assert unsalted.computed_tokens.sum() < cold.computed_tokens.sum(), "no salt is the salt 0"


def test_a_prompt_that_comes_again_with_another_salt_is_new(engine: Engine):
    alone = [PROMPTS[0]]
    computed = [
        int(engine.score(salted(salt, alone)).computed_tokens.sum()) for salt in (ONE, OTHER, ONE, OTHER, ONE, OTHER)
    ]
    assert computed[:4] == [len(PROMPTS[0])] * 4, "kept when it comes the second time"
    assert computed[4] == computed[5] < len(PROMPTS[0])


def test_salts_do_not_share_within_a_batch(engine: Engine):
    both = join([salted(ONE), salted(OTHER), salted(None)])
    assert both.salts is not None
    assert both.salts.tolist() == [ONE] * 3 + [OTHER] * 3 + [0] * 3
    computed = engine.score(both).computed_tokens.reshape(3, 3).sum(axis=1)
    assert computed.min() >= len(PROMPTS[0])
    part = cut(both, 2, 5)
    assert part.salts is not None
    assert part.salts.tolist() == [ONE, OTHER, OTHER]
