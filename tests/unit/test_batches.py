"""Packing, cutting and joining token batches."""

import itertools
from contextlib import nullcontext, suppress
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve_app.batches import DeltaBatch, Reads, cut, join, pack, pack_labels, shared_tokens, shared_with_previous
from serve_app.contract import TokenBatch
from tests.batches import label_batch

sequences = st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=6), min_size=1, max_size=8)


def assert_equal(batch: TokenBatch, expected: TokenBatch) -> None:
    for field in ("tokens", "offsets", "read_sequences", "read_positions", "targets", "target_offsets"):
        actual, wanted = getattr(batch, field), getattr(expected, field)
        np.testing.assert_array_equal(actual, wanted)
        assert actual.dtype == wanted.dtype
    assert (batch.vocab_logprobs, batch.argmax) == (expected.vocab_logprobs, expected.argmax)


def test_packed_sequences_have_their_own_reads_and_reads_their_own_targets():
    batch = pack(
        [[5, 6, 7], np.array([8], np.int32), [9, 9]],
        [Reads([0, 2], [1, 2, 3], [1, 2]), Reads([], [], []), Reads([1], [], [0])],
        vocab_logprobs=False,
        argmax=True,
    )
    expected = TokenBatch(
        tokens=np.array([5, 6, 7, 8, 9, 9], np.int32),
        offsets=np.array([0, 3, 4, 6], np.int64),
        read_sequences=np.array([0, 0, 2], np.int32),
        read_positions=np.array([0, 2, 1], np.int32),
        targets=np.array([1, 2, 3], np.int32),
        target_offsets=np.array([0, 1, 3, 3], np.int64),
        vocab_logprobs=False,
        argmax=True,
    )
    assert_equal(batch, expected)


def test_labels_are_read_at_the_last_token_of_each_sequence():
    reads = [Reads([2], [1, 2], [2]), Reads([0], [3], [1])]
    assert_equal(pack_labels([[5, 6, 7], [8]], [[1, 2], [3]]), pack([[5, 6, 7], [8]], reads))


def test_an_empty_list_is_packed_to_a_batch_without_sequences():
    empty = pack([], [])
    assert (empty.num_sequences, len(empty.targets), empty.target_offsets.tolist()) == (0, 0, [0])
    assert empty.target_offsets.dtype == np.int64


@given(sequences)
def test_shared_with_previous_is_the_longest_common_prefix_short_of_the_last_token(rows: list[list[int]]):
    expected = [0]
    for before, row in itertools.pairwise(rows):
        count = 0
        while count < min(len(before), len(row) - 1) and before[count] == row[count]:
            count += 1
        expected.append(count)
    assert shared_with_previous(label_batch(rows, [[1]] * len(rows))).tolist() == expected


@given(sequences, st.data())
def test_cut_then_join_gives_the_batch_back(rows: list[list[int]], data: st.DataObject):
    common = np.arange(2 * len(rows), dtype=np.int32).reshape(-1, 2)
    whole = replace(label_batch(rows, [[5, 6, 7]] * len(rows)), common=common)
    at = data.draw(st.integers(1, len(rows)))
    parts = [cut(whole, 0, at), *([cut(whole, at, len(rows))] if at < len(rows) else [])]
    again = join(parts)
    for field in ("tokens", "offsets", "read_sequences", "read_positions", "targets", "target_offsets", "common"):
        original, rebuilt = getattr(whole, field), getattr(again, field)
        np.testing.assert_array_equal(rebuilt, original)
        assert rebuilt.dtype == original.dtype
    unknown = join([whole, replace(whole, common=None)]).common
    np.testing.assert_array_equal(unknown, np.concatenate([common, np.zeros_like(common)]))


@given(sequences, st.data())
def test_shared_tokens_are_kept_by_cut_and_join(rows: list[list[int]], data: st.DataObject):
    batch = label_batch(rows, [[1]] * len(rows))
    batch = replace(batch, shared=shared_tokens(batch))
    bounds = st.tuples(st.integers(0, len(rows)), st.integers(0, len(rows))).map(sorted)
    parts = [cut(batch, *data.draw(bounds)) for _ in range(data.draw(st.integers(1, 4)))]
    for part in parts:
        np.testing.assert_array_equal(part.shared, shared_with_previous(part))
    joined = join(parts)
    assert joined.shared is not None
    assert joined.shared.dtype == np.int64
    np.testing.assert_array_equal(joined.shared, shared_with_previous(joined))
    assert join([batch, replace(batch, shared=None)]).shared is None


@given(sequences, st.data())
def test_wrong_shared_tokens_never_make_other_tokens(rows: list[list[int]], data: st.DataObject):
    batch = label_batch(rows, [[1]] * len(rows))
    told = np.array([data.draw(st.integers(-3, 8)) for _ in rows], np.int64)
    right = (told >= 0).all() and (told <= shared_with_previous(batch)).all()
    with nullcontext() if right else suppress(ValueError):
        whole = DeltaBatch.of(replace(batch, shared=told)).whole()
        np.testing.assert_array_equal(whole.tokens, batch.tokens)
        np.testing.assert_array_equal(whole.shared, told)


def test_a_delta_of_tokens_that_are_not_shared_is_refused():
    batch = label_batch([[1, 2, 3], [1, 5, 3]], [[1]] * 2)
    with pytest.raises(ValueError, match="shared"):
        DeltaBatch.of(replace(batch, shared=np.array([0, 2], np.int64)))
    with pytest.raises(ValueError, match="has -1"):
        DeltaBatch.of(replace(batch, shared=np.array([0, -1], np.int64)))
