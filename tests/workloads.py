"""The demo model's fixed workloads, with float32 transformers' stored log-probabilities."""

import json
from pathlib import Path

import numpy as np
import numpy.typing as npt

from serve_app.contract import TokenBatch
from tests.batches import label_batch

FOLDER = Path(__file__).parents[1] / "scripts" / "workloads" / "smollm2-135m"


def query_with_items(
    workload: str, variant: int, *, most: int | None = None
) -> tuple[TokenBatch, npt.NDArray[np.float64]]:
    """One query with ``most`` of its items, and every label's log-probability, flat."""
    content = json.loads((FOLDER / f"{workload}.json").read_text())
    inputs = content["variants"][variant]
    wanted = np.array(json.loads((FOLDER / "ref_fp32.json").read_text())[workload][variant][:most])
    prompts = [inputs["query_ids"] + item for item in inputs["items_ids"][:most]]
    return label_batch(prompts, [content["label_ids"]] * len(prompts)), wanted.reshape(-1)
