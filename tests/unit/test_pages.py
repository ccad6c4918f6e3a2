"""The prefix cache's bookkeeping: paths mean what they say, pinned pages stay, no page has two owners."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model.pages import PAGE_TOKENS, Node, OutOfPagesError, PrefixCache


def tokens(*pieces: tuple[int, int]) -> np.ndarray:
    """Runs of (token, length)."""
    return np.concatenate([np.full(length, token, np.int32) for token, length in pieces])


def store(cache: PrefixCache, prefix: np.ndarray) -> list[Node]:
    path = cache.lookup(prefix)
    for start in range(len(path) * PAGE_TOKENS, len(prefix), PAGE_TOKENS):
        with cache.pinned(path):
            path.append(cache.extend(path, prefix[start : start + PAGE_TOKENS]))
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


def test_pinned_pages_are_never_given_up() -> None:
    cache = PrefixCache(3)
    path = store(cache, tokens((1, PAGE_TOKENS), (2, PAGE_TOKENS)))
    with cache.pinned(path), pytest.raises(OutOfPagesError, match="all 2 prefix pages are in use"):
        cache.extend([], tokens((3, 5)))
    cache.extend([], tokens((3, 5)))


def test_available_pages_are_those_that_no_pin_holds() -> None:
    cache = PrefixCache(6)
    path = store(cache, tokens((1, PAGE_TOKENS), (2, PAGE_TOKENS)))
    store(cache, tokens((3, 5)))
    assert cache.available == 5
    with cache.pinned(path), cache.pinned(path[:1]):
        assert cache.available == 3
        for number in range(3):
            with cache.pinned([cache.extend([], tokens((9 + number, 5)))]):
                assert cache.available == 2
    assert cache.available == 5


@settings(max_examples=200)
@given(st.lists(st.lists(st.tuples(st.integers(0, 2), st.sampled_from([1, 64, 128])), min_size=1, max_size=4)))
def test_no_page_ever_has_two_meanings(prefixes: list[list[tuple[int, int]]]) -> None:
    """Whatever is stored and given up, what a lookup returns holds exactly the prefix's tokens."""
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
