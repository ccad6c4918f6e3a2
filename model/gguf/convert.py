"""Converts a GGUF file (Llama's type or Gemma 3's) into a Hugging Face folder.

Run as ``python -m model.gguf.convert SOURCE.gguf FOLDER``.

Needs numpy, gguf and tokenizers alone, so that it runs in a process of its own without JAX. Quantised tensors are
expanded to float32: the folder holds exactly the numbers that llama.cpp multiplies with.
"""

import argparse
import json
import os
import re
import shutil
import struct
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFReader, ReaderTensor
from gguf.quants import dequantize

from model.gguf.tokenizer import GgufError, tokenizer_of

NAMES = {
    r"token_embd\.weight": "model.embed_tokens.weight",
    r"output_norm\.weight": "model.norm.weight",
    r"output\.weight": "lm_head.weight",
    r"blk\.(\d+)\.attn_norm\.weight": r"model.layers.\1.input_layernorm.weight",
    r"blk\.(\d+)\.attn_(q|k|v)\.(weight|bias)": r"model.layers.\1.self_attn.\2_proj.\3",
    r"blk\.(\d+)\.attn_output\.(weight|bias)": r"model.layers.\1.self_attn.o_proj.\2",
    r"blk\.(\d+)\.ffn_(gate|up|down)\.(weight|bias)": r"model.layers.\1.mlp.\2_proj.\3",
}
"""GGUF tensor name -> Hugging Face name, in both architectures."""

HANDLED = {
    "vocab_size",
    "context_length",
    "embedding_length",
    "block_count",
    "feed_forward_length",
    "attention.head_count",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.value_length",
    "attention.layer_norm_rms_epsilon",
    "rope.freq_base",
    "rope.scaling.type",
    "rope.scaling.factor",
}
"""The keys ``llama.*`` or ``gemma3.*`` that are read. Any other may change the arithmetic, so it is refused."""

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Kind:
    """What an architecture does not share with the other.

    Attributes:
        names: as ``NAMES``, of the tensors that only it has, or that have other names there.
        handled: as ``HANDLED``.
        config: its part of ``config.json``, from its keys, the other part, and the names of its tensors.
        restored: a tensor as Hugging Face has it, from its name there, its values and ``config.json``.
    """

    names: dict[str, str]
    handled: set[str]
    config: Callable[[dict[str, Any], dict[str, Any], Collection[str]], dict[str, Any]]
    restored: Callable[[str, Array, dict[str, Any]], Array]


def _llama_config(keys: dict[str, Any], config: dict[str, Any], names: Collection[str]) -> dict[str, Any]:
    head_width = config["head_dim"]
    if keys.get("rope.dimension_count", head_width) != head_width:
        raise GgufError(
            f"llama.rope.dimension_count is {keys['rope.dimension_count']}; "
            f"only the head width, {head_width}, is converted"
        )
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "attention_bias": "model.layers.0.self_attn.q_proj.bias" in names,
        "mlp_bias": "model.layers.0.mlp.gate_proj.bias" in names,
    }


