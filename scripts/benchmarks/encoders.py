"""Compares encoders with transformers on this machine: pairs of the workloads' lengths, random weights.

Run as ``python -m scripts.benchmarks.encoders``. Both compute the same token ids in float32, one after the other in
each repeat. Beside the time there is the processor time, which other work on the machine disturbs less.
transformers gets the pairs sorted by length, so that a batch of it has hardly any padding.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import numpy as np

from scripts.benchmarks import work
from scripts.benchmarks.machine import in_turns, machine, versions
from serve_app.batches import pack_labels

SHAPES: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "MiniLM-L6": (
        "Bert",
        {
            "vocab_size": 30_522,
            "hidden_size": 384,
            "num_hidden_layers": 6,
            "num_attention_heads": 12,
            "intermediate_size": 1536,
        },
    ),
    "BERT-base": ("Bert", {"vocab_size": 30_522}),
    "ModernBERT-base": ("ModernBert", {}),
}
"""transformers' class, and the sizes that differ from its defaults."""
WORKLOADS = ("W2", "W6")
BATCHES = (16, 32)
"""Pairs of a batch of transformers': the fastest is compared."""
SPECIAL = 3
REPEATS = 3


def pairs(workload: str, vocab_size: int) -> list[list[int]]:
    """Random ids of pairs as long as the workload's query and items with three special tokens."""
    rng, (request,) = np.random.default_rng(1), work.load(workload, most=1)[0].requests
    lengths = [SPECIAL + len(request.query_ids) + len(item) for item in request.items_ids]
    return [rng.integers(1000, vocab_size - 1000, length).tolist() for length in lengths]


def make(kind: str, sizes: Mapping[str, Any], folder: Path) -> Any:
    """A model of transformers with random weights, which is also saved."""
    import torch
    import transformers

    torch.manual_seed(0)
    module: Any = transformers
    config = getattr(module, f"{kind}Config")(num_labels=1, **sizes)
    model = getattr(module, f"{kind}ForSequenceClassification")(config).eval()
    model.save_pretrained(folder)
    return model


def of_transformers(model: Any, sequences: Sequence[list[int]], batch: int) -> np.ndarray:
    """The logits, in batches of pairs of about the same length."""
    import torch

    found = np.zeros(len(sequences), np.float32)
    order = sorted(range(len(sequences)), key=lambda at: len(sequences[at]))
    with torch.inference_mode():
        for start in range(0, len(order), batch):
            chosen = order[start : start + batch]
            longest = len(sequences[chosen[-1]])
            ids = np.zeros((len(chosen), longest), np.int64)
            mask = np.zeros_like(ids)
            for row, at in enumerate(chosen):
                ids[row, : len(sequences[at])], mask[row, : len(sequences[at])] = sequences[at], 1
            more = {} if mask.all() else {"attention_mask": torch.from_numpy(mask)}
            found[chosen] = model(torch.from_numpy(ids), **more).logits[:, 0].numpy()
    return found


def compare(name: str, workloads: Sequence[str]) -> None:
    """Print a line for each workload."""
    from model import loading

    kind, sizes = SHAPES[name]
    with tempfile.TemporaryDirectory() as scratch:
        model = make(kind, sizes, Path(scratch))
        engine = loading.load(Path(scratch), dtype="float32", max_prompt_tokens=512)
        for workload in workloads:
            sequences = pairs(workload, model.config.vocab_size)
            batch = pack_labels(sequences, [[0]] * len(sequences), vocab_logprobs=False)
            ways: dict[str, Callable[[], np.ndarray]] = {"ours": lambda batch=batch: engine.score(batch).values}
            for size in BATCHES:
                ways[f"transformers, {size} a batch"] = lambda size=size, sequences=sequences: of_transformers(
                    model, sequences, size
                )
            answers = {way: run() for way, run in ways.items()}  # compiles, and warms up
            difference = max(float(np.abs(answer - answers["ours"]).max()) for answer in answers.values())
            times = in_turns(ways, REPEATS)
            wall, processor = ({way: each[which] for way, each in times.items()} for which in (0, 1))
            best = min((way for way in ways if way != "ours"), key=wall.__getitem__)
            row = {
                "shape": name,
                "workload": workload,
                "pairs": len(sequences),
                "tokens": sum(map(len, sequences)),
                "seconds": {way: round(each, 2) for way, each in wall.items()},
                "processor_seconds": {way: round(each, 2) for way, each in processor.items()},
                "times_as_fast": round(wall[best] / wall["ours"], 2),
                "less_processor_time": round(
                    min(processor[way] for way in ways if way != "ours") / processor["ours"], 2
                ),
                "largest_difference": f"{difference:.1e}",
            }
            sys.stdout.write(json.dumps(row) + "\n")
            sys.stdout.flush()


def main() -> None:
    sys.stdout.write(f"{machine()}; {versions()}\n")
    for name in sys.argv[1:] or SHAPES:
        compare(name, WORKLOADS)


if __name__ == "__main__":
    main()
