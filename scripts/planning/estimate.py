"""Estimates what a workload costs on a TPU, from programs compiled for it here.

The time is that of the compiled programs' instructions, plus the host's. The roofline beside it is FLOPs and bytes at
the chip's peaks: no program reaches it.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from model import attention_tpu, decoder, plan, prefill, rotary_tpu
from model.computations import Kind
from model.config import ModelConfig
from model.contract import PAGE_TOKENS
from model.cost import Cost, Ragged, program_cost
from model.families.registry import build
from model.loading import without_weights
from model.memory import MemoryNeededError, Room, roomiest
from model.pages import PrefixCache
from model.prefill import PinnedPrefix
from model.programs import Programs
from model.sharding import mesh, splits
from model.sizes import BY_PLATFORM, Layout
from scripts.benchmarks.work import Request, Sizes, Variant, floor_flops
from scripts.planning.bundles import Kernel, Product, Rotary, fold_bundles, rotary_bundles, visit_bundles
from scripts.planning.chips import CHIPS, HOST_BANDWIDTH, devices
from scripts.planning.host import host_cost
from scripts.planning.schedules import Schedules

DEAREST = 10
"""Operations that are named."""


@dataclass(frozen=True, slots=True)
class Workload:
    """One request: a query that no cache holds, and its items. The full-vocabulary log-probabilities of two labels are
    read, or a classifier's logits."""

    query_tokens: int
    items: int
    item_tokens: int

    def request(self) -> Request:
        """Random token ids, others at each call: only their lengths, and what they share, matter."""
        rng = np.random.default_rng()
        query = rng.integers(0, 2**31 - 1, self.query_tokens).tolist()
        items = rng.integers(0, 2**31 - 1, (self.items, self.item_tokens)).tolist()
        return Request(query, items, "", [], [])


class Launch(NamedTuple):
    """One run of a program."""

    kind: Kind
    size: Any
    prefix_length: int


class LaunchCost(NamedTuple):
    """The cost of one launch on one chip.

    Attributes:
        bundles: of the attention kernel's loops.
        experts, experts_worst: seconds of the experts' products, see ``experts_seconds``.
        memory: beyond the program's arguments, in bytes.
    """

    cost: Cost
    bundles: float
    experts: float
    experts_worst: float
    memory: int


@dataclass(frozen=True, slots=True)
class Estimate:
    """The estimate of one request on one topology; figures are one chip's unless they say otherwise.

    Attributes:
        data: calls that run at once, each on an equal share of the chips.
        missing_bytes: how much memory is lacking; 0 if it fits. If weights and prefix cache alone do not fit,
            nothing is compiled, and the attributes from ``cost`` on are None.
        roofline_seconds: the sum over launches of the larger of FLOPs / peak and bytes / bandwidth, plus the time
            in which the chip waits for collectives.
        collective_seconds: the time in which a chip waits for collectives.
        expected: the time by the programs' instructions and the host's measurement.
    """

    chips: int
    data: int
    bytes_per_chip: dict[str, int]
    missing_bytes: int
    floor_seconds: float
    launches: dict[str, int]
    cost: Cost | None = None
    roofline_seconds: float | None = None
    collective_seconds: float | None = None
    expected: Expected | None = None


@dataclass(frozen=True, slots=True)
class Expected:
    """The time of one request that comes alone, in seconds.

    Attributes:
        operations: of XLA's operations, see ``cost.hlo_cost``, of the collectives, and of the kernel of queries and
            keys, counted as attention's.
        modelled: the same with what libtpu's model expects of XLA's operations.
        counted: of the cycles of ``operations``, the share that is by finished programs.
        attention: of the kernel's loops, a cycle for each bundle of its program: it waits for nothing.
        experts: of libtpu's kernel for the products of experts, where tokens choose them at random.
        experts_worst: the same where they are chosen so that it takes longest.
        transfers: between host and chips, at ``HOST_BANDWIDTH``.
        host: of this machine's processor, see ``host.HostCost``.
        hidden: of the host's, while the chips compute.
        dearest: operations that take longest, and their seconds.
    """

    operations: float
    modelled: float
    counted: float
    attention: float
    experts: float
    experts_worst: float
    transfers: float
    host: float
    hidden: float
    dearest: Sequence[tuple[str, float]]

    @property
    def total(self) -> float:
        """All of it, one after the other but for what is hidden."""
        return self.operations + self.attention + self.experts + self.transfers + self.host - self.hidden


