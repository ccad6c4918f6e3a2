"""Measures the speed of a device in tokens per second."""

from __future__ import annotations

import time

import numpy as np

from serve_app.batches import pack_labels
from serve_app.contract import Engine

PROBE_TOKENS = 128
"""Tokens of the batch that is timed at the start. A large model on a CPU takes seconds for it."""
SHARE = 0.3
"""Weight of a new measurement in the moving average. That of a small batch is less: when it follows another one, its
time is a difference of two, and a few milliseconds double its speed."""


class Speed:
    """The speed in tokens per second, learnt from batches.

    A small batch takes longer per token, so a batch of less than ``enough`` tokens that seems slow is ignored.

    Args:
        tokens_per_s: the first measurement; 0.0: there is none yet.
    """

    def __init__(self, tokens_per_s: float = 0.0) -> None:
        self.tokens_per_s = tokens_per_s

    def measured(self, tokens: int, seconds: float, enough: int) -> None:
        """Learn from a batch."""
        if tokens <= 0 or seconds <= 0:
            return
        found = tokens / seconds
        if not self.tokens_per_s:
            self.tokens_per_s = found
        elif found > self.tokens_per_s or tokens >= enough:
            self.tokens_per_s += SHARE * min(tokens / max(enough, 1), 1) * (found - self.tokens_per_s)

    def seconds(self, tokens: int) -> float:
        """Seconds that ``tokens`` take; 0.0 while no speed is known."""
        return tokens / self.tokens_per_s if self.tokens_per_s else 0.0


def measure(engine: Engine) -> float:
    """Measure the tokens per second of one small batch on a warm engine. The full speed is higher, but of this order.

    The second of two batches is timed, since the first finds cold caches.
    """
    length = min(PROBE_TOKENS, engine.info.max_prompt_tokens)
    seconds = 0.0
    for number in range(2):
        tokens = (np.arange(length, dtype=np.int32) * 7 + number) % min(engine.info.vocab_size, 1000)
        batch = pack_labels([tokens.astype(np.int32)], [[0]])
        started = time.monotonic()
        engine.score(batch)
        seconds = max(time.monotonic() - started, 1e-6)
    return length / seconds
