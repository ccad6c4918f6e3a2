"""Quantised weights: the same numbers as the libraries that made them give back, from parts of the files.

The libraries' own answers lie in ``quantised_vectors.safetensors``: CASE/PART as stored, and CASE/expected. They are of
compressed-tensors 0.18.0 (``compress``, then ``decompress``), bitsandbytes 0.50.2 (``quantize_4bit``,
``dequantize_4bit``, ``int8_vectorwise_dequant``), AutoAWQ's ``dequantize_gemm`` and GPTQModel's
``PackableQuantLinear.dequantize_weight``, of random numbers.
"""

import json
import tracemalloc
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from model.families.registry import from_hf
from model.fields import ConfigError
from model.tensors.files import FileTensor
from model.tensors.folder import opened
from model.tensors.safetensors_files import SafetensorsFiles
from model.tensors.stored import NUMPY, CheckpointError, Stored, whole
from tests.parity.cases import HAVE_TORCH
from tests.published_quantised import PUBLIC
from tests.reads import bytes_read
from tests.tiny import write_json
from tests.tiny_families import config_of
from tests.tiny_quantised import NF4, fp8, gptq

VECTORS = Path(__file__).with_name("quantised_vectors.safetensors")
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 16, "version": "GEMM"}
GPTQ = {"quant_method": "gptq", "group_size": 16}
FP8 = {"quant_method": "fp8", "weight_block_size": [32, 32]}
BITSANDBYTES = {"quant_method": "bitsandbytes", "load_in_4bit": True}


def compressed(format: str, **weights: Any) -> dict[str, Any]:
    groups = {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 8, **weights}}}
    return {"quant_method": "compressed-tensors", "format": format, "config_groups": groups}


CASES: Mapping[str, dict[str, Any]] = {
    "awq": AWQ,
    "awq-bfloat16": AWQ,
    **{f"gptq-{bits}": {**GPTQ, "bits": bits} for bits in (2, 3, 4, 8)},
    **{f"gptq_v2-{bits}": {**GPTQ, "bits": bits, "checkpoint_format": "gptq_v2"} for bits in (2, 3, 4, 8)},
    "pack-4": compressed("pack-quantized", num_bits=4),
    "pack-4-zeros": compressed("pack-quantized", num_bits=4, symmetric=False),
    "pack-4-order": compressed("pack-quantized", num_bits=4, actorder="group"),
    "pack-8-channel": compressed("pack-quantized"),
    "pack-3": compressed("pack-quantized", num_bits=3),
    "int-channel": compressed("int-quantized"),
    "float-channel": compressed("float-quantized", type="float"),
    "float-tensor": compressed("naive-quantized", type="float"),
    "float-block": compressed("float-quantized", type="float", block_structure=[8, 16]),
    "nf4": BITSANDBYTES,
    "nf4-nested": BITSANDBYTES,
    "nf4-large": BITSANDBYTES,
    "fp4": BITSANDBYTES,
    "int8": {"quant_method": "bitsandbytes", "load_in_8bit": True},
}


def vectors() -> dict[str, dict[str, np.ndarray]]:
    with SafetensorsFiles() as files, files.open(VECTORS) as file:
        found: dict[str, dict[str, np.ndarray]] = {}
        for name, (shape, dtype) in file.tensors().items():
            case, part = name.split("/")
            found.setdefault(case, {})[part] = whole(FileTensor(files, VECTORS, name, shape, dtype))
        return found


@contextmanager
def stored(folder: Path, parts: Mapping[str, np.ndarray], settings: Mapping[str, Any]) -> Iterator[Stored]:
    """The weight of a module "m" with these parts."""
    with tensors(folder, {f"m.{part}": values for part, values in parts.items()}, settings) as (found, problems):
        assert problems == []
        assert found.keys() == {"m.weight"}
        yield found["m.weight"]


@contextmanager
def tensors(
    folder: Path, named: Mapping[str, np.ndarray], settings: Mapping[str, Any]
) -> Iterator[tuple[Mapping[str, Stored], list[str]]]:
    save_file(dict(named), folder / "model.safetensors")
    write_json(folder / "config.json", {"quantization_config": settings})
    with opened(folder) as of_folder:
        yield of_folder.tensors, of_folder.problems


def equal(tensor: Stored, expected: np.ndarray) -> None:
    """The same numbers of the same type, as a whole and in parts that start and end anywhere."""
    assert (tensor.shape, NUMPY[tensor.dtype]) == (expected.shape, expected.dtype)
    np.testing.assert_array_equal(whole(tensor), expected, strict=True)
    rng = np.random.default_rng(0)
    for _ in range(20):
        cut = tuple(slice(*sorted(rng.integers(0, size + 1, 2).tolist())) for size in expected.shape)
        np.testing.assert_array_equal(tensor.read(cut), expected[cut])