def launches(config: ModelConfig, laid: Layout, request: Request, at_once: int = 1) -> Counter[Launch]:
    """The programs that the engine would launch for a request, by its own planner.

    Args:
        at_once: calls of one launch.
    """
    sequences = [np.array(prompt, np.int32) for prompt in request.prompts]
    reads = [[len(prompt) - 1] for prompt in sequences]
    pages, found = PrefixCache(laid.pool.shape[0], laid.snapshot_slots), Counter[Launch]()
    for group in laid.groups(sequences, reads):
        prefix = sequences[group.prefix_of][: group.prefix_length]
        with pages.hold(prefix) as held:
            missing = PinnedPrefix(group, prefix, *held)
        for call in prefill.calls([missing], laid.sizes.chunks, laid.prefixes):
            found[Launch(Kind.PREFILL, call.size, call.pieces[0].start)] += 1
            found[Launch(Kind.WRITE, call.size, 0)] += 1
        for calls in plan.batch_calls(laid.calls([group]), at_once):
            found[Launch(Kind.SEGMENTS, calls[0].shape, group.prefix_length)] += 1
    reads_of_head = [(Kind.TARGETS, len(sequences) * (config.classes or 2), laid.sizes.target_sizes)]
    if not config.classes:
        reads_of_head.append((Kind.NORMALIZER, len(sequences), laid.sizes.head_sizes))
    for kind, count, sizes in reads_of_head:
        for _, size, _ in plan.blocks(count, sizes):
            found[Launch(kind, size, 0)] += 1
    return found


def floor_sizes(config: ModelConfig) -> Sizes:
    """The sizes from which the floor is computed."""
    return Sizes(
        width=config.width,
        layers=config.layers,
        heads=config.heads,
        kv_heads=config.kv_heads,
        head_width=config.head_width,
        ff_width=config.ff_width * max(1, config.experts_per_token) + config.shared_ff_width,
        vocab=config.classes or config.vocab_size,
        windows=decoder.windows(config) or (),
        gated=config.recurrence is not None,
        recurrence=config.recurrence,
    )


def floor_of(config: ModelConfig, request: Request) -> float:
    """The least floating-point operations that answer a request, see ``floor_flops``.

    An encoder computes the query again with each item, and each token sees all others; but in the last layer only what
    the classes are read from is needed.
    """
    if config.encoder is None:
        return floor_flops(Variant([request], None), floor_sizes(config))
    _, abstract = build(config, dtype=jnp.dtype("bfloat16"), implementation="paged")
    matmuls = sum(2 * leaf.size for leaf in jax.tree.leaves(abstract.block[1]) if leaf.ndim == 2)
    attention, keys_values = config.heads * config.head_width, 4 * config.width * config.heads * config.head_width
    lengths = np.array([len(prompt) for prompt in request.prompts], np.float64)
    reads = lengths if config.encoder.mean else np.ones_like(lengths)
    *windows, last = (min(2 * window - 1, 2**31) for window in decoder.windows(config) or (2**31,) * config.layers)
    seen = sum(lengths * np.minimum(lengths, window) for window in windows) + reads * np.minimum(lengths, last)
    linears = lengths * (config.layers - 1) * matmuls + lengths * keys_values + reads * (matmuls - keys_values)
    return float((linears + 4 * attention * seen).sum())


