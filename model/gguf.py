"""A llama-type GGUF file made into an ordinary Hugging Face folder: ``python -m model.gguf SOURCE.gguf FOLDER``.

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
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFReader, ReaderTensor, TokenType
from gguf.quants import dequantize
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors

ARCHITECTURES = ("llama",)
TOKENIZER_MODELS = ("gpt2",)

NAMES = {
    r"token_embd\.weight": "model.embed_tokens.weight",
    r"output_norm\.weight": "model.norm.weight",
    r"output\.weight": "lm_head.weight",
    r"blk\.(\d+)\.attn_norm\.weight": r"model.layers.\1.input_layernorm.weight",
    r"blk\.(\d+)\.ffn_norm\.weight": r"model.layers.\1.post_attention_layernorm.weight",
    r"blk\.(\d+)\.attn_(q|k|v)\.(weight|bias)": r"model.layers.\1.self_attn.\2_proj.\3",
    r"blk\.(\d+)\.attn_output\.(weight|bias)": r"model.layers.\1.self_attn.o_proj.\2",
    r"blk\.(\d+)\.ffn_(gate|up|down)\.(weight|bias)": r"model.layers.\1.mlp.\2_proj.\3",
}
"""GGUF tensor name -> Hugging Face name."""

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
    "rope.dimension_count",
    "rope.freq_base",
    "rope.scaling.type",
    "rope.scaling.factor",
}
"""The ``llama.*`` keys that are read. Any other may change the arithmetic, so it is refused."""


class GgufError(ValueError):
    """The file is damaged, or of a kind that is not converted. The message names what, and what is known."""


@dataclass(frozen=True)
class Pre:
    """How text is cut before the merges, named by ``tokenizer.ggml.pre``.

    Attributes:
        steps: the pre-tokenizer of the model's own ``tokenizer.json``.
        ignore_merges: a piece that is a token as a whole is taken at once.
        add_bos: what holds when the file does not say.
    """

    steps: Callable[[], pre_tokenizers.PreTokenizer]
    ignore_merges: bool
    add_bos: bool


def _smollm() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )


def _llama3() -> pre_tokenizers.PreTokenizer:
    pieces = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pieces), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


PRES = {
    "smollm": Pre(_smollm, ignore_merges=False, add_bos=False),
    "llama-bpe": Pre(_llama3, ignore_merges=True, add_bos=True),
}


def convert(source: Path, folder: Path, *, say: Callable[[str], None] = print) -> None:
    """Write ``folder`` with ``config.json``, ``model.safetensors`` (float32), ``tokenizer.json`` and its config.

    The folder appears under its name only when it is complete: a killed conversion leaves nothing that looks whole.

    Args:
        folder: must not exist yet.
        say: told, in words, how far it is.

    Raises:
        GgufError: the file cannot be read, or its architecture, tokenizer, a key or a tensor is not known.
        FileExistsError: ``folder`` is there already.
    """
    if folder.exists():
        raise FileExistsError(f"{folder} exists already; remove it or name another folder")
    reader = _open(source)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    if fields.get("general.architecture") not in ARCHITECTURES:
        raise GgufError(
            f"{source.name}: architecture {fields.get('general.architecture')!r} is not converted from GGUF; "
            f"known: {', '.join(ARCHITECTURES)}. Use the model's safetensors checkpoint"
        )
    tensors = {_hf_name(tensor.name): tensor for tensor in reader.tensors}
    config = _config(fields, tensors.keys())
    tokenizer, tokenizer_config = _tokenizer(fields)

    part = folder.with_name(f".{folder.name}.{os.getpid()}.part")
    part.mkdir(parents=True)
    try:
        tokenizer.save(str(part / "tokenizer.json"))
        _write_json(part / "tokenizer_config.json", tokenizer_config)
        _write_json(part / "config.json", config)
        _write_safetensors(part / "model.safetensors", tensors, config, say)
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


def _hf_name(name: str) -> str:
    for pattern, replacement in NAMES.items():
        if match := re.fullmatch(pattern, name):
            return match.expand(replacement)
    raise GgufError(f"tensor {name!r} has no place in a llama model; use the model's safetensors checkpoint")


def _config(fields: dict[str, Any], names: Collection[str]) -> dict[str, Any]:
    """``config.json`` of the same model."""
    llama = {key.removeprefix("llama."): value for key, value in fields.items() if key.startswith("llama.")}
    if unknown := sorted(llama.keys() - HANDLED):
        raise GgufError(f"keys not known to the conversion: {', '.join('llama.' + key for key in unknown)}")
    if per_layer := sorted(key for key, value in llama.items() if isinstance(value, list)):
        raise GgufError(f"llama.{per_layer[0]} differs between layers; only one number for all is converted")

    def required(key: str) -> Any:
        if key not in llama:
            raise GgufError(f"llama.{key} is missing")
        return llama[key]

    heads, width = required("attention.head_count"), required("embedding_length")
    head_width = llama.get("attention.key_length", width // heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        if llama.get(key, head_width) != head_width:
            raise GgufError(f"llama.{key} is {llama[key]}; only the head width, {head_width}, is converted")

    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "float32",
        "vocab_size": llama.get("vocab_size", len(fields["tokenizer.ggml.tokens"])),
        "hidden_size": width,
        "num_hidden_layers": required("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": llama.get("attention.head_count_kv", heads),
        "head_dim": head_width,
        "intermediate_size": required("feed_forward_length"),
        "rms_norm_eps": _short(required("attention.layer_norm_rms_epsilon")),
        "rope_theta": _short(llama.get("rope.freq_base", 10_000.0)),
        "max_position_embeddings": required("context_length"),
        "hidden_act": "silu",
        "tie_word_embeddings": "lm_head.weight" not in names,
        "attention_bias": "model.layers.0.self_attn.q_proj.bias" in names,
        "mlp_bias": "model.layers.0.mlp.gate_proj.bias" in names,
        "bos_token_id": fields.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": fields.get("tokenizer.ggml.eos_token_id"),
    }
    scaling = llama.get("rope.scaling.type", "none")
    if scaling == "linear":
        config["rope_scaling"] = {"rope_type": "linear", "factor": _short(required("rope.scaling.factor"))}
    elif scaling != "none":
        raise GgufError(f"llama.rope.scaling.type {scaling!r} is not converted; known: none, linear")
    return config


def _short(value: float) -> float:
    """The decimal number whose float32 was stored: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def _tokenizer(fields: dict[str, Any]) -> tuple[Tokenizer, dict[str, Any]]:
    """The tokenizer and its ``tokenizer_config.json``."""

    def ggml(key: str) -> Any:
        if f"tokenizer.ggml.{key}" not in fields:
            raise GgufError(f"tokenizer.ggml.{key} is missing")
        return fields[f"tokenizer.ggml.{key}"]

    if ggml("model") not in TOKENIZER_MODELS:
        raise GgufError(f"tokenizer model {ggml('model')!r} is not converted; known: {', '.join(TOKENIZER_MODELS)}")
    if ggml("pre") not in PRES:
        raise GgufError(f"pre-tokenizer {ggml('pre')!r} is not converted; known: {', '.join(PRES)}")
    pre = PRES[ggml("pre")]
    tokens: list[str] = ggml("tokens")
    merges = [(left, right) for left, right in (merge.split(" ") for merge in ggml("merges"))]

    tokenizer = Tokenizer(
        models.BPE(vocab={token: id for id, token in enumerate(tokens)}, merges=merges, ignore_merges=pre.ignore_merges)
    )
    tokenizer.pre_tokenizer = pre.steps()
    tokenizer.decoder = decoders.ByteLevel()
    added: list[AddedToken] = []
    for token, kind in zip(tokens, ggml("token_type"), strict=True):
        if kind in (TokenType.CONTROL, TokenType.USER_DEFINED):
            added.append(AddedToken(token, special=kind == TokenType.CONTROL, normalized=False))
    tokenizer.add_tokens(added)  # pyright: ignore[reportUnknownMemberType]

    named = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
    }
    for name, key in named.items():
        if (id := fields.get(f"tokenizer.ggml.{key}_token_id")) is not None:
            config[f"{name}_token"] = tokens[id]
    if "tokenizer.chat_template" in fields:
        config["chat_template"] = fields["tokenizer.chat_template"]
    if fields.get("tokenizer.ggml.add_bos_token", pre.add_bos):
        bos = ggml("bos_token_id")
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{tokens[bos]} $A", pair=f"{tokens[bos]} $A {tokens[bos]} $B", special_tokens=[(tokens[bos], bos)]
        )
    return tokenizer, config


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _write_safetensors(
    path: Path, tensors: dict[str, ReaderTensor], config: dict[str, Any], say: Callable[[str], None]
) -> None:
    """One tensor in memory at a time, which the safetensors package's own writer cannot do."""
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
        for values in _values(tensors, config, say):
            file.write(np.ascontiguousarray(values, dtype="<f4").data)
        file.flush()
        os.fsync(file.fileno())


