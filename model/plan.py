"""From token sequences to device work: which prefixes are shared, and which segments share a program call.

Pure numpy. The prompts of a request form a tree of tokens; each token of the tree is computed once where that saves
more than it costs. What is left of each sequence is a segment; segments are packed, whole, into bins of a few fixed
widths, and bins into calls of a few fixed shapes, so that every call runs a program compiled at start-up. Where
attention looks at each segment by itself there are no bins: segments follow each other in calls of a few sizes.
"""

import bisect
import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from model.contract import MOST_READS, common_prefix

Tokens = npt.NDArray[np.int32] | npt.NDArray[np.int64]
Numbers = npt.NDArray[np.int64]

SMALLEST_CALL = 64
"""Tokens, and reads, of the smallest program. XLA's CPU matmul gives a row the same bits whatever the number of rows,
from 64 rows on; below, other kernels round otherwise (measured with jax 0.10.2 on an AVX2 machine), and a segment's
score would depend on the size of its batch in the fifth digit."""


@dataclass(frozen=True, slots=True)
class Costs:
    """What calls cost on a device, in units of one token's matmuls.

    Attributes:
        call: of a call whatever its size: it reads all weights once.
        attention: of one more position to attend to, for each token.
        fold: tokens of a bin that are computed over the bin up to the last of them; None: all are, over all of it.
    """

    call: float = 32
    attention: float = 1 / 1536
    fold: int | None = None

    def of(self, shape: "Shape") -> float:
        """Cost of one call."""
        positions = (shape.width + min(shape.width, self.fold or shape.width)) / 2
        return shape.tokens * (1 + positions * self.attention) + self.call

    def over(self, prefix: float) -> "Costs":
        """The same, in units of one token's matmuls and its attention to so many tokens of a prefix."""
        unit = 1 + prefix * self.attention
        return replace(self, call=self.call / unit, attention=self.attention / unit)


CPU_COSTS = Costs()
"""Measured with the demo model."""


@dataclass(frozen=True, slots=True, order=True)
class Shape:
    """A compiled program's size: ``bins`` bins of ``width`` positions, with room for ``reads`` read positions."""

    width: int
    bins: int

    @property
    def tokens(self) -> int:
        return self.bins * self.width

    @property
    def reads(self) -> int:
        """Read positions that one call has room for."""
        return reads_of(self.tokens)

    def __str__(self) -> str:
        return f"{self.bins}x{self.width}"