def test_every_case_has_its_settings() -> None:
    assert vectors().keys() == CASES.keys()


@pytest.mark.parametrize("case", CASES)
def test_weights_are_those_of_the_library_that_made_them(case: str, tmp_path: Path) -> None:
    parts = vectors()[case]
    expected = parts.pop("expected")
    with stored(tmp_path, parts, CASES[case]) as tensor:
        if CASES[case]["quant_method"] == "compressed-tensors":  # its products are exact, and the library rounds them
            np.testing.assert_array_equal(whole(tensor).astype(expected.dtype), expected)
            expected = whole(tensor)
            assert expected.dtype == np.float32
        equal(tensor, expected)


@pytest.mark.skipif(not HAVE_TORCH, reason="torch is the reference")
@pytest.mark.parametrize("grid", [(3, 2), (96, 1), (1, 1), (), (1,)])
@pytest.mark.parametrize("dtype", ["F32", "BF16", "U8"])
def test_fp8_weights_are_those_of_transformers(grid: tuple[int, ...], dtype: str, tmp_path: Path) -> None:
    import torch
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    rng = np.random.default_rng(1)
    numbers = rng.normal(0, 100, (96, 64)).astype(ml_dtypes.float8_e4m3fn)
    scales = (rng.integers(100, 140, grid) if dtype == "U8" else rng.uniform(1e-3, 2e-3, grid)).astype(NUMPY[dtype])
    scales = np.asarray(scales)
    of_torch = [
        torch.from_numpy(np.array(numbers.view(np.uint8))).view(torch.float8_e4m3fn),
        torch.from_numpy(scales if dtype == "U8" else scales.astype(np.float32)),
    ]
    expected = Fp8Dequantize(None)._dequantize_one(*of_torch, output_dtype=torch.float32).numpy()
    with stored(tmp_path, {"weight": numbers, "weight_scale_inv": scales}, FP8) as tensor:
        equal(tensor, expected)


def test_the_last_blocks_may_be_smaller(tmp_path: Path) -> None:
    parts, expected = fp8(np.random.default_rng(2).normal(size=(70, 50)).astype(np.float32))
    with stored(tmp_path, parts, FP8) as tensor:
        equal(tensor, expected)


def test_what_is_not_quantised_is_left_and_scales_of_activations_are_not_used(tmp_path: Path) -> None:
    parts, expected = fp8(np.ones((32, 32), np.float32))
    named = {f"layer.q_proj.{part}": each for part, each in parts.items()}
    others = {"layer.norm.weight": np.ones(3, np.float32), "layer.q_proj.bias": np.ones(32, np.float32)}
    unused = ("layer.q_proj.input_scale", "layer.k_scale", "layer.v_scale", "layer.q_proj.activation_scale")
    with tensors(tmp_path, named | others | {name: np.float32([1]) for name in unused}, FP8) as (found, problems):
        assert not problems
        assert found.keys() == {"layer.q_proj.weight", *others}
        assert not np.any(whole(found["layer.q_proj.weight"]) != expected)


def test_what_is_wrong_with_parts_is_listed_together(tmp_path: Path) -> None:
    parts, _ = gptq(np.random.default_rng(0).normal(size=(32, 32)).astype(np.float32))
    named = {f"{module}.{part}": each for module in "abcd" for part, each in parts.items()}
    del named["a.scales"]
    named["b.qzeros"] = named["b.qzeros"][:1]
    named["c.qweight"] = named["c.qweight"][:3]
    named["d.scales"] = named["d.scales"].astype(np.int32)
    with tensors(tmp_path, named, {**GPTQ, "bits": 4}) as (found, problems):
        assert not found
    assert [problem.split(" ")[:2] for problem in problems] == [
        ["missing:", "a.scales"], ["mis-shaped:", "b.qzeros"], ["mis-shaped:", "c.qweight"], ["dtype:", "d.scales"],
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("case", "part"), [("pack-4-zeros", "weight_zero_point"), ("pack-4-order", "weight_g_idx"), ("gptq_v2-4", "g_idx")]
)
def test_zeros_and_the_order_of_inputs_are_missed(case: str, part: str, tmp_path: Path) -> None:
    """The weight without them would be another one."""
    named = {f"m.{name}": each for name, each in vectors()[case].items() if name not in (part, "expected")}
    with tensors(tmp_path, named, CASES[case] | ({"desc_act": True} if part == "g_idx" else {})) as (_, problems):
        assert problems == [f"missing: m.{part}"]


