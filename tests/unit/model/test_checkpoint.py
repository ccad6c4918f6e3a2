"""The loader: exact values from every layout, and refusals that name everything that is wrong."""

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from model.checkpoint import Fused, Place, Target, Targets, load
from model.families import llama
from model.families.registry import from_hf
from model.fields import read_config
from model.tensors.folder import opened
from model.tensors.safetensors_files import INDEX, SINGLE
from model.tensors.stored import CheckpointError
from tests.tiny import make_llama

A = np.arange(6, dtype=np.float32).reshape(2, 3)
B = np.array([0.1, -7.0], np.float32)
TARGETS = {"a": Target(("x", 0), (2, 3), "transpose"), "b": Target(("y",), (2,), "same")}


def keep(_: Place, tensor: np.ndarray) -> np.ndarray:
    return np.array(tensor)


def read(folder: Path, targets: Targets = TARGETS, **options: Any) -> dict[Place, np.ndarray]:
    with opened(folder) as stored:
        return load(stored, targets, put=keep, **options)


def refusal(folder: Path, **options: Any) -> str:
    never = lambda *_: pytest.fail("a tensor was read before the table was checked")  # noqa: E731
    with pytest.raises(CheckpointError) as error, opened(folder) as stored:
        load(stored, TARGETS, put=never, **options)
    return str(error.value)


def sharded(folder: Path, shards: Mapping[str, Mapping[str, np.ndarray]], weight_map: Mapping[str, str]) -> None:
    for file, tensors in shards.items():
        save_file(dict(tensors), folder / file)
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16, np.float64])
def test_values_transforms_and_dtypes(tmp_path: Path, dtype: Any) -> None:
    save_file({"a": A.astype(dtype), "b": B.astype(dtype)}, tmp_path / SINGLE)
    loaded = read(tmp_path)
    assert loaded.keys() == {("x", 0), ("y",)}
    assert loaded["x", 0].dtype == loaded["y",].dtype == dtype
    np.testing.assert_array_equal(loaded["x", 0], A.astype(dtype).T)
    np.testing.assert_array_equal(loaded["y",], B.astype(dtype))


def test_bfloat16_is_read_before_another_package_registers_it_with_numpy(tmp_path: Path) -> None:
    save_file({"b": B.astype(ml_dtypes.bfloat16)}, tmp_path / SINGLE)
    code = (
        "import sys, pathlib; from model.tensors.folder import opened; from model.tensors.stored import whole\n"
        "with opened(pathlib.Path(sys.argv[1])) as stored: print(whole(stored.tensors['b']).dtype)"
    )
    assert subprocess.check_output([sys.executable, "-c", code, str(tmp_path)], text=True).strip() == "bfloat16"


@pytest.mark.parametrize("tied", [True, False])
def test_a_whole_llama_from_one_file_and_from_shards(tmp_path: Path, tied: bool) -> None:
    one = make_llama(tmp_path / "one", tied=tied, attention_bias=True, mlp_bias=True)
    three = make_llama(tmp_path / "three", tied=tied, attention_bias=True, mlp_bias=True, shards=3)
    config = from_hf(read_config(one))
    source = load_file(one / SINGLE)
    from_one, from_three = (read(folder, llama.weights(config)) for folder in (one, three))
    assert len(from_one) == len(source) == len(llama.weights(config))
    for name, target in llama.weights(config).items():
        assert isinstance(target, Target)
        expected = source[name].T if target.transform == "transpose" else source[name]
        np.testing.assert_array_equal(from_one[target.path], expected)
        np.testing.assert_array_equal(from_three[target.path], expected)


def test_one_tensor_at_a_time_and_progress(tmp_path: Path) -> None:
    save_file({"a": A, "b": B}, tmp_path / SINGLE)
    events: list[object] = []
    with opened(tmp_path) as stored:
        load(
            stored,
            TARGETS,
            put=lambda place, _: events.append(place),
            progress=lambda done, total, what: events.append((done, total, what)),
        )
    assert events == [("x", 0), (1, 2, "a"), ("y",), (2, 2, "b")]


def test_a_fused_tensor_becomes_its_parts(tmp_path: Path) -> None:
    fused = Fused((Target(("q",), (3, 2), "transpose"), Target(("k",), (1, 2), "same")))
    tensor = np.arange(8, dtype=np.float32).reshape(4, 2)
    save_file({"qk": tensor}, tmp_path / SINGLE)
    loaded = read(tmp_path, {"qk": fused})
    np.testing.assert_array_equal(loaded["q",], tensor[:3].T)
    np.testing.assert_array_equal(loaded["k",], tensor[3:])
    save_file({"qk": tensor[:3]}, tmp_path / SINGLE)
    with pytest.raises(CheckpointError, match=r"mis-shaped: qk is \(3, 2\), the config asks for \(4, 2\)"):
        read(tmp_path, {"qk": fused})


