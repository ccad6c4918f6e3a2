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

import numpy as np
import numpy.typing as npt

from model.contract import common_prefix

Tokens = npt.NDArray[np.int32] | npt.NDArray[np.int64]

SMALLEST_CALL = 64
"""Tokens, and reads, of the smallest program. XLA's CPU matmul gives a row the same bits whatever the number of rows,
from 64 rows on; below, other kernels round otherwise (measured with jax 0.10.2 on an AVX2 machine), and a segment's
score would depend on the size of its batch in the fifth digit."""

CALL_COST = 32
"""What a call costs whatever its size, in units of one token's matmuls: it reads all weights once."""
ATTENTION_COST = 1 / 1536
"""What one more position to attend to costs each token, in the same units. Both measured with the demo model on CPU."""


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

    @property
    def cost(self) -> float:
        """Cost of one call, in units of one token's matmuls."""
        return self.tokens * (1 + self.width * ATTENTION_COST) + CALL_COST

    def __str__(self) -> str:
        return f"{self.bins}x{self.width}"


def reads_of(tokens: int) -> int:
    """Read positions that a call of ``tokens`` has room for: all in a small call, an eighth of a large one."""
    return tokens if tokens <= 2 * SMALLEST_CALL else max(2 * SMALLEST_CALL, tokens // 8)


@dataclass(frozen=True, slots=True)
class Segment:
    """Tokens ``start:stop`` of one sequence, computed together over the prefix ``:start``."""

    sequence: int
    start: int
    stop: int
    reads: int

    @property
    def length(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True, slots=True)
class Group:
    """Segments over one prefix: the first ``prefix_length`` tokens of sequence ``prefix_of``, which all share."""

    prefix_of: int
    prefix_length: int
    segments: tuple[Segment, ...]


@dataclass(frozen=True, slots=True)
class Placement:
    """A segment's place in a call: its first token goes to position ``offset`` of bin ``bin``, and it sees the call's
    prefix number ``prefix``."""

    segment: Segment
    bin: int
    offset: int
    prefix: int = 0


@dataclass(frozen=True, slots=True)
class Call:
    """One launch of the program of ``shape``."""

    shape: Shape
    placements: tuple[Placement, ...]


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
    widths = sorted({min(width, max_width) for width in (128, 256, 384, 512, 768, 1024)} | {max_width})
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
    waiting = {number: sorted(group.segments, key=_longest_first, reverse=True) for number, group in enumerate(groups)}
    calls: list[Call] = []
    while waiting:
        placed: list[Placement] = []
        tokens = reads = 0
        for number, segments in list(waiting.items()):
            while (at := _longest_within(segments, largest.width - tokens, largest.reads - reads)) is not None:
                segment = segments.pop(at)
                placed.append(Placement(segment, 0, tokens, number))
                tokens += segment.length
                reads += segment.reads
            if not segments:
                del waiting[number]
        if not placed:
            segment = next(iter(waiting.values()))[-1]
            wanted = f"{segment.length} tokens, {segment.reads} of them read"
            raise ValueError(
                f"a segment of {wanted}, does not fit the largest call of {largest.width}, {largest.reads} read"
            )
        smallest = next(shape for shape in ladder if shape.width >= tokens and shape.reads >= reads)
        calls.append(Call(smallest, tuple(placed)))
    return calls


def _longest_within(segments: Sequence[Segment], tokens: int, reads: int) -> int | None:
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


def share(sequences: Sequence[Tokens], limits: Sequence[int], *, min_saving: int) -> list[tuple[int, int, list[int]]]:
    """Group sequences by common token prefixes, where sharing saves at least ``min_saving`` tokens.

    Args:
        sequences: token ids.
        limits: for each sequence, how many leading tokens a prefix may take at most: the first read position, since
            a read token must be in a segment.
        min_saving: tokens; what one more prefix costs in launches and padding.

    Returns:
        (a sequence that has the prefix, prefix length, member sequences) per group, parents before the groups whose
        prefix continues theirs; every sequence is a member of exactly one group. Prefix length 0: nothing shared.
    """
    if not sequences:
        return []
    heads = [tokens[:limit] for tokens, limit in zip(sequences, limits, strict=True)]
    # As bytes, sequences with a common beginning sort together, and comparing them is a memcmp.
    keys = [head.tobytes() for head in heads]
    order = sorted(range(len(sequences)), key=keys.__getitem__)
    shared = common_prefix(heads[order[0]], heads[order[-1]])  # by all, often a long query: not compared again
    tails = [heads[i][shared:] for i in order]
    common = shared + np.array([common_prefix(a, b) for a, b in itertools.pairwise(tails)], np.int64)
    longest = max(map(len, heads))
    groups: list[tuple[int, int, list[int]]] = [(order[0], 0, [])]
    pending = [(0, len(order), 0)]  # an interval of `order`, and the group that its sequences belong to so far
    while pending:
        low, high, group = pending.pop()
        depth = int(common[low : high - 1].min()) if high - low > 1 else len(heads[order[low]])
        if (high - low - 1) * (depth - groups[group][1]) >= min_saving:
            groups.append((order[low], depth, []))
            group = len(groups) - 1
        if (high - low - 1) * (longest - groups[group][1]) < min_saving:  # nothing deeper can pay
            groups[group][2].extend(order[low:high])
            continue
        bounds = [low, *(low + 1 + np.flatnonzero(common[low : high - 1] == depth)).tolist(), high]
        pending.extend((start, stop, group) for start, stop in itertools.pairwise(bounds))
    return [group for group in groups if group[2]]


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
) -> list[Group]:
    """Shared prefixes and segments for sequences with reads at the given ascending positions.

    Tokens after a sequence's last read are not computed. A segment longer than ``max_width``, or with more than
    ``max_reads`` reads, is cut: its earlier tokens become a prefix of its own.

    Args:
        page: a prefix is stored and attended to in pages of so many tokens.
        partial_sizes: how many tokens of a partial page are looked at, ascending, the last ``page``; empty: always the
            whole page.
        common: for each sequence how many tokens at the front its request's sequences share, and how many these are;
            empty: not known.
    """
    result: list[Group] = []
    shared = share(sequences, [positions[0] for positions in reads], min_saving=min_saving)
    for prefix_of, depth, members in shared:
        own_tokens = sum(reads[sequence][-1] + 1 - depth for sequence in members)
        uses = [(depth, len(members))]
        if common:
            of_request, count = common[prefix_of]
            uses.append((min(of_request, depth), max(count, len(members))))
        prefix_length = _worthwhile(depth, uses, own_tokens / len(members), page, partial_sizes or (page,))
        segments: list[Segment] = []
        for sequence in members:
            pieces = _pieces(sequence, prefix_length, reads[sequence], max_width, max_reads)
            for piece in pieces:
                if piece.start == prefix_length:
                    segments.append(piece)
                else:
                    result.append(Group(sequence, piece.start, (piece,)))
        if segments:
            result.append(Group(prefix_of, prefix_length, tuple(segments)))
    return result


