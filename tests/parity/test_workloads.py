"""The demo model on the fixed workloads, against float32 transformers' stored log-probabilities."""

import numpy as np
import pytest

from model.engine import Engine
from tests.workloads import with_reference

pytestmark = pytest.mark.demo


def check(engine: Engine, workload: str, variant: int, most: int | None = None) -> None:
    """Score a variant's queries with their items in one batch and compare every label's log-probability."""
    asked, wanted = with_reference(workload, variant, most=most)
    np.testing.assert_allclose(engine.score(asked).values, wanted, rtol=0, atol=1e-4)


def test_w1_rerank(demo_engine: Engine) -> None:
    check(demo_engine, "W1", 1)


def test_w2_classify(demo_engine: Engine) -> None:
    check(demo_engine, "W2", 1, most=24)


@pytest.mark.slow
def test_w3_large(demo_engine: Engine) -> None:
    check(demo_engine, "W3", 1)


@pytest.mark.parametrize("variant", range(1, 6))
def test_w4_single(demo_engine: Engine, variant: int) -> None:
    check(demo_engine, "W4", variant)


def test_w5_sixteen_clients_in_one_batch(demo_engine: Engine) -> None:
    check(demo_engine, "W5", 1, most=4)