def test_stacked_tensors_become_one_parameter_in_their_order(tmp_path: Path) -> None:
    """The tensors may lie in several files, in any order; nothing is returned before all have been read."""
    experts = [A + 10 * number for number in range(3)]
    targets = {f"e{number}": Target(("experts",), (2, 3), "transpose", (number, 3)) for number in range(3)}
    sharded(
        tmp_path,
        {"1.safetensors": {"e2": experts[2], "e0": experts[0]}, "2.safetensors": {"e1": experts[1]}},
        {"e0": "1.safetensors", "e1": "2.safetensors", "e2": "1.safetensors"},
    )
    loaded = read(tmp_path, targets)
    np.testing.assert_array_equal(loaded["experts",], [expert.T for expert in experts])
    with pytest.raises(CheckpointError, match=r"missing: e3 \(2, 3\)"):
        read(tmp_path, {**targets, "e3": Target(("experts",), (2, 3), "transpose", (3, 4))})


def test_everything_wrong_is_listed_in_one_error(tmp_path: Path) -> None:
    sharded(
        tmp_path,
        {
            "1.safetensors": {"a": np.zeros((3, 2), np.int64), "extra": B, "rope.inv_freq": B},
            "2.safetensors": {"a": np.zeros((2, 3), np.float32)},
        },
        {"a": "1.safetensors", "extra": "1.safetensors", "rope.inv_freq": "1.safetensors", "z": "2.safetensors"},
    )
    message = refusal(tmp_path, ignored=[r"rope\.inv_freq"])
    assert message.splitlines()[1:] == [
        "  missing: b (2,)",
        "  duplicate: a in 1.safetensors, 2.safetensors",
        "  mis-shaped: a is (3, 2), the config asks for (2, 3)",
        "  dtype: a is I64; read are F32, BF16, F16, F64",
        "  unexpected: extra (2,)",
    ]


def test_ignored_patterns_match_whole_names(tmp_path: Path) -> None:
    save_file({"a": A, "b": B, "rotary": B, "rotary_2": B}, tmp_path / SINGLE)
    assert "unexpected: rotary_2" in refusal(tmp_path, ignored=["rotary"])
    assert len(read(tmp_path, ignored=["rotary", r"rotary_\d"])) == 2


def test_a_tensor_that_its_shard_lacks_is_missing(tmp_path: Path) -> None:
    sharded(tmp_path, {"1.safetensors": {"a": A}}, {"a": "1.safetensors", "b": "1.safetensors"})
    assert "missing: b (2,)" in refusal(tmp_path)


@pytest.mark.parametrize("keep_bytes", [0, 5, 40, -1])
def test_a_truncated_file_is_refused_by_name(tmp_path: Path, keep_bytes: int) -> None:
    save_file({"a": A, "b": B}, tmp_path / SINGLE)
    content = (tmp_path / SINGLE).read_bytes()
    (tmp_path / SINGLE).write_bytes(content[:keep_bytes])
    assert SINGLE in refusal(tmp_path)


def test_all_broken_shards_are_named(tmp_path: Path) -> None:
    sharded(tmp_path, {f"{n}.safetensors": {"a": A} for n in range(3)}, {n: f"{n}.safetensors" for n in "012"})
    (tmp_path / "0.safetensors").write_bytes(b"\xff" * 64)
    (tmp_path / "2.safetensors").write_bytes((8).to_bytes(8, "little") + b"not json")
    message = refusal(tmp_path)
    assert "0.safetensors" in message
    assert "1.safetensors" not in message
    assert "2.safetensors" in message


def test_missing_shards_are_named(tmp_path: Path) -> None:
    sharded(tmp_path, {"1.safetensors": {"a": A}}, {"a": "1.safetensors", "b": "2.safetensors"})
    assert "2.safetensors" in refusal(tmp_path)


@pytest.mark.parametrize("index", ["", "[]", "{}", '{"weight_map": 3}'])
def test_a_damaged_index_is_refused(tmp_path: Path, index: str) -> None:
    (tmp_path / INDEX).write_text(index)
    assert INDEX in refusal(tmp_path)


def test_no_weights_at_all(tmp_path: Path) -> None:
    assert SINGLE in refusal(tmp_path)
