"""Pack, cut and join token batches: pure functions on numpy arrays."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, TypeVar, cast

import numpy as np

from serve_app.contract import Int32, Int64, TokenBatch, common_prefix

Ids = Sequence[int] | Int32
Numbers = TypeVar("Numbers", Int32, Int64)


class Reads(NamedTuple):
    """The reads of one sequence.

    Attributes:
        positions: the positions that are read, ascending, counted from the start of the sequence.
        targets: the target ids of all reads, one read after the other.
        counts: the number of targets of each read.
    """

    positions: Ids
    targets: Ids
    counts: Ids


def pack(
    sequences: Sequence[Ids],
    reads: Sequence[Reads],
    *,
    vocab_logprobs: bool = True,
    argmax: bool = False,
    top: int = 0,
    temperature: float = 1.0,
) -> TokenBatch:
    """Pack ``sequences``, each with its own ``reads``, into one batch."""
    lengths = [len(sequence) for sequence in sequences]
    return TokenBatch(
        tokens=_joined(sequences),
        offsets=np.cumsum([0, *lengths], dtype=np.int64),
        read_sequences=np.repeat(np.arange(len(reads), dtype=np.int32), [len(own.positions) for own in reads]),
        read_positions=_joined([own.positions for own in reads]),
        targets=_joined([own.targets for own in reads]),
        target_offsets=np.concatenate([[0], np.cumsum(_joined([own.counts for own in reads]), dtype=np.int64)]),
        vocab_logprobs=vocab_logprobs,
        argmax=argmax,
        top=top,
        temperature=temperature,
    )


def pack_labels(sequences: Sequence[Ids], labels: Sequence[Ids], *, vocab_logprobs: bool = True) -> TokenBatch:
    """Pack ``sequences`` into one batch, each read at its last token for its own ``labels``."""
    reads = [Reads([len(ids) - 1], own, [len(own)]) for ids, own in zip(sequences, labels, strict=True)]
    return pack(sequences, reads, vocab_logprobs=vocab_logprobs)


def _joined(parts: Sequence[Ids]) -> Int32:
    return np.concatenate([np.zeros(0, np.int32), *(np.asarray(part, np.int32) for part in parts)])


def reads_of(batch: TokenBatch, start: int, stop: int) -> slice:
    """The slice of the batch's reads that belongs to sequences ``start`` to ``stop``."""
    first, last = np.searchsorted(batch.read_sequences, [start, stop])
    return slice(int(first), int(last))


def shared_with_previous(batch: TokenBatch) -> Int64:
    """For each sequence, the number of leading tokens that it shares with the one before it (0 for the first).

    A sequence's last token never counts: the model is read there, so it is always computed.
    """
    shared = np.zeros(batch.num_sequences, np.int64)
    bounds = batch.offsets.tolist()
    previous = batch.tokens[:0]
    for i, (start, stop) in enumerate(itertools.pairwise(bounds)):
        current = batch.tokens[start:stop]
        shared[i] = common_prefix(previous, current[:-1])
        previous = current
    return shared


def shared_tokens(batch: TokenBatch) -> Int64:
    """``batch.shared``, or the same numbers measured now if it is None."""
    return shared_with_previous(batch) if batch.shared is None else batch.shared


@dataclass(frozen=True, slots=True)
class DeltaBatch:
    """A batch in which each sequence lacks the tokens that it shares with the one before it: a long query is sent once.

    Attributes:
        batch: the whole batch, but with only the remaining tokens.
        shared: the number of tokens that each sequence shares with the one before it.
    """

    batch: TokenBatch
    shared: Int64

    @classmethod
    def of(cls, batch: TokenBatch) -> DeltaBatch:
        """Make the delta of ``batch``.

        Raises:
            ValueError: ``batch.shared`` is not what its sequences share, so that other tokens would arrive.
        """
        shared = shared_tokens(batch)
        if (shared < 0).any():
            raise ValueError(f"TokenBatch.shared has {shared.min()}; a number of tokens is 0 or more")
        ends = batch.offsets[1:].tolist()
        own = zip((batch.offsets[:-1] + shared).tolist(), ends, strict=True)
        tokens = np.concatenate([batch.tokens[:0], *(batch.tokens[start:end] for start, end in own)])
        delta = cls(replace(batch, tokens=tokens, shared=None), shared)
        if not np.array_equal(delta.whole().tokens, batch.tokens):
            raise ValueError("TokenBatch.shared is not what each sequence shares with the one before it")
        return delta

    def whole(self) -> TokenBatch:
        """The whole batch that this delta was made from."""
        offsets = self.batch.offsets.tolist()
        tokens = np.empty(offsets[-1], np.int32)
        taken = before = 0
        for (start, end), shared in zip(itertools.pairwise(offsets), self.shared.tolist(), strict=True):
            own = end - start - shared
            tokens[start : start + shared] = tokens[before : before + shared]
            tokens[start + shared : end] = self.batch.tokens[taken : taken + own]
            taken, before = taken + own, start
        return replace(self.batch, tokens=tokens, shared=self.shared)


