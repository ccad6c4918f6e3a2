"""Which context and how many pages an engine chooses in the memory that is free, and what it refuses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import jax
import pytest
from safetensors.numpy import save_file

from model import loading
from model.families.registry import from_hf
from model.loading import Choice, choose
from model.memory import GB, PROCESS_BYTES, SHARE, MemoryNeededError, Room, rounded
from model.sizes import BY_PLATFORM
from model.tensors.safetensors_files import SINGLE
from tests.tiny import make_llama, write_json

SHARED: Mapping[str, Any] = {
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "num_key_value_heads": 8,
    "tie_word_embeddings": True,
}
LLAMA_1B = SHARED | {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 128_256,
    "hidden_size": 2048,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "head_dim": 64,
    "intermediate_size": 8192,
    "max_position_embeddings": 131_072,
}
QWEN3_06B = SHARED | {
    "architectures": ["Qwen3ForCausalLM"],
    "vocab_size": 151_936,
    "hidden_size": 1024,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "head_dim": 128,
    "intermediate_size": 3072,
    "max_position_embeddings": 40_960,
}
QWEN3_4B_2507 = QWEN3_06B | {
    "hidden_size": 2560,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "intermediate_size": 9728,
    "max_position_embeddings": 262_144,
}
PHI_35_MINI = {
    "architectures": ["Phi3ForCausalLM"],
    "vocab_size": 32_064,
    "hidden_size": 3072,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "intermediate_size": 8192,
    "max_position_embeddings": 131_072,
    "original_max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "rope_scaling": {"type": "longrope", "short_factor": [1.0] * 48, "long_factor": [2.0] * 48},
}


def chosen(
    config: Mapping[str, Any],
    free_gb: float | None,
    *,
    dtype: Literal["float32", "bfloat16"] = "float32",
    max_prompt_tokens: int | None = None,
    cache_gb: float | None = None,
    **room: Any,
) -> Choice:
    """What a CPU chooses for a model's shape."""
    return choose(
        replace(from_hf(config), native=True, packed=True),
        dtype=dtype,
        implementation="native",
        by_layer=True,
        sizes=BY_PLATFORM["cpu"],
        max_prompt_tokens=max_prompt_tokens,
        mesh=None,
        room=None if free_gb is None else Room(int(free_gb * GB), **room),
        cache_bytes=None if cache_gb is None else int(cache_gb * GB),
    )


# Weights, and pages for one prompt of the whole context, in GB.
WHOLE = {"llama": (LLAMA_1B, 4.94, 8.61), "qwen3": (QWEN3_06B, 2.38, 9.45), "qwen3-4b": (QWEN3_4B_2507, 16.09, 77.38)}
WHOLE["phi"] = (PHI_35_MINI, 15.28, 103.28)


@pytest.mark.parametrize("name", WHOLE)
def test_a_host_with_room_for_it_gives_a_prompt_of_the_whole_context(name: str):
    config, weights, pages = WHOLE[name]
    choice = chosen(config, 256)
    assert choice.model.layout.longest == config["max_position_embeddings"]
    assert choice.memory.weights / GB == pytest.approx(weights, abs=0.01)
    assert choice.memory.pages / GB == pytest.approx(pages, abs=0.01)


# Context and pages by the free memory; None: refused.
FITTING = [
    (LLAMA_1B, "float32", 8, 16_384, 1.09),
    (LLAMA_1B, "float32", 16, 65_536, 4.31),
    (LLAMA_1B, "bfloat16", 16, 131_072, 4.30),
    (QWEN3_06B, "float32", 8, 8_192, 1.94),
    (QWEN3_06B, "float32", 16, 24_576, 5.70),
    (QWEN3_4B_2507, "float32", 16, None, None),
    (QWEN3_4B_2507, "float32", 32, 24_576, 7.32),
    (QWEN3_4B_2507, "bfloat16", 16, 16_384, 2.45),
    (PHI_35_MINI, "float32", 16, None, None),
    (PHI_35_MINI, "float32", 32, 8_192, 6.64),
    (PHI_35_MINI, "bfloat16", 64, 65_536, 25.87),
]


@pytest.mark.parametrize(("config", "dtype", "free", "context", "pages"), FITTING)
def test_the_default_fits_into_its_share_of_what_is_free(
    config: Mapping[str, Any], dtype: Any, free: float, context: int | None, pages: float | None
):
    if context is None:
        with pytest.raises(MemoryNeededError):
            chosen(config, free, dtype=dtype)
        return
    choice = chosen(config, free, dtype=dtype)
    memory = choice.memory
    assert choice.model.layout.longest == context
    assert memory.pages / GB == pytest.approx(pages, abs=0.01)
    assert memory.page_tokens >= context
    assert memory.pages <= SHARE * (free * GB - memory.weights - memory.workspace)
    assert memory.free == free * GB


def test_engines_that_share_a_host_take_a_part_each():
    alone, beside = chosen(LLAMA_1B, 32).memory, chosen(LLAMA_1B, 32, sharers=2).memory
    assert alone.pages / GB == pytest.approx(8.61, abs=0.01)
    assert 2 * beside.total <= 32 * GB
    assert beside.pages / GB == pytest.approx(4.31, abs=0.01)


