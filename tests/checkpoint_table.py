"""Prints every kind of checkpoint, and what comes of it: right, refused with a reason, or how far from transformers.

Run as ``python -m tests.checkpoint_table``; it takes some minutes. Words choose the checkpoints whose names have them,
and ``--parse`` only reads the configs. Each model has its published ``config.json`` at tiny sizes, and random weights.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=1")

import numpy as np

from model import loading
from model.families.registry import from_hf
from model.fields import ConfigError
from tests.batches import label_batch
from tests.parity import cases
from tests.published import CHECKPOINTS, Checkpoint
from tests.tiny_families import make_checkpoint

BOUND = 1e-4
SIZES: dict[str, Any] = {"max_segment_tokens": 32, "call_tokens": 64, "chunks": (64,), "prefix_cache_bytes": 2**21}
TINY: Mapping[str, Any] = {
    "vocab_size": 307,
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "intermediate_size": 52,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
}


def shrunk(config: Mapping[str, Any]) -> dict[str, Any]:
    """``config`` at tiny sizes. Windows and original contexts are shorter than the longest prompts of the tests."""
    groups = config["num_attention_heads"] // config["num_key_value_heads"]
    heads = 3 if "partial_rotary_factor" in config else 4  # of 16 channels three quarters are even
    tiny: dict[str, Any] = {
        **config,
        **TINY,
        "num_attention_heads": heads,
        "num_key_value_heads": heads // min(groups, heads),
    }
    tiny.pop("_attn_implementation", None)  # transformers would ask for the package of that kernel
    if "head_dim" in config:
        tiny["head_dim"] = 10 if config["head_dim"] * config["num_attention_heads"] == config["hidden_size"] else 14
    if config.get("sliding_window"):
        tiny["sliding_window"] = 50
    if "max_window_layers" in config:
        tiny["max_window_layers"] = 1
    if "sliding_window_pattern" in config:
        tiny["sliding_window_pattern"] = 2
    if "layer_types" in config:
        tiny["layer_types"] = config["layer_types"][-3:]
    if "num_experts" in config:
        tiny |= {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 20}
    if "original_max_position_embeddings" in config:
        tiny["original_max_position_embeddings"] = 170
    if rope := config.get("rope_scaling"):
        tiny["rope_scaling"] = _shrunk_rope(rope, pairs=6)
    if chunks := config.get("dual_chunk_attention_config"):
        tiny["dual_chunk_attention_config"] = {**chunks, "chunk_size": 400, "original_max_position_embeddings": 400}
    return tiny


def _shrunk_rope(rope: Mapping[str, Any], *, pairs: int) -> dict[str, Any]:
    tiny = dict(rope)
    if "original_max_position_embeddings" in rope:
        tiny["original_max_position_embeddings"] = 60
    return tiny | {key: rope[key][:pairs] for key in ("short_factor", "long_factor") if key in rope}


def refusal(checkpoint: Checkpoint) -> str:
    """Why it is refused; empty: it loads."""
    try:
        from_hf(checkpoint.config)
    except ConfigError as error:
        return str(error)
    return ""


def difference(checkpoint: Checkpoint, folder: Path) -> float:
    """Largest difference from transformers: of log-probabilities, or of class logits."""
    config = shrunk(checkpoint.config)
    make_checkpoint(folder, config)
    scorer = loading.load(folder, **SIZES)
    sequences = cases.sequences()
    classes = scorer.info.classes
    if classes:
        labels, wanted = tuple(range(classes)), _class_logits(folder)
    else:
        labels, wanted = cases.LABELS, cases.reference(folder)
    batch = label_batch(sequences, [labels] * len(sequences), vocab_logprobs=not classes)
    found = scorer.score(batch).values.reshape(len(sequences), -1)
    return float(np.abs(found - np.array(wanted)).max())


def _class_logits(folder: Path) -> list[list[float]]:
    import torch
    from transformers import AutoModelForSequenceClassification

    auto: Any = AutoModelForSequenceClassification
    model = auto.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        return [model(torch.tensor([tokens])).logits[0].tolist() for tokens in cases.sequences()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parse", action="store_true", help="only read the configs")
    parser.add_argument("words", nargs="*")
    asked = parser.parse_args()
    wrong = 0
    sys.stdout.write("| checkpoint | what sets it apart | result |\n| --- | --- | --- |\n")
    with tempfile.TemporaryDirectory() as scratch:
        for number, checkpoint in enumerate(CHECKPOINTS):
            if asked.words and not any(word in checkpoint.name for word in asked.words):
                continue
            why = refusal(checkpoint)
            result = f"refused: {why}" if why else "loads"
            fits = bool(why) == bool(checkpoint.refused) and checkpoint.refused in why
            if checkpoint.compared:
                result += f"; {checkpoint.compared} compares such a checkpoint" if not why else ""
            elif not (why or asked.parse):
                found = difference(checkpoint, Path(scratch) / str(number))
                fits = fits and found < BOUND
                result = f"{'right' if found < BOUND else 'WRONG'}, max difference {found:.1e}"
            wrong += not fits
            note = "" if fits else " (NOT AS EXPECTED)"
            sys.stdout.write(f"| {checkpoint.name} | {checkpoint.keys} | {result}{note} |\n")
            sys.stdout.flush()
    sys.exit(f"{wrong} not as expected" if wrong else 0)


if __name__ == "__main__":
    main()
