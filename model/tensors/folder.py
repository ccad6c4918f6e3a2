"""The tensors of a checkpoint's folder, as the families name them, in a type of numbers that becomes a parameter."""

import math
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from model.fields import read_config
from model.tensors import adapters, names
from model.tensors.adapters import Adapter
from model.tensors.quantised.methods import dequantised
from model.tensors.safetensors_files import SafetensorsFiles
from model.tensors.stored import READ, Tensors
from model.tensors.torch_files import TorchFiles

HEAD_FILE = "decision_head.safetensors"
"""Tensors of a head that scores a question's options, see ``model.decision_heads``."""
HEAD_PREFIX = "decision_head."
"""Begins the names of these tensors among all of a folder's."""

_COMPARED = 2**22
"""Numbers of each of two tensors that are compared at a time."""


@dataclass(frozen=True, slots=True)
class Opened:
    """A folder's tensors, while its files may be read.

    Attributes:
        problems: what is wrong with the folder, to be listed with what does not fit the model.
        adapter: that is merged onto the tensors.
    """

    folder: Path
    tensors: Tensors
    problems: list[str]
    adapter: Adapter | None = None


@contextmanager
def opened(folder: Path) -> Generator[Opened]:
    """Open a folder that has safetensors or PyTorch files: one, or shards with an index.

    Quantised weights are read as what they stand for.

    An adapter that lies beside these is merged onto them; a decision head is added to them.

    Raises:
        CheckpointError: a file is missing or broken.
        ConfigError: a way of quantising, or something that the adapter asks for, that is not implemented.
    """
    adapter = adapters.read(folder)
    weights = TorchFiles() if TorchFiles.there(folder) and not SafetensorsFiles.there(folder) else SafetensorsFiles()
    with weights as files, SafetensorsFiles() as of_adapter, SafetensorsFiles() as of_head:
        tensors, problems = files.tensors(folder)
        tensors, more = dequantised(tensors, read_config(folder) if (folder / "config.json").is_file() else {})
        problems += more
        tensors, more = names.known(tensors)
        problems += more
        if adapter is not None:
            own, more = of_adapter.tensors(folder, [folder / adapters.WEIGHTS])
            problems += more
            tensors, more = adapters.merged(tensors, own, adapter)
            problems += more
        if (folder / HEAD_FILE).is_file():
            own, more = of_head.tensors(folder, [folder / HEAD_FILE])
            problems += more
            tensors |= {HEAD_PREFIX + name: tensor for name, tensor in own.items()}
        yield Opened(folder, tensors, problems, adapter)


def differ(tensors: Tensors, one: str, other: str) -> bool:
    """Return whether both tensors are stored and hold different numbers; some rows are in memory at a time."""
    if one not in tensors or other not in tensors:
        return False
    first, second = tensors[one], tensors[other]
    if first.shape != second.shape or not {first.dtype, second.dtype}.issubset(READ):
        return True  # and ``checkpoint.load`` refuses them
    rows, *rest = first.shape
    step = max(1, _COMPARED // max(1, math.prod(rest)))
    for start in range(0, rows, step):
        cut = (slice(start, min(start + step, rows)), *(slice(0, size) for size in rest))
        x, y = (tensor.read(cut).astype(np.float32) for tensor in (first, second))
        if not np.array_equal(x, y):
            return True
    return False