def _worthwhile(
    prefix_length: int, uses: Sequence[tuple[int, int]], own_tokens: float, page: int, partial_sizes: Sequence[int]
) -> int:
    """The prefix, with as many tokens of its partial page as save most beyond what that page costs, or none.

    Items of one request often begin with the same word: a page for that word is computed once, and looked at by all.

    Args:
        uses: (prefix length, number of sequences that have it) to choose from.
        own_tokens: of a sequence after the prefix, on average.
    """
    whole = prefix_length - prefix_length % page
    best, most = whole, 0.0
    for length, count in uses:
        seen = bucket(length - whole, partial_sizes)
        cost = max(seen, SMALLEST_CALL) + CALL_COST + count * own_tokens * seen * ATTENTION_COST
        saving = (count - 1) * (length - whole) - cost
        if length > whole and saving >= most:
            best, most = length, saving
    return best


def _pieces(sequence: int, start: int, reads: Sequence[int], max_width: int, max_reads: int) -> Iterable[Segment]:
    """Segments that hold all reads of one sequence; stretches without a read are left to the prefix."""
    if reads[-1] + 1 - start <= max_width and len(reads) <= max_reads:
        return [Segment(sequence, start, reads[-1] + 1, len(reads))]
    segments: list[Segment] = []
    done = 0
    while done < len(reads):
        end = done
        while end < len(reads) and end - done < max_reads and reads[end] - reads[done] < max_width:
            end += 1
        stop = reads[end - 1] + 1
        first = max(segments[-1].stop if segments else start, stop - max_width)
        segments.append(Segment(sequence, first, stop, end - done))
        done = end
    return segments


