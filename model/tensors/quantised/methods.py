"""Which way of quantising a checkpoint's ``config.json`` names, and its weights as they were before."""

from collections.abc import Mapping
from typing import Any

from model.fields import ConfigError, Fields
from model.tensors.quantised import bitsandbytes, compressed, fp8, packed
from model.tensors.quantised.parts import Method, Parts
from model.tensors.stored import CheckpointError, Stored, Tensors

METHODS: Mapping[str, Method] = {
    "fp8": fp8.FINE_GRAINED,
    "fbgemm_fp8": fp8.FBGEMM,
    "awq": packed.AWQ,
    "gptq": packed.GPTQ,
    "compressed-tensors": compressed.COMPRESSED_TENSORS,
    "bitsandbytes": bitsandbytes.BITSANDBYTES,
}
"""Those that are read, by ``quant_method``."""

_NOT_USED = (
    "input_scale", "input_zero_point", "input_global_scale", "input_scale_ub", "output_scale", "output_zero_point",
    "activation_scale", "q_scale", "k_scale", "v_scale", "q_zero_point", "k_zero_point", "v_zero_point", "kv_scale",
)  # fmt: skip
"""Ends of the names of tensors that quantise activations, keys and values, which are not quantised here."""


def _fields(config: Mapping[str, Any]) -> tuple[Method, Fields] | None:
    """The way of quantising and its settings; None if the config names none.

    Raises:
        ConfigError: it is not read, or they are damaged.
    """
    key = next((key for key in ("quantization_config", "compression_config", "quantization") if config.get(key)), None)
    if key is None:
        return None
    fields = Fields(config, "config.json").group(key)
    # bitsandbytes once wrote no method, and MLX writes none.
    name = fields.text(
        "quant_method", "bitsandbytes" if {"load_in_4bit", "load_in_8bit"} & config[key].keys() else "mlx"
    )
    if name not in METHODS:
        raise ConfigError(
            f"quantised weights of {name!r} are not read; read are those of {', '.join(METHODS)}. Name the unquantised "
            "model from which this one was made, or convert this one back with the library that made it: transformers' "
            "model.dequantize(), then model.save_pretrained(FOLDER)"
        )
    return METHODS[name], fields


def check(config: Mapping[str, Any]) -> None:
    """Refuse a way of quantising, or settings of one, that are not read.

    Raises:
        ConfigError: naming them.
    """
    if found := _fields(config):
        method, fields = found
        method.read(fields)


def dequantised(tensors: Tensors, config: Mapping[str, Any]) -> tuple[Tensors, list[str]]:
    """The tensors with weights in place of the parts that they are made of, and what is wrong with parts.

    A module is quantised if it has such parts: the config's lists of those that are not are of no use.

    Raises:
        ConfigError: as ``check`` does.
    """
    found = _fields(config)
    if found is None:
        return tensors, []
    method, fields = found
    weight = method.read(fields)
    read: dict[str, Stored] = {}
    modules: dict[str, Parts] = {}
    for name, tensor in tensors.items():
        part = next((part for part in method.parts if name.endswith(f".{part}")), None)
        if part is not None:
            module = name.removesuffix(f".{part}")
            modules.setdefault(module, Parts(module))[part] = tensor
        elif not name.endswith(tuple(f".{end}" for end in _NOT_USED)):
            read[name] = tensor
    problems: list[str] = []
    for module, parts in modules.items():
        try:
            read[f"{module}.weight"] = parts["weight"] if parts.keys() == {"weight"} else weight(parts)
        except CheckpointError as error:
            problems.append(str(error))
    return read, problems
