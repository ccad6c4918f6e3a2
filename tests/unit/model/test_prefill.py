"""Prefill calls: together they fill every page, and no call attends to the pages that it writes."""

from contextlib import ExitStack

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model import plan, prefill
from model.computations import begins_with_pages, spans_of
from model.contract import PAGE_TOKENS
from model.inputs import Inputs, Room, padding
from model.pages import OutOfPagesError, PrefixCache
from model.prefill import PinnedPrefix
from model.sizes import CHUNKS_WITH_CHEAP_PADDING


def held(cache: PrefixCache, prefix: list[int]) -> PinnedPrefix:
    tokens = np.array(prefix, np.int32)
    with cache.hold(tokens) as (path, cached, *_):
        return PinnedPrefix(plan.Group(0, len(tokens), plan.NO_SEGMENTS), tokens, path, cached)


@st.composite
def prefixes(draw: st.DrawFn) -> list[list[int]]:
    """Prefixes, some of which continue the beginning of another."""
    made: list[list[int]] = [[]]
    for number in range(draw(st.integers(1, 8))):
        stem = draw(st.sampled_from(made))
        kept = draw(st.integers(0, len(stem)))
        made.append(stem[:kept] + [number + 1] * draw(st.integers(1, 400)))
    return made[1:]


@settings(max_examples=200)
@given(
    prefixes(),
    st.sampled_from([(17,), (64, 128), (64, 256, 1024), (128, 512)]),
    st.sampled_from([1, 3, 64]),
)
def test_every_page_is_filled_before_it_is_read(prompts: list[list[int]], sizes: tuple[int, ...], most: int) -> None:
    cache = PrefixCache(200)
    wanted = [held(cache, prompt) for prompt in prompts]
    pool: dict[int, np.ndarray] = {}

    def stored(path: list[int], count: int) -> np.ndarray:
        empty = np.full(PAGE_TOKENS, -1)
        return np.concatenate([np.zeros(0), *(pool.get(page, empty) for page in path)])[:count]

    for call in prefill.calls(wanted, sizes, most):
        assert 0 < len(call.pieces) <= most
        assert len(call.spans) <= spans_of(call.size)
        _, rows = padding(2, call.size, Room(most, 1, 4))
        call.fill(rows, range(len(call.pieces)))
        inputs = Inputs(*(part[1] for part in rows))
        assert call.computed == (inputs.tokens >= 0).sum() <= call.tokens <= call.size == len(inputs.tokens)
        for number, (piece, at) in enumerate(zip(call.pieces, call.places, strict=True)):
            prefix, pages = piece.held.prefix, [node.page for node in piece.held.path]
            np.testing.assert_array_equal(stored(pages, piece.start), prefix[: piece.start])
            place = slice(at, at + piece.stop - piece.start)
            np.testing.assert_array_equal(inputs.tokens[place], prefix[piece.start : piece.stop])
            np.testing.assert_array_equal(inputs.positions[place], np.arange(piece.start, piece.stop))
            owners = inputs.segments, inputs.prefixes, inputs.adapted
            assert all(set(each[place]) == {number} for each in owners)
        for page, offset, start, length in call.spans:
            if begins_with_pages(sizes):  # then a page's rows are cut from those of the call
                assert 0 <= start - offset <= call.size - PAGE_TOKENS
            written = pool.setdefault(page, np.full(PAGE_TOKENS, -1))
            written[offset : offset + length] = inputs.tokens[start : start + length]
    for each in wanted:
        np.testing.assert_array_equal(stored([node.page for node in each.path], len(each.prefix)), each.prefix)


@pytest.mark.parametrize(("length", "wanted"), [(16, [64]), (20, [51, 13]), (130, [7, 7, 7, 7, 7, 7, 7, 7, 7, 1])])
def test_as_many_prefixes_share_a_call_as_its_tokens_allow(length: int, wanted: list[int]) -> None:
    cache = PrefixCache(200)
    prefixes = [held(cache, [number] * length) for number in range(64)]
    assert [len(call.pieces) for call in prefill.calls(prefixes, CHUNKS_WITH_CHEAP_PADDING, 64)] == wanted


def test_prefixes_begin_with_pages_where_all_calls_are_of_whole_pages() -> None:
    cache = PrefixCache(200)
    (call,) = prefill.calls([held(cache, [number] * 130) for number in range(3)], (256, 1024), 64)
    assert (call.places, call.computed, call.tokens, call.size) == ([0, 256, 512], 390, 642, 1024)


def test_short_prefixes_share_calls_and_are_cut_as_alone() -> None:
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 99, length).tolist() for length in (300, 200, 500, 1400, 130)]
    cache = PrefixCache(100)
    calls = list(prefill.calls([held(cache, prompt) for prompt in prompts], (64, 256, 512, 1024), 64))
    assert [call.tokens for call in calls] == [1000, 1024, 506]
    together = [(piece.start, piece.stop) for call in calls for piece in call.pieces]
    alone = [
        (piece.start, piece.stop)
        for prompt in prompts
        for call in prefill.calls([held(PrefixCache(100), prompt)], (64, 256, 512, 1024), 64)
        for piece in call.pieces
    ]
    assert together == alone


@settings(max_examples=200)
@given(st.data(), prefixes(), st.sampled_from([(17,), (64, 256)]), st.sampled_from([1, 3, 64]), st.sampled_from([4, 9]))
def test_every_piece_begins_with_the_snapshot_of_what_is_before_it(
    data: st.DataObject, prompts: list[list[int]], sizes: tuple[int, ...], most: int, slots: int
) -> None:
    """As the engine holds prefixes, with few slots and pages: what it begins with was written by an earlier call."""
    cache = PrefixCache(30, slots)
    snapshots: dict[int, tuple[int, ...]] = {0: ()}
    waiting = prompts + data.draw(st.lists(st.sampled_from(prompts), max_size=5))
    while waiting:
        with ExitStack() as pins:
            together: list[PinnedPrefix] = []
            while waiting and len(together) < most:
                tokens = np.array(waiting[0], np.int32)
                try:
                    own = pins.enter_context(cache.hold(tokens))
                except OutOfPagesError:
                    assert together, "there is room for any one"
                    break
                together.append(PinnedPrefix(plan.Group(0, len(tokens), plan.NO_SEGMENTS), tokens, *own))
                waiting.pop(0)
            for call in prefill.calls(together, sizes, most):
                before = dict(snapshots)
                for piece in call.pieces:
                    prefix = tuple(piece.held.prefix.tolist())
                    assert before[piece.begin] == prefix[: piece.start]
                    assert piece.end > 0
                    snapshots[piece.end] = prefix[: piece.stop]
            for each in together:
                assert snapshots[each.end] == tuple(each.prefix.tolist())
                assert snapshots[0] == ()
