"""An engine without a model, to test everything around one: its distribution comes from a hash of the tokens."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt

from serve_app.batches import shared_with_previous
from serve_app.contract import BatchResult, EngineStats, Float32, Int32, ModelInfo, Progress, TokenBatch

UInt64 = npt.NDArray[np.uint64]

_STEP = np.uint64(0x9E3779B97F4A7C15)
"""Odd, so its powers modulo 2**64 never reach 0: every position counts."""
_SPREAD = 2_654_435_761
"""A prime above any vocabulary, so ``id * _SPREAD % vocab_size`` is a permutation of the ids."""
_NATS = 8.0
"""The least spread of the log-probabilities, from the top-1 id to the least probable; the most is twice that."""


class FakeEngine:
    """Scores by a distribution that depends only on the tokens up to the read. Its probabilities sum to 1.

    The ids, in an order that the hash of the prompt shifts, have geometrically falling probabilities:
    ``p(id) = q ** rank * (1 - q) / (1 - q ** V)``.

    Args:
        classes: see ``ModelInfo``.
        pad_token_id: see ``ModelInfo``.
        token_types: see ``ModelInfo``.
        decision_head: see ``ModelInfo``.
        seconds_per_token: time to sleep for each computed token, to keep a device busy.
        nan_token: an id that makes all values of its sequence NaN; None: no id does.
        adapters: see ``ModelInfo``. The distribution depends on the name of an adapter's folder, too.
    """

    def __init__(
        self,
        vocab_size: int = 49_152,
        context_length: int = 8_192,
        *,
        classes: int = 0,
        pad_token_id: int | None = None,
        token_types: int = 0,
        decision_head: str | None = None,
        seconds_per_token: float = 0.0,
        nan_token: int | None = None,
        adapters: int = 0,
    ) -> None:
        self._info = ModelInfo(
            vocab_size=vocab_size,
            max_prompt_tokens=context_length,
            context_length=context_length,
            dtype="float32",
            architecture="fake",
            platform="none",
            buckets=(),
            classes=classes,
            pad_token_id=pad_token_id,
            token_types=token_types,
            decision_head=decision_head,
            adapters=adapters,
        )
        self._adapters = np.zeros(adapters + 1, np.uint64)
        """What an adapter adds to the hashes; nothing for the model itself."""
        self._seconds_per_token = seconds_per_token
        self._nan_token = nan_token
        self._device = threading.Lock()
        self._computed_tokens = 0
        self._powers = np.cumprod(np.full(context_length, _STEP))

    @property
    def info(self) -> ModelInfo:
        return self._info

    @property
    def stats(self) -> EngineStats:
        return EngineStats(computed_tokens=self._computed_tokens)

    def warmup(self, progress: Progress | None = None) -> None:
        if progress is not None:
            progress(1, 1, "nothing to compile")

    def score(self, batch: TokenBatch) -> BatchResult:
        shortest, longest = (batch.lengths.min(), batch.lengths.max()) if batch.num_sequences else (1, 1)
        if not 1 <= shortest <= longest <= self._info.max_prompt_tokens:
            raise ValueError(
                f"sequences have {shortest:,} to {longest:,} tokens; "
                f"this engine reads 1 to {self._info.max_prompt_tokens:,}"
            )
        computed = (batch.lengths - shared_with_previous(batch)).astype(np.int32)
        with self._device:
            self._computed_tokens += int(computed.sum())
            time.sleep(self._seconds_per_token * int(computed.sum()))
        values, top_ids, top_values = self._read(batch)
        tops = len(top_ids) if batch.argmax else 0
        argmax, argmax_values = top_ids[:tops, 0], top_values[:tops, 0]
        return BatchResult(values, computed, argmax, argmax_values, top_ids[:, : batch.top], top_values[:, : batch.top])

    def launch(self, batch: TokenBatch) -> Callable[[], BatchResult]:
        """Compute the batch."""
        result = self.score(batch)
        return lambda: result

    def load_adapter(self, number: int, folder: Path) -> str:
        """Take a hash of the folder's name for the adapter."""
        digest = hashlib.blake2b(folder.name.encode(), digest_size=8).digest()
        self._adapters[number] = int.from_bytes(digest)
        return "fake"

    def set_batch_timeout(self, stall_s: float) -> None:
        """Change nothing: no batch is given up."""

    def check_health(self) -> None:
        """Never raise."""

    def _read(self, batch: TokenBatch) -> tuple[Float32, Int32, Float32]:
        """The targets' values, and for each read the highest tokens, one at least, and their values."""
        vocab_size = self._info.vocab_size
        starts = batch.offsets[:-1]
        seeds = self._hashes(batch)[starts[batch.read_sequences] + batch.read_positions]
        if batch.adapters is not None:
            own = batch.adapters[batch.read_sequences]
            seeds = np.where(own, _mixed(seeds + self._adapters[own]), seeds)
        shift = (seeds % np.uint64(vocab_size)).astype(np.int64)
        falling = _NATS * (1 + (seeds >> np.uint64(11)) / 2**53) / vocab_size  # nats from one rank to the next
        falling = falling / batch.temperature
        read = np.repeat(np.arange(len(seeds)), np.diff(batch.target_offsets))
        rank = (batch.targets.astype(np.int64) * _SPREAD + shift[read]) % vocab_size
        ranks = np.arange(max(1, min(batch.top, vocab_size)))
        tops = (ranks - shift[:, None]) % vocab_size * pow(_SPREAD, -1, vocab_size) % vocab_size
        highest = np.zeros(len(seeds))
        if batch.vocab_logprobs:
            highest = np.log(-np.expm1(-falling)) - np.log(-np.expm1(-falling * vocab_size))
        if self._nan_token is not None:
            poisoned = np.zeros(batch.num_sequences, np.bool_)
            sequence = np.repeat(np.arange(batch.num_sequences), batch.lengths)
            poisoned[sequence[batch.tokens == self._nan_token]] = True
            highest[poisoned[batch.read_sequences]] = np.nan
        values = highest[read] - falling[read] * rank
        top_values = highest[:, None] - falling[:, None] * ranks
        return values.astype(np.float32), tops.astype(np.int32), top_values.astype(np.float32)

    def _hashes(self, batch: TokenBatch) -> UInt64:
        """For each token, a hash of its sequence up to and including it."""
        positions = np.arange(len(batch.tokens)) - np.repeat(batch.offsets[:-1], batch.lengths)
        sums = np.concatenate(
            [np.zeros(1, np.uint64), np.cumsum(_mixed(batch.tokens.astype(np.uint64)) * self._powers[positions])]
        )
        return _mixed(sums[1:] - np.repeat(sums[batch.offsets[:-1]], batch.lengths))


def _mixed(x: UInt64) -> UInt64:
    """The finaliser of splitmix64: every bit of the result depends on every bit of ``x``."""
    x = x + _STEP
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
