"""Counts the bundles of the loops of kernels: Pallas' and libtpu's own for experts. libtpu gives no cycles of these.

A bundle is one instruction of the chip's core and takes a cycle at least: a loop's bundles times its runs are a lower
bound of its time. libtpu writes a kernel's final program into a folder if its flags ask for it when it is loaded, so
this compiles in a process of its own.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cache, partial
from itertools import islice
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import SingleDeviceSharding

from model import attention_tpu, rotary_tpu
from model.contract import PAGE_TOKENS
from model.layers import Heads, RMSNorm
from scripts.planning.chips import devices

_LINE = re.compile(r"\s*(?:0x[0-9a-f]+|\d+)\s+([A-Z]{2})?\s*:\s*(>*)")
DUMP_FLAGS = ("--xla_jf_dump_llo_text=true", "--xla_jf_dump_llo_pass_label_regex=final_bundles")
"""libtpu's, by which it writes finished programs."""
_SMALLEST = 200
"""Bundles of the smallest loop that is a fold; others copy a few rows."""


@dataclass(frozen=True, slots=True)
class Kernel:
    """All that the kernel's loops depend on.

    Attributes:
        chip: a key of ``chips.CHIPS``.
        width: tokens of a bin.
        groups: query heads of a key/value head.
        head_width: channels of a head.
    """

    chip: str
    width: int
    groups: int
    head_width: int
    windowed: bool
    softcap: float | None


@dataclass(frozen=True, slots=True)
class Product:
    """An experts' product, see ``model.cost.Ragged``."""

    chip: str
    rows: int
    groups: int
    into: int
    out: int


@cache
def fold_bundles(kernel: Kernel) -> attention_tpu.Folds:
    """Bundles of one run of each of the kernel's loops, in bfloat16; of those that are one field together, the sum.

    Raises:
        RuntimeError: the kernel does not compile, or its program has not the loops that it should have.
    """
    found, expected = list(loops(_program("fused_attention", kernel))), attention_tpu.loops(kernel.width)
    if len(found) != sum(expected):
        raise RuntimeError(f"the kernel's program for {kernel} has folds of {found} bundles; expected are {expected}")
    rest = iter(found)  # in the order of the kernel's text
    return attention_tpu.Folds(*(sum(islice(rest, count)) for count in expected))


@cache
def visit_bundles(product: Product) -> int:
    """Bundles of one step of the kernel's loop: a tile of rows through a part of one expert's kernel, in bfloat16.

    Raises:
        RuntimeError: it does not compile.
    """
    return sum(1 for line in _program("ragged-dot-none", product).splitlines() if _depth(line) > 0)


@dataclass(frozen=True, slots=True)
class Rotary:
    """All that the loop of the kernel of queries and keys depends on.

    Attributes:
        chip: a key of ``chips.CHIPS``.
        heads: of queries.
        head_width: channels of a head.
        rotary_width: those that are rotated.
        normed: each head has a norm.
    """

    chip: str
    heads: int
    kv_heads: int
    head_width: int
    rotary_width: int
    normed: bool


@cache
def rotary_bundles(kernel: Rotary) -> int:
    """Bundles of one run of the loop: ``rotary_tpu.FOLD_TOKENS`` tokens, in bfloat16. What the compiler has put before
    and after a short loop counts in each run.

    Raises:
        RuntimeError: the kernel does not compile, or its program has no such loop.
    """
    found = sum(1 for line in _program(rotary_tpu.NAME, kernel).splitlines() if _depth(line) >= 2)
    if not found:
        raise RuntimeError(f"the kernel's program for {kernel} has no loop in that over its grid")
    return found


def _depth(line: str) -> int:
    """How many loops a line of a kernel's program is in."""
    found = _LINE.match(line)
    return len(found[2]) if found else 0


