"""The fake engine: from outside it looks like a real language model."""

from dataclasses import replace

import numpy as np
import pytest

from serve_app.contract import TokenBatch
from serve_app.scorer.fake_engine import FakeEngine
from tests.batches import reads_batch

V = 1_000


def read(
    sequences: list[list[int]], targets: list[int], *, positions: list[int] | None = None, vocab: bool = True
) -> TokenBatch:
    positions = positions or [len(sequence) - 1 for sequence in sequences]
    return reads_batch(sequences, [[(position, targets)] for position in positions], vocab_logprobs=vocab)


@pytest.mark.parametrize("vocab_size", [1, 2, V, 49_152])
def test_probabilities_over_the_vocabulary_sum_to_one(vocab_size: int):
    values = FakeEngine(vocab_size).score(read([[0], [0, 0]], [*range(vocab_size)])).values
    np.testing.assert_allclose(np.exp(values.astype(np.float64)).reshape(2, -1).sum(1), 1.0, atol=1e-5)


def test_logits_are_logprobs_up_to_a_constant_of_the_read():
    targets = [*range(V)]
    sequences = [[1, 2], [3], [4, 5, 6]]
    logprobs = FakeEngine(V).score(read(sequences, targets)).values.reshape(3, -1)
    logits = FakeEngine(V).score(read(sequences, targets, vocab=False)).values.reshape(3, -1)
    difference = logits - logprobs
    np.testing.assert_allclose(difference, np.broadcast_to(difference[:, :1], difference.shape), atol=1e-5)
    assert np.abs(difference).min() > 1


@pytest.mark.parametrize("vocab", [False, True])
@pytest.mark.parametrize("vocab_size", [1, 2, V, 49_152])
def test_argmax_has_the_highest_logprob_of_all_targets(vocab_size: int, vocab: bool):
    engine, sequences = FakeEngine(vocab_size), [[0], [0, 0], [0, 0, 0]]
    batch = read(sequences, [*range(vocab_size)], vocab=vocab)
    values = engine.score(batch).values.reshape(3, -1)
    found = engine.score(replace(batch, argmax=True))
    assert found.argmax.tolist() == values.argmax(1).tolist()
    np.testing.assert_array_equal(found.argmax_values, values.max(1))
    assert len(engine.score(batch).argmax) == len(engine.score(batch).argmax_values) == 0


def test_every_token_and_its_place_matter():
    values = FakeEngine(V).score(read([[1, 2, 3], [1, 2, 4], [0, 2, 3], [2, 1, 3], [1, 2], [0, 1, 2, 3]], [7])).values
    assert len(set(values.tolist())) == 6


def test_a_read_depends_on_nothing_but_the_tokens_up_to_it():
    engine = FakeEngine(V)
    alone = engine.score(read([[1, 2, 3]], [5, V - 1])).values
    among = engine.score(read([[9], [1, 2, 3], [1, 2]], [5, V - 1])).values[2:4]
    earlier = engine.score(read([[1, 2, 3, 4]], [5, V - 1], positions=[2])).values
    np.testing.assert_array_equal(alone, among)
    np.testing.assert_array_equal(alone, earlier)


def test_only_the_sequence_with_the_nan_token_is_nan():
    values = FakeEngine(V, nan_token=13).score(read([[1], [2, 13, 3], [4]], [5, 6])).values
    assert np.isnan(values).tolist() == [False, False, True, True, False, False]


def test_a_prefix_shared_with_the_sequence_before_is_computed_once():
    result = FakeEngine(V).score(read([[1, 2, 3], [1, 2, 4, 5], [1, 2, 4, 5]], [0]))
    assert result.computed_tokens.tolist() == [3, 2, 1]


@pytest.mark.parametrize("sequences", [[[1], []], [[1] * 11]])
def test_empty_and_too_long_sequences_are_refused(sequences: list[list[int]]):
    with pytest.raises(ValueError, match="1 to 10"):
        FakeEngine(V, context_length=10).score(read(sequences, [0], positions=[0] * len(sequences)))


def test_a_sequence_of_the_full_context_is_read_and_an_empty_batch_answered():
    assert FakeEngine(V, context_length=10).score(read([[1] * 10], [0])).values.shape == (1,)
    assert FakeEngine(V).score(read([], [0])).values.shape == (0,)


def test_warmup_reports_progress():
    told: list[tuple[int, int, str]] = []
    FakeEngine(V).warmup(lambda *progress: told.append(progress))
    assert told == [(1, 1, "nothing to compile")]
