"""The bucket of a tenant's quota, on a clock that the test moves."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve_app.errors import QuotaExceededError
from serve_app.frontend.quotas import FULL_AFTER_S, Bucket
from tests.stubs import Clock


def refused_for(bucket: Bucket, tokens: int) -> int:
    """Retry-After of a request that is refused."""
    with pytest.raises(QuotaExceededError) as caught:
        bucket.take(tokens)
    assert caught.value.retry_after_s
    return caught.value.retry_after_s


def test_a_full_bucket_has_ten_seconds_and_an_empty_one_fills_at_its_rate(clock: Clock):
    bucket = Bucket(50)
    bucket.take(300)
    bucket.take(200)
    assert refused_for(bucket, 1) == 1
    assert refused_for(bucket, 101) == 3
    clock.now += 2
    bucket.take(100)
    clock.now += 1_000
    bucket.take(500)
    assert refused_for(bucket, 500) == FULL_AFTER_S


@pytest.mark.usefixtures("clock")
def test_a_refusal_takes_nothing_and_names_the_numbers():
    bucket = Bucket(50)
    bucket.take(490)
    with pytest.raises(
        QuotaExceededError, match=r"adds 70 tokens .* has 10 left; it gains 50 a second; try again in 2 s"
    ):
        bucket.take(70)
    bucket.take(10)


def test_a_request_larger_than_the_bucket_waits_for_a_full_one_which_then_owes_the_rest(clock: Clock):
    bucket = Bucket(50)
    bucket.take(1)
    assert refused_for(bucket, 2_000) == 1
    clock.now += 1
    bucket.take(2_000)
    assert refused_for(bucket, 1) == 31
    clock.now += 30
    bucket.owe(50)
    assert refused_for(bucket, 50) == 2


@given(st.floats(0.5, 1e5), st.lists(st.tuples(st.integers(1, 10**6), st.floats(0, 30)), max_size=20))
def test_retry_after_is_when_the_bucket_covers_the_request_and_not_a_second_before(
    rate: float, requests: list[tuple[int, float]]
):
    clock = Clock()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(time, "monotonic", clock)
        bucket = Bucket(rate)
        taken = 0
        for tokens, pause in requests:
            clock.now += pause
            try:
                bucket.take(tokens)
            except QuotaExceededError as refusal:
                wait = refusal.retry_after_s
                assert wait
                clock.now += wait - 1.001
                if wait > 1:
                    refused_for(bucket, tokens)
                clock.now += 1.002
                bucket.take(tokens)
            taken += tokens
            # Never more than the rate allows, apart from what the last request may owe.
            assert taken - tokens <= rate * (clock.now - Clock.now + FULL_AFTER_S) * 1.0001
