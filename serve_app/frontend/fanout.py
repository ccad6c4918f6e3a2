"""Splits a request's sequences into parts for replicas, and merges the results. Pure functions on packed arrays."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import fields
from itertools import pairwise

import numpy as np

from serve_app.batches import cut
from serve_app.contract import PAGE_TOKENS, Affinity, BatchResult, TokenBatch

MOST_JOBS = 4.0
"""The largest ``Affinity.worth``: no job should wait for more other jobs than this, since a prefix that many requests
share is soon cached by several replicas."""


def split(batch: TokenBatch, parts: int, min_tokens: int, shared: int) -> list[TokenBatch]:
    """Split a batch into at most ``parts`` batches of whole sequences, in order and nearly equal in tokens.

    Every part computes the ``shared`` leading tokens of all sequences again, so only the tokens after them count. Each
    part has at least ``min_tokens`` (1 or more) of those, and at least ``shared``: k parts of n tokens save the request
    the time of (k - 1) * n tokens, and cost (k - 1) prefixes. If there are too few tokens, there are fewer parts. A
    batch that is not worth splitting is returned unchanged.
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
    # The remainder goes to the last part, unless it is large enough for its own.
    if total - done[bounds[-1]] < min_tokens:
        bounds.pop()
    return [cut(batch, start, end) for start, end in pairwise([*bounds, batch.num_sequences])]


def merge(results: Sequence[BatchResult]) -> BatchResult:
    """Merge the results of ``split``'s parts, in order, into that of the whole batch. Without parts it is empty."""
    if not results:
        return BatchResult(np.zeros(0, np.float32), np.zeros(0, np.int32))
    names = [field.name for field in fields(BatchResult)]
    return BatchResult(**{name: np.concatenate([getattr(result, name) for result in results]) for name in names})


def affinities(parts: Sequence[TokenBatch], prefix_tokens: int, first: int = 0) -> Sequence[Affinity | None]:
    """The affinity of each part of a request to the replica that has computed the whole pages of its prefix before.

    A miss costs a job the prefix. A wait costs it the tokens of the jobs before it, which are assumed to be like it.

    Args:
        prefix_tokens: leading tokens of every sequence that another request may have, too.
        first: number of parts that the request had before these.
    """
    prefix_tokens -= prefix_tokens % PAGE_TOKENS
    if not prefix_tokens:
        return [None] * len(parts)
    key = hashlib.blake2b(parts[0].tokens[:prefix_tokens].tobytes(), digest_size=16).digest()
    own = [max(int((part.lengths - prefix_tokens).sum()), 1) for part in parts]
    return [Affinity(key, number, min(prefix_tokens / tokens, MOST_JOBS)) for number, tokens in enumerate(own, first)]
