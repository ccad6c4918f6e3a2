"""Random prompts, and the values that an engine gives them, for the tests of invariance."""

import shutil
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

from model.engine import Engine
from tests.batches import label_batch
from tests.tiny import make_llama

VOCAB = 307
LABELS = (3, 0, 306, 77)
TOLERANCE = 1e-5
"""Nats, in float32. Other shapes sum in another order; nothing else may differ."""
BITS = 0.0 if shutil.which("c++") else TOLERANCE
"""The same with the CPU kernels: nothing differs, see ``test_same_bits``."""
BFLOAT16_TOLERANCE = 0.05
"""Nats, in bfloat16, which also rounds the sums to eight bits. At most 0.031 was seen; float32 is 0.12 away."""


def make_model(folder: Path) -> Path:
    """A model whose context is long, with a halved head."""
    return with_halved_head(make_llama(folder, context=1024))


def with_halved_head(folder: Path) -> Path:
    """A model, in place: logprobs of -4 to -8, as real labels have; at -13 float32 itself rounds by 1e-6."""
    for file in folder.glob("*.safetensors"):
        tensors = load_file(file)
        if "lm_head.weight" in tensors:
            tensors["lm_head.weight"] *= 0.5
            save_file(tensors, file)
            return folder
    raise ValueError(f"{folder} has no head to halve")


def prompts(count: int, seed: int = 0, query: int = 0, longest: int = 60) -> list[list[int]]:
    """Random prompts of 1 to ``longest`` tokens after a common query."""
    rng = np.random.default_rng(seed)
    head = rng.integers(0, VOCAB, query).tolist()
    return [head + rng.integers(0, VOCAB, rng.integers(1, longest + 1)).tolist() for _ in range(count)]


def values(scorer: Engine, sequences: list[list[int]]) -> np.ndarray:
    """Float32 logprobs of ``LABELS``, [sequences, 4]."""
    result = scorer.score(label_batch(sequences, [LABELS] * len(sequences)))
    return result.values.reshape(len(sequences), len(LABELS))
