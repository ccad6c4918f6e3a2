"""Random prompts, and what an engine says of them, for the tests of invariance."""

import shutil

import numpy as np

from model.engine import Engine
from tests.batches import label_batch

VOCAB = 307
LABELS = (3, 0, 306, 77)
TOLERANCE = 1e-5
"""Nats, float32. Sums run in another order in another shape; nothing else may differ."""
BITS = 0.0 if shutil.which("c++") else TOLERANCE
"""The same of the CPU's kernels: ``test_same_bits`` says why it is none."""
BFLOAT16_TOLERANCE = 0.05
"""Nats. The same sums, and what they are rounded to eight bits for: 0.031 was the most that was seen, 0.12 the distance
from float32."""


def prompts(count: int, seed: int = 0, query: int = 0, longest: int = 60) -> list[list[int]]:
    """Random prompts of 1 to ``longest`` tokens behind a common query."""
    rng = np.random.default_rng(seed)
    head = rng.integers(0, VOCAB, query).tolist()
    return [head + rng.integers(0, VOCAB, rng.integers(1, longest + 1)).tolist() for _ in range(count)]


def values(scorer: Engine, sequences: list[list[int]]) -> np.ndarray:
    """Float32 logprobs of ``LABELS``, [sequences, 4]."""
    result = scorer.score(label_batch(sequences, [LABELS] * len(sequences)))
    return result.values.reshape(len(sequences), len(LABELS))
