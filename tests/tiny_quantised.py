"""Tiny checkpoints with quantised weights, as the libraries write them, made with numpy alone.

The packing is written from the formats' descriptions, and shares nothing with what reads it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import load_file, save_file

from tests.tiny import make_llama, write_json

Parts = dict[str, np.ndarray]
Made = tuple[Parts, np.ndarray]
"""What is stored of a module, and the weight [out, in] that it stands for."""


def packed(numbers: np.ndarray, bits: int, axis: int) -> np.ndarray:
    """Numbers of some bits, lowest bit first, in words of 32 bits along an axis."""
    each = np.moveaxis(numbers, axis, -1)[..., None] >> np.arange(bits) & 1
    stream = each.reshape(*each.shape[:-2], -1).astype(np.uint8)
    stream = np.pad(stream, [(0, 0)] * (stream.ndim - 1) + [(0, -stream.shape[-1] % 32)])
    words = np.packbits(stream, axis=-1, bitorder="little").view("<i4")
    return np.ascontiguousarray(np.moveaxis(words, -1, axis))


def quantised(weight: np.ndarray, bits: int, group: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Numbers [in, out], and scales and zeros [in / group, out]: the smallest of a group is 0, the largest the most."""
    columns = weight.T.reshape(-1, group, weight.shape[0])
    low, high = columns.min(1), columns.max(1)
    scales = ((high - low) / (2**bits - 1)).astype(np.float16)
    zeros = np.clip(np.round(-low / scales), 1, 2**bits - 1).astype(np.int32)
    numbers = np.clip(np.round(columns / scales[:, None]) + zeros[:, None], 0, 2**bits - 1)
    return numbers.reshape(-1, weight.shape[0]).astype(np.int32), scales, zeros


def back(numbers: np.ndarray, scales: np.ndarray, zeros: np.ndarray, groups: np.ndarray) -> np.ndarray:
    return ((numbers - zeros[groups]) * scales[groups].astype(np.float32)).astype(np.float16).T.astype(np.float32)


