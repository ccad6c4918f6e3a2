"""Rotary positions, to 32,768 tokens: the frequencies against transformers' own bits, the angles against float64."""

import copy
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
from tests.tiny import LINEAR_SCALING, YARN_SCALING, make_llama
from tests.tiny_families import config_of

pytestmark = pytest.mark.skipif(not HAVE_TORCH, reason="torch is not installed, and frequencies are not stored")

LLAMA31 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
CARD = {"factor": 4.0, "original_max_position_embeddings": 32_768}
"""YaRN as the model cards of Qwen2.5 and Qwen3 tell users to add it."""
SHORT = {"original_max_position_embeddings": 100, "truncate": False}
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
    "qwen3 with yarn": ("qwen3", {"head_dim": 128, "rope_theta": 1e6, "rope_scaling": {"rope_type": "yarn", **CARD}}),
    "qwen3 with yarn, v5": (
        "qwen3",
        {
            "head_dim": 128,
            "rope_theta": 1e6,
            "rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6, **CARD, "factor": 2.0},
        },
    ),
    "qwen2.5 with yarn": ("qwen2", {"hidden_size": 768, "rope_theta": 1e6, "rope_scaling": {"type": "yarn", **CARD}}),
    "yarn-llama-2": (
        "llama",
        {
            "head_dim": 128,
            "max_position_embeddings": 65536,
            "rope_scaling": {
                "type": "yarn",
                "factor": 16.0,
                "original_max_position_embeddings": 4096,
                "finetuned": True,
            },
        },
    ),
    "yarn's other keys": ("llama", {"head_dim": 64, "rope_theta": 1e5, "rope_scaling": {**YARN_SCALING, **CARD}}),
    "yarn of a short context": ("mistral", {"head_dim": 14, "rope_scaling": YARN_SCALING}),
    "yarn of one bound": (
        "llama",
        {"head_dim": 16, "rope_scaling": {"type": "yarn", "factor": 2.0, "beta_fast": 7.0, "beta_slow": 7.0, **SHORT}},
    ),
    "yarn with mscale": (
        "olmo2",
        {"hidden_size": 384, "rope_scaling": {"type": "yarn", **CARD, "mscale": 0.707, "mscale_all_dim": 1.1}},
    ),
    "yarn without factor": (
        "llama",
        {"head_dim": 64, "rope_theta": 1e4, "rope_scaling": {"type": "yarn", "factor": None, **SHORT}},
    ),
    "yarn, the original context beside it": (
        "llama",
        {"head_dim": 64, "original_max_position_embeddings": 99, "rope_scaling": {"type": "yarn", **CARD}},
    ),
    "yarn without the original context": ("llama", {"head_dim": 64, "rope_scaling": {"type": "yarn", "factor": 3.0}}),
    "yarn in gemma3": (
        "gemma3",
        {
            "head_dim": 256,
            "rope_theta": 1e6,
            "rope_local_base_freq": 1e4,
            "rope_scaling": {"rope_type": "yarn", **CARD, "truncate": False},
        },
    ),
    "dynamic": ("llama", {"head_dim": 128, "rope_theta": 1e4, "rope_scaling": {"type": "dynamic", "factor": 3.0}}),
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


def rotary(values: Mapping[str, Any]) -> tuple[Any, Any]:
    """The config of transformers' model, and its rope."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    settings: Any = AutoConfig.for_model(**copy.deepcopy(dict(values)))
    with torch.device("cpu"):
        model: Any = AutoModelForCausalLM.from_config(settings)
    return settings, model.model.rotary_emb


def theirs(values: Mapping[str, Any]) -> list[np.ndarray]:
    """Frequencies of transformers' model."""
    import torch

    settings, rope = rotary(values)
    if hasattr(rope, "full_attention_inv_freq"):
        return [rope.full_attention_inv_freq.numpy(), rope.sliding_attention_inv_freq.numpy()]
    found = [rope.inv_freq.numpy().copy()]
    if (values.get("rope_scaling") or {}).get("type") == "longrope":
        beyond = torch.arange(settings.original_max_position_embeddings + 1)[None]
        rope(torch.zeros(1), beyond)
        found.append(rope.inv_freq.numpy())
    return found


@pytest.mark.parametrize("name", ROPES)
def test_frequencies_are_transformers(name: str) -> None:
    parsed, reference = from_hf(config(name)), theirs(config(name))
    mine = ours(parsed)
    assert len(mine) == len(reference)
    for own, wanted in zip(mine, reference, strict=True):
        assert own.dtype == wanted.dtype == np.float32
        assert np.sum(own != wanted) <= 1  # with JAX's own ``pow`` a third of them differ
        # Where YaRN blends, the one that differs is rounded twice more.
        np.testing.assert_array_max_ulp(own, wanted, maxulp=2 if parsed.rope.kind == "yarn" else 1)


@pytest.mark.parametrize("name", [name for name in ROPES if "yarn" in name or "phi3.5" in name])
def test_magnitudes_are_transformers(name: str) -> None:
    rope = rotary(config(name))[1]
    wanted = getattr(rope, "attention_scaling", None) or rope.full_attention_attention_scaling
    assert wanted != 1.0
    assert from_hf(config(name)).rope.magnitude == wanted


def test_a_dynamic_rope_is_the_plain_one_within_its_context() -> None:
    """One token more, and transformers has other frequencies: the context ends there."""
    import torch

    values = config("dynamic")
    parsed = from_hf(values)
    assert parsed.context_length == values["max_position_embeddings"]
    rope = rotary(values)[1]
    own = ours(parsed)[0]
    for tokens, same in ((parsed.context_length, True), (parsed.context_length + 1, False)):
        rope(torch.zeros(1), torch.arange(tokens)[None])
        assert np.allclose(own, rope.inv_freq.numpy(), rtol=1e-6, atol=0) is same


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
