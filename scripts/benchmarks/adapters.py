"""Measures what LoRA adapters that requests choose cost: W1's items on the demo model, in this process.

Run as ``python -m scripts.benchmarks.adapters``. Adapters are random, of rank 16 and on all linears. The ways take
turns in each repeat, over cold prefixes. With four adapters the query is computed four times, once for each: a prefix
belongs to the adapter that computed it.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import numpy as np
from safetensors.numpy import save_file

from model import loading
from model.config import Lora
from model.contract import TokenBatch
from model.engine import Engine
from model.fields import read_config
from model.tensors.adapters import CONFIG, WEIGHTS
from scripts.benchmarks import work
from scripts.benchmarks.machine import in_turns, machine, versions
from serve_app import model_source
from serve_app.batches import pack_labels

RANK, ADAPTERS, REPEATS = 16, 4, 5


def write_adapter(base: Path, folder: Path, seed: int) -> Path:
    """A random adapter as peft saves it."""
    c, rng, tensors = read_config(base), np.random.default_rng(seed), dict[str, np.ndarray]()
    width, ff, head = c["hidden_size"], c["intermediate_size"], c["hidden_size"] // c["num_attention_heads"]
    keys = c["num_key_value_heads"] * head
    linears = {
        **{f"self_attn.{name}_proj": (width, out) for name, out in (("q", width), ("k", keys), ("v", keys))},
        "self_attn.o_proj": (width, width),
        **{f"mlp.{name}_proj": (width, ff) for name in ("gate", "up")},
        "mlp.down_proj": (ff, width),
    }
    for layer in range(c["num_hidden_layers"]):
        for name, (into, out) in linears.items():
            module = f"base_model.model.model.layers.{layer}.{name}"
            tensors[f"{module}.lora_A.weight"] = rng.normal(0, into**-0.5, (RANK, into)).astype(np.float32)
            tensors[f"{module}.lora_B.weight"] = rng.normal(0, 0.02, (out, RANK)).astype(np.float32)
    folder.mkdir()
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    (folder / CONFIG).write_text(
        json.dumps({"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "init_lora_weights": True})
    )
    return folder


def main() -> None:
    sys.stdout.write(f"{machine()}; {versions()}\n")
    base = model_source.resolve("demo")
    request = work.load("W1", most=1)[0].requests[0]
    batch = pack_labels(request.prompts, [work.LABELS] * len(request.prompts))
    salt = iter(range(1, 10**6))

    def run(engine: Engine, adapters: np.ndarray | None) -> Callable[[], np.ndarray]:
        def cold() -> np.ndarray:
            salts = np.full(batch.num_sequences, next(salt), np.int64)
            asked: TokenBatch = replace(batch, salts=salts, adapters=adapters)
            return engine.score(asked).values

        return cold

    numbers = np.arange(batch.num_sequences, dtype=np.int32)
    with tempfile.TemporaryDirectory() as scratch:
        plain, engine = loading.load(base), loading.load(base, lora=Lora(ADAPTERS, RANK))
        for number in range(1, ADAPTERS + 1):
            engine.load_adapter(number, write_adapter(base, Path(scratch) / str(number), number))
        ways = {
            "without room for adapters": run(plain, None),
            "the model itself, beside adapters": run(engine, None),
            "one adapter": run(engine, np.ones_like(numbers)),
            "four adapters mixed": run(engine, 1 + numbers % ADAPTERS),
        }
        for way in ways.values():
            way()  # compiles, and warms up
        found = in_turns(ways, REPEATS)
    one = found["one adapter"]
    for way, (wall, processor) in found.items():
        ratios = f"{wall / one[0]:.2f} and {processor / one[1]:.2f} x one adapter"
        sys.stdout.write(f"{way}: {wall:.2f} s, processor {processor:.2f} s, {ratios}\n")


if __name__ == "__main__":
    main()