def trips(config: ModelConfig, kind: Kind, size: Any) -> int:
    """How often a program's loop runs: for each layer but the last; or for each page that is written."""
    return -(-size // PAGE_TOKENS) if kind is Kind.WRITE else config.layers - 1


def launch_cost(
    programs: Programs, config: ModelConfig, laid: Layout, launch: Launch, chip: str, schedules: Schedules | None
) -> LaunchCost:
    """The cost of one launch."""
    cost, runs, memory = _cost(
        programs, launch.kind, launch.size, trips(config, launch.kind, launch.size), chip, schedules
    )
    bundles = 0.0
    if runs:
        heads = config.heads // programs.model.config.shards
        tokens, width = (
            (launch.size, launch.size) if launch.kind is Kind.PREFILL else (launch.size.tokens, launch.size.width)
        )
        windows = (decoder.windows(config) or (None,) * config.layers)[:runs]
        for window in windows:
            cost += Cost(*attention_tpu.work(tokens, width, heads, laid.pool, launch.prefix_length, window))
        groups = config.heads // config.kv_heads
        kernel = Kernel(chip, width, groups, config.head_width, any(windows), config.attention_softcap)
        of_one = fold_bundles(kernel)
        *_, kv_heads, _, _ = laid.pool.shape
        for window in windows:
            folds = attention_tpu.folds(tokens, width, heads, laid.pool, launch.prefix_length, window)
            bundles += kv_heads * sum(count * each for count, each in zip(folds, of_one, strict=True))
        rotary_width = config.rotary_width or config.head_width
        rotary = Rotary(chip, heads, kv_heads, config.head_width, rotary_width, config.qk_norm == "head")
        rotations = runs * -(-tokens // rotary_tpu.FOLD_TOKENS) * rotary_bundles(rotary)
        own = rotations / CHIPS[chip].cores
        cost += Cost(cycles={rotary_tpu.NAME: own}, modelled=own, counted=own)
    expected, worst = 0.0, 0.0
    if cost.ragged:
        for product, count in cost.ragged.items():
            chosen = used_experts(config, product.rows // config.experts_per_token)
            expected += count * experts_seconds(product, chip, chosen)
            worst += count * experts_seconds(product, chip, min(config.experts, product.rows))
            cost += Cost(bytes=count * product.bytes(chosen))
    return LaunchCost(cost, bundles / CHIPS[chip].cores, expected, worst, memory)


def used_experts(config: ModelConfig, tokens: int) -> float:
    """How many of a layer's experts so many tokens choose, each at random."""
    return config.experts * (1 - (1 - config.experts_per_token / config.experts) ** tokens)


def experts_seconds(product: Ragged, chip: str, experts: float) -> float:
    """The time of a product in which so many experts have rows: that of its instructions, or of reading the kernels.

    Balance hardly matters, since a tile in which rows of two experts meet is multiplied for both: the worst is that all
    experts have rows.
    """
    bundles = visit_bundles(Product(chip, product.rows, product.groups, product.into, product.out))
    peaks = CHIPS[chip]
    cycles = bundles * product.visits(experts) / peaks.cores
    return max(cycles / peaks.clock, product.bytes(experts) / peaks.bandwidth)


@cache
def _compiled(programs: Programs, kind: Kind, size: Any) -> tuple[Any, Any]:
    """A program, traced and compiled."""
    traced = programs.compiler.trace(kind, size)
    try:
        return traced, traced.lower().compile()
    except jax.errors.JaxRuntimeError as error:  # such as one that needs more memory than there is, with figures
        raise ValueError(f"{kind} {size} does not compile for this chip: {error}") from error


@cache
def _cost(
    programs: Programs, kind: Kind, size: Any, trips: int, chip: str, schedules: Schedules | None
) -> tuple[Cost, int, int]:
    """(cost without the attention kernel, runs of it, memory beyond arguments)."""
    traced, compiled = _compiled(programs, kind, size)
    cost, runs = program_cost(
        traced, compiled, trips=trips, rates=CHIPS[chip].rates, finished=schedules and schedules.of
    )
    memory: Any = compiled.memory_analysis()
    return cost, runs, memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes


def estimate(
    config: ModelConfig,
    chip: str,
    topology: str,
    workload: Workload,
    *,
    data: int | None = None,
    prefix_cache_bytes: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    schedules: Schedules | None = None,
) -> Estimate:
    """Compile what the workload needs for a topology, several programs at a time, and sum it up.

    Args:
        data: calls at once, each on an equal share of the chips; None: the engine's choice, by memory.
        progress: called with the number of programs compiled so far, and of all.
        prefix_cache_bytes: None: the engine's default, see ``model.memory``.
        schedules: of the finished programs; None: libtpu's model of their cycles stands for them.

    Raises:
        ValueError: see ``devices``; prompts longer than the model's context; chips that ``data`` does not divide, or
            among which the model cannot be divided; a program that the chip's compiler refuses.
    """
    longest = workload.query_tokens + workload.item_tokens
    if longest > config.context_length:
        raise ValueError(f"the prompts have {longest:,} tokens; this model reads at most {config.context_length:,}")
    peaks, here = CHIPS[chip], devices(chip, topology)
    meshes = [mesh(*sizes, here) for sizes in splits(len(here), data)]
    if not meshes:
        raise ValueError(
            f"{len(here)} chips cannot be divided among {data} calls at once; use a divisor of {len(here)}"
        )
    lay_out = partial(
        without_weights,
        config,
        sizes=BY_PLATFORM["tpu"],
        max_prompt_tokens=longest,
        cache_bytes=prefix_cache_bytes,
    )
    room = Room(int(peaks.hbm_bytes), "each chip", on_host=False)
    try:
        programs, laid = roomiest(meshes, lambda over: lay_out(over, room=room), lambda found: found[1].longest)
    except MemoryNeededError:  # then what the defaults would take says how much is lacking
        programs, laid = lay_out(meshes[-1])
    at_once = programs.model.at_once
    request = workload.request()
    needed = launches(config, laid, request, at_once)
    floor = floor_of(config, request) / peaks.flops / len(here)
    counts = Counter[str]()
    for launch, count in needed.items():
        counts[f"{launch.kind} {launch.size}"] += count
    memory = {"weights": programs.weight_bytes, "prefix_cache": laid.pool_bytes}
    if (missing := sum(memory.values()) - peaks.hbm_bytes) > 0:
        return Estimate(len(here), at_once, memory, int(missing), floor, dict(counts))
    total, seconds, collective, extra = Cost(), 0.0, 0.0, 0
    kinds = {(launch.kind, launch.size) for launch in needed}
    if schedules:
        schedules.forget()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        compiling = [pool.submit(_compiled, programs, kind, size) for kind, size in kinds]
        for done, future in enumerate(as_completed(compiling), 1):
            future.result()
            if progress is not None:
                progress(done, len(compiling))
    if schedules:
        schedules.read()
    bundles, experts, experts_worst, cycles = 0.0, 0.0, 0.0, Counter[str]()
    for launch, count in needed.items():
        one = launch_cost(programs, config, laid, launch, chip, schedules)
        extra = max(extra, one.memory)
        total += one.cost * count
        bundles += count * one.bundles
        experts += count * one.experts
        experts_worst += count * one.experts_worst
        cycles.update({f"{launch.kind}: {name}": count * each for name, each in one.cost.cycles.items()})
        exchange = one.cost.waited / peaks.clock
        seconds += count * (max(one.cost.flops / peaks.flops, one.cost.bytes / peaks.bandwidth) + exchange)
        collective += count * exchange
    memory["temporaries"] = extra
    missing = max(0, int(sum(memory.values()) - peaks.hbm_bytes))
    host = host_cost(config, BY_PLATFORM["tpu"], longest, workload.request)
    operations, attention = cycles.total() / peaks.clock + collective, bundles / peaks.clock
    expected = Expected(
        operations=operations,
        modelled=total.modelled / peaks.clock + collective,
        counted=total.counted / cycles.total(),
        attention=attention,
        experts=experts,
        experts_worst=experts_worst,
        transfers=host.bytes / HOST_BANDWIDTH,
        host=host.seconds,
        hidden=min(host.hidden, operations + attention + experts),
        dearest=[(name, each / peaks.clock) for name, each in cycles.most_common(DEAREST)],
    )
    return Estimate(len(here), at_once, memory, missing, floor, dict(counts), total, seconds, collective, expected)
