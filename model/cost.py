"""What a compiled TPU program computes and moves to and from HBM, for estimates without a TPU.

XLA's ``cost_analysis`` counts the body of a loop once, leaves out the work of Pallas kernels, and counts on-chip memory
like HBM. So FLOPs are XLA's, plus the other trips of each loop from the traced program, plus the kernels' own; bytes
are read off the compiled program, where the layout of each array names its memory. There libtpu also writes how many
cycles it expects each operation to take; it does not for a Pallas kernel. That is from a model made before there are
instructions: where the finished program of an operation is given, its instructions count.
"""

import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from jax.extend.core import ClosedJaxpr, Jaxpr

BANDWIDTHS = {"TPU v5 lite": 819e9, "TPU v5": 2765e9, "TPU v6 lite": 1638e9}
"""Bytes a second between a chip and its memory, by jax's name of its kind. Source: as of ``PEAKS``."""
PEAKS = {"TPU v5 lite": 197e12, "TPU v5": 459e12, "TPU v6 lite": 918e12}
"""FLOPs a second of a chip in bfloat16, by the same names. Source: https://docs.cloud.google.com/tpu/docs/v5e,
.../v5p and .../v6e, read in November 2026."""
CLOCKS = {"TPU v5 lite": 1.5e9, "TPU v5": 1.75e9, "TPU v6 lite": 1.75e9}
"""Cycles a second, by jax's name of a chip's kind: the documented peak over the operations that its matrix units do in
a cycle."""
LINKS = {"TPU v5 lite": 50e9, "TPU v5": 100e9, "TPU v6 lite": 100e9}
"""Bytes a second over one link to another chip, one direction. Source: as of ``PEAKS``, which gives all links of a chip
in both directions, 400, 1,200 and 800 GB/s: of four links, of six, of four."""
RINGS = 2
"""The compiler turns a sum over all chips of a slice into two rings in opposite directions, so each chip sends over two
links. The smallest slices have no more."""
KERNEL = "fused_attention"
"""Name of the Pallas kernel, ``model.attention_tpu``."""
EXPERTS_KERNEL = "ragged-dot-none"
"""Name of libtpu's kernel for ``lax.ragged_dot``."""