def cut(batch: TokenBatch, start: int, stop: int) -> TokenBatch:
    """Cut sequences ``start`` to ``stop`` of ``batch``, with their reads, into a batch of their own."""
    reads = reads_of(batch, start, stop)
    first_target, last_target = batch.target_offsets[reads.start], batch.target_offsets[reads.stop]
    return TokenBatch(
        tokens=batch.tokens[batch.offsets[start] : batch.offsets[stop]],
        offsets=batch.offsets[start : stop + 1] - batch.offsets[start],
        read_sequences=batch.read_sequences[reads] - np.int32(start),
        read_positions=batch.read_positions[reads],
        targets=batch.targets[first_target:last_target],
        target_offsets=batch.target_offsets[reads.start : reads.stop + 1] - first_target,
        vocab_logprobs=batch.vocab_logprobs,
        argmax=batch.argmax,
        top=batch.top,
        temperature=batch.temperature,
        common=None if batch.common is None else batch.common[start:stop],
        shared=None if batch.shared is None else _cut_shared(batch.shared[start:stop]),
        salts=None if batch.salts is None else batch.salts[start:stop],
        adapters=None if batch.adapters is None else batch.adapters[start:stop],
    )


def _cut_shared(shared: Int64) -> Int64:
    shared = shared.copy()
    shared[:1] = 0  # the sequence before it is in another batch
    return shared


def join(batches: Sequence[TokenBatch]) -> TokenBatch:
    """Join the batches in order. All of them must be read for the same, see ``TokenBatch.kind``."""
    if len(batches) == 1:
        return batches[0]
    firsts = np.cumsum([0, *(batch.num_sequences for batch in batches)])
    return TokenBatch(
        tokens=np.concatenate([batch.tokens for batch in batches]),
        offsets=_join_offsets([batch.offsets for batch in batches]),
        read_sequences=np.concatenate(
            [batch.read_sequences + np.int32(first) for batch, first in zip(batches, firsts, strict=False)]
        ),
        read_positions=np.concatenate([batch.read_positions for batch in batches]),
        targets=np.concatenate([batch.targets for batch in batches]),
        target_offsets=_join_offsets([batch.target_offsets for batch in batches]),
        vocab_logprobs=batches[0].vocab_logprobs,
        argmax=batches[0].argmax,
        top=batches[0].top,
        temperature=batches[0].temperature,
        common=_join_common(batches),
        shared=_join_shared(batches),
        salts=_joined_numbers([batch.salts for batch in batches], batches),
        adapters=_joined_numbers([batch.adapters for batch in batches], batches),
    )


def _join_common(batches: Sequence[TokenBatch]) -> Int32 | None:
    if all(batch.common is None for batch in batches):
        return None
    unknown = [np.zeros((batch.num_sequences, 2), np.int32) for batch in batches]
    return np.concatenate(
        [no if batch.common is None else batch.common for batch, no in zip(batches, unknown, strict=True)]
    )


def _joined_numbers(parts: Sequence[Numbers | None], batches: Sequence[TokenBatch]) -> Numbers | None:
    """A number for each sequence, 0 where a batch has none; None: none of them has."""
    known = [part for part in parts if part is not None]
    if not known:
        return None
    zeros = (np.zeros(batch.num_sequences, known[0].dtype) for batch in batches)
    joined = np.concatenate([no if part is None else part for part, no in zip(parts, zeros, strict=True)])
    return cast(Numbers, joined)


def _join_shared(batches: Sequence[TokenBatch]) -> Int64 | None:
    known = [batch.shared for batch in batches if batch.shared is not None]
    if len(known) < len(batches):
        return None
    shared, first, before = np.concatenate(known), 0, batches[0].tokens[:0]
    for batch in batches:
        if batch.num_sequences:  # requests with the same query are often next to each other
            shared[first] = common_prefix(before, batch.tokens[: batch.offsets[1] - 1])
            first, before = first + batch.num_sequences, batch.tokens[batch.offsets[-2] :]
    return shared


def _join_offsets(parts: Sequence[Int64]) -> Int64:
    return np.concatenate([[0], np.cumsum(np.concatenate([np.diff(part) for part in parts]))]).astype(np.int64)
