"""Tiny Hugging Face checkpoints written as GGUF, the way llama.cpp's own converter does."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf.quants import quantize
from safetensors.numpy import load_file
from tokenizers import pre_tokenizers

from tests.tiny import MERGES, SPECIALS
from tests.tiny_families import config_of, make_family

Edit = Callable[[dict[str, Any], dict[str, np.ndarray]], object]

LLAMA_CPP_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "model.layers": "blk",
}


def interleave(tensor: np.ndarray, heads: int) -> np.ndarray:
    """Rows of each head in llama.cpp's order: 0, H/2, 1, H/2 + 1, ... Written as a loop, unlike the code under test."""
    width = len(tensor) // heads
    order = [
        head * width + half * (width // 2) + i for head in range(heads) for i in range(width // 2) for half in (0, 1)
    ]
    return tensor[order]


def write_gguf(
    source: Path, path: Path, *, edit: Edit = lambda *_: None, quantised: gguf.GGMLQuantizationType | None = None
) -> Path:
    """Write a tiny checkpoint as llama.cpp's own converter does. ``edit`` changes keys and tensors before."""
    config = json.loads((source / "config.json").read_text())
    tokens = list(json.loads((source / "tokenizer.json").read_text())["model"]["vocab"])
    keys: dict[str, Any] = {
        "llama.vocab_size": config["vocab_size"],
        "llama.context_length": config["max_position_embeddings"],
        "llama.embedding_length": config["hidden_size"],
        "llama.block_count": config["num_hidden_layers"],
        "llama.feed_forward_length": config["intermediate_size"],
        "llama.attention.head_count": config["num_attention_heads"],
        "llama.attention.head_count_kv": config["num_key_value_heads"],
        "llama.attention.key_length": config["head_dim"],
        "llama.attention.value_length": config["head_dim"],
        "llama.attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
        "llama.rope.dimension_count": config["head_dim"],
        "llama.rope.freq_base": config["rope_theta"],
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [
            int(gguf.TokenType.CONTROL if token in SPECIALS else gguf.TokenType.NORMAL) for token in tokens
        ],
        "tokenizer.ggml.merges": list(MERGES),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.chat_template": "{{ messages }}",
    }
    tensors: dict[str, np.ndarray] = {}
    for name, tensor in load_file(source / "model.safetensors").items():
        for module, short in LLAMA_CPP_NAMES.items():
            name = name.replace(module, short)
        heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}.get(
            name.split(".")[-2]
        )
        tensors[name] = interleave(tensor, heads) if heads else tensor
    edit(keys, tensors)
    return _write(path, keys, tensors, quantised)


GEMMA3_NAMES = LLAMA_CPP_NAMES | {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
}
CONTROLS = ("<pad>", "<eos>", "<bos>", "<unk>")
USER_DEFINED = ("\n\n", "   ")
JOINED = ("▁t", "he", "▁the", "in", "▁in")
CHARACTERS = tuple("▁theinabcdfgjklmopqrsuvwxyzABCDEFGHIJKLM")
SENTENCEPIECE = (*CONTROLS, *USER_DEFINED, *(f"<0x{byte:02X}>" for byte in range(256)), *JOINED, *CHARACTERS)
"""Tokens of the tiny Gemma, in the order of their ids; scores of the last two kinds fall from 0."""


def write_gemma3_gguf(source: Path, path: Path, *, edit: Edit = lambda *_: None) -> Path:
    """Write a tiny Gemma 3 (``tests.tiny_families``) likewise, with a tokenizer of SentencePiece's type."""
    config = json.loads((source / "config.json").read_text())
    kinds = (
        [gguf.TokenType.CONTROL] * len(CONTROLS)
        + [gguf.TokenType.USER_DEFINED] * len(USER_DEFINED)
        + [gguf.TokenType.BYTE] * 256
        + [gguf.TokenType.NORMAL] * len(JOINED + CHARACTERS)
    )
    keys: dict[str, Any] = {
        "general.architecture": "gemma3",
        "gemma3.context_length": config["max_position_embeddings"],
        "gemma3.embedding_length": config["hidden_size"],
        "gemma3.block_count": config["num_hidden_layers"],
        "gemma3.feed_forward_length": config["intermediate_size"],
        "gemma3.attention.head_count": config["num_attention_heads"],
        "gemma3.attention.head_count_kv": config["num_key_value_heads"],
        "gemma3.attention.key_length": config["head_dim"],
        "gemma3.attention.value_length": config["head_dim"],
        "gemma3.attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
        "gemma3.attention.sliding_window": config["sliding_window"],
        "gemma3.rope.freq_base": config["rope_theta"],
        "gemma3.rope.scaling.type": "linear",
        "gemma3.rope.scaling.factor": config["rope_scaling"]["factor"],
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": list(SENTENCEPIECE),
        "tokenizer.ggml.scores": [-1000.0] * 6 + [0.0] * 256 + [float(-n) for n in range(len(JOINED + CHARACTERS))],
        "tokenizer.ggml.token_type": [int(kind) for kind in kinds],
        "tokenizer.ggml.bos_token_id": 2,
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.ggml.unknown_token_id": 3,
        "tokenizer.ggml.add_space_prefix": False,
    }
    tensors: dict[str, np.ndarray] = {}
    for name, tensor in load_file(source / "model.safetensors").items():
        for module, short in GEMMA3_NAMES.items():
            name = name.replace(module, short)
        tensors[name] = tensor + 1 if name.endswith("norm.weight") else tensor
    edit(keys, tensors)
    return _write(path, keys, tensors)


