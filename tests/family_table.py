"""Measures each family's tiny checkpoint on this machine, for the table of docs/measurements.md.

Run as ``python -m tests.family_table``, or with the names of some; it takes some minutes.
"""

import os
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_backend_optimization_level=1 --xla_force_host_platform_device_count=4"

import jax
import numpy as np
import numpy.typing as npt

from model import loading, sharding
from model.computations import Kind
from model.config import ModelConfig
from model.cost import program_cost
from model.engine import Engine
from model.families.registry import from_hf
from model.sizes import BY_PLATFORM
from scripts.planning.chips import CHIPS, devices
from tests.batches import label_batch
from tests.invariance.rows import prompts, values
from tests.parity import cases
from tests.tiny_encoders import COMMON, ENCODERS, make_encoder
from tests.tiny_families import CONFIGS, config_of, make_family

SIZES: dict[str, Any] = {"max_segment_tokens": 32, "call_tokens": 64, "chunks": (64,), "prefix_cache_bytes": 2**21}


def errors(folder: Path) -> tuple[float, float, float]:
    """Largest differences in log-probability: from transformers; alone and in reverse order from all together; on two
    by two devices from one."""
    scorer = loading.load(folder, **SIZES)
    sequences = cases.sequences()
    found = scorer.score(label_batch(sequences, [cases.LABELS] * len(sequences))).values.reshape(len(sequences), -1)
    parity = np.abs(found - np.array(cases.reference(folder))).max()
    sequences = [*prompts(7, query=310, longest=30, seed=1), *prompts(7, longest=60, seed=2)]
    cold = values(scorer, sequences)
    warm = values(scorer, sequences[::-1])[::-1]
    scorer._forget_prefixes()  # pyright: ignore[reportPrivateUsage]
    alone = np.concatenate([values(scorer, [sequence]) for sequence in sequences])
    invariance = max(np.abs(warm - cold).max(), np.abs(alone - cold).max())
    spread = loading.load(folder, mesh=sharding.mesh(2, 2, jax.devices()[:4]), **SIZES)
    return float(parity), float(invariance), float(np.abs(values(spread, sequences) - cold).max())


def logits(scorer: Engine, sequences: list[list[int]]) -> npt.NDArray[np.float32]:
    """An encoder's class logits."""
    batch = label_batch(sequences, [(0, 1, 2)] * len(sequences), vocab_logprobs=False)
    return scorer.score(batch).values.reshape(len(sequences), -1)


def encoder_errors(folder: Path) -> tuple[float, float, float]:
    """The same of an encoder's class logits."""
    import torch
    from transformers import AutoModelForSequenceClassification

    rng = np.random.default_rng(7)
    sequences = [rng.integers(2, 307, length).tolist() for length in (1, 2, 16, 33, 64, 130, 5, 90)]
    auto: Any = AutoModelForSequenceClassification
    model = auto.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        wanted = np.concatenate([model(torch.tensor([tokens])).logits.numpy() for tokens in sequences])
    scorer = loading.load(folder, call_tokens=64)
    found = logits(scorer, sequences)
    alone = np.concatenate([logits(scorer, [tokens]) for tokens in sequences])
    others = max(np.abs(alone - found).max(), np.abs(logits(scorer, sequences[::-1])[::-1] - found).max())
    spread = loading.load(folder, mesh=sharding.mesh(2, 2, jax.devices()[:4]), call_tokens=64, by_layer=False)
    return float(np.abs(found - wanted).max()), float(others), float(np.abs(logits(spread, sequences) - found).max())


def compiles(config: ModelConfig) -> str:
    """The numbers of v6e chips for which the segments program compiles, with the attention kernel in every layer, or in
    none of an encoder."""
    chips, found, rates = devices("v6e", "2x2"), list[str](), CHIPS["v6e"].rates
    for over in (sharding.mesh(1, 1, chips[:1]), sharding.mesh(2, 2, chips)):
        programs, laid = loading.without_weights(config, over, BY_PLATFORM["tpu"])
        traced = programs.compiler.trace(Kind.SEGMENTS, laid.ladder[0])
        _, kernels = program_cost(traced, traced.lower().compile(), trips=config.layers - 1, rates=rates)
        assert kernels == (0 if config.encoder else config.layers), config.architecture
        found.append(str(over.size))
    return ", ".join(found)


def main() -> None:
    sys.stdout.write(
        "| family | parity | invariance | sharded | compiles for v6e chips |\n| --- | --- | --- | --- | --- |\n"
    )
    with tempfile.TemporaryDirectory() as scratch:
        for name in sys.argv[1:] or (*CONFIGS, *ENCODERS):
            if name in ENCODERS:
                found = encoder_errors(make_encoder(Path(scratch) / name, name, classes=3))
                config = from_hf({**COMMON, **ENCODERS[name]})
            else:
                found, config = errors(make_family(Path(scratch) / name, name)), from_hf(config_of(name))
            row = " | ".join([name, *(f"{error:.1e}" for error in found), compiles(config)])
            sys.stdout.write(f"| {row} |\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
