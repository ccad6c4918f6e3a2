"""The engine's programs for GPUs compile for described cards, on a machine without one.

Nothing runs here: the CUDA compiler that comes with jax's plugin compiles, and refuses what a card cannot hold.
"""

import re
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import SingleDeviceSharding

from model.attention_gpu import KERNEL, paged_attention, stored_width
from model.computations import Kind
from model.config import ModelConfig
from model.contract import PAGE_TOKENS
from model.families.registry import from_hf
from model.loading import without_weights
from model.memory import Room
from model.sharding import mesh
from model.sizes import BY_PLATFORM
from tests.described_devices import QWEN3_06B_JSON, without_cache  # noqa: F401 - a fixture
from tests.gpu_compile.cards import MISSING, card

pytestmark = pytest.mark.skipif(
    bool(MISSING),
    reason=f"NOTHING IS COMPILED FOR GPU: {', '.join(MISSING)} is missing; docs/gpu.md says how to add it",
)

QWEN3_06B = from_hf(QWEN3_06B_JSON)


def kernels(hlo: str) -> int:
    """How many times a compiled program has the attention kernel; a loop's body counts once."""
    return len(re.findall(rf'custom_call_target="__gpu\$xla\.gpu\.triton".*{KERNEL}', hlo))


def launched(hlo: str) -> int:
    """Kernels and copies that a compiled program launches; those of a loop's body count once."""
    (body,) = set(re.findall(r"body=%([\w.\-]+)", hlo))
    parts = re.findall(rf"^(?:ENTRY |%{re.escape(body)} ).*?^}}$", hlo, re.MULTILINE | re.DOTALL)
    return sum(len(re.findall(r" (?:fusion|custom-call|copy)\(", part)) for part in parts)


@pytest.mark.parametrize("name", ["h100", "a6000", pytest.param("a100", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("head_width", "dtype", "window", "softcap", "pages"),
    [
        (128, jnp.bfloat16, False, None, 64),
        (256, jnp.bfloat16, True, 50.0, 64),
        pytest.param(80, jnp.bfloat16, False, None, 64, marks=pytest.mark.slow),
        pytest.param(64, jnp.bfloat16, True, None, 64, marks=pytest.mark.slow),
        pytest.param(128, jnp.bfloat16, False, None, 4096, marks=pytest.mark.slow, id="a pool of 60 GB"),
        pytest.param(128, jnp.float32, False, None, 64, marks=pytest.mark.slow),
        pytest.param(256, jnp.float32, True, 50.0, 64, marks=pytest.mark.slow),
    ],
)
def test_the_kernel_compiles_for_cards(
    name: str, head_width: int, dtype: Any, window: bool, softcap: float | None, pages: int
) -> None:
    """On the smaller cards 99 KB of shared memory are the bound."""
    sharding = SingleDeviceSharding(card(name))

    def array(*shape: int, dtype: Any = jnp.int32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    def attend(*arrays: jax.Array) -> jax.Array:
        return paged_attention(*arrays[:-1], arrays[-1] if window else None, softcap, interpret=False)

    tokens, heads, kv_heads = 4160, 16, 8
    stored = jnp.uint16 if dtype == jnp.bfloat16 else dtype
    compiled = (
        jax.jit(attend)
        .lower(
            array(tokens, heads, head_width, dtype=dtype),
            *[array(tokens, kv_heads, head_width, dtype=dtype)] * 2,
            *[array(tokens)] * 4,
            array(pages, 28, 2, kv_heads, PAGE_TOKENS, stored_width(head_width), dtype=stored),
            array(64, 65),
            array(64),
            array(),
            array(),
        )
        .compile()
    )
    assert kernels(compiled.as_text()) == 1
    widened = 0 if stored_width(head_width) == head_width else tokens * (2 * heads + 2 * kv_heads) * 128 * 2
    assert compiled.memory_analysis().temp_size_in_bytes < 100_000 + widened, "no scores, and no copy of the pool"


def h100(config: ModelConfig, dtype: Any = "bfloat16") -> Any:
    room = Room(int(0.9 * 84_942_979_072), "each H100", on_host=False)
    programs, laid = without_weights(
        config,
        mesh(1, 1, [card("h100")]),
        BY_PLATFORM["gpu"],
        dtype=dtype,
        implementation="triton",
        max_prompt_tokens=8192,
        room=room,
    )
    assert room.free * 0.3 < laid.pool_bytes < room.free * 0.5, "pages have their share of the card's memory"
    return programs, laid


def test_segments_of_a_whole_model_compile_to_few_kernels() -> None:
    programs, laid = h100(QWEN3_06B)
    assert len(programs.wanted()) <= 33, "each is compiled at the first start"
    call = laid.ladder[-1]
    compiled = programs.compiler.trace(Kind.SEGMENTS, call).lower().compile()
    hlo = compiled.as_text()
    assert kernels(hlo) == 2, "one in the loop's body, and the last layer's"
    assert 50 < launched(hlo) <= 66
    memory = compiled.memory_analysis()
    used = memory.argument_size_in_bytes + memory.temp_size_in_bytes + memory.output_size_in_bytes
    assert used < 84_942_979_072
    assert memory.temp_size_in_bytes < 40_000 * call.tokens, "no array of scores, no copy of the pool"


@pytest.mark.slow
def test_all_programs_compile_and_float32_is_multiplied_in_full_precision() -> None:
    config = replace(QWEN3_06B, layers=2)
    for kind, size in h100(config)[0].wanted():
        h100(config)[0].compiler.trace(kind, size).lower().compile()
    programs, laid = h100(config, "float32")
    lowered = programs.compiler.trace(Kind.SEGMENTS, laid.ladder[0]).lower()
    products = re.findall(r"stablehlo\.dot_general .*", lowered.as_text())
    assert products
    assert all("precision = [HIGHEST, HIGHEST]" in product for product in products)
    assert "algorithm=dot_tf32" not in lowered.compile().as_text()