@dataclass(frozen=True, slots=True)
class Ragged:
    """A product of rows that are sorted by expert with their expert's kernel, by libtpu's kernel.

    It visits each tile of rows once for every expert that has a row in it, and multiplies the whole tile.

    Attributes:
        rows: (token, expert) pairs.
        groups: experts of all layers in one stack; a layer's rows are of its own experts.
        into, out: axes of an expert's kernel.
        tile: rows, and parts of the two axes, that are multiplied at a time.
        result_bytes: of one number of the result.
    """

    rows: int
    groups: int
    into: int
    out: int
    tile: tuple[int, int, int]
    result_bytes: int = 4

    def visits(self, experts: float) -> float:
        """Tiles that are multiplied where so many experts have rows, each beginning within a tile."""
        rows, into, out = self.tile
        return (-(-self.rows // rows) + experts - 1) * -(-self.into // into) * -(-self.out // out)

    def bytes(self, experts: float) -> float:
        """To and from HBM, of operands in bfloat16: each expert's kernel once, the rows once a part of out."""
        parts = -(-self.out // self.tile[2])
        return 2 * experts * self.into * self.out + self.rows * (2 * parts * self.into + self.result_bytes * self.out)


@dataclass(frozen=True, slots=True)
class Cost:
    """Cost of one launch on one chip.

    Attributes:
        flops: floating-point operations.
        bytes: to and from HBM.
        collective_bytes: sent to other chips.
        waited: cycles in which the chip waits for them.
        cycles: of its operations, by the operation's name, see ``hlo_cost``; the Pallas kernel's and those of
            collectives and of experts' products are left out.
        ragged: experts' products and how often each runs; their bytes are not counted, since they depend on how many
            experts have rows.
        modelled: cycles of the same operations by libtpu's model.
        counted: of ``cycles``, those of operations whose finished programs are known.
    """

    flops: float = 0
    bytes: float = 0
    collective_bytes: float = 0
    waited: float = 0
    cycles: Mapping[str, float] = field(default_factory=dict[str, float])
    ragged: Mapping[Ragged, float] = field(default_factory=dict[Ragged, float])
    modelled: float = 0
    counted: float = 0

    def __add__(self, other: "Cost") -> "Cost":
        cycles, ragged = Counter(self.cycles), Counter(self.ragged)
        cycles.update(other.cycles)
        ragged.update(other.ragged)
        collective, waited = self.collective_bytes + other.collective_bytes, self.waited + other.waited
        flops, moved = self.flops + other.flops, self.bytes + other.bytes
        modelled, counted = self.modelled + other.modelled, self.counted + other.counted
        return Cost(flops, moved, collective, waited, cycles, ragged, modelled, counted)

    def __mul__(self, count: float) -> "Cost":
        cycles = {name: cycles * count for name, cycles in self.cycles.items()}
        ragged = {product: times * count for product, times in self.ragged.items()}
        flops, moved, collective = (each * count for each in (self.flops, self.bytes, self.collective_bytes))
        waited, modelled, counted = (each * count for each in (self.waited, self.modelled, self.counted))
        return Cost(flops, moved, collective, waited, cycles, ragged, modelled, counted)


class Rates(NamedTuple):
    """What a chip does in a cycle at most: floating-point operations in bfloat16, bytes to or from its memory, and
    bytes over one link to another chip."""

    flops: float
    bytes: float
    link: float

    @classmethod
    def of(cls, kind: str) -> "Rates":
        """Those of a chip, by jax's name of its kind."""
        return cls(*(rate[kind] / CLOCKS[kind] for rate in (PEAKS, BANDWIDTHS, LINKS)))


class Schedule(NamedTuple):
    """Bundles of an operation's finished program.

    Attributes:
        once: outside of its loop.
        each: of each trip.
        seldom: of the trips that finish a part of the result: where a product's inner axis is cut, one of so many.
    """

    once: int
    each: int
    seldom: int = 0


Finished = Callable[[str, Sequence[str], Sequence[str]], Schedule | None]
"""From an operation's name, its operands' names, and their and its results' shapes to its finished program, where there
is one."""


def program_cost(
    traced: Any, compiled: Any, *, trips: int, rates: Rates, finished: Finished | None = None
) -> tuple[Cost, int]:
    """Cost of a program without its Pallas kernels, and how many times it runs one.

    Args:
        traced: ``jax.jit(...).trace(...)``.
        compiled: the same, compiled for one or more TPU chips; the cost is one chip's.
        trips: of each of its loops whose compiled text does not say it.
        rates: the chip's.
        finished: see ``hlo_cost``.
    """
    counted = float(compiled.cost_analysis()["flops"])
    once, whole = dot_flops(traced.jaxpr, trips=False), dot_flops(traced.jaxpr)
    cost, kernels = hlo_cost(compiled.as_text(), trips=trips, rates=rates, finished=finished)
    return cost + Cost(counted * whole / once if once else counted), kernels


def dot_flops(jaxpr: ClosedJaxpr | Jaxpr, *, trips: bool = True) -> float:
    """FLOPs of all matrix products of a traced program, those of a Pallas kernel left out.

    Args:
        trips: count a loop's body as often as it runs, not once.
    """
    total = 0.0
    inner = jaxpr.jaxpr if isinstance(jaxpr, ClosedJaxpr) else jaxpr
    for equation in inner.eqns:
        name = equation.primitive.name
        if name == "pallas_call":
            continue
        if name == "ragged_dot_general":  # each row with one kernel
            rows: Any = equation.invars[0].aval
            kernels: Any = equation.invars[1].aval
            total += 2.0 * math.prod(rows.shape) * kernels.shape[-1]
        if name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            left: Any = equation.invars[0].aval
            out: Any = equation.outvars[0].aval
            total += 2.0 * math.prod(out.shape) * math.prod(left.shape[axis] for axis in contracted)
        times = equation.params["length"] if name == "scan" and trips else 1
        for value in equation.params.values():
            if isinstance(value, ClosedJaxpr | Jaxpr):
                total += times * dot_flops(value, trips=trips)
    return total


_OP = re.compile(r"^\s*(ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*)$")
_SHAPE = re.compile(r"([a-z]\w*)\[([\d,]*)\](?:\{([\d,]*)(:[^}]*)?\})?")
_SHAPE_ALONE = re.compile(r"\b[a-z]\w*\[[\d,]*\]")
_CONFIG = re.compile(r'"(?:estimated_cycles|iteration_bounds)":(?:"\d+"|\[[^\]]*\])')
_NAMED = re.compile(r"%[\w.\-]+|, (?:metadata|backend_config|sharding|frontend_attributes)=.*$")
_PRODUCT_BOUNDS = 3
"""A product's loop runs over so many axes; the last is the inner one, along which it sums."""
_WIDTHS = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "f32": 4, "s32": 4, "u32": 4}
_COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
_FREE = ("parameter", "constant", "get-tuple-element", "tuple", "bitcast", "while", "partition-id", "iota")


@dataclass(frozen=True, slots=True)
class _Array:
    """One array of an operation's result: its size with the layout's padding, how many numbers it has, and whether it
    lies in HBM."""

    bytes: int
    numbers: int
    in_hbm: bool


@dataclass(frozen=True, slots=True)
class _Op:
    name: str
    kind: str
    shape: str
    results: tuple[_Array, ...]
    operands: tuple[str, ...]
    text: str
    root: bool

    @property
    def calls(self) -> str | None:
        found = re.search(r"(?:calls|body)=%?([\w.\-]+)", self.text)
        return found and found[1]


def hlo_cost(hlo: str, *, trips: int, rates: Rates, finished: Finished | None = None) -> tuple[Cost, int]:
    """Bytes and cycles of one launch, without its FLOPs, and how many times it runs the Pallas kernel.

    Args:
        hlo: text of a compiled program.
        trips: of each loop whose text does not say it.
        rates: the chip's. An operation takes at least what its products and its bytes need. Of some products libtpu
            expects fewer cycles: a quarter fewer where a v6e's result has its rows in the minor axis.
        finished: gives finished programs, whose bundles are taken in the place of the cycles that libtpu expects.
    """
    computations = dict(_computations(hlo))
    entry = re.search(r"^ENTRY %?([\w.\-]+)", hlo, re.MULTILINE)
    assert entry, "the text of a compiled program has an entry"
    moved = collective = waited = modelled = counted = 0.0
    cycles, ragged = defaultdict[str, float](float), Counter[Ragged]()
    kernels, schedules = 0, _schedules(computations, finished) if finished else {}
    pending = [(entry[1], 1)]
    while pending:
        name, times = pending.pop()
        ops, exchange = {op.name: op for op in computations[name]}, _Exchange(rates.link)
        for op in ops.values():
            if op.kind == "while":
                assert op.calls
                pending.append((op.calls, times * (_trips(op, computations) or trips)))
            elif op.kind == "custom-call" and KERNEL in op.name:
                kernels += times
            elif op.kind == "custom-call" and op.name.startswith(EXPERTS_KERNEL):
                ragged[_ragged(op)] += times
                continue
            elif op.kind.removesuffix("-start") in _COLLECTIVES:
                given = sum(ops[operand].results[0].bytes for operand in op.operands if operand in ops)
                collective += times * given * _sent(op)
                exchange.begin(op, given * _sent(op))
            exchange.end(op)
            own_bytes = 0.0
            if op.kind not in _FREE and not op.kind.endswith("-done") and KERNEL not in op.name:
                own_bytes = _op_bytes(op, ops, computations)
                moved += times * own_bytes
            expected = re.search(r'"estimated_cycles":"(\d+)"', op.text)
            if expected and op.kind.removesuffix("-start").removesuffix("-done") not in _COLLECTIVES:
                least = max(_product_flops(op, ops, computations) / rates.flops, own_bytes / rates.bytes)
                schedule = schedules.get(_alike(op, ops, computations)) if schedules else None
                bundles = schedule and _bundles(op, schedule)
                once = max(int(expected[1]) if bundles is None else bundles, least)
                exchange.now += once
                taken = times * once
                cycles[_title(op)] += taken
                counted += 0 if bundles is None else taken
                modelled += times * int(expected[1])
        waited += times * exchange.waited
    return Cost(0, moved, collective, waited, cycles, ragged, modelled, counted), kernels


class _Exchange:
    """A chip's collectives beside its operations, as one computation has them one after the other.

    A permutation sends over one link; permutations to the same chips follow each other. Others take ``RINGS`` links.

    Attributes:
        now: cycles since the computation began.
        waited: of these, those in which the chip waited.
    """

    def __init__(self, link: float) -> None:
        self.now = self.waited = 0.0
        self._link = link
        self._free: dict[str, float] = defaultdict(float)
        self._arrives: dict[str, float] = {}

    def begin(self, op: _Op, sent: float) -> None:
        """A collective that sends so many bytes begins."""
        to = re.search(r"source_target_pairs=(\{\{.*?\}\})", op.text)
        links, rate = (to[1], self._link) if to else ("", RINGS * self._link)
        self._free[links] = self._arrives[op.name] = max(self.now, self._free[links]) + sent / rate

    def end(self, op: _Op) -> None:
        """What waits for a collective, or is one that waits for itself, has it."""
        kind = op.kind.removesuffix("-done")
        if kind in _COLLECTIVES:
            arrives = self._arrives[op.name if kind == op.kind else op.operands[0]]
            self.waited += max(0.0, arrives - self.now)
            self.now = max(arrives, self.now)


def _schedules(computations: Mapping[str, list[_Op]], finished: Finished) -> Mapping[tuple[str, ...], Schedule]:
    """The finished programs of all operations whose programs are known, by ``_alike``: of operations that are alike,
    libtpu finishes one. Where theirs differ, none is given."""
    found = defaultdict[tuple[str, ...], set[Schedule]](set)
    for body in computations.values():
        ops = {op.name: op for op in body}
        for op in body:
            if not _CONFIG.search(op.text):
                continue
            shapes = [shape for name in op.operands if name in ops for shape in _SHAPE_ALONE.findall(ops[name].shape)]
            if schedule := finished(op.name, op.operands, [*shapes, *_SHAPE_ALONE.findall(op.shape)]):
                found[_alike(op, ops, computations)].add(schedule)
    return {alike: schedules.pop() for alike, schedules in found.items() if len(schedules) == 1}


def _alike(op: _Op, ops: Mapping[str, _Op], computations: Mapping[str, list[_Op]]) -> tuple[str, ...]:
    """What two operations have in common whose programs are the same: all of their text but names, and where it comes
    from."""
    own = _CONFIG.findall(op.text)
    inside = computations[op.calls] if op.calls and op.kind != "while" else []
    numbers = {each.name: str(number) for number, each in enumerate(inside)}
    body = [
        f"{each.kind} {each.shape} {' '.join(numbers.get(name, '') for name in each.operands)} "
        f"{_NAMED.sub('', each.text) if each.kind != 'fusion' else _alike(each, {}, computations)}"
        for each in inside
    ]
    return (op.kind, op.shape, *(ops[name].shape for name in op.operands if name in ops), *own, *body)


def _bundles(op: _Op, schedule: Schedule) -> int | None:
    """Bundles that an operation's finished program runs through."""
    if not (schedule.each or schedule.seldom):
        return schedule.once
    if (found := re.search(r'"iteration_bounds":\[([^\]]*)\]', op.text)) is None:
        return None
    bounds = [int(bound) for bound in re.findall(r"\d+", found[1])]
    trips, inner = math.prod(bounds), bounds[-1] if len(bounds) == _PRODUCT_BOUNDS else 1
    return schedule.once + schedule.each * trips + schedule.seldom * trips // inner


def _product_flops(op: _Op, ops: Mapping[str, _Op], computations: Mapping[str, list[_Op]]) -> float:
    """FLOPs of an operation's products of two matrices; others, which have more axes, are left out."""
    if op.calls and op.kind != "while":
        inside = {each.name: each for each in computations[op.calls]}
        return sum(_product_flops(each, inside, computations) for each in inside.values())
    if op.kind != "convolution" or not re.search(r"dim_labels=\w{2}_\w{2}->\w{2}(?!\w)", op.text):
        return 0.0
    left, right = (ops[name].results[0].numbers for name in op.operands)
    return 2.0 * math.sqrt(op.results[0].numbers * left * right)  # of M N, M K and K N numbers


def _trips(loop: _Op, computations: Mapping[str, list[_Op]]) -> int | None:
    """How often a loop runs: as XLA has noted, or else the only number that its counter is compared with."""
    if noted := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.text):
        return int(noted[1])
    condition = re.search(r"condition=%?([\w.\-]+)", loop.text)
    ops = computations.get(condition[1], []) if condition else []
    bounds = [int(found[1]) for op in ops if op.kind == "constant" and (found := re.match(r"(\d+)\)", op.text))]
    return bounds[0] if len(bounds) == 1 and bounds[0] > 0 else None


def _ragged(op: _Op) -> Ragged:
    """An experts' product, by the shapes of its two operands and the tiles that libtpu has chosen."""
    shapes = re.search(r"\[(\d+),\d+\]\{[\d,]*\}, \w+\[(\d+),(\d+),(\d+)\]\{[\d,]*\}\}", op.text)
    tile = re.search(r'ragged_dot_tiling="(\d+),(\d+),(\d+)"', op.text)
    assert shapes, f"no shapes of the operands in {op.text[:500]}"
    assert tile, f"no tiles in {op.text[:500]}"
    rows, groups, into, out = map(int, shapes.groups())
    result_bytes = _WIDTHS[_SHAPE.findall(op.shape)[0][0]]
    return Ragged(rows, groups, into, out, (int(tile[1]), int(tile[2]), int(tile[3])), result_bytes)


def _title(op: _Op) -> str:
    """An operation by what was traced, where the text says so, and by its name in the program."""
    traced = re.search(r'op_name="[^"]*?([^/"]+)"', op.text)
    return f"{traced[1]} ({op.name})" if traced else op.name


def _sent(op: _Op) -> float:
    """Bytes that a chip sends in a collective for each that it puts in, the group's chips being a ring."""
    found = re.search(r"replica_groups=(?:\{\{([\d,]+)\}|\[\d+,(\d+)\])", op.text)
    kind = op.kind.removesuffix("-start")
    if not found or kind == "collective-permute":
        return 1.0
    chips = len(found[1].split(",")) if found[1] else int(found[2])
    share = (chips - 1) / chips
    return {"all-reduce": 2 * share, "all-gather": chips - 1}.get(kind, share)


def _op_bytes(op: _Op, ops: dict[str, _Op], computations: dict[str, list[_Op]]) -> float:
    """The bytes that one operation moves to and from HBM."""
    operands = [ops[name].results[0] if name in ops else _Array(0, 0, False) for name in op.operands]
    results = list(op.results)
    if op.kind == "copy-start" or op.kind.endswith("slice-start"):
        made = results[0] if op.kind == "copy-start" else results[1]
        return sum(made.bytes for side in (made, operands[0]) if side.in_hbm)
    if op.kind in ("dynamic-slice", "slice", "gather"):
        return sum(results[0].bytes for side in (results[0], operands[0]) if side.in_hbm)
    if op.kind == "dynamic-update-slice":
        return sum(operands[1].bytes for side in (results[0], operands[1]) if side.in_hbm)
    read = [operand.bytes if operand.in_hbm else 0 for operand in operands]
    written = [result.bytes if result.in_hbm else 0 for result in results]
    if op.kind == "fusion" and op.calls:
        fused = computations[op.calls]
        read = [_read(number, fused, computations) if size else 0 for number, size in enumerate(read)]
        for number, size in _written_in_place(fused):
            written[number] = min(written[number], size)
    return sum(read) + sum(written)


def _source(name: str, ops: dict[str, _Op]) -> _Op:
    """The operation that bitcasts lead back to."""
    op = ops[name]
    return _source(op.operands[0], ops) if op.kind == "bitcast" else op


def _written_in_place(fused: list[_Op]) -> Iterator[tuple[int, int]]:
    """(number of a fusion's result, bytes of the part) for each that the fusion only updates a part of."""
    ops = {op.name: op for op in fused}
    (root,) = (op for op in fused if op.root)
    for number, name in enumerate(root.operands if root.kind == "tuple" else [root.name]):
        output = _source(name, ops)
        if output.kind == "dynamic-update-slice":
            yield number, ops[output.operands[1]].results[0].bytes


def _read(number: int, fused: list[_Op], computations: dict[str, list[_Op]]) -> int:
    """Bytes that a fusion reads of its operand with this number: all, or the parts that it cuts from it."""
    ops = {op.name: op for op in fused}
    (parameter,) = (op for op in fused if op.kind == "parameter" and op.text.startswith(f"{number})"))
    whole, total = parameter.results[0].bytes, 0
    for user in fused:
        if user.kind == "bitcast":
            continue
        for place, name in enumerate(user.operands):
            if _source(name, ops) is not parameter:
                continue
            if user.kind in ("dynamic-slice", "slice", "gather"):
                total += user.results[0].bytes
            elif user.kind == "fusion" and user.calls:
                total += _read(place, computations[user.calls], computations)
            elif user.kind != "dynamic-update-slice" or place > 0:
                return whole
    return min(whole, total)


def _computations(hlo: str) -> Iterator[tuple[str, list[_Op]]]:
    name, ops = "", list[_Op]()
    for line in hlo.splitlines():
        if line.endswith("{") and not line.startswith((" ", "HloModule")):
            name, ops = line.removeprefix("ENTRY ").lstrip("%").split(" ", 1)[0], []
        elif line.startswith("}"):
            yield name, ops
        elif found := _OP.match(line):
            root, op, shapes, kind, rest = found.groups()
            arguments = re.sub(r"/\*.*?\*/", "", rest.split("), ", 1)[0])
            operands = tuple(re.findall(r"%([\w.\-]+)", arguments))
            ops.append(_Op(op, kind, shapes, tuple(_arrays(shapes)), operands, rest, bool(root)))


def _arrays(shapes: str) -> Iterator[_Array]:
    for dtype, dims, order, layout in _SHAPE.findall(shapes):
        sizes = [int(size) for size in dims.split(",") if size]
        numbers = math.prod(sizes)
        minor = [int(axis) for axis in order.split(",") if axis]
        tile = re.search(r"T\((\d+)(?:,(\d+))?\)", layout)
        if tile and minor:
            edges = [int(edge) for edge in tile.groups() if edge][::-1]  # minor first
            for axis, edge in zip(minor, edges, strict=False):
                sizes[axis] = -(-sizes[axis] // edge) * edge
        yield _Array(math.prod(sizes) * _WIDTHS.get(dtype, 4), numbers, "S(" not in layout)
