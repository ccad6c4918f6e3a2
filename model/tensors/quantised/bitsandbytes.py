"""bitsandbytes: 4-bit codes with a scale for each block of consecutive numbers; 8-bit numbers with one for each row.

Source: bitsandbytes' functional.py (``QuantState``, ``dequantize_4bit``, ``int8_vectorwise_dequant``) and
backends/default/ops.py.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from model.fields import Fields
from model.tensors.quantised.parts import Method, Parts, Weight
from model.tensors.quantised.scaled import Grid, Scaled, strips
from model.tensors.stored import NUMPY, CheckpointError, Stored, whole

_STATES = ("weight.quant_state.bitsandbytes__nf4", "weight.quant_state.bitsandbytes__fp4")
_DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}


@dataclass(frozen=True, slots=True)
class _Codes:
    """Codes of 4 bits in row-major order, the first of two in a byte's upper half; see ``Stored``.

    Attributes:
        stored: the bytes, as one column of any type of numbers.
        codes: what the 16 codes stand for.
        scales: given blocks, their scales.
    """

    stored: Stored
    shape: tuple[int, ...]
    dtype: str
    codes: npt.NDArray[np.float32]
    block: int
    scales: Callable[[slice], npt.NDArray[np.float32]]

    @property
    def file(self) -> str:
        return self.stored.file

    def read(self, cut: tuple[slice, ...]) -> npt.NDArray[Any]:
        rows, columns = cut
        width = self.shape[1]
        values = np.empty((rows.stop - rows.start, columns.stop - columns.start), NUMPY[self.dtype])
        for stored, at in strips(rows, width):
            values[at] = self._numbers(stored.start * width, stored.stop * width).reshape(-1, width)[:, columns]
        return values

    def _numbers(self, start: int, stop: int) -> npt.NDArray[np.float32]:
        each = 2 * NUMPY[self.stored.dtype].itemsize
        first = start // each
        read = self.stored.read((slice(first, -(-stop // each)), slice(0, 1))).reshape(-1).view(np.uint8)
        halves = np.stack([read >> 4, read & 15], axis=1).reshape(-1)
        numbers = self.codes[halves[start - first * each : stop - first * each]]
        blocks = slice(start // self.block, -(-stop // self.block))
        skipped = start - blocks.start * self.block
        numbers *= np.repeat(self.scales(blocks), self.block)[skipped : skipped + stop - start]
        return numbers


def _read(fields: Fields) -> Weight:
    """All settings are of how it was made, or of how others are to run it."""
    fields.refuse_rest(
        ignored={
            "load_in_4bit", "load_in_8bit", "_load_in_4bit", "_load_in_8bit", "bnb_4bit_compute_dtype",
            "bnb_4bit_quant_storage", "bnb_4bit_quant_type", "bnb_4bit_use_double_quant",
            "llm_int8_enable_fp32_cpu_offload", "llm_int8_has_fp16_weight", "llm_int8_skip_modules",
            "llm_int8_threshold", "modules_to_not_convert",
        }
    )  # fmt: skip
    return _weight


def _weight(parts: Parts) -> Stored:
    return _rows(parts) if "SCB" in parts else _blocks(parts)


def _rows(parts: Parts) -> Stored:
    """8 bits: number x scale / 127."""
    if "weight_format" in parts and np.any(layout := whole(parts["weight_format"])):
        raise CheckpointError(f"layout: {parts.module}.weight_format is {layout}; only 0, rows, is read")
    numbers = parts.typed("weight", ("I8",))
    scales = parts.shaped("SCB", ("F32",), numbers.shape[:1])
    return Scaled(numbers, Grid(scales), 1, numbers.shape[1], factor=7.874015718698502e-3)


def _blocks(parts: Parts) -> Stored:
    """4 bits: code x scale; the scales may themselves be 8-bit codes with a scale for each block, plus an offset."""
    state = next((parts[name] for name in _STATES if name in parts), None)
    if state is None:
        raise CheckpointError(f"missing: {parts.module}.{' or '.join(_STATES)}")
    try:
        settings = json.loads(bytes(whole(state)))
        (outputs, inputs), block, dtype = settings["shape"], settings["blocksize"], _DTYPES[settings["dtype"]]
        nested_block, offset = settings.get("nested_blocksize", 1), np.float32(settings.get("nested_offset", 0))
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"damaged: {parts.module}.weight.quant_state ({error!r})") from error
    blocks = -(-outputs * inputs // block)
    stored = parts["weight"]
    if stored.shape != (-(-outputs * inputs // (2 * NUMPY[stored.dtype].itemsize)), 1):
        raise CheckpointError(f"mis-shaped: {parts.module}.weight is {stored.shape} and holds {outputs} x {inputs}")
    codes = whole(parts.shaped("weight.quant_map", ("F32",), (16,)))
    if "weight.nested_absmax" in parts:
        absmax = parts.shaped("weight.absmax", ("U8",), (blocks,))
        nested_codes = whole(parts.shaped("weight.nested_quant_map", ("F32",), (256,)))
        nested = parts.shaped("weight.nested_absmax", ("F32",), (-(-blocks // nested_block),))

        def scales(which: slice) -> npt.NDArray[np.float32]:
            of = np.arange(which.start, which.stop) // nested_block
            return nested_codes[absmax.read((which,))] * whole(nested)[of] + offset
    else:
        absmax = parts.shaped("weight.absmax", ("F32",), (blocks,))

        def scales(which: slice) -> npt.NDArray[np.float32]:
            return absmax.read((which,))

    return _Codes(stored, (outputs, inputs), dtype, codes, block, scales)


BITSANDBYTES = Method(
    (
        "weight", "SCB", "weight_format", "weight.absmax", "weight.quant_map", "weight.nested_absmax",
        "weight.nested_quant_map", *_STATES,
    ),
    _read,
)  # fmt: skip
