"""The planner: every read computed once, prefixes truly shared, nothing outside its bin."""

from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model import plan

LADDERS = (plan.shapes(128, 256), plan.large_shapes(128, 1024))

token_lists = st.lists(st.integers(0, 2), min_size=1, max_size=200)


@st.composite
def batches(draw: st.DrawFn) -> tuple[list[np.ndarray], list[list[int]]]:
    """Sequences over three tokens, so that common prefixes are frequent, with one or more reads each."""
    stems = draw(st.lists(token_lists, min_size=1, max_size=3))
    sequences: list[np.ndarray] = []
    reads: list[list[int]] = []
    for _ in range(draw(st.integers(1, 12))):
        tokens = draw(st.sampled_from(stems)) + draw(st.lists(st.integers(0, 2), max_size=30))
        sequences.append(np.array(tokens, np.int32))
        reads.append(sorted(draw(st.sets(st.integers(0, len(tokens) - 1), min_size=1, max_size=6))))
    return sequences, reads


@settings(max_examples=300)
@given(batches(), st.integers(1, 64))
def test_every_read_is_in_exactly_one_segment_over_its_own_prefix_or_in_a_prefix_that_is_read(
    batch: tuple[list[np.ndarray], list[list[int]]], min_saving: int
) -> None:
    sequences, reads = batch
    groups = plan.groups(sequences, reads, max_width=64, max_reads=4, min_saving=min_saving, page=16)
    found: Counter[tuple[int, int]] = Counter()
    for group in groups:
        prefix = sequences[group.prefix_of][: group.prefix_length]
        assert len(prefix) == group.prefix_length
        if group.first_read is not None:
            own = reads[group.prefix_of]
            assert len(own) > 4
            assert (group.first_read, group.prefix_length, len(group.segments)) == (own[0], own[-1] + 1, 0)
            found.update((group.prefix_of, p) for p in own)
        for segment in group.segments:
            assert segment.start == group.prefix_length
            assert 0 < segment.length <= 64
            np.testing.assert_array_equal(sequences[segment.sequence][: segment.start], prefix)
            inside = [p for p in reads[segment.sequence] if segment.start <= p < segment.stop]
            assert len(inside) == segment.reads <= 4
            found.update((segment.sequence, p) for p in inside)
    assert found == Counter((i, p) for i, positions in enumerate(reads) for p in positions)


segment_sizes = st.lists(st.tuples(st.integers(1, 128), st.sampled_from([1, 4, 64])), min_size=1, max_size=40)


def groups_of(sizes: list[list[tuple[int, int]]]) -> list[plan.Group]:
    """Groups of segments of these lengths and reads."""
    number, made = 0, list[plan.Group]()
    for of_group in sizes:
        segments = [plan.Segment(number + i, 7, 7 + n, min(n, reads)) for i, (n, reads) in enumerate(of_group)]
        made.append(plan.Group(number, 7, plan.Segments.of(segments)))
        number += len(segments)
    return made


def assert_all_placed(calls: list[plan.Call], groups: list[plan.Group]) -> None:
    """Check that each segment is in one call, and sees its group's prefix."""
    placed = Counter((placement.prefix, placement.segment) for call in calls for placement in call.placements)
    assert placed == Counter((number, segment) for number, group in enumerate(groups) for segment in group.segments)


@settings(max_examples=300)
@given(st.lists(segment_sizes, min_size=1, max_size=5), st.sampled_from(LADDERS))
def test_packed_segments_do_not_overlap_and_fit(
    sizes: list[list[tuple[int, int]]], ladder: tuple[plan.Shape, ...]
) -> None:
    groups = groups_of(sizes)
    calls = plan.pack_bins(groups, ladder)
    assert_all_placed(calls, groups)
    for call in calls:
        assert call.shape in ladder
        assert sum(placement.segment.reads for placement in call.placements) <= call.shape.reads
        used = np.zeros((call.shape.bins, call.shape.width), int)
        for placement in call.placements:
            assert placement.offset + placement.segment.length <= call.shape.width
            used[placement.bin, placement.offset : placement.offset + placement.segment.length] += 1
        assert used.max() == 1


