"""Tiny checkpoints of every model family against transformers' float32 forward: layer by layer, then logprobs."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from model import loading, sharding
from model.computations import Kind
from model.engine import Engine
from model.inputs import padding
from model.plan import Shape
from model.tensors.folder import opened
from tests.batches import label_batch, reads_batch
from tests.parity.cases import CASES, GOLDENS, HAVE_TORCH, LABELS, expected, sequences, torch_on_one_thread
from tests.tiny_families import FAMILIES, TESTED, make_family

Families = Callable[[str], tuple[Path, Engine]]


@pytest.mark.parametrize("family", TESTED)
def test_float32_logprobs_equal_transformers(family: str, families: Families) -> None:
    folder, scorer = families(family)
    wanted = np.array(expected(family, folder))
    assert wanted.std() > 1, "the reference must vary, or the case shows nothing"
    np.testing.assert_allclose(logprobs(scorer), wanted, rtol=0, atol=1e-4)


def test_stored_answers_are_there_for_machines_without_torch() -> None:
    assert json.loads(GOLDENS.read_text()).keys() == {*CASES, *FAMILIES}


@pytest.mark.parametrize(
    "implementation",
    ["paged", pytest.param("reference", marks=pytest.mark.slow), "fused-interpreted", "triton-interpreted"],
)
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
@pytest.mark.parametrize("family", TESTED)
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
    recurrence = scorer._programs.model.config.recurrence  # pyright: ignore[reportPrivateUsage]
    wanted = wanted[:: recurrence.parts + 1 if recurrence else 1]  # a hybrid's layers up to one of attention are one
    assert len(got) == len(wanted) == (3 if recurrence else 4)
    for ours, theirs in zip(got, wanted, strict=True):
        np.testing.assert_allclose(ours, theirs[0].numpy(), rtol=0, atol=1e-4)


def hidden_states(scorer: Engine, tokens: np.ndarray) -> list[np.ndarray]:
    """Hidden states of 32 tokens by the scoring programs: each layer's input, then the last norm's output."""
    programs: Any = scorer._programs  # pyright: ignore[reportPrivateUsage]
    shape, places = Shape(width=32, bins=2), np.arange(64, dtype=np.int32)
    segments = np.repeat(np.array([0, -1], np.int32), 32)
    array, inputs = padding(1, shape.tokens, programs.model.layout.room)
    inputs.tokens[0], inputs.positions[0], inputs.segments[0] = np.pad(tokens, (0, 32)), places, segments
    inputs.reads[0] = places
    pool, snapshots, collected = programs.empty_pool(), programs.empty_snapshots(), programs.none_collected()
    x, angles, inputs = programs.layers.begin(shape.tokens, array)
    states = [np.array(x)]
    for number, weights in list(enumerate(programs.weights.layers))[:-1]:
        layer = programs.compiler.get(Kind.LAYER, shape)
        x = layer(weights, x, angles, inputs, pool, snapshots, jax.numpy.int32(number))
        states.append(np.array(x))
    last = programs.layers.segments(shape, array, pool, snapshots, collected)
    return [state[:32] for state in (*states, np.array(last))]


@pytest.mark.parametrize(
    ("by_layer", "devices"), [pytest.param(True, 0, id="a layer"), pytest.param(False, 4, id="a stack on a mesh")]
)
def test_experts_sorted_as_on_a_tpu_equal_transformers(by_layer: bool, devices: int, families: Families) -> None:
    """Their products go over all pairs of tokens and experts at once. On two devices each has 128 channels, the second
    of these all zeros."""
    folder, _ = families("qwen3_moe")
    over = sharding.mesh(2, 2, jax.devices()[:devices]) if devices else None
    sizes: dict[str, Any] = {"max_segment_tokens": 32, "call_tokens": 64, "chunks": (64,), "prefix_cache_bytes": 2**21}
    scorer = loading.load(folder, ragged=True, by_layer=by_layer, mesh=over, **sizes)
    np.testing.assert_allclose(logprobs(scorer), np.array(expected("qwen3_moe", folder)), rtol=0, atol=1e-4)


def test_a_token_s_sorted_experts_do_not_depend_on_the_others(families: Families) -> None:
    """The same bits beside tokens that crowd one expert, and beside a token that is not finite."""
    folder, _ = families("qwen3_moe")
    scorer = loading.load(folder, ragged=True, max_segment_tokens=32, call_tokens=64)
    model: Any = scorer._programs.model  # pyright: ignore[reportPrivateUsage]
    experts = model.block(scorer._programs.weights.layers[0]).mlp  # pyright: ignore[reportPrivateUsage]
    x = np.random.default_rng(3).standard_normal((64, 48)).astype(np.float32)
    crowded = x.copy()
    crowded[8:] = x[8]
    crowded[40] = np.nan
    through = jax.jit(lambda x: experts(x))
    assert (np.array(through(crowded))[:8] == np.array(through(x))[:8]).all()


@pytest.mark.skipif(not HAVE_TORCH, reason="torch is not installed, and a mixture's results are not stored")
def test_a_mixture_with_an_expert_for_all_tokens_equals_transformers(tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    torch_on_one_thread()
    folder = make_family(tmp_path, "qwen3_5_moe", changes={"num_hidden_layers": 2, "full_attention_interval": 2})
    with opened(folder) as stored:
        choice = loading.prepare(folder, by_layer=True)
        weights = loading.place(stored, choice)
    block: Any = choice.model.block(weights.layers[0])
    auto: Any = AutoModelForCausalLM
    layers = auto.from_pretrained(folder, dtype=torch.float32).eval().model.layers
    x = np.random.default_rng(3).standard_normal((40, 48)).astype(np.float32)
    for ours, theirs in ((block.recurrent[0], layers[0]), (block, layers[1])):
        with torch.no_grad():
            wanted = theirs.mlp(torch.tensor(x[None]))[0].numpy()
        assert wanted.std() > 0.1
        np.testing.assert_allclose(jax.jit(lambda x, mlp=ours.mlp: mlp(x))(x), wanted, rtol=0, atol=1e-4)


@pytest.mark.skipif(not HAVE_TORCH, reason="torch is not installed, and these answers are not stored")
@pytest.mark.slow
@pytest.mark.parametrize("first", [0, 200])
def test_every_position_of_a_hybrid_s_prompt_equals_transformers(first: int, families: Families) -> None:
    """So many reads are those of prefill calls, which begin at a snapshot before the first."""
    import torch
    from transformers import AutoModelForCausalLM

    folder, scorer = families("qwen3_5")
    tokens = np.random.default_rng(3).integers(0, 307, 330).tolist()
    auto: Any = AutoModelForCausalLM
    with torch.no_grad():
        logits = auto.from_pretrained(folder, dtype=torch.float32).eval()(torch.tensor([tokens])).logits[0, first:]
    wanted = torch.log_softmax(logits.double(), -1)[:, list(LABELS)].numpy()
    reads = [(position, LABELS) for position in range(first, len(tokens))]
    for _ in range(2):
        got = scorer.score(reads_batch([tokens], [reads])).values.reshape(-1, len(LABELS))
        np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-4)
