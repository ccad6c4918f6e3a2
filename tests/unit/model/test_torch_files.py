"""PyTorch's .bin files: the same bits as torch reads, and nothing that runs code."""

import json
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest

from model.tensors.folder import opened
from model.tensors.stored import NUMPY, CheckpointError, whole
from model.tensors.torch_files import TorchFiles
from tests.parity.cases import HAVE_TORCH

if HAVE_TORCH:
    import torch

pytestmark = pytest.mark.skipif(not HAVE_TORCH, reason="torch writes and reads these files")

DTYPES = ("float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "int64", "int32", "int8", "uint8")


@pytest.mark.parametrize("old", [False, True])
def test_every_type_of_numbers(old: bool, tmp_path: Path) -> None:
    """Also in files older than PyTorch 1.6, which are no zip archives."""
    dtypes = [dtype for dtype in DTYPES if not (old and "float8" in dtype)]
    numbers = {dtype: torch.arange(12).reshape(3, 4).to(getattr(torch, dtype)) for dtype in dtypes}
    numbers |= {"transposed": numbers["float32"].T, "scalar": torch.tensor(5, dtype=torch.bfloat16)}
    torch.save(numbers, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=not old)
    with opened(tmp_path) as stored:
        assert stored.tensors.keys() == numbers.keys()
        for name, tensor in stored.tensors.items():
            assert (tensor.shape, tensor.file) == (tuple(numbers[name].shape), "pytorch_model.bin")
            assert whole(tensor).dtype == NUMPY[tensor.dtype]
            np.testing.assert_array_equal(whole(tensor).astype(np.float32), numbers[name].float().numpy())
        part = stored.tensors["bfloat16"].read((slice(1, 3), slice(0, 2)))
        np.testing.assert_array_equal(part.astype(np.float32), numbers["bfloat16"][1:3, :2].float().numpy())


def test_shards(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(2)}, tmp_path / "1.bin")
    torch.save({"b": torch.zeros(3)}, tmp_path / "2.bin")
    index = {"weight_map": {"a": "1.bin", "b": "2.bin", "c": "3.bin"}}
    (tmp_path / TorchFiles.index).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"pytorch_model.bin.index.json names files that are not there: 3\.bin"):
        opened(tmp_path).__enter__()
    torch.save({"c": torch.ones(1)}, tmp_path / "3.bin")
    with opened(tmp_path) as stored:
        assert {name: whole(tensor).tolist() for name, tensor in stored.tensors.items()} == {
            "a": [1, 1], "b": [0, 0, 0], "c": [1],
        }  # fmt: skip


class Code:
    def __reduce__(self) -> tuple[object, tuple[str, ...]]:
        return print, ("ran",)


def test_a_file_that_would_run_code_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"a": torch.ones(2), "b": Code()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"not whole PyTorch files: pytorch_model\.bin"):
        opened(tmp_path).__enter__()
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps({"b": Code()}, protocol=2))
    with pytest.raises(CheckpointError, match=r"not whole PyTorch files: pytorch_model\.bin"):
        opened(tmp_path).__enter__()
    assert "ran" not in capsys.readouterr().out


@pytest.mark.parametrize("content", [{"model": {"a": 1}}, [1, 2]])
def test_other_things_than_tensors_are_refused(content: object, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="holds other things than tensors by name; or convert"):
        opened(tmp_path).__enter__()


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 and no more"])
def test_a_broken_file_is_named(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"not whole PyTorch files: pytorch_model\.bin"):
        opened(tmp_path).__enter__()


def test_without_torch_the_remedy_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save({"a": torch.ones(2)}, tmp_path / "pytorch_model.bin")
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(CheckpointError, match="torch, which is not installed: pip install torch, or convert the model"):
        opened(tmp_path).__enter__()
