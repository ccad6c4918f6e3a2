"""Tiny Hugging Face checkpoints written as GGUF, the way llama.cpp's own converter does."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf.quants import quantize
from safetensors.numpy import load_file

from tests.tiny import MERGES, SPECIALS

Edit = Callable[[dict[str, Any], dict[str, np.ndarray]], None]

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


def _write(
    path: Path,
    keys: dict[str, Any],
    tensors: dict[str, np.ndarray],
    quantised: gguf.GGMLQuantizationType | None = None,
) -> Path:
    writer = gguf.GGUFWriter(path, keys.pop("general.architecture", "llama"))
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
        if quantised is not None and tensor.ndim == 2:
            writer.add_tensor(name, quantize(tensor, quantised), raw_dtype=quantised)
        else:
            writer.add_tensor(name, np.ascontiguousarray(tensor))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
