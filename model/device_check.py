"""Whether a device computes what was compiled for it: its attention beside a plain softmax, and its programs' time.

A compiler's mistake, or a kernel that hangs on a chip, is found before the first request.
"""

import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from model import decoder
from model.attention import FOLD_PREFIX, NATIVE, AttentionContext, MaskSpec, attend, query_factor, to_pool
from model.computations import WHOLE, Argument, Definition, Kind, Model, Size, definition
from model.contract import PAGE_TOKENS, Progress, TokenBatch
from model.cost import CLOCKS, Rates, hlo_cost
from model.plan import Shape
from model.programs import Programs
from model.sharding import DATA, MODEL, put
from model.versions import versions

ALLOWED = {"float32": 1e-4, "bfloat16": 0.03}
"""Largest difference between a kernel and the plain softmax, whose values are of the order of 1. Of two sums over a
thousand keys, in another order: 3e-6 in float32, 0.02 with bfloat16 operands and results. A wrong mask or page: 0.1 and
more."""
PREFIX_PAGES = 5
PREFIXES = ((0,), (PREFIX_PAGES * PAGE_TOKENS - 3,), (PREFIX_PAGES * PAGE_TOKENS - 3, PAGE_TOKENS + 2))
"""Tokens of the prefixes that are compared: none, several pages of which the last is not full, and these and others in
one call."""
FAR = 20
"""How much longer some keys are than the others. Their scores are 100 and more above, where TPUs fold again."""
SHORT = 3
"""Runs of a program; the quickest is its time."""


class DeviceError(RuntimeError):
    """The device's results are wrong."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """The attention of one call beside a plain softmax.

    Attributes:
        implementation: of attention, see ``model.attention``.
        shape: of the call, bins x positions.
        prefix_tokens: tokens of the prefixes that the call's segments see in turn.
        window: None: none.
        difference: the largest; infinite where one of both is not a number.
        allowed: the largest that rounding explains.
    """

    implementation: str
    shape: str
    prefix_tokens: list[int]
    window: int | None
    difference: float
    allowed: float

    @property
    def prefixes(self) -> str:
        """Their tokens, to be read."""
        return " and ".join(map(str, self.prefix_tokens))

    @property
    def right(self) -> bool:
        return self.difference <= self.allowed


def has_own_kernel(model: Model) -> bool:
    """True if its attention is a kernel for an accelerator. The CPU's is built from C++ and tried when it is."""
    return model.implementation not in (NATIVE, *FOLD_PREFIX)


def prove(programs: Programs) -> None:
    """Compare the kernel of the smallest calls.

    Raises:
        DeviceError: its results are wrong.
    """
    for found in compare(programs, programs.model.layout.ladder[:1]):
        if not found.right:
            device = jax.devices()[0].device_kind
            installed = ", ".join(f"{name} {number}" for name, number in versions().items())
            window = "" if found.window is None else f" and a window of {found.window}"
            raise DeviceError(
                f"attention {found.implementation!r} computes wrong values on this device ({device}; {installed}): it "
                f"differs from a plain softmax by {found.difference:.2g}, and rounding explains {found.allowed:g} "
                f"(calls of {found.shape}, prefixes of {found.prefixes} tokens{window}); score-serve tpu-check or "
                "gpu-check tells more; use other versions of jax and of the device's libraries"
            )


def compare(programs: Programs, shapes: Sequence[Shape]) -> Iterator[Comparison]:
    """Run attention with the model's heads on random numbers, as calls of these shapes, on all devices."""
    model, implementation = programs.model, programs.model.implementation
    windows = sorted(set(decoder.windows(model.config) or ()))

    def built(shape: Shape) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        arrays = _inputs(model, shape)
        arguments = tuple(Argument(jax.ShapeDtypeStruct(np.shape(array), array.dtype), WHOLE) for array in arrays)
        one = Definition(partial(_difference, model, implementation, bool(windows)), arguments, WHOLE)
        return programs.compiler.build(f"{implementation} attention, compared", one), arrays

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        runs = list(pool.map(built, shapes))
    for shape, (run, arrays) in zip(shapes, runs, strict=True):
        for window in windows or [decoder.EVERYTHING]:
            for lengths in PREFIXES if model.layout.prefixes > 1 else PREFIXES[:-1]:
                given = (*arrays[:-2], np.array(window, np.int32), np.array([*lengths, 0][:2], np.int32))
                placed = jax.device_put(given) if model.mesh is None else put(given, (WHOLE,) * len(given), model.mesh)
                yield Comparison(
                    implementation,
                    str(shape),
                    list(lengths),
                    None if window == decoder.EVERYTHING else window,
                    float(run(*placed)),
                    ALLOWED[model.dtype.name],
                )