def test_a_group_without_scales_is_refused_when_it_is_read(tmp_path: Path) -> None:
    parts, _ = gptq(np.random.default_rng(0).normal(size=(32, 32)).astype(np.float32))
    parts["g_idx"][5] = -1
    with (
        stored(tmp_path, parts, {**GPTQ, "bits": 4}) as tensor,
        pytest.raises(CheckpointError, match="groups -1 to 1 and 2 scales"),
    ):
        whole(tensor)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        *(
            ({"quantization_config": {"quant_method": method}}, [f"{method!r}", "are not read", "unquantised model"])
            for method in ("hqq", "aqlm", "eetq", "quanto", "torchao", "mxfp4", "nvfp4", "auto-round", "modelopt")
        ),
        ({"quantization": {"bits": 4}, "quantization_config": {"bits": 4}}, ["'mlx'"]),
        ({"quantization_config": {**AWQ, "version": "gemv"}}, ["'gemv'", "'gemm'"]),
        ({"quantization_config": {**AWQ, "bits": 8}}, ["have 8"]),
        ({"quantization_config": {**GPTQ, "bits": 5}}, ["have 5"]),
        ({"quantization_config": {**GPTQ, "bits": 4, "checkpoint_format": "marlin"}}, ["'marlin'", "'gptq_v2'"]),
        ({"quantization_config": {**GPTQ, "bits": 4, "is_marlin_format": True}}, ["'marlin'"]),
        ({"quantization_config": {**GPTQ, "bits": 4, "pack_dtype": "int16"}}, ["pack_dtype='int16'"]),
        ({"quantization_config": {**FP8, "what": 1}}, ["what=1"]),
        ({"quantization_config": compressed("nvfp4-pack-quantized")}, ["nvfp4-pack-quantized", "pack-quantized"]),
        ({"compression_config": compressed("marlin-24")}, ["marlin-24"]),
        (
            {"quantization_config": compressed("int-quantized") | {"sparsity_config": {"format": "sparse-24-bitmask"}}},
            ["sparse-24-bitmask"],
        ),
        (
            {"quantization_config": compressed("int-quantized") | {"transform_config": {"config_groups": {"u": 1}}}},
            ["transform_config"],
        ),
    ],
)
def test_what_is_not_read_is_refused_by_name(changes: Mapping[str, Any], words: list[str]) -> None:
    with pytest.raises(ConfigError) as refusal:
        from_hf({**config_of("llama"), **changes})
    for word in words:
        assert word in str(refusal.value)


@pytest.mark.parametrize("name", PUBLIC)
@pytest.mark.parametrize("key", ["quantization_config", "compression_config"])
def test_what_well_known_checkpoints_say_is_read(name: str, key: str) -> None:
    plain = config_of("llama")
    assert from_hf({**plain, key: PUBLIC[name]}) == from_hf(plain)


def large(case: str) -> dict[str, np.ndarray]:
    """The parts of a weight [2048, 4096]: the numbers may be any."""
    rng = np.random.default_rng(0)
    state = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [2048, 4096]}
    words = rng.integers(-(2**31), 2**31, (2048, 512)).astype(np.int32)
    return {
        "fp8": {
            "weight": rng.integers(0, 127, (2048, 4096)).astype(np.uint8).view(ml_dtypes.float8_e4m3fn),
            "weight_scale_inv": np.ones((64, 128), np.float32),
        },
        "gptq": {
            "qweight": words.reshape(512, 2048),
            "qzeros": words[:32, :256],
            "scales": np.ones((32, 2048), np.float16),
        },
        "compressed": {
            "weight_packed": words,
            "weight_scale": np.ones((2048, 32), ml_dtypes.bfloat16),
            "weight_shape": np.array([2048, 4096]),
        },
        "bitsandbytes": {
            "weight": rng.integers(0, 256, (2**22, 1)).astype(np.uint8),
            "weight.absmax": np.ones(2**17, np.float32),
            "weight.quant_map": np.float32(NF4),
            "weight.quant_state.bitsandbytes__nf4": np.frombuffer(json.dumps(state).encode(), np.uint8),
        },
    }[case]


@pytest.mark.parametrize(
    ("case", "settings"),
    [("fp8", FP8), ("gptq", {**GPTQ, "bits": 4}), ("compressed", CASES["pack-4"]), ("bitsandbytes", BITSANDBYTES)],
)
def test_a_weight_takes_little_memory_beside_itself(case: str, settings: Mapping[str, Any], tmp_path: Path) -> None:
    """And a part of it reads its own part of the file."""
    parts = large(case)
    with stored(tmp_path, parts, settings) as tensor, bytes_read() as read:
        tracemalloc.start()
        values = whole(tensor)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak <= 1.2 * values.nbytes
        assert sum(read) <= 1.1 * sum(part.nbytes for part in parts.values())
        assert max(read) <= 2**20
        read.clear()
        tensor.read((slice(512, 768), slice(0, 4096)))
        assert sum(read) <= 1.1 / 8 * sum(part.nbytes for part in parts.values())
