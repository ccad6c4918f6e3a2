"""The speed that is learnt from batches."""

from __future__ import annotations

import pytest

from serve_app.scorer.speed import Speed


def test_full_batches_teach_a_new_speed_within_a_few():
    speed = Speed(1_000.0)
    for _ in range(12):
        speed.measured(2_000, 1.0, enough=1_000)
    assert speed.tokens_per_s == pytest.approx(2_000, rel=0.02)


def test_small_batches_that_seem_fast_hardly_change_it_and_slow_ones_not_at_all():
    speed = Speed(1_000.0)
    for _ in range(5):
        speed.measured(20, 0.005, enough=1_000)  # it ended soon after the one before it
        speed.measured(20, 1.0, enough=1_000)
        speed.measured(1_000, 1.0, enough=1_000)
    assert speed.tokens_per_s == pytest.approx(1_000, rel=0.05)