def _llama_tensor(name: str, values: Array, config: dict[str, Any]) -> Array:
    """llama.cpp interleaves each head's two rotary halves (0, H/2, 1, H/2 + 1, ...); Hugging Face keeps them apart."""
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    module = name.split(".")[-2]
    if module not in heads:
        return values
    pairs = values.reshape(heads[module], values.shape[0] // heads[module] // 2, 2, *values.shape[1:])
    return pairs.swapaxes(1, 2).reshape(values.shape)


def _gemma3_config(keys: dict[str, Any], config: dict[str, Any], _: Collection[str]) -> dict[str, Any]:
    if "attention.sliding_window" not in keys:
        raise GgufError("gemma3.attention.sliding_window is missing")
    # The file does not say how scores are scaled. Of the published models that of 27B alone, with 62 layers, does it by
    # another number than the head width.
    largest = config["num_hidden_layers"] == 62
    scalar = config["hidden_size"] // config["num_attention_heads"] if largest else config["head_dim"]
    return {
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "hidden_activation": "gelu_pytorch_tanh",
        "sliding_window": keys["attention.sliding_window"],
        "sliding_window_pattern": 6,
        "rope_local_base_freq": 10_000.0,
        "query_pre_attn_scalar": scalar,
    }


def _gemma3_tensor(name: str, values: Array, _: dict[str, Any]) -> Array:
    """llama.cpp stores the scales of norms whole; Hugging Face stores them less 1."""
    return values - 1 if name.endswith("norm.weight") else values


KINDS = {
    "llama": Kind(
        {r"blk\.(\d+)\.ffn_norm\.weight": r"model.layers.\1.post_attention_layernorm.weight"},
        {"rope.dimension_count"},
        _llama_config,
        _llama_tensor,
    ),
    "gemma3": Kind(
        {
            r"blk\.(\d+)\.attn_(q|k)_norm\.weight": r"model.layers.\1.self_attn.\2_norm.weight",
            r"blk\.(\d+)\.post_attention_norm\.weight": r"model.layers.\1.post_attention_layernorm.weight",
            r"blk\.(\d+)\.ffn_norm\.weight": r"model.layers.\1.pre_feedforward_layernorm.weight",
            r"blk\.(\d+)\.post_ffw_norm\.weight": r"model.layers.\1.post_feedforward_layernorm.weight",
        },
        {"attention.sliding_window"},
        _gemma3_config,
        _gemma3_tensor,
    ),
}
"""The kinds of models by their ``general.architecture``."""


def convert(source: Path, folder: Path, *, say: Callable[[str], None] = print) -> None:
    """Write ``folder`` with ``config.json``, ``model.safetensors`` (float32), ``tokenizer.json`` and its config.

    The folder appears under its name only when it is complete: a killed conversion leaves nothing that looks whole.

    Args:
        folder: must not exist yet.
        say: called with a line of text on the progress.

    Raises:
        GgufError: the file cannot be read, or its architecture, tokenizer, a key or a tensor is not known.
        FileExistsError: ``folder`` is there already.
    """
    if folder.exists():
        raise FileExistsError(f"{folder} exists already; remove it or name another folder")
    reader = _open(source)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    architecture = fields.get("general.architecture")
    if architecture not in KINDS:
        raise GgufError(
            f"{source.name}: architecture {architecture!r} is not converted from GGUF; "
            f"known: {', '.join(KINDS)}. Use the model's safetensors checkpoint"
        )
    kind = KINDS[architecture]
    tensors = {_hf_name(tensor.name, kind): tensor for tensor in reader.tensors}
    config = _config(fields, architecture, tensors.keys())
    tokenizer, tokenizer_config = tokenizer_of(fields)

    part = folder.with_name(f".{folder.name}.{os.getpid()}.part")
    part.mkdir(parents=True)
    try:
        tokenizer.save(str(part / "tokenizer.json"))
        _write_json(part / "tokenizer_config.json", tokenizer_config)
        _write_json(part / "config.json", config)
        values = ((name, kind.restored(name, tensor, config)) for name, tensor in _expanded(tensors, say))
        _write_safetensors(part / "model.safetensors", tensors, values)
        part.rename(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _open(source: Path) -> GGUFReader:
    try:
        return GGUFReader(source)
    except FileNotFoundError:
        raise
    # The reader maps the file and trusts its counts: damage shows up as whatever numpy says about it.
    except (ValueError, IndexError, KeyError, UnicodeDecodeError, OverflowError, MemoryError) as error:
        raise GgufError(f"{source.name} is not a whole GGUF file ({error}); fetch it again") from error


def _hf_name(name: str, kind: Kind) -> str:
    for pattern, replacement in (NAMES | kind.names).items():
        if match := re.fullmatch(pattern, name):
            return match.expand(replacement)
    raise GgufError(f"tensor {name!r} has no place in such a model; use the model's safetensors checkpoint")


def _config(fields: dict[str, Any], architecture: str, names: Collection[str]) -> dict[str, Any]:
    """``config.json`` of the same model."""
    kind, prefix = KINDS[architecture], f"{architecture}."
    keys = {key.removeprefix(prefix): value for key, value in fields.items() if key.startswith(prefix)}
    if unknown := sorted(keys.keys() - HANDLED - kind.handled):
        raise GgufError(f"keys not known to the conversion: {', '.join(prefix + key for key in unknown)}")
    if per_layer := sorted(key for key, value in keys.items() if isinstance(value, list)):
        raise GgufError(f"{prefix}{per_layer[0]} differs between layers; only one number for all is converted")

    def required(key: str) -> Any:
        if key not in keys:
            raise GgufError(f"{prefix}{key} is missing")
        return keys[key]

    heads, width = required("attention.head_count"), required("embedding_length")
    head_width = keys.get("attention.key_length", width // heads)
    if keys.get("attention.value_length", head_width) != head_width:
        raise GgufError(
            f"{prefix}attention.value_length is {keys['attention.value_length']}; "
            f"only the head width, {head_width}, is converted"
        )
    config = {
        "dtype": "float32",
        "vocab_size": keys.get("vocab_size", len(fields["tokenizer.ggml.tokens"])),
        "hidden_size": width,
        "num_hidden_layers": required("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": keys.get("attention.head_count_kv", heads),
        "head_dim": head_width,
        "intermediate_size": required("feed_forward_length"),
        "rms_norm_eps": _short(required("attention.layer_norm_rms_epsilon")),
        "rope_theta": _short(keys.get("rope.freq_base", 10_000.0)),
        "max_position_embeddings": required("context_length"),
        "tie_word_embeddings": "lm_head.weight" not in names,
        "bos_token_id": fields.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": fields.get("tokenizer.ggml.eos_token_id"),
    }
    scaling = keys.get("rope.scaling.type", "none")
    if scaling == "linear":
        config["rope_scaling"] = {"rope_type": "linear", "factor": _short(required("rope.scaling.factor"))}
    elif scaling != "none":
        raise GgufError(f"{prefix}rope.scaling.type {scaling!r} is not converted; known: none, linear")
    return config | kind.config(keys, config, names)


def _short(value: float) -> float:
    """The decimal number that was stored as float32: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _write_safetensors(path: Path, tensors: dict[str, ReaderTensor], values: Iterable[tuple[str, Array]]) -> None:
    """Write with one tensor in memory at a time, which the safetensors package's own writer cannot do."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + 4 * int(tensor.n_elements)
        shape = [int(size) for size in reversed(tensor.shape)]
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for _, tensor in values:
            file.write(np.ascontiguousarray(tensor, dtype="<f4").data)
        file.flush()
        os.fsync(file.fileno())


def _expanded(tensors: dict[str, ReaderTensor], say: Callable[[str], None]) -> Iterator[tuple[str, Array]]:
    """Each tensor in float32."""
    for done, (name, tensor) in enumerate(tensors.items()):
        if done % 50 == 0:
            say(f"converting: {done} of {len(tensors)} tensors")
        try:
            yield name, dequantize(tensor.data, tensor.tensor_type)
        except NotImplementedError:
            raise GgufError(f"{tensor.name}: quantisation {tensor.tensor_type.name} is not converted") from None


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line. Exit status 1 and one line on stderr when the file is refused."""
    parser = argparse.ArgumentParser(
        prog="python -m model.gguf.convert",
        description="Convert a GGUF file of Llama or Gemma 3 to a Hugging Face folder with float32 safetensors.",
    )
    parser.add_argument("source", type=Path, help="the .gguf file")
    parser.add_argument("folder", type=Path, help="the folder to make; must not exist")
    options = parser.parse_args(arguments)
    try:
        convert(options.source, options.folder, say=lambda line: print(line, flush=True))
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