ARCHITECTURES = {
    "llama": gguf.MODEL_ARCH.LLAMA,
    "mistral": gguf.MODEL_ARCH.MISTRAL3,
    "qwen2": gguf.MODEL_ARCH.QWEN2,
    "qwen3": gguf.MODEL_ARCH.QWEN3,
    "qwen3_moe": gguf.MODEL_ARCH.QWEN3MOE,
    "qwen3_5": gguf.MODEL_ARCH.QWEN35,
    "gemma2": gguf.MODEL_ARCH.GEMMA2,
    "gemma": gguf.MODEL_ARCH.GEMMA,
    "gemma3": gguf.MODEL_ARCH.GEMMA3,
    "olmo2": gguf.MODEL_ARCH.OLMO2,
    "phi3": gguf.MODEL_ARCH.PHI3,
    "phi3-longrope": gguf.MODEL_ARCH.PHI3,
}
"""Families of ``tests.tiny_families`` -> their GGUF architectures."""
WORDLESS: Mapping[str, Any] = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "gpt-2",
    "tokenizer.ggml.tokens": [
        *SPECIALS,
        *sorted(pre_tokenizers.ByteLevel.alphabet()),
        "ab",
        *(f"[PAD{id}]" for id in range(260, 307)),
    ],
    "tokenizer.ggml.token_type": [int(gguf.TokenType.CONTROL)] * 3
    + [int(gguf.TokenType.NORMAL)] * 257
    + [int(gguf.TokenType.UNUSED)] * 47,
    "tokenizer.ggml.merges": ["a b"],
    "tokenizer.ggml.bos_token_id": 1,
    "tokenizer.ggml.eos_token_id": 2,
}
"""A tokenizer of 307 tokens, where a test needs none."""


def gguf_family(folder: Path, family: str, **changes: Any) -> Path:
    """Write a tiny checkpoint of constants that a GGUF file can hold: no window of Qwen's and Mistral's, and scores
    scaled by the head width, as in the published Gemmas."""
    if family == "qwen2":
        changes["use_sliding_window"] = False
    if family == "mistral":
        changes["sliding_window"] = None
    if family in ("gemma2", "gemma3"):
        changes["query_pre_attn_scalar"] = config_of(family)["head_dim"]
    return make_family(folder, family, changes=changes)


