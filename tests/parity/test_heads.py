"""A stored output head that differs from the embedding that it should be tied to, against transformers."""

import logging
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from model import loading, sharding
from model.engine import Engine
from tests.batches import label_batch
from tests.parity.cases import HAVE_TORCH, LABELS, reference, sequences
from tests.tiny_families import make_family

SIZES: dict[str, Any] = {"max_segment_tokens": 32, "call_tokens": 64, "chunks": (64,), "prefix_cache_bytes": 2**21}


def with_head(folder: Path, family: str, offset: float) -> Path:
    """A tied checkpoint with a stored head, in which the last row is raised by ``offset``."""
    made = make_family(folder, family)
    tensors = load_file(made / "model.safetensors")
    head = tensors["model.embed_tokens.weight"].copy()
    head[-1] += offset
    tensors = {name: np.array(tensor) for name, tensor in tensors.items()}
    (made / "model.safetensors").unlink()  # not in place: numpy has mapped the file
    save_file({**tensors, "lm_head.weight": head}, made / "model.safetensors", {"format": "pt"})
    return made


def logprobs(scorer: Engine) -> np.ndarray:
    prompts = sequences()
    return scorer.score(label_batch(prompts, [LABELS] * len(prompts))).values.reshape(-1, len(LABELS))


@pytest.mark.skipif(not HAVE_TORCH, reason="torch is not installed, and these answers are not stored")
@pytest.mark.parametrize("family", ["qwen2", "gemma2"])
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_a_stored_head_is_used_where_it_differs(
    family: str, offset: float, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = with_head(tmp_path, family, offset)
    with caplog.at_level(logging.WARNING, "model.loading"):
        found = logprobs(loading.load(folder, **SIZES))
    assert ("tie_word_embeddings: false" in caplog.text) == (offset > 0)
    np.testing.assert_allclose(found, np.array(reference(folder)), rtol=0, atol=1e-4)


@pytest.mark.skipif(not HAVE_TORCH, reason="torch is not installed, and these answers are not stored")
def test_on_a_mesh_and_in_int8_as_well(tmp_path: Path) -> None:
    folder = with_head(tmp_path, "qwen2", 1.0)
    spread = logprobs(loading.load(folder, mesh=sharding.mesh(1, 2, jax.devices()[:2]), **SIZES))
    np.testing.assert_allclose(spread, np.array(reference(folder)), rtol=0, atol=1e-4)
    tied = with_head(tmp_path / "tied", "qwen2", 0.0)
    moved = logprobs(loading.load(folder, quantization="int8", **SIZES)) - logprobs(
        loading.load(tied, quantization="int8", **SIZES)
    )
    assert np.abs(moved).max() > 0.5, "the raised row is label 306"