def _inputs(model: Model, shape: Shape) -> tuple[Any, ...]:
    """Queries, keys, values, pages, segments, positions, window and lengths of two prefixes of one call."""
    c, rng = model.config, np.random.default_rng(0)
    place = np.arange(shape.width)
    long = max(1, shape.width * 2 // 5)
    segments = np.arange(shape.bins)[:, None] * shape.width + place[None, :] // long
    segments[:, shape.width - shape.width // 16 :] = -1
    positions = np.broadcast_to(place % long, segments.shape)

    def normal(*dims: int) -> Any:
        return rng.normal(0, 1, dims).astype(model.dtype)

    pages = normal(PREFIX_PAGES + 1, 1, 2, c.kv_heads, PAGE_TOKENS, model.layout.pool.shape[-1])
    pages[..., c.head_width :] = 0  # as heads are widened in the pool
    pages[1, :, 0, :, ::64] *= FAR  # the last of one prefix, in a step of its own, and the first of another
    return (
        (rng.normal(0, 2, (shape.tokens, c.heads, c.head_width)) * c.head_width**-0.5).astype(model.dtype),
        normal(shape.tokens, c.kv_heads, c.head_width),
        normal(shape.tokens, c.kv_heads, c.head_width),
        pages,
        segments.astype(np.int32),
        positions.reshape(-1).astype(np.int32),
        np.array(0, np.int32),
        np.zeros(2, np.int32),
    )


def _difference(
    model: Model,
    implementation: str,
    windowed: bool,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    pages: jax.Array,
    segments: jax.Array,
    positions: jax.Array,
    window: jax.Array,
    lengths: jax.Array,
) -> jax.Array:
    """The largest difference of both, on all devices. The second prefix is empty where all see the first."""
    spec = MaskSpec(window if windowed else None, model.config.attention_softcap)
    seen = min(model.layout.prefixes, 2)
    tables = jnp.zeros((model.layout.prefixes, PREFIX_PAGES), jnp.int32)
    tables = tables.at[:seen].set(jnp.stack([jnp.arange(PREFIX_PAGES, 0, -1), jnp.arange(1, PREFIX_PAGES + 1)])[:seen])
    which = jnp.where(segments.reshape(-1) % 2 == 1, jnp.minimum(lengths[1], 1), 0)
    of_all = jnp.zeros(model.layout.prefixes, jnp.int32).at[:seen].set(lengths[:seen])
    kept = AttentionContext(segments, positions + lengths[which], which, to_pool(pages), tables, of_all)
    found = attend(q, k, v, kept, 0, spec, implementation=implementation)
    exact = kept._replace(pool=pages[..., : model.config.head_width].astype(jnp.float32))
    wanted = jnp.zeros(found.shape, jnp.float32)
    with jax.default_matmul_precision("highest"):
        q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
        q = q / query_factor(implementation)
        for number in range(seen):
            own = tables[number : number + 1], lengths[number : number + 1]
            alone = exact._replace(positions=positions + lengths[number], page_tables=own[0], prefix_lengths=own[1])
            mine = (which == number)[:, None, None]
            wanted = jnp.where(mine, attend(q, k, v, alone, 0, spec, implementation="reference"), wanted)
    differences = jnp.abs(found.astype(jnp.float32) - wanted)
    differences = jnp.where(jnp.isnan(differences), jnp.inf, differences)  # XLA's maximum may pass over NaN
    differences = jnp.where(segments.reshape(-1, 1, 1) >= 0, differences, 0)
    largest = jnp.max(differences)
    return largest if model.mesh is None else jax.lax.pmax(largest, (DATA, MODEL))


def first_batch(programs: Programs) -> TokenBatch:
    """A batch that runs programs of all kinds: three prompts that begin alike, read for two tokens and the top one."""
    model = programs.model
    query = max(0, min(model.layout.longest - 2, 2 * PAGE_TOKENS + 40))
    ids = np.arange(query, dtype=np.int32) % min(model.config.vocab_size, 1000)
    rows = [np.append(ids, np.arange(count + 1, dtype=np.int32))[: model.layout.longest] for count in range(3)]
    lengths = np.array([len(row) for row in rows])
    causal = not model.config.classes and not model.config.decision_head
    return TokenBatch(
        tokens=np.concatenate(rows).astype(np.int32),
        offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        read_sequences=np.arange(3, dtype=np.int32),
        read_positions=(lengths - 1).astype(np.int32),
        targets=np.zeros(3, np.int32),
        target_offsets=np.arange(4, dtype=np.int64),
        vocab_logprobs=causal,
        argmax=causal,
    )


@dataclass(frozen=True, slots=True)
class Timing:
    """The time of one run of a program, in seconds.

    Attributes:
        expected: what libtpu's model expects its operations to take, without the attention kernel and sums over chips;
            None: the compiler does not say, or the chip's clock is not known.
        kernels: how often it runs the attention kernel.
    """

    program: str
    seconds: float
    expected: float | None
    kernels: int


def timings(programs: Programs, progress: Progress | None = None) -> Iterator[Timing]:
    """Compile every program, and run each over the weights and zeros, without a prefix."""
    model = programs.model
    programs.compiler.compile_all(programs.wanted(), progress)
    device = jax.devices()[0].device_kind
    clock = CLOCKS.get(device)
    for kind, size in programs.wanted():
        run: Any = programs.compiler.get(kind, size)
        expected, kernels = None, 0
        if clock and (text := run.as_text()):
            trips = model.config.layers - 1
            cost, kernels = hlo_cost(text, trips=trips, rates=Rates.of(device))
            expected = sum(cost.cycles.values()) / clock if cost.cycles else None
        yield Timing(f"{kind} {size}", _quickest(programs, kind, size, run), expected, kernels)


def _quickest(programs: Programs, kind: Kind, size: Size, run: Callable[..., Any]) -> float:
    one = definition(programs.model, programs.weights, kind, size)
    _, shapes, _ = programs.compiler.on_all_devices(one)
    weights = [programs.weights.ends, programs.weights.layers[0]]

    def made(shape: Any) -> Any:
        known = [each for each in weights if jax.tree.structure(each) == jax.tree.structure(shape)]
        return known[0] if known else jax.tree.map(_zeros, shape)

    best = float("inf")
    for _ in range(SHORT):
        given = jax.block_until_ready([made(shape) for shape in shapes])  # a program may overwrite its arguments
        started = time.perf_counter()
        jax.block_until_ready(run(*given))
        best = min(best, time.perf_counter() - started)
    return best


def _zeros(leaf: Any) -> jax.Array:
    return leaf if isinstance(leaf, jax.Array) else jnp.zeros(leaf.shape, leaf.dtype, device=leaf.sharding)