def reads_of(tokens: int) -> int:
    """Read positions that a call of ``tokens`` has room for: all in a small call, an eighth of a large one."""
    return tokens if tokens <= MOST_READS else max(MOST_READS, tokens // 8)


class Segment(NamedTuple):
    """Tokens ``start:stop`` of one sequence, computed together over the prefix ``:start``."""

    sequence: int
    start: int
    stop: int
    reads: int

    @property
    def length(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True, slots=True, eq=False)
class Segments:
    """Segments, a column for each of their numbers: hundreds are planned in as many steps as one."""

    sequences: Numbers
    starts: Numbers
    stops: Numbers
    reads: Numbers

    @classmethod
    def of(cls, segments: Iterable[Segment]) -> "Segments":
        return cls(*np.array(list(segments), np.int64).reshape(-1, 4).T)

    @property
    def lengths(self) -> Numbers:
        return self.stops - self.starts

    def __len__(self) -> int:
        return len(self.sequences)

    def __iter__(self) -> Iterator[Segment]:
        columns = (self.sequences, self.starts, self.stops, self.reads)
        return itertools.starmap(Segment, zip(*(column.tolist() for column in columns), strict=True))

    def __getitem__(self, places: Numbers | npt.NDArray[np.bool_]) -> "Segments":
        return Segments(self.sequences[places], self.starts[places], self.stops[places], self.reads[places])

    def __add__(self, other: "Segments") -> "Segments":
        columns = ("sequences", "starts", "stops", "reads")
        return Segments(*(np.concatenate([getattr(self, name), getattr(other, name)]) for name in columns))


NO_SEGMENTS = Segments.of([])


@dataclass(frozen=True, slots=True, eq=False)
class Group:
    """Segments over one prefix: the first ``prefix_length`` tokens of sequence ``prefix_of``, which all share.

    Attributes:
        first_read: there are no segments, and the prefix's own tokens are read, from this one on. They, and what is
            before them in their page, are computed even where the prefix is in the cache. None: only segments are read.
    """

    prefix_of: int
    prefix_length: int
    segments: Segments
    first_read: int | None = None


class Placement(NamedTuple):
    """A segment's place in a call: its first token goes to position ``offset`` of bin ``bin``, and it sees the call's
    prefix number ``prefix``."""

    segment: Segment
    bin: int
    offset: int
    prefix: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class Call:
    """One launch of the program of ``shape``: its segments, and what a ``Placement`` says of each."""

    shape: Shape
    segments: Segments
    bins: Numbers
    offsets: Numbers
    prefixes: Numbers

    @property
    def placements(self) -> list[Placement]:
        columns = (column.tolist() for column in (self.bins, self.offsets, self.prefixes))
        return list(itertools.starmap(Placement, zip(self.segments, *columns, strict=True)))


def shapes(max_width: int, call_tokens: int) -> tuple[Shape, ...]:
    """The ladder of compiled shapes: for each width one full call of about ``call_tokens`` tokens, and a smallest one.

    Widths go by steps of 32 up to 160, then of 48: with several segments to a bin, segments of one length in 8 to 512
    tokens leave 7% of the work on padding on average (computed), and mixed lengths less.
    """
    widths: list[int] = []
    width = 32
    while width < max_width:
        widths.append(width)
        width += 32 if width < 160 else 48
    widths.append(max_width)
    # A short prompt alone, where padding is latency, has two widths more.
    alone = {Shape(w, -(-SMALLEST_CALL // w)) for w in (*widths, 80, 112) if w <= max_width}
    ladder = alone | {Shape(w, max(-(-SMALLEST_CALL // w), call_tokens // w)) for w in widths}
    return tuple(sorted(ladder))


def large_shapes(max_width: int, call_tokens: int) -> tuple[Shape, ...]:
    """The ladder for a device that one small call leaves idle: few widths, each in calls of about ``call_tokens``
    tokens, of half, a quarter and an eighth of that.

    Segments of one length leave 7% (8 to 128 tokens) to 12% (256 to 1,024) of the positions on padding on average,
    mixed lengths 4% (computed).
    """
    widths = sorted({min(width, max_width) for width in (128, 256, 384, 512, 768, 1024, 2048, 4096)} | {max_width})
    return tuple(sorted({Shape(w, -(-call_tokens // (part * w))) for w in widths for part in (1, 2, 4, 8)}))


def flat_shapes(call_tokens: int, *, padding_is_cheap: bool) -> tuple[Shape, ...]:
    """The ladder where attention looks at each segment by itself: one bin, up to ``call_tokens``, in steps of a quarter
    and less; where padding is cheap, of a half and less from 256 tokens on.
    """
    parts = [(4, 6) if padding_is_cheap and octave > 1 else (4, 5, 6, 7) for octave in range(16)]
    steps = [16 * part << octave for octave in range(16) for part in parts[octave]]
    widths = [*itertools.takewhile(lambda width: width < call_tokens, steps), max(call_tokens, SMALLEST_CALL)]
    return tuple(Shape(width, 1) for width in widths)


def pack_flat(groups: Sequence[Group], ladder: Sequence[Shape]) -> list[Call]:
    """Pack segments of several groups one after the other into few calls of a flat ladder.

    A segment's prefix is its group's number.

    Next in a call is the longest segment that it has room for, of the first group that has one.

    Raises:
        ValueError: a segment is longer than the largest call, or has more reads.
    """
    largest = ladder[-1]
    segments = sum((group.segments for group in groups), NO_SEGMENTS)
    lengths, reads_of_each = segments.lengths.tolist(), segments.reads.tolist()
    waiting: dict[int, list[_Waiting]] = {}
    first = 0
    for number, group in enumerate(groups):
        last = first + len(group.segments)
        # Ascending, and of one length those with fewest reads last.
        order = sorted(range(first, last), key=lambda i: (lengths[i], -reads_of_each[i]))
        waiting[number] = [_Waiting(lengths[i], reads_of_each[i], i) for i in order]
        first = last
    calls: list[Call] = []
    while waiting:
        placed: list[int] = []
        offsets: list[int] = []
        prefixes: list[int] = []
        tokens = reads = 0
        for number, of_group in list(waiting.items()):
            while (at := _longest_within(of_group, largest.width - tokens, largest.reads - reads)) is not None:
                segment = of_group.pop(at)
                placed.append(segment.place)
                offsets.append(tokens)
                prefixes.append(number)
                tokens += segment.length
                reads += segment.reads
            if not of_group:
                del waiting[number]
        if not placed:
            segment = next(iter(waiting.values()))[-1]
            wanted = f"{segment.length} tokens, {segment.reads} of them read"
            raise ValueError(
                f"a segment of {wanted}, does not fit the largest call of {largest.width}, {largest.reads} read"
            )
        smallest = next(shape for shape in ladder if shape.width >= tokens and shape.reads >= reads)
        taken = segments[np.array(placed)]
        calls.append(Call(smallest, taken, np.zeros(len(taken), np.int64), np.array(offsets), np.array(prefixes)))
    return calls


def pack_whole(groups: Sequence[Group], ladder: Sequence[Shape], call_tokens: int) -> list[Call]:
    """``pack_flat`` in calls of up to ``call_tokens``; longer segments are packed by themselves, in longer calls."""
    (group,) = groups
    long = group.segments.lengths > call_tokens
    usual = [shape for shape in ladder if shape.tokens <= call_tokens]
    parts = ((group.segments[long], ladder), (group.segments[~long], usual))
    return [call for part, shapes in parts if len(part) for call in pack_flat([Group(0, 0, part)], shapes)]


class _Waiting(NamedTuple):
    """A segment that is to be packed, and its place among all."""

    length: int
    reads: int
    place: int


def _longest_within(segments: Sequence[_Waiting], tokens: int, reads: int) -> int | None:
    """The place of the last of ascending segments that has at most so many tokens and reads."""
    short = len(segments)
    if segments and segments[-1].length > tokens:
        short = bisect.bisect_right(segments, tokens, key=lambda segment: segment.length)
    return next((at for at in reversed(range(short)) if segments[at].reads <= reads), None)


def batch_calls(calls: Sequence[Call], at_once: int) -> Iterator[list[Call]]:
    """Up to ``at_once`` calls of one width that follow each other, all in the shape of the largest: each runs on
    devices of its own, and those of a smaller one would wait."""
    if at_once == 1:
        yield from ([call] for call in calls)
        return
    for _, alike in itertools.groupby(calls, lambda call: call.shape.width):
        same = sorted(alike, key=lambda call: -call.shape.tokens)
        for at in range(0, len(same), at_once):
            yield [replace(call, shape=same[at].shape) for call in same[at : at + at_once]]


def share(
    sequences: Sequence[Tokens], limits: Sequence[int], *, min_saving: int, salts: Sequence[int] = (), known: int = 0
) -> list[tuple[int, int, Numbers]]:
    """Group sequences by common token prefixes, where sharing saves at least ``min_saving`` tokens.

    Args:
        sequences: token ids.
        limits: for each sequence, how many leading tokens a prefix may take at most: the first read position, since
            a read token must be in a segment.
        min_saving: tokens; what one more prefix costs in launches and padding.
        salts: for each sequence a number: those with different ones share nothing; empty: all may share.
        known: leading tokens that are known to be equal in all sequences: not compared.

    Returns:
        (a sequence that has the prefix, prefix length, member sequences) per group, parents before the groups whose
        prefix continues theirs; every sequence is a member of exactly one group. Prefix length 0: nothing shared.
    """
    if not sequences:
        return []
    heads = [tokens[:limit] for tokens, limit in zip(sequences, limits, strict=True)]
    salted = len(set(salts)) > 1
    shared = 0 if salted else _shared_by_all(heads, known)  # often a long query: not copied
    # As bytes, sequences with a common beginning sort together, and comparing them is a memcmp.
    keys = [head[shared:].tobytes() for head in heads]
    if salted:
        keys = [salt.to_bytes(_SALT_SIZE) + key for salt, key in zip(salts, keys, strict=True)]
    first = sequences[0].itemsize + (_SALT_SIZE if salted else 0)
    order = sorted(range(len(keys)), key=keys.__getitem__)
    common = np.array(
        [
            shared + common_prefix(heads[a][shared:], heads[b][shared:])
            if keys[a][:first] == keys[b][:first]
            else shared
            for a, b in itertools.pairwise(order)
        ],
        np.int64,
    )
    longest = max(map(len, heads))
    groups: list[tuple[int, int, list[int]]] = [(order[0], 0, [])]
    pending = [(0, len(order), 0)]  # an interval of `order`, and the group that its sequences belong to so far
    while pending:
        low, high, group = pending.pop()
        depth = int(common[low : high - 1].min()) if high - low > 1 else len(heads[order[low]])
        if (high - low - 1) * (depth - groups[group][1]) >= min_saving:
            groups.append((order[low], depth, []))
            group = len(groups) - 1
        bounds = [low, *(low + 1 + np.flatnonzero(common[low : high - 1] == depth)).tolist(), high]
        for start, stop in itertools.pairwise(bounds):
            if stop - start < high - low and (stop - start - 1) * (longest - groups[group][1]) >= min_saving:
                pending.append((start, stop, group))
            else:  # nothing deeper can pay
                groups[group][2].extend(order[start:stop])
    return [(prefix_of, depth, np.array(members)) for prefix_of, depth, members in groups if members]


_SALT_SIZE = 8
"""Bytes of a salt."""


def _shared_by_all(heads: Sequence[Tokens], known: int) -> int:
    """The number of leading tokens that are equal in all ``heads``; ``known`` of them are not compared."""
    shared = min(map(len, heads))
    known = min(known, shared)
    first = heads[0][known:].tobytes()
    for head in heads:
        if not first.startswith(head[known:shared].data):  # a memcmp
            shared = known + common_prefix(head[known:shared], heads[0][known:])
    return shared


def groups(
    sequences: Sequence[Tokens],
    reads: Sequence[Sequence[int]],
    *,
    max_width: int,
    max_reads: int,
    min_saving: int,
    page: int,
    partial_sizes: Sequence[int] = (),
    common: Sequence[Sequence[int]] = (),
    salts: Sequence[int] = (),
    known: int = 0,
    prefixes: int = 1,
    costs: Costs = CPU_COSTS,
) -> list[Group]:
    """Shared prefixes and segments for sequences with reads at the given ascending positions.

    Tokens after a sequence's last read are not computed. A segment longer than ``max_width`` is cut: its earlier tokens
    become a prefix of its own. A sequence with more than ``max_reads`` reads becomes a prefix that is read.

    Args:
        page: a prefix is stored and attended to in pages of so many tokens.
        partial_sizes: how many tokens of a partial page are looked at, ascending, the last ``page``; empty: always the
            whole page.
        common: for each sequence how many tokens at the front its request's sequences share, and how many these are;
            empty: not known.
        salts, known: see ``share``.
        prefixes: a call computes parts of so many at once.
    """
    result: list[Group] = []
    ends = np.array([positions[-1] for positions in reads], np.int64) + 1
    counts = np.array([len(positions) for positions in reads], np.int64)
    shared = share(sequences, [positions[0] for positions in reads], min_saving=min_saving, salts=salts, known=known)
    beside = min(prefixes, max(1, sum(depth > 0 for _, depth, _ in shared)))
    for prefix_of, depth, members in shared:
        own_tokens = float((ends[members] - depth).mean())
        uses = [(depth, len(members))]
        if common:
            of_request, count = common[prefix_of]
            uses.append((min(of_request, depth), max(count, len(members))))
        prefix_length = _worthwhile(depth, uses, own_tokens, page, partial_sizes or (page,), beside, costs)
        many = counts[members] > max_reads
        result += [
            Group(sequence, int(ends[sequence]), NO_SEGMENTS, first_read=reads[sequence][0])
            for sequence in members[many].tolist()
        ]
        members = members[~many]
        whole = ends[members] - prefix_length <= max_width
        fitting = members[whole]
        segments = Segments(fitting, np.full(len(fitting), prefix_length), ends[fitting], counts[fitting])
        fronts: list[Segment] = []
        for sequence in members[~whole].tolist():
            for piece in _pieces(sequence, prefix_length, reads[sequence], max_width):
                if piece.start == prefix_length:
                    fronts.append(piece)
                else:
                    result.append(Group(sequence, piece.start, Segments.of([piece])))
        if fronts:
            segments += Segments.of(fronts)
        if len(segments):
            result.append(Group(prefix_of, prefix_length, segments))
    return result


def whole(sequences: Sequence[Tokens], reads: Sequence[Sequence[int]]) -> Group:
    """Every sequence as one segment, wherever it is read: each of its tokens depends on all of them.

    Raises:
        ValueError: a sequence has more reads than a call has room for.
    """
    if (most := max(map(len, reads), default=0)) > MOST_READS:
        raise ValueError(f"a sequence has {most} reads; an encoder's may have {MOST_READS}")
    segments = [Segment(at, 0, len(tokens), len(reads[at])) for at, tokens in enumerate(sequences)]
    return Group(0, 0, Segments.of(segments))


def _worthwhile(
    prefix_length: int,
    uses: Sequence[tuple[int, int]],
    own_tokens: float,
    page: int,
    partial_sizes: Sequence[int],
    beside: int,
    costs: Costs,
) -> int:
    """The prefix, with as many tokens of its partial page as save most beyond what that page costs, or none.

    Items of one request often begin with the same word: a page for that word is computed once, and looked at by all.

    Args:
        uses: (prefix length, number of sequences that have it) to choose from.
        own_tokens: of a sequence after the prefix, on average.
        beside: prefixes whose partial pages are computed in one call.
    """
    whole = prefix_length - prefix_length % page
    best, most = whole, 0.0
    for length, count in uses:
        seen = bucket(length - whole, partial_sizes)
        cost = max(seen, SMALLEST_CALL / beside) + costs.call / beside + count * own_tokens * seen * costs.attention
        saving = (count - 1) * (length - whole) - cost
        if length > whole and saving >= most:
            best, most = length, saving
    return best


def _pieces(sequence: int, start: int, reads: Sequence[int], max_width: int) -> list[Segment]:
    """Segments that hold all reads of one sequence; stretches without a read are left to the prefix."""
    segments: list[Segment] = []
    done = 0
    while done < len(reads):
        end = done
        while end < len(reads) and reads[end] - reads[done] < max_width:
            end += 1
        stop = reads[end - 1] + 1
        first = max(segments[-1].stop if segments else start, stop - max_width)
        segments.append(Segment(sequence, first, stop, end - done))
        done = end
    return segments


def pack_bins(groups: Sequence[Group], ladder: Sequence[Shape], costs: Costs = CPU_COSTS) -> list[Call]:
    """Pack segments of several groups into calls, choosing among the ladder's widths what costs least.

    A segment's prefix is its group's number.

    Tried: each group by itself, all its segments in bins of one width, or long and short ones apart; and groups one
    after the other in bins of one width. Only lengths and reads matter, and what was chosen for them is remembered.

    Raises:
        ValueError: a segment is longer than the widest bin.
    """
    segments = sum((group.segments for group in groups), NO_SEGMENTS)
    prefixes = np.repeat(np.arange(len(groups)), [len(group.segments) for group in groups])
    order = np.lexsort((segments.reads, -segments.lengths, prefixes))
    ordered, of_each = segments[order], prefixes[order]
    columns = of_each, ordered.lengths, ordered.reads
    seen = np.array([group.prefix_length for group in groups])[of_each]
    prefix = round(float(np.average(seen, weights=ordered.lengths)) / _PREFIX_STEP) * _PREFIX_STEP
    found = _chosen(*(column.tobytes() for column in columns), tuple(ladder), costs.over(prefix))
    return [Call(one.shape, ordered[one.places], one.bins, one.offsets, of_each[one.places]) for one in found]


_PREFIX_STEP = 1024
"""Prefixes are weighed in steps of so many tokens, so that what was chosen is found again after another prefix."""


class _Run(NamedTuple):
    """Segments alike in tokens and reads, which follow each other among all: ``number`` from ``first`` on."""

    first: int
    number: int
    length: int
    reads: int


class _Planned(NamedTuple):
    """A call of a plan: the runs in each of its bins."""

    shape: Shape
    bins: list[list[_Run]]


class _Places(NamedTuple):
    """A call of a plan: the places of its segments among all, and a column for each of what a ``Placement`` says."""

    shape: Shape
    places: Numbers
    bins: Numbers
    offsets: Numbers


@lru_cache(256)
def _chosen(groups: bytes, lengths: bytes, reads: bytes, ladder: tuple[Shape, ...], costs: Costs) -> Sequence[_Places]:
    """The calls that cost least.

    Args:
        groups: numbers of the segments' groups, ascending, as the bytes of an array.
        lengths: of the segments; descending within a group.
        reads: of the segments; ascending where lengths are equal.
    """
    columns = [np.frombuffer(column, np.int64) for column in (groups, lengths, reads)]
    starts = np.flatnonzero(np.r_[True, np.any(np.diff(columns) != 0, axis=0)])
    counts = np.diff(np.r_[starts, len(columns[0])])
    numbers = columns[0][starts].tolist()
    of_runs = (starts, counts, *(column[starts] for column in columns[1:]))
    runs = list(itertools.starmap(_Run, zip(*(column.tolist() for column in of_runs), strict=True)))
    if (longest := max(run.length for run in runs)) > (widest := max(shape.width for shape in ladder)):
        raise ValueError(f"a segment of {longest} tokens does not fit the widest bin of {widest}")
    of_groups = [
        [run for _, run in members]
        for _, members in itertools.groupby(zip(numbers, runs, strict=True), key=lambda pair: pair[0])
    ]
    apart = [call for members in of_groups for call in _of_one(members, ladder, costs)]
    options = [apart, *(_in_turn(of_groups, ladder, costs) if len(of_groups) > 1 else ())]
    return list(map(_placed, min(options, key=lambda option: _cost(option, costs))))


def _in_turn(groups: Sequence[Sequence[_Run]], ladder: Sequence[Shape], costs: Costs) -> Iterator[list[_Planned]]:
    """Groups one after the other, for each width that holds all segments.

    A group begins in what the last one has left free, and not in earlier bins: those that see one prefix stay close.
    """
    longest = max(run.length for runs in groups for run in runs)
    for width in sorted({shape.width for shape in ladder if shape.width >= longest}):
        sizes = sorted((shape for shape in ladder if shape.width == width), reverse=True)
        bins: list[list[_Run]] = []
        room: list[_Free] = []
        for runs in groups:
            begun = len(bins)
            room = _bins(runs, sizes[0], bins, room)
            room = [free for free in room if free.bin >= begun] if len(bins) > begun else room
        yield _downwards(bins, sizes, costs)


def _of_one(runs: Sequence[_Run], ladder: Sequence[Shape], costs: Costs) -> list[_Planned]:
    """One group's runs, descending: all in bins of one width, or long and short ones apart."""
    full = {shape.width: shape for shape in ladder}  # the largest of a width comes last
    longest, shortest = runs[0].length, runs[-1].length
    narrowest = min(width for width in full if width >= longest)
    tokens = [0, *itertools.accumulate(run.length * run.number for run in runs)]
    per_token = {width: costs.of(shape) / shape.tokens for width, shape in full.items()}

    def least(cut: int, wide: int, narrow: int) -> float:
        """What the runs before ``cut`` in wide bins and the others in narrow ones cost if no position is wasted."""
        return tokens[cut] * per_token[wide] + (tokens[-1] - tokens[cut]) * per_token[narrow]

    options = [(len(runs), width, width) for width in full if width >= longest]
    for width in [width for width in full if shortest <= width < longest]:
        cut = bisect.bisect_left(runs, -width, key=lambda run: -run.length)
        options.append((cut, narrowest, width))
    best: list[_Planned] = []
    best_cost = float("inf")
    for cut, wide, narrow in sorted(options, key=lambda option: least(*option)):
        if least(cut, wide, narrow) + costs.call >= 0.99 * best_cost:
            break  # the rest of the search could save no more than a hundredth
        parts = [(part, full[width]) for part, width in ((runs[:cut], wide), (runs[cut:], narrow)) if part]
        calls = [call for part, shape in parts for call in _calls(_packed(part, shape), shape, ladder, costs)]
        if (cost := _cost(calls, costs)) < best_cost:
            best, best_cost = calls, cost
    return best


def _placed(call: _Planned) -> _Places:
    places: list[Numbers] = []
    offsets: list[Numbers] = []
    bins: list[int] = []
    for number, runs in enumerate(call.bins):
        offset = 0
        for run in runs:
            places.append(np.arange(run.first, run.first + run.number))
            offsets.append(offset + run.length * np.arange(run.number))
            bins += [number] * run.number
            offset += run.length * run.number
    return _Places(call.shape, np.concatenate(places), np.array(bins), np.concatenate(offsets))


def _longest_first(run: _Run) -> tuple[int, int]:
    return -run.length, run.reads


def _cost(calls: Sequence[_Planned], costs: Costs) -> float:
    return sum(costs.of(call.shape) for call in calls)


class _Free(NamedTuple):
    """What a bin has room for."""

    tokens: int
    bin: int
    reads: int


def _packed(runs: Sequence[_Run], shape: Shape) -> list[list[_Run]]:
    """Bins of the shape's width that hold the runs, longest first."""
    bins: list[list[_Run]] = []
    _bins(runs, shape, bins, [])
    return bins


def _bins(runs: Sequence[_Run], shape: Shape, bins: list[list[_Run]], room: Sequence[_Free]) -> list[_Free]:
    """Best-fit of segments, longest first, into bins of the shape's width; none has more reads than one call may.

    Args:
        bins: get the runs; new ones are added.
        room: in bins, ascending.

    Returns:
        The room that is left in these and in new bins, ascending.
    """
    width, most = shape.width, shape.reads
    room = list(room)
    for first, count, length, reads in runs:
        left = count
        while left:
            at = bisect.bisect_left(room, (length, -1, -1))
            if at < len(room) and room[at].reads >= reads:
                free, number, free_reads = room.pop(at)
            else:
                free, number, free_reads = width, len(bins), most
                bins.append([])
            taken = min(free // length, free_reads // reads, left)
            bins[number].append(_Run(first + count - left, taken, length, reads))
            left -= taken
            free, free_reads = free - taken * length, free_reads - taken * reads
            if free and free_reads:
                bisect.insort(room, _Free(free, number, free_reads))
    return room


def _calls(bins: Sequence[list[_Run]], full: Shape, ladder: Sequence[Shape], costs: Costs) -> list[_Planned]:
    """Bins of one width as full calls; the segments that do not fill the last one go where they cost least."""
    *calls, last = _runs(bins, full)
    rest = sorted(itertools.chain.from_iterable(last.bins), key=_longest_first)
    options = [[last]]
    for shape in ladder:
        small = shape.bins == -(-SMALLEST_CALL // shape.width) or 2 * shape.tokens <= full.tokens + shape.width
        if shape.width >= rest[0].length and small:
            smaller = [other for other in ladder if other.width == shape.width and other.bins < shape.bins]
            options.append(_downwards(_packed(rest, shape), [shape, *reversed(smaller)], costs))
    return calls + min(options, key=lambda option: _cost(option, costs))


def _downwards(bins: Sequence[list[_Run]], sizes: Sequence[Shape], costs: Costs) -> list[_Planned]:
    """Bins as calls of the first of these sizes, which descend; those that do not fill the last call go into smaller
    ones where that costs less."""
    calls = _runs(bins, sizes[0])
    *full, last = calls
    if len(sizes) == 1 or any(sum(run.reads * run.number for run in runs) > sizes[1].reads for runs in last.bins):
        return calls
    return min(calls, [*full, *_downwards(last.bins, sizes[1:], costs)], key=lambda option: _cost(option, costs))


def _runs(bins: Sequence[list[_Run]], shape: Shape) -> list[_Planned]:
    """Bins in order, as many to a call as it has room for, and no more reads."""
    most = shape.reads
    calls: list[_Planned] = []
    taken: list[list[_Run]] = []
    reads = 0
    for members in bins:
        wanted = sum([run.reads * run.number for run in members])
        if len(taken) == shape.bins or reads + wanted > most:
            calls.append(_Planned(shape, taken))
            taken, reads = [], 0
        taken.append(members)
        reads += wanted
    return [*calls, _Planned(shape, taken)]


MOST_PADDING = 1023
"""Positions of padding up to which the last tokens of a prefill are one call: more cost as much as another call."""


def chunks(length: int, sizes: Sequence[int]) -> list[int]:
    """Sizes of the prefill chunks that cover ``length`` tokens in few calls, largest first."""
    result: list[int] = []
    while length > 0:
        size = bucket(length, sizes)
        if size - length > MOST_PADDING:
            size = max((each for each in sizes if each <= length), default=size)
        result.append(size)
        length -= size
    return result


def padding_waste(calls: Sequence[Call]) -> float:
    """Share of computed positions that hold no token, 0 to 1."""
    computed = sum(call.shape.tokens for call in calls)
    real = sum(int(call.segments.lengths.sum()) for call in calls)
    return 1 - real / computed if computed else 0.0


def bucket(count: int, sizes: Sequence[int]) -> int:
    """The smallest size that holds ``count``, or the largest."""
    return sizes[min(bisect.bisect_left(sizes, count), len(sizes) - 1)]


def blocks(count: int, sizes: Sequence[int]) -> list[tuple[int, int, int]]:
    """(start, compiled size, how many of it are real) until ``count`` are covered."""
    result: list[tuple[int, int, int]] = []
    at = 0
    while at < count:
        size = bucket(count - at, sizes)
        result.append((at, size, min(size, count - at)))
        at += size
    return result
