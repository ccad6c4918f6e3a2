"""Tiny random Llama checkpoints in Hugging Face layout, made with numpy alone.

The default constants are awkward on purpose: a field that is not read (theta, eps, head width that is not D/N, K that
is not N, biases) changes the scores, and a comparison shows it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
"""Ids 0, 1 and 2 of the tiny tokenizer."""
MERGES = ("Ġ t", "h e", "Ġt he", "i n", "Ġ Y", "e s", "ĠY es", "Ġ N", "ĠN o", "o u", "Ġ a", "e r")
SMALLEST_VOCAB = len(SPECIALS) + 256 + len(MERGES)

DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}

LLAMA3_SCALING: Mapping[str, Any] = {
    "rope_type": "llama3",
    "factor": 5.0,
    "low_freq_factor": 1.25,
    "high_freq_factor": 3.5,
    "original_max_position_embeddings": 24,
}
LINEAR_SCALING: Mapping[str, Any] = {"rope_type": "linear", "factor": 2.5}
YARN_SCALING: Mapping[str, Any] = {
    "rope_type": "yarn",
    "factor": 6.0,
    "original_max_position_embeddings": 80,
    "attention_factor": 1.3,
    "beta_fast": 9.0,
    "beta_slow": 0.7,
    "truncate": False,
}


def make_llama(
    folder: Path,
    *,
    seed: int = 0,
    vocab: int = 307,
    width: int = 48,
    heads: int = 6,
    kv_heads: int = 2,
    head_width: int = 10,
    ff: int = 52,
    layers: int = 3,
    context: int = 512,
    theta: float = 1234.5,
    eps: float = 3e-4,
    tied: bool = False,
    attention_bias: bool = False,
    mlp_bias: bool = False,
    rope_scaling: Mapping[str, Any] | None = None,
    shards: int = 1,
    dtype: Literal["float32", "float16", "bfloat16"] = "float32",
    tokenizer: bool = False,
) -> Path:
    """Write ``config.json`` and random safetensors into ``folder`` and return it.

    Args:
        folder: made if absent.
        seed: the same arguments give the same bytes.
        width: a multiple of ``heads``, which transformers asks for, though ``head_width`` is set apart.
        shards: the number of files; more than 1 have an index.
        tokenizer: also a byte-level BPE with a few merges; ``vocab`` must be at least ``SMALLEST_VOCAB``, and any rows
            above it have no token.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "torch_dtype": dtype,
        "vocab_size": vocab,
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_width,
        "intermediate_size": ff,
        "max_position_embeddings": context,
        "rms_norm_eps": eps,
        "rope_theta": theta,
        "rope_scaling": dict(rope_scaling) if rope_scaling else None,
        "hidden_act": "silu",
        "tie_word_embeddings": tied,
        "attention_bias": attention_bias,
        "mlp_bias": mlp_bias,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    write_json(folder / "config.json", config)
    save(folder, _tensors(np.random.default_rng(seed), config), shards, dtype)
    if tokenizer:
        _write_tokenizer(folder, vocab)
    return folder


def _tensors(rng: np.random.Generator, config: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Random tensors, scaled like a trained model's: attention is far from uniform, and logits spread by about 3."""
    width, vocab, ff = config["hidden_size"], config["vocab_size"], config["intermediate_size"]
    queries = config["num_attention_heads"] * config["head_dim"]
    keys = config["num_key_value_heads"] * config["head_dim"]
    tensors: dict[str, np.ndarray] = {}

    def linear(name: str, out: int, into: int, bias: bool, gain: float = 1.0) -> None:
        tensors[f"{name}.weight"] = rng.normal(0, gain * into**-0.5, (out, into))
        if bias:
            tensors[f"{name}.bias"] = rng.normal(0, 0.3, out)

    def norm(name: str) -> None:
        tensors[f"{name}.weight"] = rng.uniform(0.6, 1.4, width)

    linear("model.embed_tokens", vocab, width, bias=False, gain=3.0)
    for layer in range(config["num_hidden_layers"]):
        block = f"model.layers.{layer}"
        norm(f"{block}.input_layernorm")
        norm(f"{block}.post_attention_layernorm")
        for name, out, into in (("q", queries, width), ("k", keys, width), ("v", keys, width), ("o", width, queries)):
            gain = 1.5 if name in "qk" else 1.0
            linear(f"{block}.self_attn.{name}_proj", out, into, config["attention_bias"], gain)
        for name, out, into in (("gate", ff, width), ("up", ff, width), ("down", width, ff)):
            linear(f"{block}.mlp.{name}_proj", out, into, config["mlp_bias"])
    norm("model.norm")
    if not config["tie_word_embeddings"]:
        linear("lm_head", vocab, width, bias=False, gain=3.0)
    return tensors


def save(folder: Path, tensors: Mapping[str, np.ndarray], shards: int = 1, dtype: str = "float32") -> None:
    cast = {name: tensor.astype(DTYPES[dtype]) for name, tensor in tensors.items()}
    if shards == 1:
        save_file(cast, folder / "model.safetensors", {"format": "pt"})
        return
    names = list(cast)
    weight_map: dict[str, str] = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        part = names[shard::shards]
        save_file({name: cast[name] for name in part}, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    total = sum(tensor.nbytes for tensor in cast.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    write_json(folder / "model.safetensors.index.json", index)


def _write_tokenizer(folder: Path, vocab: int) -> None:
    if vocab < SMALLEST_VOCAB:
        raise ValueError(f"the tiny tokenizer has {SMALLEST_VOCAB} tokens; vocab is {vocab}")
    merges = [(left, right) for left, right in (merge.split() for merge in MERGES)]
    tokens = [*SPECIALS, *sorted(pre_tokenizers.ByteLevel.alphabet()), *(left + right for left, right in merges)]
    tokenizer = Tokenizer(models.BPE(vocab={token: id for id, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in SPECIALS])
    tokenizer.save(str(folder / "tokenizer.json"))
    write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": SPECIALS[1],
            "eos_token": SPECIALS[2],
            "clean_up_tokenization_spaces": False,
        },
    )


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2), encoding="utf-8")
