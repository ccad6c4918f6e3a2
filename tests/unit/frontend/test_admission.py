"""Admission to the front end, on a clock that the test moves."""

from __future__ import annotations

from collections import Counter
from contextlib import AbstractContextManager
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve_app.contract import Share
from serve_app.errors import OverloadedError
from serve_app.frontend.admission import LONGEST_RETRY_S, Admission
from serve_app.room import has_room
from tests.stubs import Clock

A, B = Share("a"), Share("b")


def enter(door: Admission, tokens: int, replicas: int) -> AbstractContextManager[None]:
    door.check(tokens, replicas)
    return door.inside(tokens)


def test_requests_that_fit_are_admitted_and_others_are_refused_with_the_numbers():
    door = Admission(1_000)
    with enter(door, 600, 1):
        with pytest.raises(OverloadedError, match=r"600 tokens .* adds 500; the limit is 1,000"), enter(door, 500, 1):
            raise AssertionError
        with enter(door, 400, 1), pytest.raises(OverloadedError):
            door.check(1, 1)
        door.check(400, 1)
    door.check(1_000, 1)


def test_there_is_room_for_each_running_replica_and_for_one_if_none_runs():
    door = Admission(1_000)
    with enter(door, 900, 3):
        door.check(2_100, 3)
        for replicas in (0, 1):
            door.check(100, replicas)
            with pytest.raises(OverloadedError):
                door.check(101, replicas)


def test_a_request_that_is_larger_than_the_limit_is_admitted_alone():
    door = Admission(1_000)
    with enter(door, 5_000, 1), pytest.raises(OverloadedError):
        door.check(1, 1)


def test_a_tenant_that_fills_the_queue_does_not_keep_others_out():
    door = Admission(1_000)
    with door.inside(1_000, A):
        with pytest.raises(OverloadedError):
            door.check(1, 1, A)
        door.check(1_000, 1, B)
        with door.inside(300, B):
            door.check(200, 1, B)  # up to its half
            with pytest.raises(OverloadedError, match="1,300 tokens are being scored and this request adds 201"):
                door.check(201, 1, B)
            door.check(400, 1, replace(B, tenant="c", weight=4.0))
    door.check(1_000, 1, A)


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(1, 100)), max_size=200))
def test_all_tenants_together_hold_a_bounded_number_of_tokens(requests: list[tuple[int, int]]):
    held: Counter[Share] = Counter()
    for tenant, tokens in requests:
        share = Share(str(tenant))
        if has_room(tokens, share, held, 1_000):
            held[share] += tokens
        else:
            assert held[share] > 0
    assert held.total() <= 1_000 * sum(1 / n for n in range(1, 6))


def test_a_request_that_fails_makes_room_too():
    door = Admission(1_000)
    with pytest.raises(ValueError, match="bad"), enter(door, 1_000, 1):
        raise ValueError("bad")
    door.check(1_000, 1)


def refused_for(door: Admission, tokens: int) -> int | None:
    """Retry-After while ``tokens`` are admitted and not answered."""
    with pytest.raises(OverloadedError) as caught, enter(door, tokens, 1):
        door.check(1_000, 1)
    return caught.value.retry_after_s


def test_retry_after_is_when_the_work_will_be_done(clock: Clock):
    door = Admission(1_000)
    assert refused_for(door, 900) == 1  # no speed is known yet
    door = Admission(1_000)
    clock.now += 1_000  # idle time is not counted
    with enter(door, 400, 1):
        clock.now += 2  # 200 tokens/s
    clock.now += 1_000
    assert refused_for(door, 900) == 5
    assert refused_for(door, 10) == 1


def test_retry_after_is_bounded_and_failures_do_not_count_as_speed(clock: Clock):
    door = Admission(1_000)
    with enter(door, 1, 1):
        clock.now += 20
    assert refused_for(door, 900) == LONGEST_RETRY_S
    with pytest.raises(ValueError, match="bad"), enter(door, 900, 1):
        raise ValueError("bad")
    assert refused_for(door, 900) == LONGEST_RETRY_S


def test_old_work_is_forgotten(clock: Clock):
    door = Admission(1_000)
    for tokens in (*[1] * 10, *[100] * 5):  # from 0.1 to 10 tokens/s
        with enter(door, tokens, 1):
            clock.now += 10
    assert 10 <= (refused_for(door, 100) or 0) <= 12  # by the average of all requests it would be 30
