"""One request's sequences as parts for replicas, and the parts' results as one. Pure functions on packed arrays."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from serve_app.batches import cut
from serve_app.contract import BatchResult, TokenBatch


def split(batch: TokenBatch, parts: int, min_tokens: int) -> list[TokenBatch]:
    """At most ``parts`` batches of whole sequences, in order and near equal in tokens.

    Every part computes the prefix that all sequences share anew, so only the tokens behind it count: each part has
    at least ``min_tokens`` (1 or more) of them, else there are fewer parts. A batch that is not worth a split comes
    back as it is.
    """
    if parts < 2 or batch.num_sequences < 2:
        return [batch]
    done = np.concatenate((np.zeros(1, np.int64), np.cumsum(batch.lengths - _shared_prefix(batch))))
    total = int(done[-1])
    parts = min(parts, total // min_tokens)
    if parts < 2:
        return [batch]
    share = -(-total // parts)
    bounds = [0]
    while total - done[bounds[-1]] >= share:
        bounds.append(int(done.searchsorted(int(done[bounds[-1]]) + share)))
    # What is left over goes to the last part, unless it can stand alone.
    if total - done[bounds[-1]] < min_tokens:
        bounds.pop()
    return [cut(batch, start, end) for start, end in pairwise([*bounds, batch.num_sequences])]


def merge(results: Sequence[BatchResult]) -> BatchResult:
    """The results of ``split``'s parts, in its order, as the result of the whole batch."""
    return BatchResult(
        values=np.concatenate([result.values for result in results]),
        computed_tokens=np.concatenate([result.computed_tokens for result in results]),
    )


def _shared_prefix(batch: TokenBatch) -> int:
    """Tokens at the front that all sequences have in common."""
    shared = int(batch.lengths.min())
    first = batch.tokens[:shared]
    for start in batch.offsets[1:-1].tolist():
        same = batch.tokens[start : start + shared] == first[:shared]
        if not same.all():
            shared = int(same.argmin())
    return shared
