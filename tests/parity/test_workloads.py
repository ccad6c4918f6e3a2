"""The demo model on the fixed workloads, against float32 transformers' stored log-probabilities."""

import json

import numpy as np
import pytest

from model.engine import Engine
from tests.batches import label_batch
from tests.workloads import FOLDER, query_with_items

pytestmark = pytest.mark.demo


def check(engine: Engine, workload: str, variant: int, most: int | None = None) -> None:
    """Score one query with its items and compare every label's log-probability."""
    asked, wanted = query_with_items(workload, variant, most=most)
    np.testing.assert_allclose(engine.score(asked).values, wanted, rtol=0, atol=1e-4)


def test_w1_rerank(demo_engine: Engine) -> None:
    check(demo_engine, "W1", 1)


def test_w2_classify(demo_engine: Engine) -> None:
    check(demo_engine, "W2", 1, most=24)


def test_w3_large(demo_engine: Engine) -> None:
    check(demo_engine, "W3", 1)


@pytest.mark.parametrize("variant", range(1, 6))
def test_w4_single(demo_engine: Engine, variant: int) -> None:
    check(demo_engine, "W4", variant)


def test_w5_sixteen_clients_in_one_batch(demo_engine: Engine) -> None:
    content = json.loads((FOLDER / "W5.json").read_text())
    wanted = json.loads((FOLDER / "ref_fp32.json").read_text())["W5"][1]
    clients = content["variants"][1]["clients"]
    prompts = [client["query_ids"] + item for client in clients for item in client["items_ids"][:4]]
    result = demo_engine.score(label_batch(prompts, [content["label_ids"]] * len(prompts)))
    expected = np.array([rows[:4] for rows in wanted]).reshape(-1)
    np.testing.assert_allclose(result.values, expected, rtol=0, atol=1e-4)
