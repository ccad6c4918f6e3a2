"""Packing of token sequences for tests of engines."""

from collections.abc import Sequence
from itertools import chain, pairwise

from serve_app.batches import Reads, pack, pack_labels
from serve_app.contract import TokenBatch


def label_batch(
    sequences: Sequence[Sequence[int]], labels: Sequence[Sequence[int]], *, vocab_logprobs: bool = True
) -> TokenBatch:
    """A batch with one read per sequence, at its last token, of its own labels."""
    return pack_labels(sequences, labels, vocab_logprobs=vocab_logprobs)


def batch_of(
    sequences: Sequence[Sequence[int]], labels: Sequence[int] = (1, 2), *, vocab_logprobs: bool = True
) -> TokenBatch:
    """A ``label_batch`` with the same labels for all sequences."""
    return label_batch(sequences, [labels] * len(sequences), vocab_logprobs=vocab_logprobs)


def sequences_of(batch: TokenBatch) -> list[list[int]]:
    """The tokens of each sequence."""
    return [batch.tokens[start:stop].tolist() for start, stop in pairwise(batch.offsets)]


def reads_batch(
    sequences: Sequence[Sequence[int]],
    reads: Sequence[Sequence[tuple[int, Sequence[int]]]],
    *,
    vocab_logprobs: bool = True,
) -> TokenBatch:
    """A batch with any (position, target ids) reads of each sequence."""
    return pack(
        sequences,
        [
            Reads([at for at, _ in own], [*chain.from_iterable(ids for _, ids in own)], [len(ids) for _, ids in own])
            for own in reads
        ],
        vocab_logprobs=vocab_logprobs,
    )
