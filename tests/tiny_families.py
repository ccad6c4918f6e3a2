"""Tiny random checkpoints of the model families in Hugging Face layout, made with numpy alone.

As in ``tests.tiny`` the constants are awkward: each differs from its default, from the others, and shows in the scores.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.tiny import save, write_json

COMMON: Mapping[str, Any] = {
    "vocab_size": 307,
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "intermediate_size": 52,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}

CONFIGS: Mapping[str, Mapping[str, Any]] = {
    "llama": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "head_dim": 10,
        "rms_norm_eps": 1.5e-4,
        "rope_theta": 1234.5,
    },
    "qwen2": {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "rms_norm_eps": 2e-4,
        "rope_theta": 4321.0,
        "tie_word_embeddings": True,
        "use_sliding_window": True,
        "sliding_window": 20,
        "max_window_layers": 1,
    },
    "qwen3": {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "head_dim": 10,
        "rms_norm_eps": 3e-4,
        "rope_theta": 8765.0,
    },
    "mistral": {
        "architectures": ["MistralForCausalLM"],
        "model_type": "mistral",
        "head_dim": 14,
        "rms_norm_eps": 1e-4,
        "rope_theta": 2345.0,
        "sliding_window": 150,
    },
    "gemma": {
        "architectures": ["GemmaForCausalLM"],
        "model_type": "gemma",
        "head_dim": 14,
        "hidden_act": "gelu",
        "rms_norm_eps": 7e-4,
        "rope_theta": 4321.0,
    },
    "gemma2": {
        "architectures": ["Gemma2ForCausalLM"],
        "model_type": "gemma2",
        "head_dim": 10,
        "rms_norm_eps": 5e-4,
        "rope_theta": 3456.0,
        "sliding_window": 21,
        "query_pre_attn_scalar": 17,
        "attn_logit_softcapping": 2.5,
        "final_logit_softcapping": 4.5,
    },
    "gemma3": {
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "head_dim": 12,
        "rms_norm_eps": 6e-4,
        "rope_theta": 5678.0,
        "rope_local_base_freq": 77.0,
        "rope_scaling": {"rope_type": "linear", "factor": 2.5},
        "sliding_window": 130,
        "sliding_window_pattern": 2,
        "query_pre_attn_scalar": 23,
    },
    "olmo2": {
        "architectures": ["Olmo2ForCausalLM"],
        "model_type": "olmo2",
        "rms_norm_eps": 7e-4,
        "rope_theta": 6789.0,
    },
    "phi3": {
        "architectures": ["Phi3ForCausalLM"],
        "model_type": "phi3",
        "num_attention_heads": 4,
        "rms_norm_eps": 8e-4,
        "rope_theta": 7890.0,
        "partial_rotary_factor": 0.5,
        "sliding_window": 170,
        "tie_word_embeddings": True,
    },
    "phi3-longrope": {
        "architectures": ["Phi3ForCausalLM"],
        "model_type": "phi3",
        "num_attention_heads": 4,
        "rms_norm_eps": 8e-4,
        "rope_theta": 7890.0,
        "original_max_position_embeddings": 170,
        "rope_scaling": {
            "type": "longrope",
            "short_factor": [1.0, 1.1, 1.3, 1.7, 2.1, 2.9],
            "long_factor": [1.2, 1.9, 3.5, 5.0, 7.5, 9.0],
        },
    },
    "qwen3_5": {
        "architectures": ["Qwen3_5ForCausalLM"],
        "model_type": "qwen3_5_text",
        "num_hidden_layers": 6,
        "full_attention_interval": 3,
        "head_dim": 20,
        "rms_norm_eps": 4e-4,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 9012.0,
            "partial_rotary_factor": 0.3,
            "mrope_interleaved": True,
            "mrope_section": [1, 1, 1],
        },
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 12,
        "linear_value_head_dim": 10,
        "linear_conv_kernel_dim": 4,
    },
    "qwen3_5_moe": {
        "architectures": ["Qwen3_5MoeForCausalLM"],
        "model_type": "qwen3_5_moe_text",
        "num_hidden_layers": 4,
        "full_attention_interval": 2,
        "head_dim": 16,
        "rms_norm_eps": 6e-4,
        "rope_parameters": {"rope_type": "default", "rope_theta": 8109.0, "partial_rotary_factor": 0.5},
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 2,
        "linear_key_head_dim": 10,
        "linear_value_head_dim": 12,
        "linear_conv_kernel_dim": 3,
        "moe_intermediate_size": 20,
        "shared_expert_intermediate_size": 28,
        "num_experts": 5,
        "num_experts_per_tok": 2,
    },
    "qwen3_moe": {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "head_dim": 10,
        "rms_norm_eps": 9e-4,
        "rope_theta": 8901.0,
        "moe_intermediate_size": 20,
        "num_experts": 5,
        "num_experts_per_tok": 2,
        "norm_topk_prob": True,
    },
}

FAMILIES = tuple(name for name in CONFIGS if name != "llama")
"""Families that have no tests of their own."""
TESTED = tuple(
    pytest.param(name, marks=pytest.mark.slow) if name == "qwen3_5_moe" else pytest.param(name) for name in FAMILIES
)
"""The same for tests. The slow one's layers are those of two others, and every run compares its mixture alone."""
DIFFERENT = tuple(
    each if each.values[0] in ("gemma2", "qwen3_5", "qwen3_moe") else pytest.param(*each.values, marks=pytest.mark.slow)
    for each in TESTED
)
"""For tests of what layers do together, which compile for long: every run has one family of each kind of layers."""
CLASSIFIERS: Mapping[str, str] = {
    "llama": "LlamaForSequenceClassification",
    "qwen2": "Qwen2ForSequenceClassification",
    "qwen3": "Qwen3ForSequenceClassification",
    "gemma": "GemmaForSequenceClassification",
    "gemma2": "Gemma2ForSequenceClassification",
    "gemma3": "Gemma3TextForSequenceClassification",
    "mistral": "MistralForSequenceClassification",
    "olmo2": "Olmo2ForSequenceClassification",
    "phi3": "Phi3ForSequenceClassification",
    "qwen3_5": "Qwen3_5TextForSequenceClassification",
    "qwen3_moe": "Qwen3MoeForSequenceClassification",
}
"""Families, and their architecture with a classification head."""

