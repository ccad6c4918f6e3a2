"""The attention of ``model.attention`` as one Pallas kernel for TPU: no score matrix in memory, no copy of the prefix.

A grid step holds a tile of queries of the heads that share one key/value head. The softmax is folded first over the
tile's own bins, then, in a wide bin, over the tiles before it, then over the prefixes that its queries see, whose pages
are fetched straight from the pool through the page tables. The number of steps over prefixes is part of the call, not
of the program: one program serves every prefix length and computes no more than it holds, and with a sliding window no
more than the window lets see. Where all queries of a tile see one prefix, what lies past its end is zeros; else a step
folds the queries from the first to the last that see its prefix, and masks the others.

Only the first fold finds its queries' maxima before it takes exponentials. Later ones keep these maxima, so that scores
need not be stored until the last is known. Where one turns out to be too far above, the fold is done again, with new
maxima.

Source: the folding is FlashAttention's (arXiv 2205.14135); ``tests/parity`` compares with ``reference``.
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int, Shaped

from model.logprobs import softcapped

LANES = 128
"""Width of a vector register. Heads of another width are widened by zeros to a multiple of it, also in the pool."""
SUBLANES = 8
"""Rows of a vector register of float32."""
TILE_TOKENS = 1024
"""Queries of one step: the prefix is read once for each tile. Wider bins must be a multiple of it."""
FOLD_TOKENS = 256
"""Queries folded at once over their own bins, at most, in a loop: the compiler writes a fold out vector by vector. They
are a matrix's columns, so a fold is a multiple of ``LANES``, as each bin is therefore."""
OWN_ROW = 2048
"""Bytes of queries at one place of a bin, or of several bins, that are folded at once over narrow bins: 8 heads of 128
channels in bfloat16. With two heads a score takes 1.6 times as many instructions, since each product waits for the one
before."""
WIDE_FOLD_TOKENS = (1024, 512)
"""Queries folded at once over the prefix and over earlier tiles, at most: where a token's queries that share a
key/value head have few bytes, and where they have many. In between, ``WIDE_BYTES`` of them. With fewer queries a score
takes more instructions: of two heads on a v6e 2.16 for 1,000 scores of 768 queries, and 2.84 of 256."""
WIDE_BYTES = 768 * 2**10
STEP_PAGES = 4
"""Pages of the prefix that one step folds in: enough work to hide the next step's copies."""
EARLIER_KEYS = 512
"""Keys of an earlier tile that are folded in at once."""
MOST_ABOVE = 80.0
"""How far above the known maximum a score may be, as a power of 2: the sum of as many weights as a prefix has tokens,
times values, is still a float32."""
LEAST_MEMORY = 16 * 2**20
"""Of the core's own, in bytes: as much as the smallest chips have."""
LOG2_E = math.log2(math.e)
"""What queries are multiplied by beside their scale: the chip's exponential is of 2."""
MASKED = -1e30
"""A score that weighs nothing; finite, so that the difference of two is a number."""