@settings(max_examples=300)
@given(st.lists(segment_sizes, min_size=1, max_size=5), st.sampled_from([128, 200, 1024, 2048]), st.booleans())
def test_segments_of_several_groups_fill_calls(sizes: list[list[tuple[int, int]]], largest: int, cheap: bool) -> None:
    """Groups come in order, the longest segment first; a call is closed when no later segment fits into it."""
    ladder, groups = plan.flat_shapes(largest, padding_is_cheap=cheap), groups_of(sizes)
    calls = plan.pack_flat(groups, ladder)
    assert_all_placed(calls, groups)
    for number, call in enumerate(calls):
        ends = [placement.offset + placement.segment.length for placement in call.placements]
        assert [placement.offset for placement in call.placements] == [0, *ends[:-1]]
        in_order = [(placement.prefix, -placement.segment.length) for placement in call.placements]
        assert in_order == sorted(in_order)
        reads = sum(placement.segment.reads for placement in call.placements)
        assert reads <= call.shape.reads
        assert call.shape == next(shape for shape in ladder if shape.width >= ends[-1] and shape.reads >= reads)
        for segment in [placement.segment for following in calls[number + 1 :] for placement in following.placements]:
            assert ends[-1] + segment.length > largest or reads + segment.reads > ladder[-1].reads


def test_a_query_shared_by_many_items_is_one_group() -> None:
    rng = np.random.default_rng(0)
    query = rng.integers(0, 1000, 300)
    sequences = [np.concatenate([query, [i], rng.integers(0, 1000, 9)]).astype(np.int32) for i in range(50)]
    groups = plan.groups(sequences, [[309]] * 50, max_width=64, max_reads=4, min_saving=64, page=1)
    assert [(g.prefix_length, len(g.segments)) for g in groups] == [(300, 50)]


def test_a_tree_of_prefixes_is_shared_at_both_levels() -> None:
    """Two queries follow one system prompt: the deeper prefixes continue the common one."""
    rng = np.random.default_rng(1)
    system = rng.integers(0, 1000, 200)
    queries = [np.concatenate([system, [q], rng.integers(0, 1000, 99)]) for q in (1, 2)]
    sequences = [
        np.concatenate([queries[q], [i], rng.integers(0, 1000, 5)]).astype(np.int32) for q in (0, 1) for i in range(8)
    ]
    groups = plan.groups(sequences, [[305]] * 16, max_width=64, max_reads=4, min_saving=64, page=1)
    assert sorted((g.prefix_length, len(g.segments)) for g in groups) == [(300, 8), (300, 8)]
    shared = plan.share(sequences, [305] * 16, min_saving=64)
    assert {length for _, length, _ in shared} == {300}


@settings(max_examples=300)
@given(batches(), st.data())
def test_tokens_that_are_known_to_be_shared_change_no_group(
    batch: tuple[list[np.ndarray], list[list[int]]], data: st.DataObject
) -> None:
    sequences, reads = batch
    limits, least = [positions[0] for positions in reads], min(map(len, sequences))
    all_share = int(np.logical_and.accumulate(np.ptp([tokens[:least] for tokens in sequences], axis=0) == 0).sum())
    known, min_saving = data.draw(st.integers(0, all_share)), data.draw(st.integers(1, 64))

    def groups(known: int) -> list[tuple[int, int, list[int]]]:
        found = plan.share(sequences, limits, min_saving=min_saving, known=known)
        return [(first, length, members.tolist()) for first, length, members in found]

    assert groups(known) == groups(0)


def test_a_prefix_that_saves_too_little_is_not_shared() -> None:
    sequences = [np.array([1, 2, 3, i, 9], np.int32) for i in range(4)]
    groups = plan.groups(sequences, [[4]] * 4, max_width=64, max_reads=4, min_saving=10, page=1)
    assert [(g.prefix_length, len(g.segments)) for g in groups] == [(0, 4)]


@pytest.mark.parametrize(("query", "kept"), [(257, 256), (259, 256), (300, 300), (256, 256)])
def test_a_partial_page_that_holds_little_is_not_shared(query: int, kept: int) -> None:
    """For a hundred items of 32 tokens, one token beyond two pages is not worth a third page; 44 tokens are."""
    head = list(range(query))
    sequences = [np.array([*head, 1000 + i, *range(31)], np.int32) for i in range(100)]
    reads = [[query + 31]] * 100
    groups = plan.groups(sequences, reads, max_width=128, max_reads=4, min_saving=128, page=128)
    assert [(g.prefix_length, len(g.segments)) for g in groups] == [(kept, 100)]