def _program(name: str, kernel: Kernel | Product | Rotary) -> str:
    """The final program of the kernel with this name."""
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {"LIBTPU_INIT_ARGS": " ".join((f"--xla_jf_dump_to={folder}", *DUMP_FLAGS))}
        command = [sys.executable, "-m", "scripts.planning.bundles", type(kernel).__name__, json.dumps(asdict(kernel))]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"the kernel {name} does not compile for {kernel}:\n{done.stderr[-2000:]}")
        (file,) = (each for each in Path(folder).glob(f"*{name}*final_bundles.txt") if "schedule" not in each.name)
        return file.read_text()


def loops(program: str) -> Iterator[int]:
    """Bundles of each loop in the kernel's loop over its grid that does more than copy, without loops within it."""
    count = 0
    for line in program.splitlines():
        if not (found := _LINE.match(line)):
            continue
        label, depth = found[1], len(found[2])
        if label in ("LB", "PF") or depth < 2:
            if count >= _SMALLEST:
                yield count
            count = int(label == "LB" and depth == 2)
        elif count:
            count += 1


def _compile_attention(kernel: Kernel) -> None:
    here = SingleDeviceSharding(devices(kernel.chip, "1x1")[0])

    def array(shape: tuple[int, ...], dtype: jnp.dtype | type = jnp.int32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=here)

    # More than a tile, or a loop of one trip is none.
    tokens, kv_heads = 2 * max(kernel.width, attention_tpu.TILE_TOKENS // kernel.width * kernel.width), 2
    stored = attention_tpu.stored_width(kernel.head_width)
    window = array(()) if kernel.windowed else None

    def attention(
        *heads_places_pool: jax.Array, tables: jax.Array, lengths: jax.Array, layer: jax.Array, window: Any = None
    ) -> jax.Array:
        *_, segments, _, prefixes, _ = heads_places_pool
        steps = attention_tpu.steps(segments, prefixes, tables, lengths, PAGE_TOKENS, window)
        return attention_tpu.fused(*heads_places_pool, steps, layer, window, kernel.softcap, interpret=False)

    heads = [array((tokens, count, kernel.head_width), jnp.bfloat16) for count in (kernel.groups * kv_heads, 2, 2)]
    places = array((tokens // kernel.width, kernel.width)), array((tokens,)), array((tokens,))
    pool = array((8, 1, 2, kv_heads, PAGE_TOKENS, stored), jnp.uint16)
    prefixes = {"tables": array((2, 9)), "lengths": array((2,)), "layer": array(()), "window": window}
    jax.jit(attention).lower(*heads, *places, pool, **prefixes).compile()


def _compile_product(product: Product) -> None:
    here = SingleDeviceSharding(devices(product.chip, "1x1")[0])

    def array(*shape: int, dtype: Any = jnp.bfloat16) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=here)

    rows, sizes = array(product.rows, product.into), array(product.groups, dtype=jnp.int32)
    through: Any = partial(lax.ragged_dot, preferred_element_type=jnp.float32)
    jax.jit(through).lower(rows, array(product.groups, product.into, product.out), sizes).compile()


def _compile_rotary(kernel: Rotary) -> None:
    here, tokens = SingleDeviceSharding(devices(kernel.chip, "1x1")[0]), 4 * rotary_tpu.TILE_TOKENS

    def array(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=here)

    def both(q: jax.Array, k: jax.Array, *angles: jax.Array) -> list[jax.Array]:
        norm = RMSNorm(kernel.head_width, eps=1e-6, dtype=jnp.dtype(jnp.bfloat16)) if kernel.normed else None
        parts = Heads(q, kernel.heads, norm, 0.1), Heads(k, kernel.kv_heads, norm, 1.0)
        return rotary_tpu.rotated(parts, (angles[0], angles[1]), jnp.bfloat16, interpret=False)

    projections = [array(tokens, heads * kernel.head_width) for heads in (kernel.heads, kernel.kv_heads)]
    jax.jit(both).lower(*projections, *[array(tokens, kernel.rotary_width // 2)] * 2).compile()


if __name__ == "__main__":
    _, kind, told = sys.argv
    fields = json.loads(told)
    if kind == Kernel.__name__:
        _compile_attention(Kernel(**fields))
    elif kind == Rotary.__name__:
        _compile_rotary(Rotary(**fields))
    else:
        _compile_product(Product(**fields))
