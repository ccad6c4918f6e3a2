"""compressed-tensors: 8-bit whole or floating-point numbers, or whole numbers of 1 to 8 bits packed in words of 32.

Sources: compressed-tensors' compressors/pack_quantized and compressors/naive_quantized (``decompress``), and
quantization/lifecycle/forward.py (``dequantize``).
"""

import numpy as np

from model.fields import ConfigError, Fields
from model.tensors.quantised.parts import Method, Parts, Weight
from model.tensors.quantised.scaled import Grid, Packed, Scaled, group_sizes
from model.tensors.stored import CheckpointError, Stored, whole

_FORMATS = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized")
_NUMBERS = ("I8", "F8_E4M3", "F8_E5M2")
_SCALES = ("BF16", "F16", "F32")
_ZEROS = (*_NUMBERS, "I32")


def _read(fields: Fields) -> Weight:
    groups = fields.groups("config_groups")  # not those that are a known scheme's name
    formats = {scheme.text("format") for scheme in groups if "format" in scheme}
    if (overall := fields.text("format", "dense")) != "mixed-precision":
        formats.add(overall)
    if others := sorted(formats.difference(_FORMATS)):
        raise ConfigError(
            f"quantised weights of compressed-tensors are read in the formats {', '.join(_FORMATS)}, and this "
            f"checkpoint's is {', '.join(others)}; name a checkpoint in one of those, or an unquantised one"
        )
    if "sparsity_config" in fields and ((sparse := fields.group("sparsity_config").text("format", "dense")) != "dense"):
        raise ConfigError(f"sparse weights of compressed-tensors ({sparse}) are not read; name a dense checkpoint")
    weights = [scheme.group("weights") for scheme in groups if "weights" in scheme]
    possible = {each.integer("num_bits") for each in weights} or set(range(1, 9))  # which, is told by what is stored
    blocks = {tuple(int(n) for n in each.numbers("block_structure")) for each in weights if "block_structure" in each}
    # Where all modules must have these, one without them is refused.
    with_zeros = bool(weights) and not any(each.flag("symmetric", True) for each in weights)
    with_order = bool(weights) and all(each.text("actorder", "") in ("group", "dynamic") for each in weights)
    fields.refuse_rest(
        ignored={
            "version", "global_compression_ratio", "run_compressed", "quantization_status",
            # What is stored decides which modules are quantised.
            "ignore",
            # Keys and values are not quantised here.
            "kv_cache_scheme",
        },
        neutral={"transform_config": {}},
    )  # fmt: skip

    def weight(parts: Parts) -> Stored:
        scales = Grid(parts.typed("weight_scale", _SCALES))
        zeros = Grid(parts.typed("weight_zero_point", _ZEROS)) if with_zeros or "weight_zero_point" in parts else None
        if "weight_packed" in parts:
            numbers, zeros = _unpacked(parts, possible, zeros)
        else:
            numbers = parts.typed("weight", _NUMBERS)
        if zeros is not None and zeros.shape != scales.shape:
            raise CheckpointError(
                f"mis-shaped: {parts.module}.weight_zero_point is {zeros.shape} and weight_scale {scales.shape}"
            )
        sizes = group_sizes(parts.module, numbers.shape, scales.shape, blocks)
        order = _order(parts) if with_order or "weight_g_idx" in parts else None
        # In float32, as transformers does where it loads in float32. The products are exact, so that what is rounded to
        # the type of the scales then is what the library gives back.
        return Scaled(numbers, scales, sizes[0], order or sizes[1], zeros)

    return weight


def _unpacked(parts: Parts, possible: set[int], zeros: Stored | None) -> tuple[Packed, Stored | None]:
    """The numbers and zeros of a weight that is packed, along its inputs; its zeros are, along its outputs."""
    words = parts.typed("weight_packed", ("I32",))
    outputs, inputs = (int(size) for size in whole(parts.shaped("weight_shape", ("I64", "I32"), (2,))))
    bits = [bits for bits in possible if words.shape == (outputs, -(-inputs * bits // 32))]
    if len(bits) != 1:
        raise CheckpointError(
            f"mis-shaped: {parts.module}.weight_packed is {words.shape}, which is not {outputs} x {inputs} numbers of "
            f"{' or '.join(str(each) for each in sorted(possible))} bits"
        )
    middle = 1 << (bits[0] - 1)
    if zeros is not None and zeros.dtype == "I32":
        zeros = Packed(zeros, 0, outputs, bits[0], minus=middle)
    return Packed(words, 1, inputs, bits[0], minus=middle), zeros


def _order(parts: Parts) -> Stored | None:
    """The group of each input; None if they are in order, which the library writes as -1."""
    order = parts.typed("weight_g_idx", ("I32", "I64"))
    return None if np.any(whole(order) < 0) else order


COMPRESSED_TENSORS = Method(
    ("weight", "weight_packed", "weight_shape", "weight_scale", "weight_zero_point", "weight_g_idx"), _read
)
