"""Weights in 8 bits of floating point: a scale for each block, row or tensor.

Source: ``Fp8Dequantize`` and ``FbgemmFp8Linear`` in transformers' integrations, finegrained_fp8.py and fbgemm_fp8.py.
"""

from functools import partial

from model.fields import Fields
from model.tensors.quantised.parts import Method, Parts, Weight
from model.tensors.quantised.scaled import Grid, Scaled, group_sizes
from model.tensors.stored import Stored

_NUMBERS = ("F8_E4M3", "F8_E5M2")
_SCALES = ("F32", "BF16", "F16", "F8_E8M0", "U8")

_IGNORED = {
    # What is stored decides which modules are quantised, and in which type of numbers.
    "modules_to_not_convert", "modules_to_convert", "ignored_layers", "fmt", "scale_fmt",
    # Activations, keys and values are not quantised here.
    "activation_scheme", "kv_cache_scheme",
    # How transformers is to run it.
    "dequantize",
}  # fmt: skip


def _fine_grained(fields: Fields) -> Weight:
    """``fp8``: blocks, as DeepSeek and Qwen have them, or one scale for a tensor (AutoFP8's ``weight_scale``)."""
    sizes = [tuple(int(n) for n in fields.numbers("weight_block_size"))] if "weight_block_size" in fields else []
    fields.refuse_rest(ignored=_IGNORED)
    return partial(_weight, sizes=sizes)


def _fbgemm(fields: Fields) -> Weight:
    """``fbgemm_fp8``: a scale for each row."""
    fields.refuse_rest(ignored={"modules_to_not_convert", "activation_scale_ub"})
    return partial(_weight, sizes=[])


def _weight(parts: Parts, sizes: list[tuple[int, ...]]) -> Stored:
    numbers = parts.typed("weight", _NUMBERS)
    scales = Grid(parts.typed("weight_scale" if "weight_scale" in parts else "weight_scale_inv", _SCALES))
    rows, columns = group_sizes(parts.module, numbers.shape, scales.shape, sizes)
    return Scaled(numbers, scales, rows, columns)


FINE_GRAINED = Method(("weight", "weight_scale_inv", "weight_scale"), _fine_grained)
FBGEMM = Method(("weight", "weight_scale"), _fbgemm)
