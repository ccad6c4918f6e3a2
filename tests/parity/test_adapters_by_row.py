"""Scores of several adapters in one batch, against transformers with peft's own merge of each."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from model import loading, sharding
from model.config import Lora
from model.engine import Engine
from model.fields import ConfigError
from model.lora import CALL_ADAPTERS
from serve_app.contract import TokenBatch
from tests.batches import label_batch
from tests.parity.cases import HAVE_TORCH, LABELS, reference, sequences
from tests.parity.test_adapter_scores import merged_by_peft
from tests.parity.test_classifiers import class_batch
from tests.parity.test_heads import SIZES
from tests.tiny_families import make_family
from tests.tiny_peft import PEFT_WARNS, adapted

pytestmark = [PEFT_WARNS, pytest.mark.skipif(not HAVE_TORCH, reason="torch is not installed")]

ROOM = Lora(slots=6, rank=20)
OPTIONS: Sequence[dict[str, Any]] = (
    {"target_modules": "all-linear"},
    {"target_modules": ["q_proj", "v_proj"], "r": 20, "use_rslora": True},
    {"target_modules": ["o_proj", "down_proj"], "r": 1},
    {"target_modules": "all-linear", "rank_pattern": {"o_proj": 7}, "alpha_pattern": {"o_proj": 20}, "r": 3},
    {"target_modules": ["gate_proj", "k_proj"], "layers_to_transform": [1]},
)
"""More adapters than one call takes where XLA multiplies."""

Mixed = tuple[Engine, list[list[int]], np.ndarray, np.ndarray]


def mixed(folder: Path, family: str, options: Sequence[dict[str, Any]], **how: Any) -> Mixed:
    """A model with adapters in its slots; prompts, the adapter of each, and what transformers answers."""
    base = make_family(folder / "base", family)
    engine = loading.load(base, lora=ROOM, **SIZES, **how)
    prompts = sequences()
    answers = [np.array(reference(base))]
    for number, own in enumerate(options, 1):
        one = folder / str(number)
        adapted(base, one, **own)
        merged_by_peft(one).save_pretrained(folder / f"merged {number}")
        answers.append(np.array(reference(folder / f"merged {number}")))
        assert np.abs(answers[-1] - answers[0]).max() > 0.1
        engine.load_adapter(number, one)
    chosen = np.repeat(np.arange(len(answers), dtype=np.int32), len(prompts))
    order = np.random.default_rng(3).permutation(len(chosen))
    every = [prompts[each % len(prompts)] for each in order]
    return engine, every, chosen[order], np.concatenate(answers)[order]


def with_adapters(prompts: Sequence[Sequence[int]], adapters: np.ndarray) -> TokenBatch:
    return replace(label_batch(prompts, [LABELS] * len(prompts)), adapters=adapters)


def check(case: Mixed) -> None:
    """Twice: the second time over the pages that the first has left."""
    engine, prompts, adapters, wanted = case
    for _ in range(2):
        found = engine.score(with_adapters(prompts, adapters)).values.reshape(wanted.shape)
        np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "family",
    [
        "qwen2",
        "qwen3_5",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("phi3", "gemma2", "qwen3_moe", "qwen3_5_moe")),
    ],
)
def test_each_row_is_its_adapters(family: str, tmp_path: Path) -> None:
    if family not in ("qwen2", "gemma2"):
        of_phi3 = {"target_modules": ["qkv_proj", "gate_up_proj", "o_proj"]}
        of_hybrid = {"target_modules": ["in_proj_qkv", "in_proj_z", "in_proj_b", "out_proj", "q_proj", "up_proj"]}
        of_mixture = {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]}
        of_both = {"target_modules": ["in_proj_z", "q_proj", "shared_expert.up_proj"]}
        by_family = {"phi3": of_phi3, "qwen3_5": of_hybrid, "qwen3_moe": of_mixture, "qwen3_5_moe": of_both}
        options: Sequence[dict[str, Any]] = [by_family[family]]
    else:
        assert len(OPTIONS) > CALL_ADAPTERS
        options = OPTIONS
    check(mixed(tmp_path, family, options))


HOW: dict[str, Callable[[], dict[str, Any]]] = {
    "layers in a loop": lambda: {"by_layer": False},
    "without the CPU's kernels": lambda: {"implementation": "paged"},
    "split over two devices": lambda: {"mesh": sharding.mesh(1, 2, jax.devices()[:2])},
    "two calls at once": lambda: {"mesh": sharding.mesh(2, 1, jax.devices()[:2]), "by_layer": False},
}


SELDOM = {"without the CPU's kernels", "two calls at once"}


@pytest.mark.parametrize("how", [pytest.param(how, marks=pytest.mark.slow if how in SELDOM else ()) for how in HOW])
def test_however_the_model_runs(how: str, tmp_path: Path) -> None:
    options = OPTIONS if how == "split over two devices" else OPTIONS[:2]
    check(mixed(tmp_path, "qwen2", options, **HOW[how]()))


def test_heads_of_classes(tmp_path: Path) -> None:
    """An adapter has a head of its own, or its base's."""
    import torch

    base = make_family(tmp_path / "base", "qwen3", classes=3)
    engine = loading.load(base, lora=ROOM, **SIZES)
    adapted(base, tmp_path / "own", target_modules=["q_proj"], task_type="SEQ_CLS")
    engine.load_adapter(2, tmp_path / "own")
    model = merged_by_peft(tmp_path / "own", classes=True)
    prompts = sequences()
    with torch.no_grad():
        own = np.stack([model(torch.tensor([tokens])).logits[0].numpy() for tokens in prompts])
    batch = class_batch([*prompts, *prompts], 0)
    plain = loading.load(base, **SIZES).score(class_batch(prompts, 0)).values.reshape(-1, 3)
    adapters = np.repeat(np.array([2, 0], np.int32), len(prompts))
    found = engine.score(replace(batch, adapters=adapters)).values.reshape(-1, 3)
    assert np.abs(own - plain).max() > 0.3
    np.testing.assert_allclose(found, [*own, *plain], rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_a_row_has_the_same_bits_whatever_is_beside_it(dtype: str, tmp_path: Path) -> None:
    """Alone, over an empty cache, among rows of other adapters, and over the pages that these have left."""
    base = make_family(tmp_path / "base", "qwen2")
    engine = loading.load(base, lora=ROOM, dtype=dtype, **SIZES)
    for number, own in enumerate(OPTIONS, 1):
        adapted(base, tmp_path / str(number), **own)
        engine.load_adapter(number, tmp_path / str(number))
    prompts = sequences()
    adapters = np.random.default_rng(1).integers(0, len(OPTIONS) + 1, 3 * len(prompts)).astype(np.int32)
    batch = with_adapters([*prompts, *prompts, *prompts], adapters)
    mixed, again = engine.score(batch).values, engine.score(batch).values
    np.testing.assert_array_equal(mixed, again)
    for place in range(0, len(adapters), 4):
        engine.load_adapter(int(adapters[place]) or 6, tmp_path / str(adapters[place] or 1))  # its pages are lost
        own = engine.score(with_adapters([prompts[place % len(prompts)]], adapters[place : place + 1])).values
        np.testing.assert_array_equal(own, mixed.reshape(len(adapters), -1)[place])


def test_what_another_adapter_has_left_in_the_cache_is_never_read(tmp_path: Path) -> None:
    base = make_family(tmp_path / "base", "qwen2")
    engine = loading.load(base, lora=ROOM, **SIZES)
    for number, own in enumerate(OPTIONS[:2], 1):
        adapted(base, tmp_path / str(number), **own)
    prompt = sequences()[8]
    assert len(prompt) == 300

    def scored(slot: int) -> tuple[np.ndarray, int]:
        result = engine.score(with_adapters([prompt, [*prompt, 5]], np.array([slot, slot], np.int32)))
        return result.values, int(result.computed_tokens.sum())

    engine.load_adapter(1, tmp_path / "1")
    first, cold = scored(1)
    assert scored(1)[1] < cold, "its own pages are"
    assert scored(0)[1] == cold
    engine.load_adapter(1, tmp_path / "2")
    second, computed = scored(1)
    assert computed == cold
    assert np.abs(second - first).max() > 0.1
    engine.load_adapter(2, tmp_path / "1")
    np.testing.assert_array_equal(scored(2)[0], first)


def test_what_cannot_be_beside_a_base_is_refused_by_name(tmp_path: Path) -> None:
    base = make_family(tmp_path / "base", "qwen2")
    engine = loading.load(base, lora=ROOM, **SIZES)
    cases: dict[str, dict[str, Any]] = {
        "rank 40, and there is room for 32; set max_adapter_rank to 40": {"r": 40, "target_modules": ["q_proj"]},
        "no place: base_model.model.lm_head": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        "use_dora": {"target_modules": ["q_proj"], "use_dora": True},
    }
    for number, (message, options) in enumerate(cases.items()):
        adapted(base, tmp_path / str(number), **options)
        with pytest.raises(ValueError, match=message):
            engine.load_adapter(1, tmp_path / str(number))
    with pytest.raises(ConfigError, match=r"has no adapter_config\.json"):
        engine.load_adapter(1, base)
    with pytest.raises(ValueError, match="no adapter in slot 1"):
        engine.score(with_adapters([[1, 2]], np.array([1], np.int32)))
    with pytest.raises(ValueError, match="without room for adapters"):
        loading.load(base, **SIZES).load_adapter(1, tmp_path / "0")
