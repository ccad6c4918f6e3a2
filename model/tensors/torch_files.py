"""The tensors of a folder's PyTorch files (``.bin``), read by torch's reader of weights alone, which runs no code."""

import importlib.util
import pickle
import zipfile
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy.typing as npt

from model.tensors.files import Files
from model.tensors.stored import NUMPY, CheckpointError

_DTYPES = {
    "float64": "F64",
    "float32": "F32",
    "bfloat16": "BF16",
    "float16": "F16",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
    "float8_e8m0fnu": "F8_E8M0",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint8": "U8",
}
"""Safetensors' names of torch's types."""


class TorchFiles(Files):
    """See ``Files``."""

    single = "pytorch_model.bin"
    index = "pytorch_model.bin.index.json"
    kind = "PyTorch"
    errors = (pickle.UnpicklingError, RuntimeError, EOFError, OSError)

    @contextmanager
    def open(self, path: Path) -> Generator["_File"]:
        """Open a file.

        Raises:
            CheckpointError: torch is not installed, or is too old; or the file holds something else than tensors.
        """
        convert = (
            "or convert the model to safetensors where torch is: transformers' "
            "AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(OTHER_FOLDER)"
        )
        if importlib.util.find_spec("torch") is None:
            raise CheckpointError(f"{path} is read by torch, which is not installed: pip install torch, {convert}")
        import torch

        if tuple(int(n) for n in torch.__version__.split(".")[:2]) < (
            2,
            6,
        ):  # CVE-2025-32434: until then a file could run code all the same
            raise CheckpointError(f"{path} is read by torch 2.6 or later, and here is {torch.__version__}; {convert}")
        # Files older than PyTorch 1.6 are no zip archives, and cannot be mapped: they are read as a whole.
        tensors: Any = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
        if not isinstance(tensors, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in tensors.values()):
            raise CheckpointError(f"{path} holds other things than tensors by name; {convert}")
        yield _File(tensors)


class _File:
    def __init__(self, tensors: dict[str, Any]) -> None:
        self._tensors = tensors

    def tensors(self) -> Mapping[str, tuple[tuple[int, ...], str]]:
        return {name: (tuple(tensor.shape), _dtype(tensor)) for name, tensor in self._tensors.items()}

    def part(self, name: str, cut: tuple[slice, ...]) -> npt.NDArray[Any]:
        import torch

        part = self._tensors[name][cut].clone(memory_format=torch.contiguous_format)
        # As bytes: torch knows types that numpy does not.
        return part.reshape(-1).view(torch.uint8).numpy().view(NUMPY[_dtype(part)]).reshape(part.shape)


def _dtype(tensor: Any) -> str:
    name = str(tensor.dtype).removeprefix("torch.")
    return _DTYPES.get(name, name)