def write_family_gguf(
    source: Path,
    path: Path,
    family: str,
    *,
    edit: Edit = lambda *_: None,
    quantised: gguf.GGMLQuantizationType | None = None,
    parts: int = 1,
) -> Path:
    """Write a tiny checkpoint of any family with gguf's own tables of names, and return the last part's path.

    The keys are those that the family's class in llama.cpp's ``conversion/`` writes.
    """
    config = json.loads((source / "config.json").read_text())
    arch = ARCHITECTURES[family]
    name, heads = gguf.MODEL_ARCH_NAMES[arch], config["num_attention_heads"]
    head_width = config.get("head_dim", config["hidden_size"] // heads)
    rope = config if "rope_theta" in config else config["rope_parameters"]
    keys: dict[str, Any] = {
        "general.architecture": name,
        f"{name}.context_length": config["max_position_embeddings"],
        f"{name}.embedding_length": config["hidden_size"],
        f"{name}.block_count": config["num_hidden_layers"],
        f"{name}.feed_forward_length": config["intermediate_size"],
        f"{name}.attention.head_count": heads,
        f"{name}.attention.head_count_kv": config["num_key_value_heads"],
        f"{name}.attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
        f"{name}.rope.freq_base": rope["rope_theta"],
        f"{name}.rope.dimension_count": int(head_width * rope.get("partial_rotary_factor", 1)),
        **WORDLESS,
    }
    more: dict[str, Any] = {}
    if "head_dim" in config:
        more |= {"attention.key_length": head_width, "attention.value_length": head_width}
    if family == "qwen3_moe":
        more |= {
            "expert_count": config["num_experts"],
            "expert_used_count": config["num_experts_per_tok"],
            "expert_feed_forward_length": config["moe_intermediate_size"],
        }
    if family == "qwen3_5":
        value_heads = config["linear_num_value_heads"]
        more |= {
            "full_attention_interval": config["full_attention_interval"],
            "rope.dimension_sections": [*rope["mrope_section"], 0],
            "ssm.conv_kernel": config["linear_conv_kernel_dim"],
            "ssm.state_size": config["linear_key_head_dim"],
            "ssm.group_count": config["linear_num_key_heads"],
            "ssm.time_step_rank": value_heads,
            "ssm.inner_size": value_heads * config["linear_value_head_dim"],
        }
    if family == "gemma2":
        more |= {key: config[key] for key in ("attn_logit_softcapping", "final_logit_softcapping")}
    if family == "gemma3":
        more |= {"rope.freq_base_swa": config["rope_local_base_freq"]}
        more |= {"attention.sliding_window_pattern": config["sliding_window_pattern"]}
        more |= {"rope.scaling.type": "linear", "rope.scaling.factor": config["rope_scaling"]["factor"]}
    if family.startswith("phi3"):
        original = config.get("original_max_position_embeddings", 4096)
        more |= {"rope.scaling.original_context_length": original}
        more |= {"attention.sliding_window": config.get("sliding_window", 0)}
    elif config.get("sliding_window") and family != "qwen2":
        more |= {"attention.sliding_window": config["sliding_window"]}
    keys |= {f"{name}.{key}": value for key, value in more.items()}
    tensors = _named(load_file(source / "model.safetensors"), config, arch)
    if family == "phi3-longrope":
        scaling, original = config["rope_scaling"], config["original_max_position_embeddings"]
        scale = config["max_position_embeddings"] / original
        keys[f"{name}.rope.scaling.attn_factor"] = math.sqrt(1 + math.log(scale) / math.log(original))
        for which in ("long", "short"):
            tensors[f"rope_factors_{which}.weight"] = np.array(scaling[f"{which}_factor"], np.float32)
    edit(keys, tensors)
    return _write(path, keys, tensors, quantised, parts)


def _named(tensors: dict[str, np.ndarray], config: dict[str, Any], arch: gguf.MODEL_ARCH) -> dict[str, np.ndarray]:
    """The tensors as llama.cpp names and stores them."""
    table = gguf.get_tensor_name_map(arch, config["num_hidden_layers"])
    experts: dict[str, list[np.ndarray]] = {}
    found: dict[str, np.ndarray] = {}
    for hf_name, tensor in tensors.items():
        if match := re.fullmatch(r"(.*\.experts)\.\d+(\..*)", hf_name):
            experts.setdefault(match[1] + match[2], []).append(tensor)
            continue
        heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
        module = hf_name.split(".")[-2]
        if arch in (gguf.MODEL_ARCH.LLAMA, gguf.MODEL_ARCH.MISTRAL3) and module in heads:
            tensor = interleave(tensor, heads[module])
        if ".linear_attn." in hf_name:
            tensor = _delta(hf_name, tensor, config)
        elif config["model_type"].startswith(("gemma", "qwen3_5")) and hf_name.endswith("norm.weight"):
            tensor = tensor + 1
        found[_name(table, hf_name)] = tensor
    return found | {_name(table, hf_name): np.stack(each) for hf_name, each in experts.items()}


def _delta(hf_name: str, tensor: np.ndarray, config: dict[str, Any]) -> np.ndarray:
    """A tensor of gated DeltaNet. Written as loops, unlike the code under test."""
    keys, each = config["linear_num_key_heads"], config["linear_num_value_heads"] // config["linear_num_key_heads"]

    def tiled(tensor: np.ndarray) -> np.ndarray:
        parts = np.split(tensor, keys * each)
        return np.concatenate([parts[key * each + number] for number in range(each) for key in range(keys)])

    before = 2 * keys * config["linear_key_head_dim"]
    match hf_name.split(".linear_attn.")[1].removesuffix(".weight"):
        case "norm":
            return tensor
        case "in_proj_qkv":
            return np.concatenate([tensor[:before], tiled(tensor[before:])])
        case "conv1d":
            return np.concatenate([tensor[:before, 0], tiled(tensor[before:, 0])])
        case "out_proj":
            return np.ascontiguousarray(tiled(tensor.T).T)
        case "A_log":
            return tiled(-np.exp(tensor))
        case _:
            return tiled(tensor)


def _name(table: gguf.TensorNameMap, hf_name: str) -> str:
    name = table.get_name(hf_name.replace("dt_bias", "dt_proj.bias"), (".weight", ".bias"))  # as llama.cpp does, too
    assert name is not None, hf_name
    return name


def _write(
    path: Path,
    keys: dict[str, Any],
    tensors: dict[str, np.ndarray],
    quantised: gguf.GGMLQuantizationType | None = None,
    parts: int = 1,
) -> Path:
    """Return the path, or of a file in several parts the last one's."""
    most = -(-len(tensors) // parts) if parts > 1 else 0
    writer = gguf.GGUFWriter(path, keys.pop("general.architecture", "llama"), split_max_tensors=most)
    for key, value in keys.items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_array(key, value)
    for name, tensor in tensors.items():
        # As llama.cpp: rows that are no multiple of a block stay as they are.
        if quantised is not None and tensor.ndim > 1 and tensor.shape[-1] % gguf.GGML_QUANT_SIZES[quantised][0] == 0:
            writer.add_tensor(name, quantize(tensor, quantised), raw_dtype=quantised)
        else:
            writer.add_tensor(name, np.ascontiguousarray(tensor))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path if parts == 1 else path.with_name(f"{path.stem}-{parts:05d}-of-{parts:05d}.gguf")
