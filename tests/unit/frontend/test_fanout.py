"""Splitting a request between replicas, and merging the results."""

from __future__ import annotations

from dataclasses import fields

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve_app.batches import join
from serve_app.contract import BatchResult, TokenBatch
from serve_app.frontend import fanout
from serve_app.scorer.fake_engine import FakeEngine
from tests.batches import batch_of, label_batch


def assert_equal(a: TokenBatch, b: TokenBatch) -> None:
    for field in fields(TokenBatch):
        np.testing.assert_array_equal(getattr(a, field.name), getattr(b, field.name))


@st.composite
def batches(draw: st.DrawFn) -> tuple[TokenBatch, int]:
    """A batch, and the length of the prefix that its sequences share."""
    prefix = draw(st.lists(st.integers(0, 9), max_size=12))
    tails = draw(st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=12), min_size=1, max_size=12))
    labels = [draw(st.lists(st.integers(0, 9), min_size=1, max_size=3)) for _ in tails]
    sequences = [prefix + tail for tail in tails]
    return label_batch(sequences, labels, vocab_logprobs=draw(st.booleans())), len(prefix)


def own_tokens(part: TokenBatch, shared: int) -> int:
    return int((part.lengths - shared).sum())


def shared_prefix(batch: TokenBatch) -> int:
    sequences = [batch.tokens[a:b].tolist() for a, b in zip(batch.offsets, batch.offsets[1:], strict=False)]
    shared = 0
    for tokens in zip(*sequences, strict=False):
        if len(set(tokens)) > 1:
            break
        shared += 1
    return shared


@given(made=batches(), parts=st.integers(1, 6), min_tokens=st.integers(1, 40))
def test_parts_are_the_batch_in_order_and_each_is_worth_it(made: tuple[TokenBatch, int], parts: int, min_tokens: int):
    batch, _ = made
    split = fanout.split(batch, parts, min_tokens, shared_prefix(batch))
    assert 1 <= len(split) <= parts
    assert_equal(join(split), batch)
    if len(split) > 1:
        shared = shared_prefix(batch)
        # Each part computes the prefix once more.
        min_tokens = max(min_tokens, shared)
        assert all(own_tokens(part, shared) >= min_tokens for part in split)
        # A part exceeds its share by at most one sequence and the remainder.
        share = own_tokens(batch, shared) / len(split)
        longest = int(batch.lengths.max()) - shared
        assert all(own_tokens(part, shared) <= share + longest + max(min_tokens, share) for part in split)


@given(made=batches(), parts=st.integers(1, 6), min_tokens=st.integers(1, 10))
def test_scoring_the_parts_is_scoring_the_batch(made: tuple[TokenBatch, int], parts: int, min_tokens: int):
    batch, _ = made
    engine = FakeEngine(vocab_size=16, context_length=64)
    merged = fanout.merge([engine.score(part) for part in fanout.split(batch, parts, min_tokens, shared_prefix(batch))])
    np.testing.assert_array_equal(merged.values, engine.score(batch).values)
    assert len(merged.computed_tokens) == batch.num_sequences


def test_even_items_go_to_all_replicas_evenly():
    prefix = list(range(10))
    batch = batch_of([[*prefix, 60 + i, 1, 2, 3] for i in range(12)])
    assert [part.num_sequences for part in fanout.split(batch, 4, 8, shared=10)] == [3, 3, 3, 3]


@pytest.mark.parametrize(
    ("batch", "min_tokens"),
    [
        (batch_of([[1, 2, 3, 4]]), 1),  # one sequence
        (batch_of([[1, 2, 3]] * 8), 1),  # nothing but the shared prefix
        (batch_of([[1, 2, 3, i] for i in range(8)]), 5),  # the prefix does not count
        (batch_of([[*range(20), i, 1] for i in range(19)]), 1),  # two parts would save less than their prefix costs
    ],
)
def test_a_batch_that_is_not_worth_a_split_stays_whole(batch: TokenBatch, min_tokens: int):
    assert fanout.split(batch, 2, min_tokens, shared_prefix(batch)) == [batch]


def test_a_prefix_that_comes_again_has_the_same_key_whatever_follows():
    prefix = [*range(300)]
    (one,) = fanout.affinities([batch_of([[*prefix, 7]])], 300)
    (other,) = fanout.affinities([batch_of([[*prefix, 8], [*prefix, 9, 9]])], 300)
    (longer,) = fanout.affinities([batch_of([[*prefix, *prefix]])], 383)
    (different,) = fanout.affinities([batch_of([[1, *prefix]])], 300)
    assert one.key == other.key == longer.key  # two whole pages
    assert one.key != different.key
    assert len(one.key) == 16


def test_a_prefix_that_fills_no_page_has_no_affinity():
    assert fanout.affinities([batch_of([[*range(200)]])] * 2, 127) == [None, None]


def test_an_affinity_is_worth_what_the_prefix_costs_in_jobs_like_this_one():
    prefix = [*range(256)]
    parts = [batch_of([[*prefix, *[i] * 64] for i in range(8)]), batch_of([[*prefix, *[i] * 32] for i in range(2)])]
    big, small = fanout.affinities(parts, 256)
    assert (big.part, small.part) == (0, 1)
    assert big.worth == 0.5  # 256 tokens against 8 x 64
    assert small.worth == 4.0
    (tiny,) = fanout.affinities([batch_of([[*prefix, 1]])], 256)
    assert tiny.worth == fanout.MOST_JOBS


def test_merge_keeps_the_order():
    parts = [BatchResult(np.array([1, 2], np.float32), np.array([3], np.int32))]
    parts += [BatchResult(np.array([4], np.float32), np.array([5, 6], np.int32))]
    merged = fanout.merge(parts)
    assert merged.values.tolist() == [1, 2, 4]
    assert merged.computed_tokens.tolist() == [3, 5, 6]
    assert (merged.values.dtype, merged.computed_tokens.dtype) == (np.float32, np.int32)
