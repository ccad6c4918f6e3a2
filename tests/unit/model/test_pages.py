"""The prefix cache's bookkeeping: paths mean what they say, pinned pages stay, no page has two owners."""

from contextlib import ExitStack
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model.contract import PAGE_TOKENS
from model.pages import Node, OutOfPagesError, PrefixCache


def tokens(*pieces: tuple[int, int]) -> np.ndarray:
    """Make runs of equal tokens from (token, length) pairs."""
    return np.concatenate([np.full(length, token, np.int32) for token, length in pieces])


def store(cache: PrefixCache, prefix: np.ndarray) -> list[Node]:
    with cache.hold(prefix) as (path, *_):
        return path


def test_a_stored_prefix_is_found_and_its_beginning_too() -> None:
    cache = PrefixCache(8)
    prefix = tokens((1, PAGE_TOKENS), (2, PAGE_TOKENS), (3, 10))
    path = store(cache, prefix)
    assert cache.lookup(prefix) == path
    assert cache.lookup(prefix[: 2 * PAGE_TOKENS]) == path[:2]
    assert cache.lookup(prefix[: 2 * PAGE_TOKENS + 4]) == path
    assert cache.lookup(np.append(prefix, np.int32(4))) == path[:2]
    assert cache.lookup(tokens((9, 5))) == []


def test_the_least_recently_used_path_goes_first() -> None:
    cache = PrefixCache(3)
    first, second = tokens((1, 5)), tokens((2, 5))
    store(cache, first)
    store(cache, second)
    cache.lookup(first)
    store(cache, tokens((3, 5)))
    assert cache.lookup(first)
    assert not cache.lookup(second)
    assert cache.stats.evicted_pages == 1


def test_a_page_that_others_continue_outlives_them() -> None:
    cache = PrefixCache(4)
    long = tokens((1, PAGE_TOKENS), (2, PAGE_TOKENS), (3, PAGE_TOKENS))
    store(cache, long)
    store(cache, tokens((9, 5)))
    assert len(cache.lookup(long)) == 2


def test_pages_that_are_held_are_never_given_up() -> None:
    cache = PrefixCache(5)
    prefix = tokens((1, PAGE_TOKENS), (2, PAGE_TOKENS))
    store(cache, tokens((3, 5)))
    with cache.hold(prefix) as (path, cached, *_):
        assert cached == 0
        with cache.hold(prefix[: PAGE_TOKENS + 4]) as (beginning, cached, *_):
            assert (beginning, cached) == (path, PAGE_TOKENS + 4)
        three = tokens((4, PAGE_TOKENS), (5, PAGE_TOKENS), (6, PAGE_TOKENS))
        with pytest.raises(OutOfPagesError, match="3 more prefix pages are needed; 2 of 4 are left"), cache.hold(three):
            pass
        with pytest.raises(OutOfPagesError, match="3 more"), cache.hold(np.concatenate([prefix, three])):
            pass
        assert cache.lookup(tokens((3, 5))), "no page was given up for a prefix that has no room"
        with cache.hold(three[: 2 * PAGE_TOKENS]):
            assert cache.stats.evicted_pages == 1
        assert cache.lookup(prefix) == path
    with cache.hold(three) as (path, cached, *_):
        assert (len(path), cached) == (3, 2 * PAGE_TOKENS)
    assert cache.stats.hit_tokens == 3 * PAGE_TOKENS + 4
    assert cache.stats.missed_tokens == 5 + 5 * PAGE_TOKENS


@settings(max_examples=200)
@given(st.lists(st.lists(st.tuples(st.integers(0, 2), st.sampled_from([1, 64, 128])), min_size=1, max_size=4)))
def test_no_page_ever_has_two_meanings(prefixes: list[list[tuple[int, int]]]) -> None:
    """After any stores and evictions, the pages that a lookup returns hold exactly the prefix's tokens."""
    cache = PrefixCache(6)
    contents: dict[int, bytes] = {}
    for pieces in prefixes:
        prefix = tokens(*pieces)
        known = set(map(id, cache.lookup(prefix)))
        for start, node in zip(range(0, len(prefix), PAGE_TOKENS), store(cache, prefix), strict=True):
            piece = prefix[start : start + PAGE_TOKENS]
            if id(node) not in known:
                contents[node.page] = node.tokens.tobytes()
            assert contents[node.page].startswith(piece.tobytes())
            assert node.page != 0
    assert cache.stats.pages_used <= 5


