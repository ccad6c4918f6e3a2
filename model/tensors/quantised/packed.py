"""AWQ and GPTQ: the weight is stored transposed, in words of 32 bits, with a scale and a zero for each group of inputs.

Sources: AutoAWQ's awq/utils/packing_utils.py (``dequantize_gemm``); GPTQModel's nn_modules/qlinear/__init__.py
(``PackableQuantLinear.dequantize_weight``) and utils/model.py (``convert_gptq_v1_to_v2_format_module``).
"""

from functools import partial

from model.fields import ConfigError, Fields
from model.tensors.quantised.parts import Method, Parts, Weight
from model.tensors.quantised.scaled import Group, Packed, Scaled, Transposed
from model.tensors.stored import CheckpointError, Stored

_SCALES = ("F16", "BF16", "F32")

_ABOUT_THE_MAKING = {
    # What is stored decides which modules are quantised, in which groups, and whether a zero is the middle.
    "modules_to_not_convert", "modules_in_block_to_quantize", "lm_head", "group_size", "sym", "zero_point", "desc_act",
    # How it was made, and with what.
    "meta", "dataset", "tokenizer", "batch_size", "damp_percent", "damp_auto_increment", "true_sequential",
    "static_groups", "mse", "block_name_to_quantize", "module_name_preceding_first_block", "model_seqlen",
    "cache_block_outputs", "model_name_or_path", "model_file_base_name", "pad_token_id", "quantizer", "method",
    "gptaq", "foem", "act_group_aware", "hyb_act", "failsafe", "fallback",
    # How others are to run it.
    "backend", "use_exllama", "disable_exllama", "exllama_config", "max_input_length", "use_cuda_fp16", "do_fuse",
    "fuse_max_seq_len", "modules_to_fuse",
}  # fmt: skip

_AWQ_PLACES = tuple(number // 8 * 8 + (0, 4, 1, 5, 2, 6, 3, 7)[number % 8] for number in range(32))
"""AWQ has the even ones of eight numbers in a word's lower half."""


def _awq(fields: Fields) -> Weight:
    layouts = {fields.text(key, "gemm").lower() for key in ("version", "format", "checkpoint_format")}
    if layouts != {"gemm"}:
        raise ConfigError(
            f"quantised weights of AWQ are read in the layout 'gemm', and this checkpoint's is "
            f"{' and '.join(sorted(layouts - {'gemm'}))!r}; name a checkpoint in that layout, or an unquantised one"
        )
    if (bits := fields.integer("bits", 4)) != 4:
        raise ConfigError(f"quantised weights of AWQ are read with 4 bits, and this checkpoint's have {bits}")
    fields.refuse_rest(ignored=_ABOUT_THE_MAKING, neutral={"pack_dtype": "int32"})

    def weight(parts: Parts) -> Stored:
        words, scales = parts.typed("qweight", ("I32",)), parts.typed("scales", _SCALES)
        inputs, outputs, groups = words.shape[0], words.shape[-1] * 8, scales.shape[0]
        zeros = parts.shaped("qzeros", ("I32",), (groups, outputs // 8))
        unpacked = partial(Packed, axis=1, count=outputs, bits=4, places=_AWQ_PLACES)
        return _weight(parts, unpacked(words), unpacked(zeros), _group_size(parts, inputs, groups))

    return weight


_GPTQ_BITS = (2, 3, 4, 8)


def _gptq(fields: Fields) -> Weight:
    # ``format`` is GPTQModel's name of it. In the first format a zero is stored less 1.
    first, second = {"gptq"}, {"gptq_v2"}
    layouts = {fields.text(key) for key in ("checkpoint_format", "format") if key in fields} or first
    if fields.flag("is_marlin_format", False):
        layouts = {"marlin"}
    if layouts not in (first, second):
        raise ConfigError(
            f"quantised weights of GPTQ are read in the layouts 'gptq' and 'gptq_v2', and this checkpoint's is "
            f"{' and '.join(sorted(layouts))!r}; name a checkpoint in one of those, or an unquantised one"
        )
    if (configured := fields.integer("bits")) not in _GPTQ_BITS:
        raise ConfigError(f"quantised weights of GPTQ are read with 2, 3, 4 or 8 bits, and these have {configured}")
    # Some modules may have other settings: what is stored tells them.
    possible = (configured, *_GPTQ_BITS) if "dynamic" in fields else (configured,)
    ordered = fields.flag("desc_act", False)
    fields.refuse_rest(ignored={*_ABOUT_THE_MAKING, "dynamic"}, neutral={"pack_dtype": "int32"})

    def weight(parts: Parts) -> Stored:
        words, scales = parts.typed("qweight", ("I32",)), parts.typed("scales", _SCALES)
        order = parts.typed("g_idx", ("I32",)) if ordered or "g_idx" in parts else None
        inputs = order.shape[0] if order else words.shape[0] * 32 // configured
        outputs, groups = words.shape[-1], scales.shape[0]
        bits = next((bits for bits in possible if -(-inputs * bits // 32) == words.shape[0]), None)
        if bits is None:
            raise CheckpointError(
                f"mis-shaped: {parts.module}.qweight is {words.shape}, which is not {inputs} numbers of "
                f"{configured} bits in each column"
            )
        # transformers' reader wraps too: a zero of 0 was stored as all ones.
        zeros = parts.shaped("qzeros", ("I32",), (groups, -(-outputs * bits // 32)))
        unpacked = Packed(zeros, 1, outputs, bits, plus=1 if layouts == first else 0)
        by_order = order or _group_size(parts, inputs, groups)
        return _weight(parts, Packed(words, 0, inputs, bits), unpacked, by_order)

    return weight


def _group_size(parts: Parts, inputs: int, groups: int) -> int:
    if inputs % groups:
        raise CheckpointError(f"mis-shaped: {parts.module}.scales has {groups} rows, which do not divide {inputs}")
    return inputs // groups


def _weight(parts: Parts, numbers: Packed, zeros: Packed, groups: Group) -> Stored:
    scales = parts.shaped("scales", _SCALES, zeros.shape)
    return Transposed(Scaled(numbers, scales, groups, 1, zeros, dtype=scales.dtype))


AWQ = Method(("qweight", "qzeros", "scales"), _awq)
GPTQ = Method(("qweight", "qzeros", "scales", "g_idx"), _gptq)
