"""The tiny checkpoints and inputs of the parity tests, and transformers' float32 answers.

Each case changes one thing that a wrong implementation could miss. The answers are computed live where torch is
installed; elsewhere the stored ones are used. ``python -m tests.parity.cases`` writes them again.
"""

import importlib.util
import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tests.tiny import LINEAR_SCALING, LLAMA3_SCALING, YARN_SCALING, make_llama
from tests.tiny_families import FAMILIES, make_family

CASES: Mapping[str, Mapping[str, Any]] = {
    "untied": {},
    "tied": {"tied": True, "seed": 1},
    "llama3-rope": {"rope_scaling": LLAMA3_SCALING, "seed": 2},
    "linear-rope": {"rope_scaling": LINEAR_SCALING, "seed": 3},
    "yarn-rope": {"rope_scaling": YARN_SCALING, "seed": 11},
    "attention-bias": {"attention_bias": True, "seed": 4},
    "mlp-bias": {"mlp_bias": True, "seed": 5},
    "one-kv-head": {"kv_heads": 1, "seed": 6},
    "no-groups": {"kv_heads": 6, "seed": 7},
    "one-layer": {"layers": 1, "seed": 8},
    "sharded": {"shards": 3, "seed": 9},
    "large-theta-eps": {"theta": 5e5, "eps": 1e-2, "seed": 10},
}
GOLDENS = Path(__file__).with_name("goldens.json")
LABELS = (3, 0, 306, 77)
HAVE_TORCH = importlib.util.find_spec("torch") is not None


def sequences() -> list[list[int]]:
    """Prompts of 1 to 300 tokens, some sharing a prefix longer than a cache page."""
    rng = np.random.default_rng(7)
    query = rng.integers(0, 307, 150).tolist()
    alone = [rng.integers(0, 307, n).tolist() for n in (1, 2, 15, 16, 17, 33, 64, 100, 300)]
    return alone + [query + rng.integers(0, 307, n).tolist() for n in (1, 5, 20, 40)]


def torch_on_one_thread() -> None:
    """Tiny matmuls take many times as long on several threads that wait for each other, most of all beside other
    tests."""
    import torch

    torch.set_num_threads(1)


def reference(folder: Path, prompts: Sequence[list[int]] | None = None) -> list[list[float]]:
    """transformers' float32 log-probabilities of ``LABELS`` after each sequence, each prompt run alone."""
    import torch
    from transformers import AutoModelForCausalLM

    torch_on_one_thread()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    rows: list[list[float]] = []
    with torch.no_grad():
        for tokens in sequences() if prompts is None else prompts:
            logits = model(torch.tensor([tokens])).logits[0, -1].double()
            rows.append(torch.log_softmax(logits, -1)[list(LABELS)].tolist())
    return rows


def expected(case: str, folder: Path) -> list[list[float]]:
    """The reference, computed by transformers or stored."""
    return reference(folder) if HAVE_TORCH else json.loads(GOLDENS.read_text())[case]


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        goldens = {case: reference(make_llama(Path(scratch) / case, **options)) for case, options in CASES.items()}
        goldens |= {family: reference(make_family(Path(scratch) / family, family)) for family in FAMILIES}
    GOLDENS.write_text(json.dumps({case: np.round(rows, 7).tolist() for case, rows in goldens.items()}) + "\n")
