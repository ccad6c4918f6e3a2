"""The attention kernel and every kind of program compile for each TPU chip, on a machine without one.

A program that libtpu compiles fits the chip's memories. ``test_programs`` has what programs of real models cost.
"""

import importlib.util
from dataclasses import replace
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import SingleDeviceSharding

from model.attention import AttentionContext, MaskSpec, attend
from model.attention_tpu import stored_width
from model.computations import Kind, Weights, stack_of
from model.contract import PAGE_TOKENS
from model.families.registry import from_hf
from model.loading import choose
from model.programs import Programs
from model.sharding import mesh
from model.sizes import CALL_PREFIXES, Sizes
from scripts.planning.chips import devices
from tests.described_devices import without_cache  # noqa: F401 - a fixture
from tests.tiny_families import config_of

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="NOTHING IS COMPILED FOR TPU: libtpu is not installed; the extras test and tpu-compile bring it",
)

SMALLEST = {"v4": "2x2x1", "v5e": "2x2", "v5p": "2x2x1", "v6e": "2x2", "tpu7x": "2x2x1"}
"""Each chip's smallest slice of several, whose first device stands for a single one. All but the v6e have, or are, one
of two cores, or another shape of the matrix unit."""
SLOTS = 131_072 // PAGE_TOKENS + 1
"""Of the page tables of a model that reads 131,072 tokens: all of a call lie in a core's scalar memory."""
Dtype = Literal["float32", "bfloat16"]


class Kernel(NamedTuple):
    """What a kernel is compiled for."""

    chip: str
    dtype: Dtype = "bfloat16"
    head_width: int = 128
    groups: int = 2
    bins: int = 4
    width: int = 256
    windowed: bool = False
    softcap: float | None = None

    def __str__(self) -> str:
        rule = f"{' window' * self.windowed}{' cap' * (self.softcap is not None)}"
        return f"{self.chip} {self.dtype} head {self.head_width} groups {self.groups} {self.bins}x{self.width}{rule}"


GEMMA: dict[str, Any] = {"head_width": 256, "windowed": True, "softcap": 50.0}
KERNELS = [
    *(Kernel(chip) for chip in SMALLEST),
    *(Kernel(chip, "float32") for chip in SMALLEST),
    *(Kernel(chip, **GEMMA) for chip in SMALLEST),
    *(Kernel(chip, groups=groups) for chip in ("v5e", "v6e") for groups in (1, 4, 7, 8)),
    Kernel("v5e", "float32", groups=8, **GEMMA),
    *(Kernel("v6e", head_width=head_width) for head_width in (64, 80)),
    Kernel("v4", groups=4, width=768),
    Kernel("v4", "float32", width=768),
    *(Kernel("v6e", bins=bins, width=width) for bins, width in ((1, 128), (9, 128), (3, 384), (2, 1024), (2, 2048))),
]


def compile_kernel(kernel: Kernel) -> None:
    here = SingleDeviceSharding(devices(kernel.chip, SMALLEST[kernel.chip])[0])
    dtype, kv_heads, tokens = jnp.dtype(kernel.dtype), 2, kernel.bins * kernel.width

    def array(*shape: int, dtype: Any = jnp.int32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=here)

    heads = kernel.groups * kv_heads, kv_heads, kv_heads
    q, k, v = (array(tokens, count, kernel.head_width, dtype=dtype) for count in heads)
    stored = jnp.uint16 if dtype == jnp.bfloat16 else dtype
    pool = array(16, 3, 2, kv_heads, PAGE_TOKENS, stored_width(kernel.head_width), dtype=stored)
    segments = array(kernel.bins, kernel.width)
    tables = array(CALL_PREFIXES, SLOTS), array(CALL_PREFIXES)
    context = AttentionContext(segments, array(tokens), array(tokens), pool, *tables)

    def attention(q: Any, k: Any, v: Any, context: AttentionContext, layer: Any, window: Any) -> jax.Array:
        rule = MaskSpec(window if kernel.windowed else None, kernel.softcap)
        return attend(q, k, v, context, layer, rule, implementation="fused")

    with jax.default_matmul_precision("highest" if kernel.dtype == "float32" else "default"):
        compiled = jax.jit(attention).lower(q, k, v, context, array(), array()).compile()
    assert "[<=" not in compiled.as_text(), "a dynamic shape"


def test_the_kernel_compiles() -> None:
    compile_kernel(Kernel("tpu7x"))


@pytest.mark.slow
@pytest.mark.parametrize("kernel", KERNELS, ids=str)
def test_every_kind_of_kernel_compiles(kernel: Kernel) -> None:
    compile_kernel(kernel)


class Built(NamedTuple):
    """The programs of a tiny model on some chips."""

    chip: str
    family: str = "llama"
    dtype: Dtype = "bfloat16"
    int8: bool = False
    data: int = 1

    def __str__(self) -> str:
        return f"{self.family} {self.dtype}{' int8' * self.int8} on {self.chip}, data {self.data}"


SIZES = Sizes(
    max_segment_tokens=256,
    call_tokens=512,
    chunks=(256,),
    head_sizes=(8,),
    argmax_sizes=(8,),
    target_sizes=(8,),
    prefix_cache_bytes=2**20,
    large_calls=True,
)
BUILT = [
    *(Built(chip) for chip in SMALLEST),
    *(Built(chip, dtype="float32") for chip in ("v5e", "v6e")),
    *(Built(chip, "qwen3", "float32") for chip in ("v5e", "v6e")),  # with norms of each head
    *(Built(chip, int8=True) for chip in ("v5e", "v6e", "tpu7x")),
    *(Built("v6e", family) for family in ("gemma2", "phi3-longrope", "qwen3_moe")),
    *(Built(chip, data=4) for chip in ("v5e", "v6e")),
    Built("v6e", int8=True, data=4),
]


def compile_programs(built: Built, *only: Kind) -> None:
    """Compile the smallest program of each kind that an engine can call, or of the kinds in ``only``."""
    chips = devices(built.chip, SMALLEST[built.chip])[: built.data]
    model = choose(
        replace(from_hf(config_of(built.family)), int8=built.int8),
        dtype=built.dtype,
        implementation="fused",
        by_layer=False,
        max_prompt_tokens=None,
        sizes=SIZES,
        mesh=mesh(built.data, 1, chips),
    ).model
    shapes = Weights(model.abstract.ends[1], [stack_of(model.abstract.block[1], model.config.layers)])
    programs = Programs(model, shapes)
    smallest = dict(reversed(programs.wanted()))
    assert {Kind.SEGMENTS, Kind.PREFILL, Kind.WRITE} < smallest.keys()
    for kind in only or smallest:
        compiled = programs.compiler.trace(kind, smallest[kind]).lower().compile()
        text = compiled.as_text()
        assert "[<=" not in text, f"a dynamic shape in {kind}"
        # Calls that run side by side share no sum: they only tell each other what was read.
        assert "all-reduce" not in text, kind
        if kind == Kind.WRITE:
            assert compiled.memory_analysis().alias_size_in_bytes >= model.layout.pool_bytes, "the pool is copied"


def test_float32_with_norms_of_each_head_compiles() -> None:
    """Products then have a precision by default that only takes float32, and the norms' are of bfloat16."""
    compile_programs(Built("v6e", "qwen3", "float32"), Kind.SEGMENTS)


def test_the_programs_of_four_data_parallel_chips_compile() -> None:
    compile_programs(Built("v6e", data=4), Kind.WRITE)


@pytest.mark.slow
@pytest.mark.parametrize("built", BUILT, ids=str)
def test_every_kind_of_program_compiles(built: Built) -> None:
    compile_programs(built)
