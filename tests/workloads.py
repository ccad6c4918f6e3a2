"""The demo model's fixed workloads, with float32 transformers' stored log-probabilities."""

import numpy as np
import numpy.typing as npt

from scripts.benchmarks.work import load
from serve_app.contract import TokenBatch
from tests.batches import label_batch


def with_reference(
    workload: str, variant: int, *, most: int | None = None
) -> tuple[TokenBatch, npt.NDArray[np.float64]]:
    """Each query of a variant with at most ``items`` of its items, and every label's log-probability, flat."""
    asked = load(workload, most=variant + 1)[variant]
    assert asked.reference is not None
    prompts = [prompt for request in asked.requests for prompt in request.prompts[:most]]
    wanted = [rows[:most] for rows in asked.reference]
    return label_batch(prompts, [asked.requests[0].label_ids] * len(prompts)), np.array(wanted).reshape(-1)
