"""An encoder's class logits are the same bits whatever is beside a sequence, and the same on several devices."""

import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from model import loading, sharding
from model.engine import Engine
from tests.batches import label_batch
from tests.invariance.rows import TOLERANCE
from tests.tiny_encoders import ENCODERS, make_encoder

CLASSES = (0, 1, 2)


def sequences(kind: str, count: int) -> list[list[int]]:
    """Of 1 to 130 tokens, most of them short; some of a BERT's are of the second type."""
    rng = np.random.default_rng(count)
    lengths = [*rng.integers(1, 40, count - 3).tolist(), 64, 65, 130]
    return [rng.integers(0, 307 * (2 if kind == "bert" else 1), length).tolist() for length in lengths]


def logits(scorer: Engine, prompts: list[list[int]]) -> np.ndarray:
    batch = label_batch(prompts, [CLASSES] * len(prompts), vocab_logprobs=False)
    return scorer.score(batch).values.reshape(len(prompts), -1)


@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler is installed")
@pytest.mark.parametrize(
    ("kind", "dtype"),
    [*((kind, "float32") for kind in ENCODERS), ("bert", "bfloat16"), ("modernbert-mean", "bfloat16")],
)
def test_a_sequence_has_the_bits_that_it_has_alone(kind: str, dtype: Any, tmp_path: Path) -> None:
    """In calls of up to 64 tokens; two sequences are longer."""
    scorer = loading.load(make_encoder(tmp_path, kind, classes=3), dtype=dtype, implementation="native", call_tokens=64)
    prompts = sequences(kind, 12)
    alone = np.concatenate([logits(scorer, [tokens]) for tokens in prompts])
    assert alone.std(axis=0).min() > 0.2
    rng = np.random.default_rng(5)
    for _ in range(4):
        chosen = rng.permutation(len(prompts))[: int(rng.integers(2, len(prompts) + 1))]
        np.testing.assert_array_equal(logits(scorer, [prompts[at] for at in chosen]), alone[chosen])
    np.testing.assert_array_equal(logits(scorer, prompts * 2), np.tile(alone, (2, 1)))


@pytest.mark.parametrize(
    "kind",
    [kind if kind == "bert" else pytest.param(kind, marks=pytest.mark.slow) for kind in ENCODERS],
)
def test_spread_over_four_devices_equals_one(kind: str, tmp_path: Path) -> None:
    """Two calls run at once, each over two devices; a mesh of one device multiplies as they do."""
    folder = make_encoder(tmp_path, kind, classes=3)
    one, spread = (
        loading.load(
            folder, mesh=sharding.mesh(size, size, jax.devices()[: size * size]), call_tokens=64, by_layer=False
        )
        for size in (1, 2)
    )
    prompts = sequences(kind, 9)
    np.testing.assert_allclose(logits(spread, prompts), logits(one, prompts), rtol=0, atol=TOLERANCE)