_GEMMA3_IMAGES: Mapping[str, Any] = {
    "model_type": "gemma3",
    "boi_token_index": 301,
    "eoi_token_index": 302,
    "image_token_index": 303,
    "mm_tokens_per_image": 4,
    "vision_config": {
        "model_type": "siglip_vision_model",
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    },
}
_MISTRAL3_IMAGES: Mapping[str, Any] = {
    "model_type": "mistral3",
    "image_token_index": 10,
    "multimodal_projector_bias": False,
    "projector_hidden_act": "gelu",
    "spatial_merge_size": 2,
    "vision_feature_layer": -1,
    "vision_config": {
        "model_type": "pixtral",
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "head_dim": 8,
        "image_size": 28,
        "patch_size": 14,
    },
}
_QWEN3_5_IMAGES: Mapping[str, Any] = {
    "model_type": "qwen3_5",
    "image_token_id": 303,
    "video_token_id": 304,
    "vision_start_token_id": 301,
    "vision_end_token_id": 302,
    "vision_config": {
        "model_type": "qwen3_5",
        "hidden_size": 16,
        "intermediate_size": 16,
        "depth": 1,
        "num_heads": 2,
        "out_hidden_size": 48,
        "num_position_embeddings": 16,
    },
}
WRAPPED: Mapping[str, str] = {
    "Gemma3ForConditionalGeneration": "gemma3",
    "Gemma3ForSequenceClassification": "gemma3",
    "Mistral3ForConditionalGeneration": "mistral",
    "Qwen3_5ForConditionalGeneration": "qwen3_5",
    "Qwen3_5ForSequenceClassification": "qwen3_5",
    "Qwen3_5MoeForConditionalGeneration": "qwen3_5_moe",
}
"""Architectures whose text part is a family."""


def wrapped_config(architecture: str) -> dict[str, Any]:
    """The ``config.json`` of a model for images with a tiny family in it."""
    family = WRAPPED[architecture]
    text = {key: value for key, value in config_of(family).items() if key != "architectures"}
    images = {
        "gemma3": _GEMMA3_IMAGES,
        "mistral": _MISTRAL3_IMAGES,
        "qwen3_5": _QWEN3_5_IMAGES,
        "qwen3_5_moe": {
            **_QWEN3_5_IMAGES,
            "model_type": "qwen3_5_moe",
            "vision_config": {**_QWEN3_5_IMAGES["vision_config"], "model_type": "qwen3_5_moe"},
        },
    }
    return {**images[family], "architectures": [architecture], "text_config": text}


NORMS: Mapping[str, tuple[str, ...]] = {
    "olmo2": ("post_attention_layernorm", "post_feedforward_layernorm"),
    **dict.fromkeys(
        ("gemma2", "gemma3_text"),
        ("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm"),
    ),
}
"""Norms of a layer, if they are not Llama's."""
HYBRIDS = ("qwen3_5_text", "qwen3_5_moe_text")
"""Model types with gated DeltaNet in most layers."""
QK_NORMS: Mapping[str, str] = {
    "qwen3": "one head",
    "qwen3_5_text": "one head",
    "qwen3_5_moe_text": "one head",
    "qwen3_moe": "one head",
    "gemma3_text": "one head",
    "olmo2": "all heads",
}


def make_family(folder: Path, family: str, *, classes: int = 0, changes: Mapping[str, Any] | None = None) -> Path:
    """Write ``config.json`` and random safetensors into ``folder`` and return it.

    Args:
        classes: number of classes of a head in place of the output head; 0: the model is causal.
        changes: keys of ``config.json`` in place of the family's.
    """
    config = config_of(family) | dict(changes or {})
    if classes:
        names = {str(number): f"class {number}" for number in range(classes)}
        config |= {"architectures": [CLASSIFIERS[family]], "id2label": names}
    return make_checkpoint(folder, config)