def _values(
    tensors: dict[str, ReaderTensor], config: dict[str, Any], say: Callable[[str], None]
) -> Iterator[np.ndarray[Any, Any]]:
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    for done, (name, tensor) in enumerate(tensors.items()):
        if done % 50 == 0:
            say(f"converting: {done} of {len(tensors)} tensors")
        try:
            values = dequantize(tensor.data, tensor.tensor_type)
        except NotImplementedError:
            raise GgufError(f"{tensor.name}: quantisation {tensor.tensor_type.name} is not converted") from None
        module = name.split(".")[-2]
        yield _unpermute(values, heads[module]) if module in heads else values


def _unpermute(values: np.ndarray[Any, Any], heads: int) -> np.ndarray[Any, Any]:
    """llama.cpp interleaves each head's two rotary halves (0, H/2, 1, H/2 + 1, ...); Hugging Face keeps them apart."""
    pairs = values.reshape(heads, values.shape[0] // heads // 2, 2, *values.shape[1:])
    return pairs.swapaxes(1, 2).reshape(values.shape)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line. Exit status 1 and one line on stderr when the file is refused."""
    parser = argparse.ArgumentParser(
        prog="python -m model.gguf",
        description="Convert a llama-type GGUF file to a Hugging Face folder with float32 safetensors.",
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