class Scanning(PrefixCache):
    """Finds the page to give up by looking at all of them."""

    def _take_page(self) -> int:
        if not self._free:
            pages = self._below(self._root)
            leaves = [node for node in pages if not node.children and not node.pins]
            self._remove(min(leaves, key=lambda node: node.last_used))
            self._evicted += 1
        return self._free.pop()

    def _below(self, node: Node) -> list[Node]:
        return [page for child in node.children.values() for page in (child, *self._below(child))]


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["store", "look up", "hold"]),
            st.lists(st.tuples(st.integers(0, 3), st.sampled_from([1, 64, 128])), min_size=1, max_size=4),
        ),
        max_size=40,
    )
)
def test_the_page_that_is_given_up_is_the_one_that_a_look_at_all_of_them_finds(
    steps: list[tuple[str, list[tuple[int, int]]]],
) -> None:
    caches = PrefixCache(9), Scanning(9)
    with ExitStack() as held:
        for what, pieces in steps:
            prefix = tokens(*pieces)
            found: list[Any] = []
            for cache in caches:
                try:
                    if what == "look up":
                        path: list[Node] = cache.lookup(prefix)
                    elif what == "store":
                        path = store(cache, prefix)
                    else:
                        path, *_ = held.enter_context(cache.hold(prefix))
                except OutOfPagesError as error:
                    found.append(str(error))
                else:
                    found.append([node.page for node in path])
            assert found[0] == found[1]
    assert caches[0].stats == caches[1].stats


def test_a_large_pool_is_not_searched_for_each_page(monkeypatch: pytest.MonkeyPatch) -> None:
    """A page is given up in some steps, however many pages there are."""
    pages, looked = 500, 0
    removable = Node.removable.fget
    assert removable is not None

    def counted(node: Node) -> bool:
        nonlocal looked
        looked += 1
        return removable(node)

    monkeypatch.setattr(Node, "removable", property(counted))
    cache = PrefixCache(pages + 1)
    for number in range(3 * pages):
        store(cache, tokens((number, 5)))
    assert cache.stats.evicted_pages == 2 * pages
    assert looked < 10 * 3 * pages


def test_a_prefix_begins_at_a_snapshot_and_leaves_one_where_it_parts_from_others() -> None:
    """A hybrid's prefix cannot begin where there is no snapshot, though its pages are there."""
    cache = PrefixCache(20, slots=9)
    first = tokens((1, 3 * PAGE_TOKENS), (2, PAGE_TOKENS + 10))
    with cache.hold(first) as held:
        assert (held.cached, held.begin) == (0, 0)
        [(stop, end)] = held.cuts
        assert stop == len(first)
        assert end > 0
    with cache.hold(first) as held:
        assert held[1:] == (len(first), end, [])
    with cache.hold(first[:-4]) as held:
        assert held.cached == 0
        assert [stop for stop, _ in held.cuts] == [4 * PAGE_TOKENS, len(first) - 4]
    with cache.hold(np.append(first, np.int32(7))) as held:
        assert held.cached == 4 * PAGE_TOKENS, "where the last one has left it"
    other = tokens((1, 2 * PAGE_TOKENS + 60), (9, 100))
    with cache.hold(other) as held:
        assert held.cached == 0
        assert [stop for stop, _ in held.cuts] == [2 * PAGE_TOKENS, len(other)]
    with cache.hold(np.append(other[: 2 * PAGE_TOKENS], np.full(20, 5, np.int32))) as held:
        assert held.cached == 2 * PAGE_TOKENS


def test_snapshots_in_use_stay_and_the_oldest_of_the_others_goes() -> None:
    cache = PrefixCache(50, slots=4)
    first, second, third = (tokens((number, 40)) for number in (1, 2, 3))
    for prefix in (first, second, third):
        store(cache, prefix)
    cache.lookup(first)
    with cache.hold(second) as held, cache.hold(tokens((4, 40))) as more:
        assert held.cached == 40
        assert more.cached == 0
        with cache.hold(first) as kept:
            assert kept.cached == 40
            with (
                pytest.raises(OutOfPagesError, match="1 more snapshots are needed; 0 of 3 are left"),
                cache.hold(third),
            ):
                pass
    with cache.hold(third) as held:
        assert held.cached == 0, "it was the oldest that was not in use"


def test_a_prefix_whose_own_tokens_are_read_begins_before_them() -> None:
    """And its snapshots on the way are given back where the pages have theirs."""
    cache = PrefixCache(20, slots=4)
    prefix = tokens((1, 2 * PAGE_TOKENS), (2, PAGE_TOKENS))
    store(cache, prefix[: 2 * PAGE_TOKENS])
    store(cache, prefix)
    for read_from, begins in (
        (PAGE_TOKENS, 0),
        (2 * PAGE_TOKENS + 5, 2 * PAGE_TOKENS),
        (3 * PAGE_TOKENS, 3 * PAGE_TOKENS),
    ):
        for _ in range(3):
            with cache.hold(prefix, read_from=read_from) as held:
                assert held.cached == begins
                assert (held.begin > 0) == (begins > 0)
                assert [stop for stop, _ in held.cuts] == ([] if begins == len(prefix) else [len(prefix)])
                assert all(slot not in (0, held.begin) for _, slot in held.cuts)
    with cache.hold(prefix) as held:
        assert held.cached == len(prefix)