@pytest.mark.parametrize(
    ("items", "common", "kept"),
    [
        (25, (), 512),
        (25, (516, 25), 512),
        (25, (516, 60), 516),
        (2, (516, 60), 516),
        (25, (515, 60), 515),
        (25, (400, 60), 512),
        (60, (), 516),
        (60, (515, 70), 516),
    ],
)
def test_a_partial_page_is_worth_its_cost_by_all_sequences_of_the_request(
    items: int, common: tuple[int, ...], kept: int
) -> None:
    """Four tokens are worth a page to sixty items, however few of them are in this batch."""
    head = list(range(516))
    (group,) = plan.groups(
        [np.array([*head, 1000 + i, *range(11)], np.int32) for i in range(items)],
        [[527]] * items,
        max_width=128,
        max_reads=4,
        min_saving=128,
        page=128,
        partial_sizes=range(1, 129),
        common=[common] * items if common else (),
    )
    assert group.prefix_length == kept


def test_a_long_prompt_leaves_its_last_tokens_as_the_segment() -> None:
    (group,) = plan.groups(
        [np.arange(1000, dtype=np.int32)], [[999]], max_width=128, max_reads=4, min_saving=64, page=1
    )
    assert group.prefix_length == 872
    assert [(segment.start, segment.stop) for segment in group.segments] == [(872, 1000)]


def test_tokens_after_the_last_read_are_not_computed() -> None:
    (group,) = plan.groups([np.arange(100, dtype=np.int32)], [[9]], max_width=128, max_reads=4, min_saving=64, page=1)
    assert [(segment.start, segment.stop) for segment in group.segments] == [(0, 10)]


def alone(segments: list[plan.Segment]) -> plan.Group:
    """The only group."""
    return plan.Group(0, 0, plan.Segments.of(segments))


