"""Tiny checkpoints of every model family against transformers' float32 forward: layer by layer, then logprobs."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from model import loading
from model.computations import Kind
from model.engine import Engine
from model.inputs import padding
from model.plan import Shape
from tests.batches import label_batch
from tests.parity.cases import HAVE_TORCH, LABELS, expected, sequences
from tests.tiny_families import FAMILIES

Families = Callable[[str], tuple[Path, Engine]]


@pytest.mark.parametrize("family", FAMILIES)
def test_float32_logprobs_equal_transformers(family: str, families: Families) -> None:
    folder, scorer = families(family)
    wanted = np.array(expected(family, folder))
    assert wanted.std() > 1, "the reference must vary, or the case shows nothing"
    np.testing.assert_allclose(logprobs(scorer), wanted, rtol=0, atol=1e-4)


@pytest.mark.parametrize("implementation", ["paged", "reference", "fused-interpreted"])
def test_all_attentions_know_windows_and_caps(implementation: str, families: Families) -> None:
    folder, scorer = families("gemma2")
    other = loading.load(
        folder,
        implementation=implementation,
        max_segment_tokens=32,
        call_tokens=64,
        chunks=(128,),
        large_calls=True,
        prefix_cache_bytes=2**21,
    )
    np.testing.assert_allclose(logprobs(other), logprobs(scorer), rtol=0, atol=1e-5)


def logprobs(scorer: Engine) -> np.ndarray:
    prompts = sequences()
    return scorer.score(label_batch(prompts, [LABELS] * len(prompts))).values.reshape(-1, len(LABELS))


@pytest.mark.skipif(not HAVE_TORCH, reason="torch is not installed, and hidden states are not stored")
@pytest.mark.parametrize("family", FAMILIES)
def test_every_layer_equals_transformers(family: str, families: Families) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    folder, scorer = families(family)
    tokens = np.random.default_rng(5).integers(0, 307, 32)
    auto: Any = AutoModelForCausalLM
    model = auto.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        wanted = model(torch.tensor(tokens[None]), output_hidden_states=True).hidden_states
    got = hidden_states(scorer, tokens)
    assert len(got) == len(wanted) == 4
    for ours, theirs in zip(got, wanted, strict=True):
        np.testing.assert_allclose(ours, theirs[0].numpy(), rtol=0, atol=1e-4)


def hidden_states(scorer: Engine, tokens: np.ndarray) -> list[np.ndarray]:
    """Hidden states of 32 tokens by the scoring programs: each layer's input, then the last norm's output."""
    programs: Any = scorer._programs  # pyright: ignore[reportPrivateUsage]
    shape, places = Shape(width=32, bins=2), np.arange(64, dtype=np.int32)
    segments = np.repeat(np.array([0, -1], np.int32), 32)
    array, inputs = padding(1, shape.tokens, programs.model.layout.tables)
    inputs.tokens[0], inputs.positions[0], inputs.segments[0] = np.pad(tokens, (0, 32)), places, segments
    inputs.reads[0] = places
    pool, collected = programs.empty_pool(), programs.none_collected()
    x, angles, inputs = programs.layers.begin(shape.tokens, array)
    states = [np.array(x)]
    for number, weights in list(enumerate(programs.weights.layers))[:-1]:
        x = programs.compiler.get(Kind.LAYER, shape)(weights, x, angles, inputs, pool, jax.numpy.int32(number))
        states.append(np.array(x))
    return [state[:32] for state in (*states, np.array(programs.layers.segments(shape, array, pool, collected)))]
