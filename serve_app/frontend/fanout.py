"""One request's sequences as parts for replicas, and the parts' results as one. Pure functions on packed arrays."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from serve_app.batches import cut
from serve_app.contract import PAGE_TOKENS, Affinity, BatchResult, TokenBatch

MOST_JOBS = 4.0
"""A prefix that many want at once is soon held by several replicas: no job waits for more than so many others."""


def split(batch: TokenBatch, parts: int, min_tokens: int, shared: int) -> list[TokenBatch]:
    """At most ``parts`` batches of whole sequences, in order and near equal in tokens.

    Every part computes the ``shared`` tokens at the front of all sequences again, so only those after them count: each
    part has at least ``min_tokens`` (1 or more) of them, else there are fewer parts. And at least ``shared`` of them,
    since k parts of n tokens save the request the time of (k - 1) * n, and cost (k - 1) prefixes. A batch that is not
    worth a split comes back as it is.
    """
    if parts < 2 or batch.num_sequences < 2:
        return [batch]
    done = np.concatenate((np.zeros(1, np.int64), np.cumsum(batch.lengths - shared)))
    total = int(done[-1])
    min_tokens = max(min_tokens, shared)
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
    """The results of ``split``'s parts, in its order, as the result of the whole batch; of no parts, an empty one."""
    return BatchResult(
        values=np.concatenate([np.zeros(0, np.float32), *(result.values for result in results)]),
        computed_tokens=np.concatenate([np.zeros(0, np.int32), *(result.computed_tokens for result in results)]),
        argmax=np.concatenate([np.zeros(0, np.int32), *(result.argmax for result in results)]),
        argmax_values=np.concatenate([np.zeros(0, np.float32), *(result.argmax_values for result in results)]),
    )


def affinities(parts: Sequence[TokenBatch], prefix_tokens: int, first: int = 0) -> Sequence[Affinity | None]:
    """Where each part of a request should go: to where the whole pages of its prefix were computed before.

    A miss costs a job the prefix; a wait costs it the tokens of those before it, which are taken to be jobs like this
    one.

    Args:
        prefix_tokens: at the front of every sequence that may come again in another request.
        first: parts of the request that came before these.
    """
    prefix_tokens -= prefix_tokens % PAGE_TOKENS
    if not prefix_tokens:
        return [None] * len(parts)
    key = hashlib.blake2b(parts[0].tokens[:prefix_tokens].tobytes(), digest_size=16).digest()
    own = [max(int((part.lengths - prefix_tokens).sum()), 1) for part in parts]
    return [Affinity(key, number, min(prefix_tokens / tokens, MOST_JOBS)) for number, tokens in enumerate(own, first)]