def awq(weight: np.ndarray) -> Made:
    numbers, scales, zeros = quantised(weight, 4, 16)
    order = np.array([0, 2, 4, 6, 1, 3, 5, 7])  # AutoAWQ's: these columns follow each other in a word
    shuffled = [each.reshape(len(each), -1, 8)[:, :, order].reshape(each.shape) for each in (numbers, zeros)]
    words, zero_words = (packed(each, 4, 1) for each in shuffled)
    plain = back(numbers, scales, zeros, np.arange(len(numbers)) // 16)
    return {"qweight": words, "qzeros": zero_words, "scales": scales}, plain


def gptq(weight: np.ndarray, *, bits: int = 4, minus: int = 1, shuffle: bool = False) -> Made:
    """minus: 1 in the first format, which is the default of the libraries."""
    groups = np.arange(weight.shape[1]) // 16
    if shuffle:
        groups = np.random.default_rng(len(weight)).permutation(groups)
    inputs = np.argsort(groups, kind="stable")
    ordered, scales, zeros = quantised(weight[:, inputs], bits, 16)
    numbers = np.empty_like(ordered)
    numbers[inputs] = ordered
    parts = {"qweight": packed(numbers, bits, 0), "qzeros": packed(zeros - minus, bits, 1), "scales": scales}
    return parts | {"g_idx": groups.astype(np.int32)}, back(numbers, scales, zeros, groups)


def fp8(weight: np.ndarray) -> Made:
    """Blocks of 32 x 32; the last ones may be smaller."""
    blocks = np.ix_(np.arange(weight.shape[0]) // 32, np.arange(weight.shape[1]) // 32)
    largest = np.zeros(tuple(-(-size // 32) for size in weight.shape), np.float32)
    np.maximum.at(largest, blocks, np.abs(weight))
    scales = largest / 448
    numbers = (weight / scales[blocks]).astype(ml_dtypes.float8_e4m3fn)
    return {"weight": numbers, "weight_scale_inv": scales}, numbers.astype(np.float32) * scales[blocks]


def fbgemm(weight: np.ndarray) -> Made:
    scales = np.abs(weight).max(1, keepdims=True) / np.float32(448)
    numbers = (weight / scales).astype(ml_dtypes.float8_e4m3fn)
    parts = {"weight": numbers, "weight_scale": scales, "input_scale_ub": np.float32([1200])}
    return parts, numbers.astype(np.float32) * scales


def compressed_int4(weight: np.ndarray) -> Made:
    """Symmetric groups of 16 inputs, with scales in bfloat16."""
    groups = weight.reshape(len(weight), -1, 16)
    scales = (np.abs(groups).max(-1) / 7.5).astype(ml_dtypes.bfloat16)
    numbers = np.clip(np.round(groups / scales[..., None].astype(np.float32)), -8, 7)
    parts = {
        "weight_packed": packed(numbers.reshape(weight.shape).astype(np.int32) + 8, 4, 1),
        "weight_scale": scales,
        "weight_shape": np.array(weight.shape, np.int64),
    }
    return parts, (numbers * scales[..., None].astype(np.float32)).reshape(weight.shape).astype(np.float32)


def compressed_int8(weight: np.ndarray) -> Made:
    scales = (np.abs(weight).max(1, keepdims=True) / 127).astype(np.float32)
    numbers = np.round(weight / scales).astype(np.int8)
    return {"weight": numbers, "weight_scale": scales}, numbers * scales


NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


def nf4(weight: np.ndarray) -> Made:
    codes = np.float32(NF4)
    blocks = np.pad(weight.reshape(-1), (0, -weight.size % 64)).reshape(-1, 64)
    largest = np.abs(blocks).max(1).astype(np.float32)
    numbers = np.abs(blocks[..., None] / largest[:, None, None] - codes).argmin(-1)
    flat = numbers.reshape(-1)[: weight.size].astype(np.uint8)
    state = {"quant_type": "nf4", "blocksize": 64, "dtype": "float32", "shape": list(weight.shape)}
    parts = {
        "weight": (flat[::2] << 4 | flat[1::2])[:, None],
        "weight.absmax": largest,
        "weight.quant_map": codes,
        "weight.quant_state.bitsandbytes__nf4": np.frombuffer(json.dumps(state).encode(), np.uint8),
    }
    return parts, (codes[numbers] * largest[:, None]).reshape(-1)[: weight.size].reshape(weight.shape)


def int8_rows(weight: np.ndarray) -> Made:
    largest = np.abs(weight).max(1).astype(np.float32)
    numbers = np.round(weight * 127 / largest[:, None]).astype(np.int8)
    plain = numbers * largest[:, None] * np.float32(7.874015718698502e-3)
    return {"weight": numbers, "SCB": largest, "weight_format": np.uint8(0)}, plain


_INT4 = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 16}
_INT8 = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}
_TOKENS = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}

METHODS: Mapping[str, tuple[Callable[[np.ndarray], Made], Mapping[str, Any]]] = {
    "fp8": (fp8, {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [32, 32]}),
    "fbgemm": (
        fbgemm,
        {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0, "modules_to_not_convert": ["lm_head"]},
    ),
    "awq": (
        awq,
        {
            "quant_method": "awq",
            "bits": 4,
            "group_size": 16,
            "version": "gemm",
            "zero_point": True,
            "backend": "autoawq",
        },
    ),
    "gptq": (
        gptq,
        {"quant_method": "gptq", "bits": 4, "group_size": 16, "desc_act": False, "sym": False, "damp_percent": 0.1},
    ),
    "compressed-int4": (
        compressed_int4,
        {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "quantization_status": "compressed",
            "ignore": ["lm_head"],
            "config_groups": {"group_0": {"targets": ["Linear"], "weights": _INT4, "input_activations": None}},
        },
    ),
    "compressed-int8": (
        compressed_int8,
        {
            "quant_method": "compressed-tensors",
            "format": "int-quantized",
            "quantization_status": "compressed",
            "ignore": ["lm_head"],
            "config_groups": {"group_0": {"targets": ["Linear"], "weights": _INT8, "input_activations": _TOKENS}},
        },
    ),
    "bitsandbytes-nf4": (
        nf4,
        {"quant_method": "bitsandbytes", "load_in_4bit": True, "_load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    ),
    "bitsandbytes-int8": (int8_rows, {"quant_method": "bitsandbytes", "load_in_8bit": True, "llm_int8_threshold": 6.0}),
}
"""Name -> what quantises a weight, and the ``quantization_config``."""

SIZES: Mapping[str, int] = {"width": 64, "heads": 4, "head_width": 16, "ff": 96, "layers": 2}
"""Of the tiny model: what the packings ask for."""


def make_quantised(folder: Path, method: str) -> tuple[Path, Path]:
    """Write a tiny Llama with quantised layers, and one with the weights that they stand for."""
    quantise, settings = METHODS[method]
    plain = make_llama(folder / "plain", **SIZES)
    stored = make_llama(folder / "stored", **SIZES)
    tensors, weights = load_file(plain / "model.safetensors"), {}
    for name, tensor in tensors.items():
        if "_proj." in name:
            parts, tensors[name] = quantise(tensor)
            weights |= {f"{name.removesuffix('weight')}{part}": each for part, each in parts.items()}
        else:
            weights[name] = tensor
    for to, named in ((plain, tensors), (stored, weights)):  # in C's order, which the package takes for granted
        ordered = {name: np.asarray(each, order="C") for name, each in named.items()}
        save_file(ordered, to / "model.safetensors", {"format": "pt"})
    config = json.loads((stored / "config.json").read_text())
    write_json(stored / "config.json", config | {"quantization_config": dict(settings)})
    return stored, plain
