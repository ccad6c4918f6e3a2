"""int8 weights: within half a step of the stored ones, and scores as transformers computes with such weights."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from model import loading, sharding
from model.fields import ConfigError
from model.layers import quantized
from tests.batches import label_batch
from tests.parity import cases
from tests.sharding.one_of_two import SIZES
from tests.tiny import make_llama
from tests.tiny_families import make_family


def test_every_weight_is_within_half_a_step() -> None:
    kernel = np.random.default_rng(0).normal(size=(40, 30)).astype(np.float32)
    kernel[:, 7] = 0
    integers, scales = (np.asarray(array) for array in quantized(jnp.asarray(kernel)))
    assert (integers.dtype, scales.shape) == (np.int8, (1, 30))
    assert (np.abs(integers).max(axis=0) == np.where(np.arange(30) == 7, 0, 127)).all()
    assert (np.abs(integers * scales - kernel) <= scales / 2 * (1 + 1e-5)).all()


@pytest.mark.skipif(not cases.HAVE_TORCH, reason="torch is the reference")
@pytest.mark.parametrize("model", [1, 2])
def test_scores_are_those_of_a_model_with_such_weights(tmp_path: Path, model: int) -> None:
    """The reference is transformers with the weights that int8 and scales stand for, which numpy computes."""
    folder = make_llama(tmp_path / "stored", heads=4, ff=32, layers=2)
    rounded = make_llama(tmp_path / "rounded", heads=4, ff=32, layers=2)
    tensors = load_file(rounded / "model.safetensors")
    for name, tensor in tensors.items():
        if "_proj." in name:
            parts = model if name.split(".")[-2] in ("o_proj", "down_proj") else 1
            tensors[name] = np.concatenate([_rounded(part) for part in np.split(tensor, parts, axis=1)], axis=1)
    save_file(tensors, rounded / "model.safetensors")
    mesh = sharding.mesh(1, model, jax.devices()[:model])
    scorer = loading.load(folder, quantization="int8", mesh=mesh, **SIZES)
    assert scorer.info.quantization == "int8"
    values = scorer.score(label_batch(cases.sequences(), [cases.LABELS] * 13)).values.reshape(13, -1)
    np.testing.assert_allclose(values, cases.reference(rounded), rtol=0, atol=1e-4)
    assert 1e-4 < np.abs(values - cases.reference(folder)).max() < 0.5


@pytest.mark.skipif(not cases.HAVE_TORCH, reason="torch is the reference")
def test_a_hybrid_s_scores_are_those_of_one_with_such_weights(tmp_path: Path) -> None:
    """Projections of memories too; their gates' taps, decays and norms stay as they are."""
    # With 52 channels one of the weights is half a step, within rounding, and numpy and XLA round it differently.
    changes = {"num_hidden_layers": 3, "intermediate_size": 56}
    folder = make_family(tmp_path / "stored", "qwen3_5", changes=changes)
    rounded = make_family(tmp_path / "rounded", "qwen3_5", changes=changes)
    tensors = load_file(rounded / "model.safetensors")
    tensors |= {name: _rounded(tensor) for name, tensor in tensors.items() if "_proj" in name}
    assert sum("in_proj" in name for name in tensors) == 8
    save_file(tensors, rounded / "model.safetensors")
    prompts = cases.sequences()[-3:]
    scorer = loading.load(folder, quantization="int8", **SIZES)
    values = scorer.score(label_batch(prompts, [cases.LABELS] * 3)).values.reshape(3, -1)
    np.testing.assert_allclose(values, cases.reference(rounded, prompts), rtol=0, atol=1e-4)
    assert np.abs(values - cases.reference(folder, prompts)).max() > 1e-3


def _rounded(weight: np.ndarray) -> np.ndarray:
    """Round a weight [out, in] to int8, with a scale for each row."""
    scales = np.abs(weight).max(axis=1, keepdims=True) / np.float32(127)
    return np.round(weight / scales) * scales


@pytest.mark.parametrize("family", ["qwen3_moe", "qwen3_5_moe"])
def test_experts_are_refused(family: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="mixtures of experts are not quantised; leave out int8"):
        loading.load(make_family(tmp_path, family), quantization="int8")
