"""Compares a hybrid of Qwen3.5-0.8B's sizes with transformers on this machine: random weights, items after a query.

Run as ``python -m scripts.benchmarks.hybrid``. Both get the same token ids, in turn in each repeat, and each repeat has
ids of its own, so that no cache knows them. transformers computes the query once, and continues from copies of its
cache with the recurrent states in it, by its chunked functions in torch.
"""

from __future__ import annotations

import copy
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import numpy as np
import typer

from scripts.benchmarks.machine import gemm_gflops, machine, medians, seconds, versions
from scripts.benchmarks.work import Request, Variant, floor_flops
from scripts.planning.estimate import floor_sizes
from serve_app.batches import pack_labels

SIZES: Mapping[str, Any] = {
    "vocab_size": 248_320,
    "hidden_size": 1024,
    "intermediate_size": 3584,
    "num_hidden_layers": 24,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 256,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 16,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}
"""Qwen3.5-0.8B's text part, but for the context; the rest are transformers' defaults."""
LABELS = [9230, 2838]
BATCHES = (8, 32)
"""Items of a batch of transformers': the fastest is compared."""


def make(folder: Path, dtype: str, layers: int) -> Any:
    """A model of transformers with random weights, which is also saved."""
    import torch
    from transformers import Qwen3_5ForCausalLM, Qwen3_5TextConfig

    torch.manual_seed(0)
    config = Qwen3_5TextConfig(**{**SIZES, "num_hidden_layers": layers})
    model: Any = Qwen3_5ForCausalLM(config).eval().to(getattr(torch, dtype))
    model.save_pretrained(folder)
    return model


def of_transformers(model: Any, request: Request, batch: int) -> np.ndarray:
    """The labels' log-probabilities after each item; all items are of one length."""
    import torch

    rows: list[np.ndarray] = []
    with torch.inference_mode():
        cached = model.model(input_ids=torch.tensor([request.query_ids]), use_cache=True).cache
        for start in range(0, len(request.items_ids), batch):
            ids = torch.tensor(request.items_ids[start : start + batch])
            cache = copy.deepcopy(cached)
            cache.reorder_cache(torch.zeros(len(ids), dtype=torch.long))  # as many copies
            hidden = model.model(input_ids=ids, cache=cache, use_cache=True).last_hidden_state[:, -1]
            rows.append(torch.log_softmax(model.lm_head(hidden).float(), -1)[:, LABELS].numpy())
    return np.concatenate(rows)


def main(
    query: Annotated[int, typer.Option(help="Tokens of the query.")] = 256,
    items: Annotated[int, typer.Option(help="Items of a request.")] = 32,
    item: Annotated[int, typer.Option(help="Tokens of an item.")] = 32,
    layers: Annotated[int, typer.Option(help="Layers; fewer for a machine with little memory.")] = 24,
    repeats: Annotated[int, typer.Option(help="Timed requests.")] = 3,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
) -> None:
    from model import loading
    from serve_app.scorer.engines import compiled_folder

    rng = np.random.default_rng(1)

    def request() -> Request:
        ids = rng.integers(1000, 200_000, query).tolist(), rng.integers(1000, 200_000, (items, item)).tolist()
        return Request(*ids, "", [], LABELS)

    sys.stdout.write(f"{machine()}; {versions()}; load average {os.getloadavg()[0]:.1f}\n")
    with tempfile.TemporaryDirectory() as scratch:
        model = make(Path(scratch), dtype, layers)
        target = "bfloat16" if dtype == "bfloat16" else "float32"
        engine = loading.load(Path(scratch), dtype=target, compiled_folder=compiled_folder())
        sizes = floor_sizes(engine._programs.model.config)  # pyright: ignore[reportPrivateUsage]

        def ours(asked: Request) -> np.ndarray:
            batch = pack_labels(asked.prompts, [LABELS] * items)
            return engine.score(batch).values.reshape(items, -1)

        ways: dict[str, Callable[[Request], np.ndarray]] = {"ours": ours}
        for size in BATCHES:
            ways[f"transformers, {size} a batch"] = lambda asked, size=size: of_transformers(model, asked, size)
        first = request()
        answers = {way: run(first) for way, run in ways.items()}  # compiles, and warms up
        difference = max(float(np.abs(answer - answers["ours"]).max()) for answer in answers.values())
        times = {way: list[tuple[float, float]]() for way in ways}
        rates: list[float] = []
        for _ in range(repeats):
            asked = request()
            rates.append(gemm_gflops(dtype, sizes))
            for way, run in ways.items():
                times[way].append(seconds(lambda run=run, asked=asked: run(asked)))
        floor = floor_flops(Variant([first], None), sizes)
    wall, processor = ({way: medians(each)[which] for way, each in times.items()} for which in (0, 1))
    others = [way for way in ways if way != "ours"]
    row = {
        "query, items, tokens of an item": [query, items, item],
        "layers": layers,
        "dtype": dtype,
        "seconds": {way: round(each, 2) for way, each in wall.items()},
        "processor_seconds": {way: round(each, 2) for way, each in processor.items()},
        "floor_gflop": round(floor / 1e9, 1),
        "matmul_gflops": round(statistics.median(rates), 1),
        "times_floor": round(wall["ours"] * 1e9 * statistics.median(rates) / floor, 2),
        "times_as_fast": round(min(wall[way] for way in others) / wall["ours"], 2),
        "less_processor_time": round(min(processor[way] for way in others) / processor["ours"], 2),
        "largest_difference": f"{difference:.1e}",
        "load_average": round(os.getloadavg()[0], 1),
    }
    sys.stdout.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    typer.run(main)
