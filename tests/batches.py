"""Packing of token sequences for tests of engines."""

from collections.abc import Sequence

import numpy as np

from serve_app.contract import TokenBatch


def label_batch(
    sequences: Sequence[Sequence[int]], labels: Sequence[Sequence[int]], *, vocab_logprobs: bool = True
) -> TokenBatch:
    """One read a sequence, at its last token, of its own labels."""
    return reads_batch(
        sequences,
        [[(len(tokens) - 1, ids)] for tokens, ids in zip(sequences, labels, strict=True)],
        vocab_logprobs=vocab_logprobs,
    )


def reads_batch(
    sequences: Sequence[Sequence[int]],
    reads: Sequence[Sequence[tuple[int, Sequence[int]]]],
    *,
    vocab_logprobs: bool = True,
) -> TokenBatch:
    """Any (position, target ids) reads of each sequence."""
    flat = [(number, *read) for number, own in enumerate(reads) for read in own]
    return TokenBatch(
        tokens=np.concatenate([np.asarray(tokens, np.int32) for tokens in sequences]),
        offsets=np.cumsum([0, *map(len, sequences)]).astype(np.int64),
        read_sequences=np.array([number for number, _, _ in flat], np.int32),
        read_positions=np.array([position for _, position, _ in flat], np.int32),
        targets=np.concatenate([np.zeros(0, np.int32), *(np.asarray(ids, np.int32) for _, _, ids in flat)]),
        target_offsets=np.cumsum([0, *(len(ids) for _, _, ids in flat)]).astype(np.int64),
        vocab_logprobs=vocab_logprobs,
    )