def test_a_replica_takes_the_context_of_the_others_or_does_not_start():
    assert chosen(LLAMA_1B, 16, context=16_384).model.layout.longest == 16_384
    with pytest.raises(MemoryNeededError, match="131,072 tokens"):
        chosen(LLAMA_1B, 12, context=131_072)


def test_what_is_asked_for_may_take_more_than_the_share():
    asked = chosen(LLAMA_1B, 16, max_prompt_tokens=131_072)
    assert asked.model.layout.longest == 131_072
    assert asked.memory.total < 16 * GB
    more = chosen(LLAMA_1B, 16, cache_gb=8)
    assert more.memory.pages / GB == pytest.approx(8, abs=0.01)
    assert chosen(LLAMA_1B, 8, max_prompt_tokens=1024).model.layout.longest == 1024


def test_what_is_asked_for_and_does_not_fit_is_refused_with_figures_and_a_remedy():
    with pytest.raises(MemoryNeededError) as refused:
        chosen(LLAMA_1B, 12, max_prompt_tokens=131_072)
    assert str(refused.value) == (
        "LlamaForCausalLM needs 14.4 GB of this host, and 12.0 GB are free: weights 4.9 GB, workspace 0.9 GB, and "
        "pages 8.6 GB for prompts of up to 131,072 tokens; set limits.max_prompt_tokens of at most 65,536, or dtype "
        "bfloat16, or quantization int8, or free memory, or take a larger machine"
    )
    assert chosen(LLAMA_1B, 12, max_prompt_tokens=65_536)  # the remedy works
    with pytest.raises(MemoryNeededError, match="or a smaller prefix_cache_gb"):
        chosen(LLAMA_1B, 12, cache_gb=10)


def test_a_model_that_is_in_bfloat16_already_is_not_told_to_be():
    with pytest.raises(MemoryNeededError) as refused:
        chosen(QWEN3_4B_2507, 8, dtype="bfloat16", on_host=False, where="each TPU v5 lite")
    assert "of each TPU v5 lite, and 8.0 GB are free" in str(refused.value)
    assert "set quantization int8, or take more chips, or larger ones" in str(refused.value)


def test_a_little_less_memory_leaves_the_same_programs():
    pools = {chosen(QWEN3_4B_2507, free / 10).model.layout.pool.shape for free in range(320, 340)}
    assert len(pools) == 1
    assert [rounded(n) for n in (-1, 0, 1, 2, 3, 5, 7, 9, 100, 131_071)] == [0, 0, 1, 2, 3, 4, 6, 8, 96, 98_304]


def test_the_whole_is_refused_before_any_weights_are_read(tmp_path: Path):
    """No tensor is there, which only shows when they are read."""
    write_json(tmp_path / "config.json", PHI_35_MINI)
    save_file({}, tmp_path / SINGLE)
    with pytest.raises(MemoryNeededError, match=r"needs 18\.8 GB of this host, and 4\.0 GB are free"):
        loading.load(tmp_path, room=Room(4_000_000_000))


@pytest.mark.heavy
def test_the_plan_is_what_an_engine_holds(tmp_path: Path):
    engine = loading.load(make_llama(tmp_path, context=8192), room=Room(PROCESS_BYTES + 10_000_000))
    memory = engine.info.memory
    assert memory is not None
    programs = engine._programs  # pyright: ignore[reportPrivateUsage]
    assert memory.weights == programs.weight_bytes
    pool: jax.Array = engine._pool  # pyright: ignore[reportPrivateUsage]
    assert memory.pages == pool.nbytes
    assert memory.page_tokens == engine.stats.prefix_pages * 128
    assert engine.info.max_prompt_tokens == 6144 < engine.info.context_length


@pytest.mark.parametrize(
    ("platform", "implementation", "free", "pages"),
    [
        # A v5e, a v6e and a v5p; an older default took 4.3 GB of each.
        pytest.param("tpu", "fused", 16, 5.6, id="v5e"),
        pytest.param("tpu", "fused", 32, 15.0, id="v6e"),
        pytest.param("tpu", "fused", 95, 45.1, id="v5p"),
        # 24, 80 and 141 GB, of which XLA holds 90%.
        pytest.param("gpu", "triton", 21.6, 7.5, id="24 GB"),
        pytest.param("gpu", "triton", 72, 30.1, id="80 GB"),
        pytest.param("gpu", "triton", 127, 60.1, id="141 GB"),
    ],
)
def test_a_device_keeps_as_many_pages_as_its_own_memory_allows(
    platform: str, implementation: str, free: float, pages: float
):
    choice = choose(
        from_hf(QWEN3_06B),
        dtype="bfloat16",
        implementation=implementation,
        by_layer=False,
        sizes=BY_PLATFORM[platform],
        max_prompt_tokens=None,
        mesh=None,
        room=Room(int(free * GB), "each device", on_host=False),
    )
    assert choice.memory.pages / GB == pytest.approx(pages, abs=0.1)
    assert choice.model.layout.longest == QWEN3_06B["max_position_embeddings"]
    assert choice.memory.pages < (free * GB - choice.memory.weights) / 2
