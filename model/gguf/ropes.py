"""The rope of a file as ``rope_scaling`` has it.

Source: llama.cpp's ``conversion/llama.py``, ``phi.py`` and ``base.py``, which write what is read back here.
"""

import math
from typing import Any

import numpy as np

from model.gguf.files import Array, GgufError
from model.gguf.keys import Keys


def rope_scaling(keys: Keys, theta: float, factors: Array | None) -> dict[str, Any] | None:
    """None, or the group of a linear, YaRN or Llama 3 rope.

    Args:
        factors: the tensor ``rope_freqs.weight``, by which the frequencies are divided.
    """
    kind = keys.get("rope.scaling.type", "linear")  # llama.cpp takes an absent type for this
    now, older = keys.get("rope.scaling.factor"), keys.get("rope.scale_linear", 1.0)
    factor = older if now is None else now
    if kind == "linear" and factor in (0.0, 1.0):
        kind = "none"
    if factors is not None and not np.all(factors == 1):
        if kind != "none":
            raise GgufError(
                f"{keys.name('rope.scaling.type')} is {kind!r} beside rope_freqs.weight; only one is converted"
            )
        return _llama3(theta, factors.astype(np.float64))
    if kind == "none":
        return None
    if kind == "linear":
        name = "rope.scale_linear" if now is None else "rope.scaling.factor"
        return {"rope_type": "linear", "factor": keys.number(name)}
    if kind == "yarn":
        return _yarn(keys, factor)
    raise GgufError(f"{keys.name('rope.scaling.type')} {kind!r} is not converted; known: none, linear, yarn")


def _llama3(theta: float, factors: Array) -> dict[str, Any]:
    """The scaling whose factors these are.

    Between two wavelengths, ``original / high_freq_factor`` and ``original / low_freq_factor``, the share of the kept
    frequency is linear in ``original / wavelength``. The factors show that line, but the three numbers only up to their
    scale: the context is taken to be 8,192 tokens, as in every Llama 3.
    """
    original, largest = 8192, float(factors.max())
    frequencies = theta ** (-np.arange(len(factors)) / len(factors))
    turns = original * frequencies / (2 * math.pi)
    shares = (1 / factors - 1 / largest) / (1 - 1 / largest)
    between = (shares > 1e-6) & (shares < 1 - 1e-6)
    if between.sum() >= 2:
        slope, start = np.polyfit(turns[between], shares[between], 1)
        low, high = (float(f"{number:.4g}") for number in (-start / slope, (1 - start) / slope))
        expected = np.clip((turns - low) / (high - low), 0, 1)
        if np.allclose((1 - expected) / largest + expected, 1 / factors, rtol=1e-5):
            return {
                "rope_type": "llama3",
                "factor": float(str(np.float32(largest))),
                "low_freq_factor": low,
                "high_freq_factor": high,
                "original_max_position_embeddings": original,
            }
    raise GgufError(
        "rope_freqs.weight: these are not the factors of a Llama 3 rope; use the model's safetensors checkpoint"
    )


def _yarn(keys: Keys, factor: float) -> dict[str, Any]:
    if keys.get("rope.scaling.yarn_ext_factor", 1.0) not in (-1.0, 1.0):  # -1 is llama.cpp's own word for 1
        raise GgufError(f"{keys.name('rope.scaling.yarn_ext_factor')} is not 1; only that is converted")
    group: dict[str, Any] = {
        "rope_type": "yarn",
        "factor": keys.number("rope.scaling.factor"),
        "original_max_position_embeddings": keys.required("rope.scaling.original_context_length"),
    }
    for name, key in {
        "beta_fast": "yarn_beta_fast",
        "beta_slow": "yarn_beta_slow",
        "attention_factor": "yarn_attn_factor",
    }.items():
        if keys.get(f"rope.scaling.{key}") is not None:
            group[name] = keys.number(f"rope.scaling.{key}")
    # Mistral's: the attention factor is divided by that of a logarithm times this number, see transformers'
    # _compute_yarn_parameters, where it is called mscale_all_dim, beside an mscale of 1.
    if multiplier := keys.get("rope.scaling.yarn_log_multiplier", 0.0):
        grown = 0.1 * math.log(factor)
        group["attention_factor"] = (grown + 1) / (multiplier * grown + 1)
    return group


def longrope(keys: Keys, short: Array, long: Array) -> dict[str, Any]:
    """The group of Phi-3's rope.

    Args:
        short: the tensor ``rope_factors_short.weight``.
        long: the tensor ``rope_factors_long.weight``.
    """
    group: dict[str, Any] = {
        "rope_type": "longrope",
        "short_factor": [float(str(factor)) for factor in short.astype(np.float32)],
        "long_factor": [float(str(factor)) for factor in long.astype(np.float32)],
    }
    context, original = keys.required("context_length"), keys.required("rope.scaling.original_context_length")
    usual = math.sqrt(1 + math.log(context / original) / math.log(original)) if context > original else 1.0
    factor = keys.get("rope.scaling.attn_factor", usual)
    return group if math.isclose(factor, usual, rel_tol=1e-6) else group | {"attention_factor": factor}
