"""The walk over the vocabulary, in one block and in several."""

import jax.numpy as jnp
import numpy as np
import pytest

from model import logprobs

R, D, V = 5, 8, 100


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("block", [V, 33, 7, 1])
def test_argmax_is_numpys_and_the_normaliser_log_normalizers(
    monkeypatch: pytest.MonkeyPatch, block: int, softcap: float | None
):
    monkeypatch.setattr(logprobs, "LOGITS_BUDGET_BYTES", 4 * R * block)
    rng = np.random.default_rng(0)
    # Small whole numbers: exact in any order of sums, with many ties.
    hidden = rng.integers(-1, 2, (R, D)).astype(np.float32)
    head = rng.integers(-1, 2, (V, D)).astype(np.float32)
    head[V - 1] = head[0]
    normaliser, ids, highest = logprobs.argmax(jnp.asarray(hidden), jnp.asarray(head), softcap)
    logits = hidden @ head.T
    if softcap is not None:
        logits = softcap * np.tanh(logits / softcap)
    np.testing.assert_array_equal(ids, logits.argmax(1))
    np.testing.assert_allclose(highest, logits.max(1), rtol=1e-6)
    np.testing.assert_allclose(normaliser, np.log(np.exp(logits.astype(np.float64)).sum(1)), rtol=1e-6)
    np.testing.assert_array_equal(normaliser, logprobs.log_normalizer(jnp.asarray(hidden), jnp.asarray(head), softcap))


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("block", [V, 7])
@pytest.mark.parametrize("count", [1, 20, V])
def test_the_highest_are_numpys_of_equals_the_lowest_ids(
    monkeypatch: pytest.MonkeyPatch, count: int, block: int, softcap: float | None
):
    monkeypatch.setattr(logprobs, "LOGITS_BUDGET_BYTES", 4 * R * block)
    rng = np.random.default_rng(0)
    hidden = rng.integers(-1, 2, (R, D)).astype(np.float32)
    head = rng.integers(-1, 2, (V, D)).astype(np.float32)
    normaliser, ids, highest = logprobs.top(jnp.asarray(hidden), jnp.asarray(head), jnp.float32(0.5), count, softcap)
    logits = hidden @ head.T
    if softcap is not None:
        logits = softcap * np.tanh(logits / softcap)
    order = np.argsort(-(hidden @ head.T), axis=1, kind="stable")[:, :count]
    np.testing.assert_array_equal(ids, order)
    np.testing.assert_allclose(highest, np.take_along_axis(logits, order, axis=1) / 2, rtol=1e-6)
    np.testing.assert_allclose(normaliser, np.log(np.exp(logits.astype(np.float64) / 2).sum(1)), rtol=1e-6)


def test_a_row_that_is_not_finite_harms_no_other():
    hidden = np.ones((2, D), np.float32)
    hidden[0, 3] = np.nan
    _, ids, highest = logprobs.argmax(jnp.asarray(hidden), jnp.eye(V, D))
    assert np.isnan(highest[0])
    assert 0 <= ids[0] < V
    assert (ids[1], highest[1]) == (0, 1)
