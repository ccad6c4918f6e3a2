"""GGUF files of every architecture, as llama.cpp writes them: keys, ropes, biases, parts, types, refusals."""

import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf.quants import dequantize, quantize
from safetensors.numpy import load_file

from model.config import Rope
from model.families.registry import from_hf
from model.fields import read_config
from model.gguf.convert import GgufError, convert
from tests.tiny_gguf import ARCHITECTURES, Edit, gguf_family, write_family_gguf

TYPES = [gguf.GGMLQuantizationType.F16]
TYPES += [type for type in gguf.GGML_QUANT_SIZES if type in gguf.quants._type_traits]  # pyright: ignore[reportPrivateUsage]


def made(folder: Path, path: Path) -> Path:
    convert(path, folder / "made", say=lambda _: None)
    return folder / "made"


def refusal(folder: Path, path: Path) -> str:
    with pytest.raises(GgufError) as error:
        made(folder, path)
    assert not (folder / "made").exists()
    return str(error.value)


def set_keys(**changes: Any) -> Edit:
    """Keys with two underscores for each dot."""
    return lambda keys, _: keys.update({key.replace("__", "."): value for key, value in changes.items()})


@pytest.mark.parametrize("family", ARCHITECTURES)
def test_there_and_back(tmp_path: Path, family: str) -> None:
    source = gguf_family(tmp_path / "source", family)
    folder = made(tmp_path, write_family_gguf(source, tmp_path / "x.gguf", family))
    expected, found = load_file(source / "model.safetensors"), load_file(folder / "model.safetensors")
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        # A norm's scale of some is stored with 1 added, which rounds it, and A_log as minus its exponential.
        rounded = family.startswith("gemma") or family == "qwen3_5"
        atol = 4e-7 if name.endswith("A_log") else 1e-7 if rounded and name.endswith("norm.weight") else 0
        np.testing.assert_allclose(found[name], tensor, rtol=0, atol=atol, err_msg=name)
    assert from_hf(read_config(folder)) == from_hf(read_config(source))


def test_quantised_experts(tmp_path: Path) -> None:
    source = gguf_family(tmp_path / "source", "qwen3_moe", hidden_size=64, moe_intermediate_size=32)
    kind = gguf.GGMLQuantizationType.Q8_0
    folder = made(tmp_path, write_family_gguf(source, tmp_path / "x.gguf", "qwen3_moe", quantised=kind))
    found = load_file(folder / "model.safetensors")
    for name, tensor in load_file(source / "model.safetensors").items():
        if "experts" in name:
            np.testing.assert_array_equal(found[name], dequantize(quantize(tensor, kind), kind), err_msg=name)