def flat(segments: list[plan.Segment], *, padding_is_cheap: bool) -> list[plan.Call]:
    return plan.pack_flat([alone(segments)], plan.flat_shapes(1024, padding_is_cheap=padding_is_cheap))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(
    ("packed", "most"),
    [
        (lambda segments: plan.pack_bins([alone(segments)], plan.shapes(512, 1024)), 0.10),
        (lambda segments: flat(segments, padding_is_cheap=False), 0.03),
        (lambda segments: flat(segments, padding_is_cheap=True), 0.03),
    ],
    ids=["in bins", "flat", "flat, where padding is cheap"],
)
def test_realistic_lengths_waste_little(
    packed: Callable[[list[plan.Segment]], list[plan.Call]], most: float, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    lengths = np.clip(np.exp(rng.normal(3.5, 0.9, 200)), 4, 300).astype(int)
    segments = [plan.Segment(i, 0, int(length), 1) for i, length in enumerate(lengths)]
    assert plan.padding_waste(packed(segments)) <= most


def test_a_segment_wider_than_every_bin_is_refused() -> None:
    with pytest.raises(ValueError, match="129 tokens does not fit the widest bin of 128"):
        plan.pack_bins([alone([plan.Segment(0, 0, 129, 1)])], LADDERS[0])
    with pytest.raises(
        ValueError, match="1025 tokens, 1 of them read, does not fit the largest call of 1024, 128 read"
    ):
        flat([plan.Segment(0, 0, 1025, 1)], padding_is_cheap=True)
    with pytest.raises(ValueError, match="200 tokens, 129 of them read, does not fit"):
        flat([plan.Segment(0, 0, 30, 1), plan.Segment(1, 0, 200, 129)], padding_is_cheap=True)


def test_prefill_chunks_cover_the_prefix() -> None:
    assert plan.chunks(0, (128, 256)) == []
    assert plan.chunks(1, (128, 256)) == [128]
    assert plan.chunks(300, (128, 256)) == [256, 128]
    assert plan.chunks(512, (128, 256)) == [256, 256]
    for_four, for_eight = (256, 512, 1024, 2048, 4096), (256, 512, 1024, 2048, 8192)
    assert plan.chunks(2100, for_four) == plan.chunks(2100, for_eight) == [2048, 256]
    assert plan.chunks(6500, for_four) == [4096, 2048, 512]
    assert plan.chunks(8000, for_four) == [4096, 4096]
    assert plan.chunks(1100, for_eight) == [2048]


def test_buckets() -> None:
    assert [plan.bucket(n, (1, 8, 32)) for n in (1, 2, 8, 9, 32, 100)] == [1, 8, 8, 32, 32, 32]


def test_calls_that_run_at_once_have_the_shape_of_the_largest() -> None:
    """Each on devices of its own: no launch is for a smaller rest alone. Calls of another width are apart."""
    none = np.empty(0, np.int64)
    parts = (plan.Segments.of([]), none, none, none)
    calls = [
        plan.Call(plan.Shape(width, bins), *parts)
        for width, bins in [(512, 2), (128, 32), (128, 32), (128, 16), (128, 4)]
    ]
    batched = [[str(call.shape) for call in each] for each in plan.batch_calls(calls, 4)]
    assert batched == [["2x512"], ["32x128"] * 4]
    batched = [[str(call.shape) for call in each] for each in plan.batch_calls(calls, 2)]
    assert batched == [["2x512"], ["32x128"] * 2, ["16x128"] * 2]
    assert list(plan.batch_calls(calls, 1)) == [[call] for call in calls]


def test_what_fills_no_call_goes_into_smaller_ones_where_a_call_is_dear() -> None:
    """500 items of 20 tokens, six to a bin of 128: the last 20 bins as a call of 16 and one of 4. One of 32 would cost
    1,100 tokens more, and five of 4 as much as 1,700 more."""
    segments = alone([plan.Segment(number, 2000, 2020, 1) for number in range(500)])
    calls = plan.pack_bins([segments], plan.large_shapes(1024, 4096), plan.Costs(call=560))
    assert [str(call.shape) for call in calls] == ["32x128", "32x128", "16x128", "4x128"]
    assert sum(len(call.segments) for call in calls) == 500


def test_small_groups_share_a_call_where_a_call_is_dear() -> None:
    """64 callers with an item of 20 tokens each: six to a bin, in order, and all in one call. With long items of some,
    each group is in bins next to each other."""
    ladder, costs = plan.large_shapes(1024, 4096), plan.Costs(call=560)
    (call,) = plan.pack_bins(groups_of([[(20, 1)]] * 64), ladder, costs)
    assert (str(call.shape), len(call.segments)) == ("16x128", 64)
    assert call.prefixes.tolist() == list(range(64))
    assert call.bins.tolist() == [number // 6 for number in range(64)]
    mixed = plan.pack_bins(groups_of([[(20, 1)] * 30, [(100, 1), (60, 1)] * 4, [(25, 1)] * 3]), ladder, costs)
    assert [str(call.shape) for call in mixed] == ["16x128"]
    for prefix in range(3):
        bins = mixed[0].bins[mixed[0].prefixes == prefix]
        assert set(bins.tolist()) == set(range(bins.min(), bins.max() + 1))


def test_large_groups_do_not_wait_for_each_other_s_rest() -> None:
    """Two requests of 500 items: five full calls of both, where each alone takes two, a half one and a smaller one."""
    found = plan.pack_bins(groups_of([[(20, 1)] * 500] * 2), plan.large_shapes(1024, 4096), plan.Costs(call=560))
    assert [str(call.shape) for call in found] == ["32x128"] * 5 + ["8x128"]
    seen = [sorted(set(call.prefixes.tolist())) for call in found]
    assert seen == [[0], [0], [0, 1], [1], [1], [1]]


def test_sequences_with_different_salts_share_nothing() -> None:
    sequences = [np.array([*range(300), number], np.int32) for number in range(6)]
    salts = [7, 0, 7, 0, 7, 0]
    groups = plan.groups(
        sequences, [[300]] * 6, max_width=400, max_reads=4, min_saving=128, page=128, partial_sizes=(128,), salts=salts
    )
    found = {frozenset(segment.sequence for segment in group.segments): group.prefix_length for group in groups}
    assert found == {frozenset({0, 2, 4}): 256, frozenset({1, 3, 5}): 256}


def test_partial_pages_of_several_prefixes_are_shared_where_one_alone_would_not_pay() -> None:
    """25 sequences share three tokens of a partial page: too few for a call of their own, not for a fourth of one."""
    page, queries = 128, [[query] * 259 for query in range(4)]
    for count, length in ((1, 256), (4, 259)):
        sequences = [np.array([*query, item, 5]) for query in queries[:count] for item in range(10, 35)]
        found = plan.groups(
            sequences,
            [[260]] * len(sequences),
            max_width=512,
            max_reads=8,
            min_saving=page,
            page=page,
            partial_sizes=range(1, page + 1),
            prefixes=64,
        )
        assert [group.prefix_length for group in found] == [length] * count