def pack_bins(segments: Sequence[Segment], ladder: Sequence[Shape]) -> list[Call]:
    """Pack segments of one group into calls, choosing among the ladder's widths what costs least.

    Tried: all segments in bins of one width, and long and short segments apart.

    Raises:
        ValueError: a segment is longer than the widest bin.
    """
    ordered = sorted(segments, key=_longest_first)
    full = {shape.width: shape for shape in ladder}  # the largest of a width comes last
    longest = ordered[0].length
    if longest > max(full):
        raise ValueError(f"a segment of {longest} tokens does not fit the widest bin of {max(full)}")
    narrowest = min(width for width in full if width >= longest)
    tokens = [0, *itertools.accumulate(segment.length for segment in ordered)]
    per_token = {width: shape.cost / shape.tokens for width, shape in full.items()}

    def least(cut: int, wide: int, narrow: int) -> float:
        """What the segments before ``cut`` in wide bins and the others in narrow ones cost if no position is wasted."""
        return tokens[cut] * per_token[wide] + (tokens[-1] - tokens[cut]) * per_token[narrow]

    options = [(len(ordered), width, width) for width in full if width >= longest]
    for width in [width for width in full if ordered[-1].length <= width < longest]:
        cut = bisect.bisect_left(ordered, -width, key=lambda segment: -segment.length)
        options.append((cut, narrowest, width))
    best: list[Call] = []
    best_cost = float("inf")
    for cut, wide, narrow in sorted(options, key=lambda option: least(*option)):
        if least(cut, wide, narrow) + CALL_COST >= 0.98 * best_cost:
            break  # the rest of the search could save no more than a fiftieth
        parts = [(part, full[width]) for part, width in ((ordered[:cut], wide), (ordered[cut:], narrow)) if part]
        calls = [call for part, shape in parts for call in _calls(_bins(part, shape), shape, ladder)]
        if (cost := _cost(calls)) < best_cost:
            best, best_cost = calls, cost
    return best


def _longest_first(segment: Segment) -> tuple[int, int]:
    return -segment.length, segment.reads


def _cost(calls: Sequence[Call]) -> float:
    return sum(call.shape.cost for call in calls)


def _bins(segments: Sequence[Segment], shape: Shape) -> list[list[Segment]]:
    """Best-fit of segments, longest first, into bins of the shape's width; none has more reads than one call may."""
    bins: list[list[Segment]] = []
    room: list[tuple[int, int, int]] = []  # (free tokens, bin, free reads), ascending
    for (length, reads), run in itertools.groupby(segments, key=lambda segment: (segment.length, segment.reads)):
        alike = list(run)
        placed = 0
        while placed < len(alike):
            at = bisect.bisect_left(room, (length, -1, -1))
            if at < len(room) and room[at][2] >= reads:
                free, number, free_reads = room.pop(at)
            else:
                free, number, free_reads = shape.width, len(bins), shape.reads
                bins.append([])
            count = min(free // length, free_reads // reads, len(alike) - placed)
            bins[number].extend(alike[placed : placed + count])
            placed += count
            free, free_reads = free - count * length, free_reads - count * reads
            if free and free_reads:
                bisect.insort(room, (free, number, free_reads))
    return bins


def _calls(bins: Sequence[list[Segment]], full: Shape, ladder: Sequence[Shape]) -> list[Call]:
    """Bins of one width as full calls; the segments that do not fill the last one go where they cost least."""
    *calls, last = _runs(bins, full)
    rest = sorted((placement.segment for placement in last.placements), key=_longest_first)
    options = [[last]]
    for shape in ladder:
        small = shape.bins == -(-SMALLEST_CALL // shape.width) or 2 * shape.tokens <= full.tokens + shape.width
        if shape.width >= rest[0].length and small:
            options.append(_runs(_bins(rest, shape), shape))
    return calls + min(options, key=_cost)


def _runs(bins: Sequence[list[Segment]], shape: Shape) -> list[Call]:
    """Bins in order, as many to a call as it has room for, and no more reads."""
    calls: list[Call] = []
    taken: list[list[Segment]] = []
    reads = 0
    for members in bins:
        wanted = sum(segment.reads for segment in members)
        if len(taken) == shape.bins or reads + wanted > shape.reads:
            calls.append(_call(shape, taken))
            taken, reads = [], 0
        taken.append(members)
        reads += wanted
    return [*calls, _call(shape, taken)]


def _call(shape: Shape, bins: Sequence[Sequence[Segment]]) -> Call:
    placements: list[Placement] = []
    for number, segments in enumerate(bins):
        offset = 0
        for segment in segments:
            placements.append(Placement(segment, number, offset))
            offset += segment.length
    return Call(shape, tuple(placements))


def chunks(length: int, sizes: Sequence[int]) -> list[int]:
    """Sizes of the prefill chunks that cover ``length`` tokens with the least padding, largest first."""
    largest = sizes[-1]
    result = [largest] * (length // largest)
    rest = length - largest * len(result)
    if rest:
        result.append(next(size for size in sizes if size >= rest))
    return result


def padding_waste(calls: Sequence[Call]) -> float:
    """Share of computed positions that hold no token, 0 to 1."""
    computed = sum(call.shape.tokens for call in calls)
    real = sum(placement.segment.length for call in calls for placement in call.placements)
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