def test_every_type_that_gguf_expands(tmp_path: Path) -> None:
    """Random bytes of each type in place of one tensor: what is written is what gguf makes of the whole."""
    source = gguf_family(tmp_path / "source", "qwen3", intermediate_size=256, num_hidden_layers=1)
    assert len(TYPES) > 20
    for kind in TYPES:
        path = write_family_gguf(source, tmp_path / "plain.gguf", "qwen3")
        keys, tensors = gguf.GGUFReader(path).fields, gguf.GGUFReader(path).tensors
        writer = gguf.GGUFWriter(tmp_path / "x.gguf", "qwen3")
        for key, field in keys.items():
            if not key.startswith("GGUF.") and key != "general.architecture":
                value = field.contents()
                sub = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
                writer.add_key_value(key, value, field.types[0], sub)
        block, size = gguf.GGML_QUANT_SIZES[kind]
        # No exponent of all ones in a scale: such bytes are no numbers.
        raw = np.random.default_rng(0).integers(0, 120, (48, 256 // block * size), np.uint8)
        for tensor in tensors:
            if tensor.name == "blk.0.ffn_down.weight":
                writer.add_tensor(tensor.name, raw, raw_dtype=kind)
            else:
                writer.add_tensor(tensor.name, tensor.data)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        folder = tmp_path / kind.name
        convert(tmp_path / "x.gguf", folder, say=lambda _: None)
        found = load_file(folder / "model.safetensors")["model.layers.0.mlp.down_proj.weight"]
        np.testing.assert_array_equal(found, dequantize(raw, kind), err_msg=kind.name)


# Ropes


def rope_freqs(theta: float, width: int, factor: float, low: float, high: float, context: int = 8192) -> np.ndarray:
    """``rope_freqs.weight`` of a Llama 3, as llama.cpp computes it, one frequency at a time."""
    factors: list[float] = []
    for channel in range(0, width, 2):
        length = 2 * math.pi * theta ** (channel / width)
        if length < context / high:
            factors.append(1)
        elif length > context / low:
            factors.append(factor)
        else:
            smooth = (context / length - low) / (high - low)
            factors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(factors, np.float32)


@pytest.mark.parametrize(
    ("theta", "width", "factor", "low", "high"),
    [
        (500_000.0, 64, 32.0, 1.0, 4.0),  # Llama 3.2
        (500_000.0, 128, 8.0, 1.0, 4.0),  # Llama 3.1, 3.3
        (98_765.0, 96, 12.5, 1.25, 3.5),
    ],
)
def test_the_rope_of_llama_3(tmp_path: Path, theta: float, width: int, factor: float, low: float, high: float) -> None:
    def edit(_: dict[str, Any], tensors: dict[str, np.ndarray]) -> None:
        tensors["rope_freqs.weight"] = rope_freqs(theta, width, factor, low, high)

    source = gguf_family(tmp_path / "source", "llama", head_dim=width, rope_theta=theta, num_hidden_layers=1)
    folder = made(tmp_path, write_family_gguf(source, tmp_path / "x.gguf", "llama", edit=edit))
    assert from_hf(read_config(folder)).rope == Rope(theta, "llama3", factor, low, high, 8192)


def test_other_rope_factors(tmp_path: Path) -> None:
    factors = np.ones(5, np.float32)
    source = gguf_family(tmp_path / "source", "llama", num_hidden_layers=1)
    path = write_family_gguf(
        source, tmp_path / "x.gguf", "llama", edit=lambda _, tensors: tensors.update({"rope_freqs.weight": factors})
    )
    assert from_hf(read_config(made(tmp_path, path))).rope == Rope(1234.5)
    factors[:] = [1, 2, 3, 5, 8]
    path = write_family_gguf(
        source, path, "llama", edit=lambda _, tensors: tensors.update({"rope_freqs.weight": factors})
    )
    assert "rope_freqs.weight" in refusal(tmp_path / "other", path)


def test_yarn(tmp_path: Path) -> None:
    scaling = set_keys(
        qwen2__rope__scaling__type="yarn",
        qwen2__rope__scaling__factor=4.0,
        qwen2__rope__scaling__original_context_length=128,
        qwen2__rope__scaling__yarn_beta_fast=28.0,
    )
    source = gguf_family(tmp_path / "source", "qwen2")
    path = write_family_gguf(source, tmp_path / "x.gguf", "qwen2", edit=scaling)
    assert read_config(made(tmp_path, path))["rope_scaling"] == {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 128,
        "beta_fast": 28.0,
    }


@pytest.mark.parametrize(("multiplier", "attention_factor"), [(1.0, 1.0), (0.5, 1.1217512)])
def test_yarn_of_mistral(tmp_path: Path, multiplier: float, attention_factor: float) -> None:
    """Its multiplier is transformers' mscale_all_dim, beside an mscale of 1."""
    scaling = set_keys(
        mistral3__rope__scaling__type="yarn",
        mistral3__rope__scaling__factor=16.0,
        mistral3__rope__scaling__original_context_length=128,
        mistral3__rope__scaling__yarn_log_multiplier=multiplier,
    )
    source = gguf_family(tmp_path / "source", "mistral")
    path = write_family_gguf(source, tmp_path / "x.gguf", "mistral", edit=scaling)
    found = read_config(made(tmp_path, path))["rope_scaling"]["attention_factor"]
    assert found == pytest.approx(attention_factor, abs=1e-6)


def test_a_llama_31_without_its_rope_is_told_of() -> None:
    from model.gguf.convert import _unscaled  # pyright: ignore[reportPrivateUsage]

    known = {"model_type": "llama", "max_position_embeddings": 131_072, "rope_theta": 5e5, "vocab_size": 128_256}
    assert _unscaled(known, {})
    assert not _unscaled(known | {"max_position_embeddings": 8192}, {})
    assert not _unscaled(known | {"rope_scaling": {"rope_type": "llama3"}}, {})


# Keys


@pytest.mark.parametrize(
    ("family", "key", "value"),
    [
        ("llama", "llama.rope.scaling.finetuned", True),
        ("llama", "llama.rope.scale_linear", 1.0),
        ("llama", "llama.tensor_data_layout", "Meta AI original pth"),
        ("llama", "llama.expert_count", 0),
        ("llama", "llama.expert_used_count", 0),
        ("llama", "llama.feed_forward_length", [52, 52, 52]),
        ("qwen2", "qwen2.attention.causal", True),
        ("qwen3", "qwen3.pooling_type", 3),
        ("qwen3_moe", "qwen3moe.expert_weights_scale", 0.0),
        ("gemma3", "gemma3.mm.tokens_per_image", 256),
        ("gemma3", "gemma3.vision.block_count", 27),
    ],
)
def test_keys_that_change_nothing(tmp_path: Path, family: str, key: str, value: Any) -> None:
    source = gguf_family(tmp_path / "source", family)
    path = write_family_gguf(source, tmp_path / "x.gguf", family, edit=lambda keys, _: keys.update({key: value}))
    assert from_hf(read_config(made(tmp_path, path))) == from_hf(read_config(source))


@pytest.mark.parametrize(
    ("keys", "rope"),
    [
        ({"scale_linear": 2.5}, Rope(1234.5, "linear", 2.5)),
        ({"scaling.factor": 2.5}, Rope(1234.5, "linear", 2.5)),
        ({"scaling.type": "linear", "scale_linear": 2.5}, Rope(1234.5, "linear", 2.5)),
        ({"scaling.type": "linear", "scaling.factor": 2.5, "scale_linear": 3.5}, Rope(1234.5, "linear", 2.5)),
        ({"scaling.type": "linear", "scaling.factor": 0.0}, Rope(1234.5)),
        ({"scaling.type": "none", "scaling.factor": 2.5}, Rope(1234.5)),
        ({"scaling.type": "none", "scale_linear": 2.5}, Rope(1234.5)),
    ],
)
def test_a_linear_rope_is_what_llama_cpp_takes_it_for(tmp_path: Path, keys: dict[str, Any], rope: Rope) -> None:
    """A file that names no type is linear, by either key of the factor; one of type none is never scaled."""
    source = gguf_family(tmp_path / "source", "llama")
    edit = set_keys(**{f"llama__rope__{key.replace('.', '__')}": value for key, value in keys.items()})
    path = write_family_gguf(source, tmp_path / "x.gguf", "llama", edit=edit)
    assert from_hf(read_config(made(tmp_path, path))).rope == rope


def test_gemma_3_with_its_layers_listed_and_its_vision_tower(tmp_path: Path) -> None:
    def edit(keys: dict[str, Any], tensors: dict[str, np.ndarray]) -> None:
        keys["gemma3.attention.sliding_window_pattern"] = [True, False, True]
        tensors["v.blk.0.attn_q.weight"] = tensors["mm.input_projection.weight"] = np.ones((4, 4), np.float32)

    source = gguf_family(tmp_path / "source", "gemma3")
    folder = made(tmp_path, write_family_gguf(source, tmp_path / "x.gguf", "gemma3", edit=edit))
    assert from_hf(read_config(folder)) == from_hf(read_config(source))
    assert load_file(folder / "model.safetensors").keys() == load_file(source / "model.safetensors").keys()


def test_gemma_3_caps_its_logits_where_the_file_says_so(tmp_path: Path) -> None:
    source = gguf_family(tmp_path / "source", "gemma3")
    path = write_family_gguf(
        source,
        tmp_path / "x.gguf",
        "gemma3",
        edit=lambda keys, _: keys.update({"gemma3.final_logit_softcapping": 30.0}),
    )
    assert from_hf(read_config(made(tmp_path, path))).logit_softcap == 30.0


@pytest.mark.parametrize(
    ("family", "key", "value"),
    [
        ("llama", "llama.expert_count", 8),
        ("llama", "llama.attention.clamp_kqv", 8.0),
        ("mistral", "mistral3.attention.temperature_scale", 0.1),
        ("olmo2", "olmo2.attention.sliding_window", 4096),  # OLMo 3
        ("qwen3_moe", "qwen3moe.expert_gating_func", 2),
    ],
)
def test_other_keys_are_refused_by_name(tmp_path: Path, family: str, key: str, value: Any) -> None:
    source = gguf_family(tmp_path / "source", family)
    path = write_family_gguf(source, tmp_path / "x.gguf", family, edit=lambda keys, _: keys.update({key: value}))
    assert f"{key}={value!r}"[:20] in refusal(tmp_path, path)


@pytest.mark.parametrize("architecture", ["gemma3n", "granite", "smollm3", "gpt-oss", "llama4"])
def test_other_architectures_are_refused_by_name(tmp_path: Path, architecture: str) -> None:
    edit = set_keys(general__architecture=architecture)
    path = write_family_gguf(gguf_family(tmp_path / "source", "llama"), tmp_path / "x.gguf", "llama", edit=edit)
    message = refusal(tmp_path, path)
    for word in (
        repr(architecture),
        "known: llama, mistral3, qwen2, qwen3, qwen35, qwen3moe, gemma, gemma2, gemma3, olmo2, phi3",
    ):
        assert word in message


def test_an_adapter_is_refused(tmp_path: Path) -> None:
    edit = set_keys(general__type="adapter")
    path = write_family_gguf(gguf_family(tmp_path / "source", "llama"), tmp_path / "x.gguf", "llama", edit=edit)
    assert "'adapter'" in refusal(tmp_path, path)


# Tensors


def test_biases_of_queries_keys_and_values_alone(tmp_path: Path) -> None:
    """A Qwen in Llama's clothes: the output projection's bias is zero, which is exact."""

    def edit(_: dict[str, Any], tensors: dict[str, np.ndarray]) -> None:
        for layer in range(3):
            for name, size in (("attn_q", 60), ("attn_k", 20), ("attn_v", 20)):
                tensors[f"blk.{layer}.{name}.bias"] = np.arange(size, dtype=np.float32)

    source = gguf_family(tmp_path / "source", "llama")
    folder = made(tmp_path, write_family_gguf(source, tmp_path / "x.gguf", "llama", edit=edit))
    config = from_hf(read_config(folder))
    assert (config.attention_bias, config.output_bias, config.mlp_bias) == (True, True, False)
    found = load_file(folder / "model.safetensors")
    np.testing.assert_array_equal(found["model.layers.2.self_attn.v_proj.bias"], np.arange(20))
    np.testing.assert_array_equal(found["model.layers.2.self_attn.o_proj.bias"], np.zeros(48))


def test_missing_tensors_are_named(tmp_path: Path) -> None:
    path = write_family_gguf(
        gguf_family(tmp_path / "source", "qwen3"),
        tmp_path / "x.gguf",
        "qwen3",
        edit=lambda _, tensors: tensors.pop("blk.1.ffn_up.weight"),
    )
    assert "1 tensors are missing: blk.1.ffn_up.weight" in refusal(tmp_path, path)


@pytest.mark.parametrize("tied", [True, False])
def test_a_qwen3_reranker(tmp_path: Path, tied: bool) -> None:
    """llama.cpp writes the rows of yes and no in place of the output head; the last class stands for relevance."""
    rows = np.stack([np.full(48, 1.5, np.float32), np.full(48, -2.0, np.float32)])

    def edit(keys: dict[str, Any], tensors: dict[str, np.ndarray]) -> None:
        keys |= {"qwen3.pooling_type": 4, "qwen3.classifier.output_labels": ["yes", "no"]}
        tensors.pop("output.weight", None)
        tensors["cls.output.weight"] = rows

    source = gguf_family(tmp_path / "source", "qwen3", tie_word_embeddings=tied)
    folder = made(tmp_path, write_family_gguf(source, tmp_path / "x.gguf", "qwen3", edit=edit))
    config = from_hf(read_config(folder))
    assert (config.architecture, config.classes, config.pad_token_id) == ("Qwen3ForSequenceClassification", 2, None)
    np.testing.assert_array_equal(load_file(folder / "model.safetensors")["score.weight"], rows[::-1])


# Parts


def test_a_split_file(tmp_path: Path) -> None:
    source = gguf_family(tmp_path / "source", "qwen2")
    last = write_family_gguf(source, tmp_path / "x.gguf", "qwen2", parts=3)
    assert sorted(path.name for path in tmp_path.glob("*.gguf")) == [f"x-0000{n}-of-00003.gguf" for n in (1, 2, 3)]
    expected = load_file(source / "model.safetensors")
    for part in tmp_path.glob("*.gguf"):
        folder = tmp_path / part.stem
        convert(part, folder, say=lambda _: None)
        found = load_file(folder / "model.safetensors")
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            np.testing.assert_array_equal(found[name], tensor, err_msg=name)
    moved = last.rename(tmp_path / "other.gguf")
    assert "x-00003-of-00003.gguf not in" in refusal(tmp_path, tmp_path / "x-00001-of-00003.gguf")
    assert "part 3 of 3; its name must end in -00003-of-00003.gguf" in refusal(tmp_path, moved)


def test_parts_of_two_files(tmp_path: Path) -> None:
    source = gguf_family(tmp_path / "source", "qwen2")
    write_family_gguf(source, tmp_path / "x.gguf", "qwen2", parts=2)
    write_family_gguf(source, tmp_path / "y.gguf", "qwen2", parts=3)
    (tmp_path / "x-00001-of-00002.gguf").rename(tmp_path / "y-00001-of-00003.gguf")
    assert "y-00001-of-00003.gguf says that it is part 1 of 2" in refusal(tmp_path, tmp_path / "y-00002-of-00003.gguf")


def test_a_part_of_a_smaller_model(tmp_path: Path) -> None:
    for layers in (3, 2):
        source = gguf_family(tmp_path / f"source {layers}", "qwen2", num_hidden_layers=layers)
        write_family_gguf(source, tmp_path / f"{layers}.gguf", "qwen2", parts=2)
    (tmp_path / "2-00002-of-00002.gguf").rename(tmp_path / "3-00002-of-00002.gguf")
    assert "tensors together, but should have" in refusal(tmp_path, tmp_path / "3-00001-of-00002.gguf")


# Room


def test_a_disk_without_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_family_gguf(gguf_family(tmp_path / "source", "qwen2"), tmp_path / "x.gguf", "qwen2")

    class Usage:
        free = 1000

    monkeypatch.setattr("shutil.disk_usage", lambda _: Usage)
    with pytest.raises(OSError, match=r"0\.00 GB free, and the model in float32 takes"):
        made(tmp_path, path)
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("name", ["F32", "Q8_0"])
def test_memory(tmp_path: Path, name: str) -> None:
    """A conversion holds a few rows at a time: its peak grows by less than 1.2 times the largest tensor."""
    source = gguf_family(tmp_path / "source", "llama", intermediate_size=2**15, hidden_size=192, num_hidden_layers=1)
    path = write_family_gguf(source, tmp_path / "x.gguf", "llama", quantised=gguf.GGMLQuantizationType[name])
    code = """
import sys
from pathlib import Path
from model.gguf.convert import convert

def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) * 1024

before = peak()
convert(Path(sys.argv[1]), Path(sys.argv[2]), say=lambda _: None)
print(peak() - before)
"""
    command = [sys.executable, "-c", code, str(path), str(tmp_path / "made")]
    grown = int(subprocess.check_output(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, text=True))
    largest = 4 * 2**15 * 192
    assert (tmp_path / "made" / "model.safetensors").stat().st_size > 3 * largest
    assert grown < 1.2 * largest