def stored_width(head_width: int) -> int:
    """Width of a head in the pool: the next multiple of ``LANES``."""
    return -(-head_width // LANES) * LANES


class Tiling(NamedTuple):
    """The cut of a call into tiles.

    Attributes:
        span: tokens that look at each other: a bin, or a tile of a wider one.
        fold: queries that are folded at once over their own bins, a divisor of ``span``.
        tile: queries of a step.
        tiles: how many there are; the last may be filled in part.
        own_steps: tiles in a bin.
    """

    span: int
    fold: int
    tile: int
    tiles: int
    own_steps: int

    def wide_fold(self, row: int) -> int:
        """Queries that are folded at once over the prefix: a divisor of ``tile``, and a multiple of ``fold``.

        Args:
            row: bytes of a token's queries that share a key/value head.
        """
        of_few_bytes, of_many = WIDE_FOLD_TOKENS
        unit = math.gcd(self.tile, FOLD_TOKENS)
        most = min(max(WIDE_BYTES // row, of_many), of_few_bytes) // unit
        return unit * max(count for count in range(1, most + 1) if self.tile % (unit * count) == 0)

    def together(self, row: int) -> int:
        """Bins that are folded at once over their own keys."""
        return math.gcd(self.tile // self.span, max(OWN_ROW // row, 1)) if self.span == self.fold else 1


def _tiling(tokens: int, bin_width: int) -> Tiling:
    if bin_width % LANES or (bin_width > TILE_TOKENS and bin_width % TILE_TOKENS):
        raise ValueError(
            f"a bin of {bin_width} positions is not a multiple of {LANES}, or of {TILE_TOKENS} if it is wider than that"
        )
    span = min(bin_width, TILE_TOKENS)
    tile = span * min(TILE_TOKENS // span, -(-tokens // span))
    return Tiling(span, math.gcd(span, FOLD_TOKENS), tile, -(-tokens // tile), bin_width // span)


class Folds(NamedTuple):
    """How often one key/value head's kernel runs the bodies of its loops in a layer.

    Attributes:
        own: ``Tiling.span`` queries, of ``Tiling.together`` bins, over their own bins. Each fold of a span has a body,
            with the keys up to its end.
        earlier: ``Tiling.wide_fold()`` queries over ``EARLIER_KEYS`` keys of an earlier tile of their bin.
        prefix: the same over ``STEP_PAGES`` pages of the prefix.
        mixed: ``Tiling.fold`` queries over ``STEP_PAGES`` pages of one of the prefixes that their tile sees.
    """

    own: int
    earlier: int
    prefix: int
    mixed: int = 0


def loops(bin_width: int) -> Sequence[int]:
    """How many loops of the kernel's text each field of ``Folds`` is of."""
    tiling = _tiling(bin_width, bin_width)
    return tiling.span // tiling.fold, int(tiling.own_steps > 1), 1, 1


def _row(heads: int, pool: Any) -> int:
    """Bytes of a token's queries that share a key/value head."""
    *_, kv_heads, _, width = pool.shape
    return heads // kv_heads * width * pool.dtype.itemsize


def folds(
    tokens: int, bin_width: int, heads: int, pool: jax.ShapeDtypeStruct, prefix_length: int, window: int | None
) -> Folds:
    """The folds of a call with one prefix."""
    tiling, row = _tiling(tokens, bin_width), _row(heads, pool)
    wide_fold, together = tiling.wide_fold(row), tiling.together(row)
    filled = [min(tiling.tile, tokens - number * tiling.tile) for number in range(tiling.tiles)]
    wide = [-(-queries // wide_fold) for queries in filled]
    earlier = sum(number % tiling.own_steps * folds for number, folds in enumerate(wide))
    return Folds(
        sum(-(-queries // (tiling.span * together)) for queries in filled),
        earlier * (tiling.tile // EARLIER_KEYS),
        _prefix_steps(pool.shape[4], prefix_length, window) * sum(wide),
    )


def _prefix_steps(page: int, prefix_length: int, window: int | None) -> int:
    """Steps over a prefix."""
    step = STEP_PAGES * page
    return -(-prefix_length // step) - (0 if window is None else max(prefix_length + 1 - window, 0) // step)


def work(
    tokens: int, bin_width: int, heads: int, pool: jax.ShapeDtypeStruct, prefix_length: int, window: int | None
) -> tuple[float, float]:
    """FLOPs of the kernel's matrix products, masked ones too, and the bytes that its copies move: in one layer of a
    call with one prefix."""
    *_, kv_heads, page, width = pool.shape
    tiling, row = _tiling(tokens, bin_width), _row(heads, pool)
    (span, fold, tile, tiles, own_steps), wide_fold = tiling, tiling.wide_fold(row)
    count = folds(tokens, bin_width, heads, pool, prefix_length, window)
    step = STEP_PAGES * page
    of_own = sum(fold * (place + 1) * fold for place in range(span // fold))
    scores = count.own * tiling.together(row) * of_own
    scores += wide_fold * (count.earlier * EARLIER_KEYS + count.prefix * step)
    own_tiles = sum(number % own_steps + 1 for number in range(tiles))
    fetched = max(_prefix_steps(page, prefix_length, window), 1)
    queries = 2 * tokens * heads * width
    keys = 2 * kv_heads * width * (own_tiles * tile + tiles * fetched * step)
    positions = 0 if window is None else 2 * tokens * kv_heads * LANES
    return 4.0 * heads * width * scores, float((queries + keys) * pool.dtype.itemsize + positions)


class Walk(NamedTuple):
    """The steps over prefixes, prefix after prefix: every tile takes those from its first prefix to its last.

    Attributes:
        owners: [all steps] the prefix of each.
        begins: [P] each prefix's first among all steps.
        skipped: [P] its steps before that, which no window reaches.
        lengths: [P] its tokens.
        tables: [P * slots] its pages.
        first, last: [P] the first query that sees it, and the one after the last.
        starts, counts: [tiles] each tile's first step, and how many it takes.
        mixed: [tiles] 1 where a tile's queries see several prefixes.
    """

    owners: Any
    begins: Any
    skipped: Any
    lengths: Any
    tables: Any
    first: Any
    last: Any
    starts: Any
    counts: Any
    mixed: Any

    def at(self, tile: Any, step: Any) -> tuple[Any, Any]:
        """The prefix of a tile's step, and the step's number in it; after the tile's last step that one again."""
        step = self.starts[tile] + jnp.clip(step, 0, jnp.maximum(self.counts[tile] - 1, 0))
        prefix = self.owners[step]
        return prefix, step - self.begins[prefix] + self.skipped[prefix]


class Steps(NamedTuple):
    """The steps of a call, and how many a tile takes at most."""

    walk: Walk
    most: Int[Array, ""]


def steps(
    segments: Int[Array, "B T"],
    prefixes: Int[Array, " M"],
    page_tables: Int[Array, "P slots"],
    prefix_lengths: Int[Array, " P"],
    page: int,
    window: Int[Array, ""] | None,
) -> Steps:
    """The steps of a call; args are those of ``fused``."""
    (number, slots), step = page_tables.shape, STEP_PAGES * page
    tiling = _tiling(segments.size, segments.shape[1])
    # No query is before its prefix's end, and none sees further back than its window.
    skipped = jnp.zeros_like(prefix_lengths)
    if window is not None:
        skipped = lax.div(jnp.maximum(prefix_lengths + 1 - window, 0), step)
    ends = jnp.cumsum(pl.cdiv(prefix_lengths, step) - skipped)
    begins = jnp.pad(ends, (1, 0))
    every = jnp.arange(number * -(-slots // STEP_PAGES))
    owners = jnp.minimum((every[:, None] >= ends[None, :]).sum(axis=1), number - 1)
    # Padding sees no prefix.
    seen = jnp.where(segments.reshape(-1) < 0, number, prefixes)
    sees, places = seen[None, :] == jnp.arange(number)[:, None], jnp.arange(seen.size)[None, :]
    first, last = jnp.where(sees, places, seen.size).min(axis=1), jnp.where(sees, places + 1, 0).max(axis=1)
    of_tiles = _tiled(seen, tiling, number)
    lowest, highest = of_tiles.min(axis=1), jnp.where(of_tiles < number, of_tiles, -1).max(axis=1)
    starts = begins[jnp.minimum(lowest, number)]
    counts = jnp.maximum(begins[highest + 1] - starts, 0)
    starts, mixed = jnp.where(counts > 0, starts, 0), lowest < highest
    walk = owners, begins[:-1], skipped, prefix_lengths, page_tables.reshape(-1), first, last, starts, counts, mixed
    return Steps(Walk(*(part.astype(jnp.int32) for part in walk)), counts.max())


def _tiled(x: Int[Array, " M"], tiling: Tiling, padding: int = 0) -> Int[Array, "tiles tile"]:
    return jnp.pad(x, (0, tiling.tiles * tiling.tile - len(x)), constant_values=padding).reshape(tiling.tiles, -1)


def fused(
    q: Float[Array, "M N W"],
    k: Float[Array, "M K W"],
    v: Float[Array, "M K H"],
    segments: Int[Array, "B T"],
    positions: Int[Array, " M"],
    prefixes: Int[Array, " M"],
    pool: Shaped[Array, "pages L 2 K page stored"],
    steps: Steps,
    layer: int | Int[Array, ""],
    window: Int[Array, ""] | None,
    softcap: float | None,
    *,
    interpret: bool,
) -> Float[Array, "M N H"]:
    """Softmax attention of every token, in q's dtype.

    Args are those of ``attention.attend``, the fields of its ``AttentionContext`` and of its ``MaskSpec``, and:
        q: with ``LOG2_E`` in their scale.
        prefixes: those that see one prefix should be next to each other, and prefixes ascend, for speed.
        steps: of these prefixes and this window.
        interpret: run step by step on any platform, for tests.

    Raises:
        ValueError: at trace time, a bin that folds or tiles do not divide.
    """
    (tokens, heads, _), (_, kv_heads, head_width) = q.shape, v.shape
    page, width = pool.shape[4:]
    groups = heads // kv_heads
    tiling, row = _tiling(tokens, segments.shape[1]), _row(heads, pool)
    (span, fold, tile, tiles, own_steps), wide_fold = tiling, tiling.wide_fold(row)

    def flat(x: Float[Array, "M heads _"]) -> Float[Array, "M features"]:
        return jnp.pad(x, ((0, 0), (0, 0), (0, width - x.shape[2]))).reshape(tokens, -1)

    tiled = partial(_tiled, tiling=tiling)
    of_tiles = tiled(segments.reshape(-1), padding=-1)
    query_segments, key_segments = of_tiles.reshape(tiles, -1, fold), of_tiles.reshape(tiles, -1, span)
    numbers = jnp.stack([jnp.asarray(number, jnp.int32) for number in (layer, 0 if window is None else window)])
    slots = steps.walk.tables.size // steps.walk.lengths.size

    def own_tile(i: Any, s: Any) -> Any:
        """The key tile of a step: from the queries' own back to the beginning of the bin."""
        return jnp.maximum(i - s, lax.div(i, own_steps) * own_steps)

    def page_at(r: int, h: Any, i: Any, s: Any, numbers: Any, *refs: Any) -> Any:
        walk = Walk(*refs)
        prefix, number = walk.at(i, s - own_steps)
        slot = jnp.minimum(number * STEP_PAGES + r, slots - 1)
        return walk.tables[prefix * slots + slot], numbers[0], 0, h, 0, 0

    by_fold = pl.BlockSpec((None, tile // fold, fold), lambda _head, i, *_: (i, 0, 0))
    queries = pl.BlockSpec((tile, groups * width), lambda h, i, *_: (i, h))
    own = pl.BlockSpec((tile, width), lambda h, i, s, *_: (own_tile(i, s), h))
    pages = [pl.BlockSpec((None, None, 2, None, page, width), partial(page_at, number)) for number in range(STEP_PAGES)]
    places = [] if window is None else [tiled(positions).reshape(tiles, -1, fold)]
    result = pl.pallas_call(
        partial(_kernel, tokens, tiling, row, window is not None, softcap and softcap * LOG2_E),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1 + len(steps.walk),
            grid=(kv_heads, tiles, own_steps + steps.most),
            in_specs=[
                queries,
                own,
                own,
                by_fold,
                pl.BlockSpec((None, tile // span, span), lambda _head, i, s, *_: (own_tile(i, s), 0, 0)),
                by_fold,
                *pages,
                *[by_fold] * len(places),
            ],
            out_specs=queries,
            scratch_shapes=[
                pltpu.VMEM((groups, SUBLANES, tile), jnp.float32),
                pltpu.VMEM((2, groups, SUBLANES, tile), jnp.float32),
                pltpu.VMEM((2, groups, width, tile), jnp.float32),
                pltpu.SMEM((tile // wide_fold,), jnp.int32),
                pltpu.SMEM((max(tile // EARLIER_KEYS, 1) * (tile // wide_fold),), jnp.int32),
            ],
        ),
        out_shape=jax.ShapeDtypeStruct((tokens, heads * width), q.dtype),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=_memory(tiling, groups, page, width, q.dtype),
        ),
        interpret=interpret,
        name="fused_attention",
    )(
        *(numbers, *steps.walk),
        *(flat(q), flat(k), flat(v)),
        *(query_segments, key_segments, tiled(prefixes).reshape(tiles, -1, fold)),
        *[pool] * STEP_PAGES,
        *places,
    )
    return result.reshape(tokens, heads, width)[:, :, :head_width]


def _memory(tiling: Tiling, groups: int, page: int, width: int, dtype: Any) -> int:
    """Bytes of the core's memory that the kernel may take: of what it leaves, XLA keeps more between its products."""
    size, keys = jnp.dtype(dtype).itemsize, STEP_PAGES * page
    twice = tiling.tile * width * size * (2 * groups + 2) + 2 * keys * width * size  # the next step's are on their way
    sums = 4 * tiling.tile * groups * (2 * width + 3 * SUBLANES)
    scores = groups * tiling.wide_fold(groups * width * size) * keys * (4 + size)
    return max(2 * twice + sums + 2 * scores, LEAST_MEMORY)


def _kernel(tokens: int, tiling: Tiling, row: int, windowed: bool, softcap: float | None, *refs: Any) -> None:
    """One tile of queries, one step of keys.

    Sums lie in one of two halves of their memory, of which ``half_ref`` has the number for each wide fold. New sums go
    to the other half, and stand if no score was too far above its query's maximum.
    """
    numbers_ref, walk, of_call = refs[0], Walk(*refs[1 : 1 + len(Walk._fields)]), refs[1 + len(Walk._fields) : -6]
    q_ref, k_ref, v_ref, query_segment_ref, key_segment_ref, prefix_ref = of_call[:6]
    page_refs, place_refs = of_call[6 : 6 + STEP_PAGES], of_call[6 + STEP_PAGES :]
    out_ref, maximum_ref, total_ref, values_ref, half_ref, stands_ref = refs[-6:]
    tile_number, step = pl.program_id(1), pl.program_id(2)
    (_, page, width), (span, fold, tile, _, own_steps) = page_refs[0].shape, tiling
    groups, wide_fold, together = q_ref.shape[1] // width, tiling.wide_fold(row), tiling.together(row)
    wide_folds, chunks, size = tile // wide_fold, tile // EARLIER_KEYS, STEP_PAGES * page
    window = numbers_ref[1]
    filled = jnp.minimum(tile, tokens - tile_number * tile)

    def queries(begin: Any, count: int) -> Any:
        return pl.ds(pl.multiple_of(begin, LANES), count)

    def scores(keys: Any, place: Any, group: int) -> Any:
        """[keys, queries]: a query's maximum is then taken from register to register, not within one."""
        return softcapped(_product(keys, q_ref[place, group * width : (group + 1) * width], 1, 1), softcap)

    def fold_in(parts: Sequence[tuple[Any, Any, Any, Any]], half: Any = None) -> None:
        """Fold keys and values into queries, with new maxima.

        All products come before the first softmax, and all stores last, so that none waits for another. The sum of
        weights is left to the matrix unit.

        Args:
            parts: for each the queries' place, keys, values, and where they are visible.
            half: has the sums before; None: there are none.
        """
        every = [(part, g) for part in parts for g in range(groups)]
        before = [
            None
            if half is None
            else (maximum_ref[g, :1, place], total_ref[half, g, :, place], values_ref[half, g, :, place])
            for (place, *_), g in every
        ]
        of_heads = [scores(keys, place, g) for (place, keys, *_), g in every]
        after: list[tuple[Any, Any, Any]] = []
        for ((_, _, values, mask), _), of_head, sums in zip(every, of_heads, before, strict=True):
            seen = jnp.where(mask, of_head, MASKED)
            maximum = seen.max(axis=0, keepdims=True)
            if sums:
                maximum = jnp.maximum(sums[0], maximum)
            weights = jnp.exp2(seen - maximum).astype(values.dtype)
            total, summed = _product(_ones(values), weights, 0, 0), _product(values, weights, 0, 0)
            if sums:
                scale = jnp.exp2(sums[0] - maximum)
                total, summed = sums[1] * scale + total, sums[2] * scale + summed
            after.append((maximum, total, summed))
        into = 0 if half is None else half
        for ((place, *_), g), (maximum, total, summed) in zip(every, after, strict=True):
            maximum_ref[g, :, place] = jnp.broadcast_to(maximum, (SUBLANES, maximum.shape[1]))
            total_ref[into, g, :, place], values_ref[into, g, :, place] = total, summed

    def fold_quickly(number: Any, turn: Any, keys: Any, values: Any, ones: Any, visible: Any) -> None:
        """Fold keys and values into the queries of a wide fold, with the maxima that are known as long as that goes.

        Args:
            number: of the fold.
            turn: where ``stands_ref`` keeps whether it went.
            ones: zeros where there is no key.
            visible: from rows of queries to where they see keys; None: everywhere.
        """
        place, half, rows = queries(number * wide_fold, wide_fold), half_ref[number], wide_fold // fold
        above = jnp.full((1, wide_fold), -jnp.inf)
        for g, of_head in enumerate([scores(keys, place, g) for g in range(groups)]):
            if visible:
                of_head = jnp.where(visible(number * rows, rows), of_head, MASKED)
            of_head -= maximum_ref[g, :1, place]
            above = jnp.maximum(above, of_head.max(axis=0, keepdims=True))
            weights = jnp.exp2(of_head).astype(values.dtype)
            total_ref[1 - half, g, :, place] = total_ref[half, g, :, place] + _product(ones, weights, 0, 0)
            values_ref[1 - half, g, :, place] = values_ref[half, g, :, place] + _product(values, weights, 0, 0)
        there = lax.broadcasted_iota(jnp.int32, above.shape, 1) < filled - number * wide_fold
        stands = jnp.where(there, above, 0.0).max() <= MOST_ABOVE
        half_ref[number] = lax.select(stands, 1 - half, half)
        stands_ref[turn] = stands.astype(jnp.int32)

    def again(row: Any, first_turn: Any, read: Any, mask: Any) -> None:
        """Fold the same into a row of queries, unless what ``fold_quickly`` did stands."""
        number = lax.div(row, wide_fold // fold)

        @pl.when(stands_ref[first_turn + number] == 0)
        def _again() -> None:
            keys, values = read()
            fold_in([(queries(row * fold, fold), keys, values, mask(row, 1))], half_ref[number])

    def row_of(ref: Any, first: Any, rows: int) -> Any:
        """What a reference has of so many folds of queries."""
        return jnp.concatenate([ref[pl.ds(first + number, 1), :] for number in range(rows)], axis=1)

    def column(row: Any) -> Any:
        return jnp.broadcast_to(row, (LANES, row.shape[1])).T[:, :1]

    def of_a_bin(number: Any, place: int) -> tuple[Any, Any, Any, Any]:
        """One of the folds of one of a tile's bins, and the bin's keys up to its end."""
        begins, count = place * fold, (place + 1) * fold
        keys = queries(number * span, count)
        back = lax.broadcasted_iota(jnp.int32, (count, fold), 1) + begins
        back -= lax.broadcasted_iota(jnp.int32, (count, fold), 0)
        row = number * (span // fold) + place
        segments = column(key_segment_ref[pl.ds(number, 1), :][:, :count])
        mask = (segments == row_of(query_segment_ref, row, 1)) & (back >= 0)
        if windowed:
            mask &= back < window
        return queries(row * fold, fold), k_ref[keys, :], v_ref[keys, :], mask

    @pl.when(step == 0)
    def _own() -> None:
        for number in range(wide_folds):
            half_ref[number] = 0
        for place in range(span // fold):

            def one(number: Any, _: Any, place: int = place) -> None:
                fold_in([of_a_bin(number * together + each, place) for each in range(together)])

            lax.fori_loop(0, pl.cdiv(filled, span * together), one, None)

    if own_steps > 1:

        @pl.when((step > 0) & (step <= lax.rem(tile_number, own_steps)))
        def _earlier() -> None:
            def of_chunk(chunk: Any) -> tuple[Any, Any]:
                """Reads a chunk's keys and values; and where rows of queries see them."""
                first = chunk * EARLIER_KEYS
                place = queries(first, EARLIER_KEYS)

                def visible(row: Any, rows: int) -> Any:
                    mask = column(key_segment_ref[:, place]) == row_of(query_segment_ref, row, rows)
                    if windowed:
                        back = lax.broadcasted_iota(jnp.int32, mask.shape, 1) + (step * tile + row * fold - first)
                        mask &= back - lax.broadcasted_iota(jnp.int32, mask.shape, 0) < window
                    return mask

                return lambda: (k_ref[place, :], v_ref[place, :]), visible

            def one(turn: Any, _: Any) -> None:
                read, visible = of_chunk(lax.div(turn, wide_folds))
                keys, values = read()
                fold_quickly(lax.rem(turn, wide_folds), turn, keys, values, _ones(values), visible)

            def repeated(turn: Any, _: Any) -> None:
                chunk = lax.div(turn, tile // fold)
                read, visible = of_chunk(chunk)
                again(lax.rem(turn, tile // fold), chunk * wide_folds, read, visible)

            lax.fori_loop(0, chunks * wide_folds, one, None)
            lax.fori_loop(0, chunks * (tile // fold), repeated, None)

    prefix, number = walk.at(tile_number, step - own_steps)
    length = walk.lengths[prefix]
    places = number * size + lax.broadcasted_iota(jnp.int32, (size, 1), 0)

    def keys_and_values() -> Any:
        return (jnp.concatenate([_as(ref[part], q_ref.dtype) for ref in page_refs], axis=0) for part in (0, 1))

    def in_reach(row: Any, rows: int) -> Any:
        return places > row_of(place_refs[0], row, rows) - window

    def only() -> None:
        """All queries over the prefix that they see."""
        exists, (keys, values) = places < length, keys_and_values()
        # What lies past the prefix may be another's, and 0 * NaN is NaN.
        keys, values = (jnp.where(exists, each, jnp.zeros_like(each)) for each in (keys, values))
        ones = jnp.broadcast_to(jnp.where(exists, 1.0, 0.0), (size, SUBLANES)).astype(values.dtype)

        def visible(row: Any, rows: int) -> Any:
            mask = jnp.broadcast_to(exists, (size, rows * fold))
            return mask & in_reach(row, rows) if windowed else mask

        def one(number: Any, _: Any) -> None:
            fold_quickly(number, number, keys, values, ones, in_reach if windowed else None)

        lax.fori_loop(0, pl.cdiv(filled, wide_fold), one, None)
        lax.fori_loop(0, pl.cdiv(filled, fold), lambda row, _: again(row, 0, lambda: (keys, values), visible), None)

    def mixed() -> None:
        """The queries around those that see this prefix."""
        keys, values = keys_and_values()
        # A broken prefix is not to spoil the others, see ``attention._finite``.
        fine = (places < length) & (jnp.abs(values.astype(jnp.float32)) < jnp.inf)
        values = jnp.where(fine, values, jnp.zeros_like(values))

        def one(row: Any, _: Any) -> None:
            mask = (places < length) & (row_of(prefix_ref, row, 1) == prefix)
            if windowed:
                mask &= in_reach(row, 1)
            # Only folds over earlier tiles have been quick ones.
            half = half_ref[lax.div(row, wide_fold // fold)] if own_steps > 1 else 0
            fold_in([(queries(row * fold, fold), keys, values, mask)], half)

        first, last = (jnp.clip(at[prefix] - tile_number * tile, 0, filled) for at in (walk.first, walk.last))
        lax.fori_loop(lax.div(first, fold), pl.cdiv(last, fold), one, None)

    due = (step >= own_steps) & (step - own_steps < walk.counts[tile_number])
    several = walk.mixed[tile_number] > 0
    pl.when(due & ~several)(only)
    pl.when(due & several)(mixed)

    @pl.when(step == pl.num_programs(2) - 1)
    def _finish() -> None:
        for number in range(wide_folds):
            place, half = slice(number * wide_fold, (number + 1) * wide_fold), half_ref[number]
            for g in range(groups):
                values = (values_ref[half, g, :, place] / total_ref[half, g, :1, place]).T
                out_ref[place, g * width : (g + 1) * width] = values.astype(out_ref.dtype)


def _product(a: Array, b: Array, of_a: int, of_b: int) -> Array:
    """The matrix product over these axes, with float32 sums."""
    return lax.dot_general(a, b, (((of_a,), (of_b,)), ((), ())), preferred_element_type=jnp.float32)


def _ones(values: Array) -> Array:
    return jnp.ones((len(values), SUBLANES), values.dtype)


def _as(x: Array, dtype: Any) -> Array:
    """A page's values; bfloat16 is stored as its bits, see ``attention.to_pool``."""
    return pltpu.bitcast(x, jnp.bfloat16) if x.dtype == jnp.uint16 else x.astype(dtype)