def make_checkpoint(folder: Path, config: Mapping[str, Any]) -> Path:
    """Write this ``config.json`` and random safetensors that fit it into ``folder`` and return it."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", config)
    save(folder, _tensors(np.random.default_rng(11), config))
    return folder


def config_of(family: str) -> dict[str, Any]:
    """The family's ``config.json``."""
    return {**COMMON, **CONFIGS[family]}


def _tensors(rng: np.random.Generator, config: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Random tensors, scaled so that attention is far from uniform and logits spread by about 3."""
    kind, width = config["model_type"], config["hidden_size"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    head = config.get("head_dim", width // heads)
    tensors: dict[str, np.ndarray] = {}

    def linear(name: str, out: int, into: int, *, bias: bool = False, gain: float = 1.0) -> None:
        tensors[f"{name}.weight"] = rng.normal(0, gain * into**-0.5, (out, into))
        if bias:
            tensors[f"{name}.bias"] = rng.normal(0, 0.3, out)

    def norm(name: str, size: int = width) -> None:
        tensors[f"{name}.weight"] = rng.uniform(0.6, 1.4, size) - (1 if kind.startswith(("gemma", "qwen3_5")) else 0)

    def delta_net(name: str) -> None:
        """With memories that fade by a hundredth to a half a token."""
        keys = config["linear_num_key_heads"] * config["linear_key_head_dim"]
        of_values = config["linear_num_value_heads"]
        values = of_values * config["linear_value_head_dim"]
        linear(f"{name}.in_proj_qkv", 2 * keys + values, width)
        linear(f"{name}.in_proj_z", values, width)
        linear(f"{name}.in_proj_b", of_values, width)
        linear(f"{name}.in_proj_a", of_values, width)
        linear(f"{name}.out_proj", width, values)
        tensors[f"{name}.conv1d.weight"] = rng.normal(0, 0.5, (2 * keys + values, 1, config["linear_conv_kernel_dim"]))
        tensors[f"{name}.A_log"] = np.log(rng.uniform(0.02, 0.8, of_values))
        tensors[f"{name}.dt_bias"] = rng.normal(0, 0.5, of_values)
        tensors[f"{name}.norm.weight"] = rng.uniform(0.6, 1.4, config["linear_value_head_dim"])

    linear("model.embed_tokens", config["vocab_size"], width, gain=3.0)
    for layer in range(config["num_hidden_layers"]):
        block = f"model.layers.{layer}"
        attention = f"{block}.self_attn"
        for name in NORMS.get(kind, ("input_layernorm", "post_attention_layernorm")):
            norm(f"{block}.{name}")
        recurrent = kind in HYBRIDS and (layer + 1) % config["full_attention_interval"] > 0
        gated = 2 if kind in HYBRIDS else 1
        projections = (("q", gated * heads, 1.5), ("k", kv_heads, 1.5), ("v", kv_heads, 1.0))
        for name, count, gain in () if recurrent else projections:
            linear(f"{attention}.{name}_proj", count * head, width, bias=kind == "qwen2", gain=gain)
        if recurrent:
            delta_net(f"{block}.linear_attn")
        else:
            linear(f"{attention}.o_proj", width, heads * head)
        if kind in QK_NORMS and not recurrent:
            norm(f"{attention}.q_norm", head * (heads if QK_NORMS[kind] == "all heads" else 1))
            norm(f"{attention}.k_norm", head * (kv_heads if QK_NORMS[kind] == "all heads" else 1))
        mlps = {f"{block}.mlp": config["intermediate_size"]}
        if kind in ("qwen3_moe", "qwen3_5_moe_text"):
            linear(f"{block}.mlp.gate", config["num_experts"], width, gain=2.0)
            experts = range(config["num_experts"])
            mlps = {f"{block}.mlp.experts.{expert}": config["moe_intermediate_size"] for expert in experts}
        if kind == "qwen3_5_moe_text":
            linear(f"{block}.mlp.shared_expert_gate", 1, width, gain=2.0)
            mlps[f"{block}.mlp.shared_expert"] = config["shared_expert_intermediate_size"]
        for mlp, ff in mlps.items():
            linear(f"{mlp}.gate_proj", ff, width)
            linear(f"{mlp}.up_proj", ff, width)
            linear(f"{mlp}.down_proj", width, ff)
        if kind == "phi3":
            _fuse(tensors, f"{attention}.qkv_proj", [f"{attention}.{name}_proj" for name in "qkv"])
            _fuse(tensors, f"{block}.mlp.gate_up_proj", [f"{block}.mlp.{name}_proj" for name in ("gate", "up")])
    norm("model.norm")
    if "id2label" in config:
        linear("score", len(config["id2label"]), width, gain=3.0)
    elif not config.get("tie_word_embeddings", kind.startswith("gemma")):
        linear("lm_head", config["vocab_size"], width, gain=3.0)
    return tensors


def _fuse(tensors: dict[str, np.ndarray], name: str, parts: list[str]) -> None:
    tensors[f"{name}.weight"] = np.concatenate([tensors.pop(f"{part}.weight") for part in parts])
