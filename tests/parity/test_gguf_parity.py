"""GGUF files of every architecture against transformers, with the tensors that their quantised blocks stand for."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize, quantize
from safetensors.numpy import load_file, save_file

from model import loading
from model.gguf.convert import convert
from tests.batches import label_batch
from tests.parity.cases import HAVE_TORCH, LABELS, sequences
from tests.parity.cases import reference as logprobs
from tests.tiny_gguf import ARCHITECTURES, gguf_family, write_family_gguf

pytestmark = pytest.mark.skipif(not HAVE_TORCH, reason="torch is not installed, and no answers are stored")

SIZES: dict[str, Any] = {"hidden_size": 96, "intermediate_size": 64}
"""Rows of whole blocks, so that nearly all tensors are quantised."""
MORE: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"moe_intermediate_size": 32},
    "phi3-longrope": {"partial_rotary_factor": 0.5},
}


def both(folder: Path, family: str, kind: GGMLQuantizationType) -> tuple[Path, Path]:
    """The converted folder, and the source with each tensor that is quantised in the file as its blocks have it."""
    source = gguf_family(folder / "source", family, **SIZES, **MORE.get(family, {}))
    path = write_family_gguf(source, folder / "x.gguf", family, quantised=kind)
    convert(path, folder / "made", say=lambda _: None)
    tensors = load_file(source / "model.safetensors")
    block = GGML_QUANT_SIZES[kind][0]
    for name, tensor in tensors.items():
        if tensor.ndim > 1 and tensor.shape[-1] % block == 0:
            tensors[name] = dequantize(quantize(tensor, kind), kind)
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    return folder / "made", source


@pytest.mark.parametrize("family", ARCHITECTURES)
def test_logits_in_transformers(family: str, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    found, wanted = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
        for folder in both(tmp_path, family, GGMLQuantizationType.Q8_0)
    )
    tokens = torch.tensor(np.random.default_rng(3).integers(0, 307, (1, 260)))
    with torch.no_grad():
        expected = wanted(tokens).logits.numpy()
        assert expected.std() > 1, "the reference must vary, or the case shows nothing"
        np.testing.assert_allclose(found(tokens).logits.numpy(), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(("family", "kind"), [("mistral", "Q4_1"), ("qwen3_moe", "Q8_0")])
def test_logprobs_of_the_engine(family: str, kind: str, tmp_path: Path) -> None:
    made, source = both(tmp_path, family, GGMLQuantizationType[kind])
    scorer = loading.load(made, max_segment_tokens=32, call_tokens=64, chunks=(64,), prefix_cache_bytes=2**21)
    prompts = sequences()
    found = scorer.score(label_batch(prompts, [LABELS] * len(prompts))).values.reshape(-1, len(LABELS))
    np.testing.assert_allclose(found, np.array(logprobs(source)), rtol=0, atol=1e-4)
