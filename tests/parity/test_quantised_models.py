"""Other numbers and files than safetensors of floating-point weights, against transformers' float32 forward."""

from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from model import loading, sharding
from tests.batches import label_batch
from tests.parity import cases
from tests.sharding.one_of_two import SIZES
from tests.tiny import make_llama
from tests.tiny_quantised import METHODS, make_quantised

pytestmark = pytest.mark.skipif(not cases.HAVE_TORCH, reason="torch is the reference")


def check(folder: Path, reference: Path, devices: int | None = None) -> None:
    """The scores of the first folder are transformers' of the other one."""
    prompts = cases.sequences()[:7]
    mesh = sharding.mesh(1, devices, jax.devices()[:devices]) if devices else None
    scorer = loading.load(folder, mesh=mesh, **SIZES)
    values = scorer.score(label_batch(prompts, [cases.LABELS] * len(prompts))).values.reshape(len(prompts), -1)
    np.testing.assert_allclose(values, cases.reference(reference, prompts), rtol=0, atol=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_scores_are_those_of_the_weights_that_are_meant(method: str, tmp_path: Path) -> None:
    check(*make_quantised(tmp_path, method))


@pytest.mark.parametrize("method", ["gptq", "bitsandbytes-nf4"])
def test_each_device_reads_its_own_part(method: str, tmp_path: Path) -> None:
    """Rows of some weights and columns of others, which divide neither groups nor words."""
    check(*make_quantised(tmp_path, method), devices=2)


def test_transformers_itself_means_these_weights(tmp_path: Path) -> None:
    """It dequantises FP8 where there is no GPU."""
    stored, _ = make_quantised(tmp_path, "fp8")
    check(stored, stored)


def test_float64(tmp_path: Path) -> None:
    folder = make_llama(tmp_path, layers=1)
    tensors = load_file(folder / "model.safetensors")
    doubles = {name: each.astype(np.float64) for name, each in tensors.items()}
    save_file(doubles, folder / "model.safetensors", {"format": "pt"})
    check(folder, folder)


def test_pytorch_files(tmp_path: Path) -> None:
    import torch

    folder = make_llama(tmp_path, layers=1)
    tensors = load_file(folder / "model.safetensors")
    torch.save({name: torch.from_numpy(each) for name, each in tensors.items()}, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    check(folder, folder)
