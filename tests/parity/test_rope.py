"""Rotary positions, to 32,768 tokens: the frequencies against transformers' own bits, the angles against float64."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from model import loading
from model.config import ModelConfig, Rope
from model.families.registry import from_hf
from model.layers import rope_angles, rope_frequencies
from tests.batches import label_batch
from tests.parity.cases import HAVE_TORCH, LABELS
from tests.tiny import LINEAR_SCALING, make_llama
from tests.tiny_families import config_of

pytestmark = pytest.mark.skipif(not HAVE_TORCH, reason="torch is not installed, and frequencies are not stored")

LLAMA31 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
LONG: Mapping[str, Any] = {
    "type": "longrope",
    "short_factor": [1 + 0.01 * n for n in range(48)],
    "long_factor": [1 + 1.3 * n for n in range(48)],
}
ROPES: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "llama-2": ("llama", {"head_dim": 128, "rope_theta": 1e4}),
    "smollm2": ("llama", {"head_dim": 64, "rope_theta": 1e5}),
    "linear": ("llama", {"head_dim": 128, "rope_theta": 1e4, "rope_scaling": LINEAR_SCALING}),
    "llama-3.1": ("llama", {"head_dim": 128, "rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **LLAMA31}}),
    "llama-3.2": (
        "llama",
        {"head_dim": 64, "rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **LLAMA31, "factor": 32.0}},
    ),
    "qwen3": ("qwen3", {"head_dim": 128, "rope_theta": 1e6}),
    "qwen3-2507": ("qwen3", {"head_dim": 128, "rope_theta": 5e6}),
    "gemma2": ("gemma2", {"head_dim": 256, "rope_theta": 1e4}),
    "gemma3": (
        "gemma3",
        {
            "head_dim": 256,
            "rope_theta": 1e6,
            "rope_local_base_freq": 1e4,
            "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        },
    ),
    "phi3.5": (
        "phi3-longrope",
        {"hidden_size": 384, "max_position_embeddings": 131072, "rope_theta": 1e4, "rope_scaling": LONG},
    ),
    "phi4-partial": ("phi3", {"hidden_size": 512, "rope_theta": 1e4, "partial_rotary_factor": 0.75}),
}
"""Ropes of published models: a family's tiny checkpoint, and the changes to its config."""
LENGTH = 32_768


def config(name: str) -> dict[str, Any]:
    family, changes = ROPES[name]
    return {**config_of(family), **changes}


def ours(parsed: ModelConfig) -> list[np.ndarray]:
    """Frequencies of each of the model's ropes."""
    width = parsed.rotary_width or parsed.head_width
    found = [rope_frequencies(parsed.rope, width)]
    if parsed.local_rope is not None:
        found.append(rope_frequencies(parsed.local_rope, width))
    if parsed.rope.kind == "longrope":
        found.append(rope_frequencies(parsed.rope, width, long=True))
    return found


def theirs(values: Mapping[str, Any]) -> list[np.ndarray]:
    """Frequencies of transformers' model."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    settings: Any = AutoConfig.for_model(**values)
    with torch.device("cpu"):
        model: Any = AutoModelForCausalLM.from_config(settings)
    rope = model.model.rotary_emb
    if hasattr(rope, "full_attention_inv_freq"):
        return [rope.full_attention_inv_freq.numpy(), rope.sliding_attention_inv_freq.numpy()]
    found = [rope.inv_freq.numpy().copy()]
    if values.get("rope_scaling", {}).get("type") == "longrope":
        beyond = torch.arange(settings.original_max_position_embeddings + 1)[None]
        rope(torch.zeros(1), beyond)
        found.append(rope.inv_freq.numpy())
    return found


@pytest.mark.parametrize("name", ROPES)
def test_frequencies_are_transformers(name: str) -> None:
    mine, reference = ours(from_hf(config(name))), theirs(config(name))
    assert len(mine) == len(reference)
    for own, wanted in zip(mine, reference, strict=True):
        assert own.dtype == wanted.dtype == np.float32
        assert np.sum(own != wanted) <= 1  # with JAX's own ``pow`` a third of them differ
        np.testing.assert_array_max_ulp(own, wanted, maxulp=1)


@pytest.mark.parametrize(("theta", "width"), [(1e4, 64), (5e5, 64), (1e6, 128)])
def test_angles_err_as_transformers_do(theta: float, width: int) -> None:
    """Both differ from float64 by float32's rounding, which grows with distance; from each other by last bits."""
    import torch

    reference = theirs({**config("smollm2"), "head_dim": width, "rope_theta": theta})[0]
    positions = np.arange(0, LENGTH, 7, dtype=np.int32)
    exact = positions[:, None] * theta ** -(np.arange(0, width, 2) / width)
    angles = torch.tensor(positions).float()[:, None] * torch.tensor(reference)
    pairs = zip(jax.jit(lambda p: rope_angles(Rope(theta), width, p))(positions), (np.cos, np.sin), strict=True)
    for (own, exactly), wanted in zip(pairs, (angles.cos().numpy(), angles.sin().numpy()), strict=True):
        np.testing.assert_allclose(own, wanted, rtol=0, atol=2e-6)  # with JAX's own ``pow`` 2.0e-3
        for found in (own, wanted):
            np.testing.assert_allclose(found, exactly(exact), rtol=0, atol=2.5e-3)


def test_long_prompts_equal_transformers(tmp_path: Path) -> None:
    """The model attends far, with Qwen's rope: with JAX's own ``pow`` it would differ by 1.2e-4 here."""
    import torch
    from transformers import AutoModelForCausalLM

    folder = make_llama(tmp_path, seed=1, width=64, heads=4, head_width=128, theta=1e6, context=2048)
    rng = np.random.default_rng(7)
    prompts = [rng.integers(0, 307, length).tolist() for length in (1000, 1300, 1600, 1900)]
    scorer = loading.load(folder, max_segment_tokens=256, call_tokens=256, chunks=(1024,), prefix_cache_bytes=2**24)
    got = scorer.score(label_batch(prompts, [LABELS] * len(prompts))).values.reshape(-1, len(LABELS))
    auto: Any = AutoModelForCausalLM
    model = auto.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    for own, tokens in zip(got, prompts, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([tokens]), logits_to_keep=1).logits[0, -1].double()
        np.testing.assert_allclose(own, torch.log_softmax(logits, -1)[list(LABELS)].numpy(), rtol=0, atol=5e-5)
