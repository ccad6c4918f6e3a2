"""Converts a GGUF file into a Hugging Face folder.

Run as ``python -m model.gguf.convert SOURCE.gguf FOLDER``.

Needs numpy, gguf and tokenizers alone, so that it runs in a process of its own without JAX. Quantised tensors are
expanded to float32: the folder holds exactly the numbers that llama.cpp multiplies with.
"""

import argparse
import errno
import json
import os
import shutil
import struct
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf.quants import dequantize

from model.gguf.files import Array, GgufError, Stored, read
from model.gguf.keys import Keys
from model.gguf.kinds import KINDS, Kind
from model.gguf.ropes import longrope, rope_scaling
from model.gguf.tokenizer import tokenizer_of

CHUNK = 2**19
"""Numbers that are expanded at a time: 2 MB."""

ENDS = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
ROPES = ("rope_freqs.weight", "rope_factors_short.weight", "rope_factors_long.weight")
"""Tensors that become a part of ``config.json``."""
CLASSIFIER = "cls.output.weight"
"""The head of a Qwen3-Reranker in place of the output head: its rows are those of "yes" and of "no"."""


@dataclass(frozen=True)
class Piece:
    """A tensor of the folder.

    Attributes:
        stored: where its numbers are; None: they are zeros.
        rows: of the stored tensor (numbers, if it has one dimension), in the order to write.
        shift: subtracted from every number.
        columns: of the stored rows, in the order to write; None: all as they are.
        logarithm: what is stored is minus the exponential of the numbers.
    """

    name: str
    shape: tuple[int, ...]
    stored: Stored | None
    rows: Array
    shift: float = 0.0
    columns: Array | None = None
    logarithm: bool = False

    def values(self) -> Iterator[Array]:
        """Its numbers in float32, some rows at a time."""
        if self.stored is None:
            yield np.zeros(self.shape, np.float32)
            return
        type, shift = self.stored.type, np.float32(self.shift)
        try:
            if len(self.shape) == 1:
                values = dequantize(self.stored.rows(0, 1)[0], type)[self.rows] - shift
                yield np.log(-values) if self.logarithm else values
                return
            step = max(1, CHUNK // self.shape[-1])
            for start in range(0, len(self.rows), step):
                rows = self.rows[start : start + step]
                first = rows.min()
                values = dequantize(self.stored.rows(first, rows.max() + 1)[rows - first], type) - shift
                yield values if self.columns is None else values[:, self.columns]
        except NotImplementedError:
            raise GgufError(f"{self.stored.name}: quantisation {type.name} is not converted") from None


def convert(source: Path, folder: Path, *, say: Callable[[str], None] = print) -> None:
    """Write ``folder`` with ``config.json``, ``model.safetensors`` (float32), ``tokenizer.json`` and its config.

    The folder appears under its name only when it is complete: a killed conversion leaves nothing that looks whole.

    Args:
        source: of a split file, any part.
        folder: must not exist yet.
        say: called with a line of text on the progress.

    Raises:
        GgufError: the file cannot be read, or its architecture, tokenizer, a key or a tensor is not known.
        FileExistsError: ``folder`` is there already.
        OSError: the disk has too little room.
    """
    if folder.exists():
        raise FileExistsError(f"{folder} exists already; remove it or name another folder")
    fields, tensors = read(source)
    if (type := fields.get("general.type", "model")) != "model":
        raise GgufError(f"{source.name} holds no model of its own (general.type is {type!r}); name the model's file")
    architecture = fields.get("general.architecture")
    if architecture not in KINDS:
        raise GgufError(
            f"{source.name}: architecture {architecture!r} is not converted from GGUF; "
            f"known: {', '.join(KINDS)}. Use the model's safetensors checkpoint"
        )
    kind = KINDS[architecture]
    tensors = {name: stored for name, stored in tensors.items() if not name.startswith(kind.ignored)}
    config = _config(fields, architecture, tensors)
    layers = range(config["num_hidden_layers"], fields[f"{architecture}.block_count"])
    tensors = {name: stored for name, stored in tensors.items() if not name.startswith(_blocks(layers))}
    if _unscaled(config, tensors):
        say("this file has no rope_freqs.weight, as files of Llama 3.1 of before August 2024: its rope is not scaled")
    pieces = _pieces(kind, config, tensors)
    tokenizer, tokenizer_config = tokenizer_of(fields)
    _need_space(folder.parent, sum(4 * int(np.prod(piece.shape)) for piece in pieces))

    part = folder.with_name(f".{folder.name}.{os.getpid()}.part")
    part.mkdir(parents=True)
    try:
        tokenizer.save(str(part / "tokenizer.json"))
        _write_json(part / "tokenizer_config.json", tokenizer_config)
        _write_json(part / "config.json", config)
        _write_safetensors(part / "model.safetensors", pieces, say)
        part.rename(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _blocks(layers: range) -> tuple[str, ...]:
    """What the names of these layers' tensors begin with."""
    return tuple(f"blk.{layer}." for layer in layers)


def _config(fields: dict[str, Any], architecture: str, tensors: Mapping[str, Stored]) -> dict[str, Any]:
    """``config.json`` of the same model."""
    kind, keys = KINDS[architecture], Keys(fields, architecture)
    heads, width = keys.required("attention.head_count"), keys.required("embedding_length")
    head_width = keys.get("attention.key_length", width // heads)
    keys.same("attention.value_length", head_width)
    if "token_embd.weight" not in tensors:
        raise GgufError("token_embd.weight is missing: this is no whole model")
    theta = keys.number("rope.freq_base", 10_000.0)
    config: dict[str, Any] = {
        "architectures": [kind.architecture],
        "model_type": kind.model_type,
        "dtype": "float32",
        "vocab_size": tensors["token_embd.weight"].shape[0],
        "hidden_size": width,
        "num_hidden_layers": keys.required("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": keys.get("attention.head_count_kv", heads),
        "head_dim": head_width,
        "intermediate_size": keys.get("feed_forward_length", keys.get("expert_feed_forward_length")),
        "rms_norm_eps": keys.number("attention.layer_norm_rms_epsilon"),
        "rope_theta": theta,
        "max_position_embeddings": keys.required("context_length"),
        "tie_word_embeddings": "output.weight" not in tensors,
        "bos_token_id": fields.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": fields.get("tokenizer.ggml.eos_token_id"),
    }
    if config["intermediate_size"] is None:
        raise GgufError(f"{keys.name('feed_forward_length')} is missing")
    freqs, short, long = (_small(tensors[name]) if name in tensors else None for name in ROPES)
    if short is not None and long is not None:
        keys.get("rope.scaling.type")
        config["rope_scaling"] = longrope(keys, short, long)
    elif scaling := rope_scaling(keys, theta, freqs):
        config["rope_scaling"] = scaling
    config |= kind.config(keys, config)
    config |= {key: any(f"blk.0.{name}.bias" in tensors for name in names) for key, names in kind.biases.items()}
    if CLASSIFIER in tensors:
        config |= _reranker(kind, keys.whole("classifier.output_labels"))
    keys.refuse_rest(kind.ignored)
    return config


def _reranker(kind: Kind, labels: Any) -> dict[str, Any]:
    """A Qwen3-Reranker as llama.cpp writes it: the rows of two answers are all that is left of the output head."""
    if kind.architecture != "Qwen3ForCausalLM" or labels != ["yes", "no"]:
        raise GgufError(f"{CLASSIFIER} with classes {labels} is not converted; known: Qwen3's, with 'yes' and 'no'")
    return {
        "architectures": ["Qwen3ForSequenceClassification"],
        "tie_word_embeddings": False,
        "id2label": {"0": "no", "1": "yes"},
        "pad_token_id": None,
        "is_original_qwen3_reranker": True,
    }


def _unscaled(config: dict[str, Any], tensors: Mapping[str, Stored]) -> bool:
    """It looks like a Llama 3.1, 3.2 or 3.3 whose scaled frequencies were not written."""
    known = {"model_type": "llama", "max_position_embeddings": 131_072, "rope_theta": 500_000.0, "vocab_size": 128_256}
    return known.items() <= config.items() and ROPES[0] not in tensors and "rope_scaling" not in config


def _small(stored: Stored) -> Array:
    """All numbers of a tensor of one dimension."""
    return dequantize(stored.rows(0, 1)[0], stored.type)


def _pieces(kind: Kind, config: dict[str, Any], tensors: Mapping[str, Stored]) -> list[Piece]:
    """The folder's tensors.

    Raises:
        GgufError: naming stored tensors that have no place, or those that are missing.
    """
    rest = {name: stored for name, stored in tensors.items() if name not in ROPES}
    pieces: list[Piece] = []
    missing: list[str] = []

    def take(name: str, hf_name: str) -> None:
        stored = rest.pop(name, None)
        if stored is None:
            missing.append(name)
        else:
            pieces.extend(_restored(stored, hf_name, kind, config))

    heads = [CLASSIFIER] if CLASSIFIER in tensors else ["output.weight"] * (not config["tie_word_embeddings"])
    for name in ["token_embd.weight", "output_norm.weight", *heads]:
        take(name, "score.weight" if name == CLASSIFIER else f"{ENDS[name.removesuffix('.weight')]}.weight")
    present = [names for key, names in kind.biases.items() if config[key]] + [kind.always]
    biased = {name for names in present for name in names}
    for layer in range(config["num_hidden_layers"]):
        for stored_name, hf_name in kind.tensors(layer, config).items():
            name, place = stored_name.removesuffix(".weight"), f"model.layers.{layer}.{hf_name}".removesuffix(".weight")
            take(f"blk.{layer}.{stored_name}", f"model.layers.{layer}.{hf_name}")
            if f"blk.{layer}.{name}.bias" in rest and name in biased:
                take(f"blk.{layer}.{name}.bias", f"{place}.bias")
            elif name in biased and f"blk.{layer}.{name}.weight" in tensors:
                size = tensors[f"blk.{layer}.{name}.weight"].shape[0]
                pieces.append(Piece(f"{place}.bias", (size,), None, np.arange(size)))
    if rest:
        shown = ", ".join(repr(name) for name in list(rest)[:5])
        raise GgufError(f"tensor {shown} has no place in such a model; use the model's safetensors checkpoint")
    if missing:
        shown = ", ".join(missing[:5]) + (", ..." if len(missing) > 5 else "")
        raise GgufError(f"{len(missing)} tensors are missing: {shown}. Fetch the file, or all of its parts, again")
    return pieces


def _restored(stored: Stored, name: str, kind: Kind, config: dict[str, Any]) -> Iterator[Piece]:
    """What is stored as one tensor, as Hugging Face has it."""
    if "{}" in name:
        experts, count, _ = stored.shape
        for expert in range(experts):
            rows = np.arange(expert * count, (expert + 1) * count)
            yield Piece(name.format(expert), stored.shape[1:], stored, rows)
        return
    if ".linear_attn." in name:
        yield _of_delta_net(stored, name, config)
        return
    rows = np.arange(stored.shape[0])
    module = name.split(".")[-2]
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    if kind.interleaved and module in heads:
        rows = rows.reshape(heads[module], -1, 2).swapaxes(1, 2).reshape(-1)
    if stored.name == CLASSIFIER:
        rows = rows[::-1]  # /v1/rerank takes the last class for relevance
    yield Piece(name, stored.shape, stored, rows, kind.norm_shift if name.endswith("norm.weight") else 0.0)


def _of_delta_net(stored: Stored, name: str, config: dict[str, Any]) -> Piece:
    """A tensor of gated DeltaNet. Of a key head's value heads llama.cpp stores the first of all key heads, then the
    second, and so on; Hugging Face has them together."""
    key_heads, value_heads = config["linear_num_key_heads"], config["linear_num_value_heads"]
    width, keys = config["linear_value_head_dim"], 2 * key_heads * config["linear_key_head_dim"]
    heads = np.arange(value_heads).reshape(-1, key_heads).T.reshape(-1)
    channels = (heads[:, None] * width + np.arange(width)).reshape(-1)
    mixed = np.concatenate([np.arange(keys), keys + channels])
    every = np.arange(stored.shape[0])
    match name.split(".linear_attn.")[1]:
        case "in_proj_qkv.weight":
            return Piece(name, stored.shape, stored, mixed)
        case "conv1d.weight":
            return Piece(name, (stored.shape[0], 1, stored.shape[1]), stored, mixed)
        case "in_proj_z.weight":
            return Piece(name, stored.shape, stored, channels)
        case "out_proj.weight":
            return Piece(name, stored.shape, stored, every, columns=channels)
        case "norm.weight":  # the only one that is stored as it is
            return Piece(name, stored.shape, stored, every)
        case part:
            return Piece(name, stored.shape, stored, heads, logarithm=part == "A_log")


def _need_space(folder: Path, needed: int) -> None:
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise OSError(
            errno.ENOSPC,
            f"{folder} has {free / 1e9:.2f} GB free, and the model in float32 takes {needed / 1e9:.2f} GB; free some "
            "space, or name a folder on another disk",
        )


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _write_safetensors(path: Path, pieces: Sequence[Piece], say: Callable[[str], None]) -> None:
    """Write with a few rows in memory at a time, which the safetensors package's own writer cannot do."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for piece in pieces:
        start, end = end, end + 4 * int(np.prod(piece.shape))
        header[piece.name] = {"dtype": "F32", "shape": piece.shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for done, piece in enumerate(pieces):
            if done % 50 == 0:
                say(f"converting: {done} of {len(pieces)} tensors")
            for values in piece.values():
                file.write(np.ascontiguousarray(values, dtype="<f4").data)
        file.flush()
        os.fsync(file.fileno())


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line. Exit status 1 and one line on stderr when the file is refused."""
    parser = argparse.ArgumentParser(
        prog="python -m model.gguf.convert",
        description="Convert a GGUF file to a Hugging Face folder with float32 safetensors.",
    )
    parser.add_argument("source", type=Path, help="the .gguf file; of a split one, any part")
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
