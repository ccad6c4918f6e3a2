"""Pages of key/value memory: which prefix lies in which page, and which to give up when room is short.

Host side only, pure Python: the device holds one pool array, this module says what each page of it means. A prefix is
a path in a tree of pages; each edge is keyed by the page's own tokens, not by a hash of them, so two prefixes never
collide. Only whole paths are kept: a page is given up only when no page continues it.

A hybrid's prefix is a snapshot besides (``model.delta``), of the state after its last token: it can be begun from
where a page has one after its own last token, and nowhere else.
"""

import hashlib
import heapq
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from model.contract import PAGE_TOKENS

Tokens = npt.NDArray[np.int32] | npt.NDArray[np.int64]
"""A prefix: token ids, or ids with more in their upper bits that prefixes must not share."""


@dataclass(eq=False, slots=True)
class Node:
    """One page: its number in the pool, the tokens in it (fewer than ``PAGE_TOKENS`` only at the end of a path).

    Attributes:
        queued: it is among the pages that may be given up, see ``PrefixCache``.
        snapshot: slot of the snapshot after its last token; 0: there is none.
        holders: how many have the snapshot in use.
    """

    page: int
    tokens: Tokens
    parent: "Node | None"
    children: dict[bytes, "Node"] = field(default_factory=dict[bytes, "Node"])
    last_used: int = 0
    pins: int = 0
    snapshot: int = 0
    holders: int = 0
    queued: bool = False

    @property
    def removable(self) -> bool:
        """No page continues it, and none holds it."""
        return not self.children and not self.pins


class Held(NamedTuple):
    """Pages for a prefix.

    Attributes:
        path: all its pages.
        cached: tokens at its front that need not be computed.
        begin: slot of the snapshot after these.
        cuts: where snapshots of the others belong: ascending, (tokens before it, slot), the last at the prefix's end.
            Empty: the model has no snapshots, or the prefix's is there.
    """

    path: list[Node]
    cached: int
    begin: int = 0
    cuts: Sequence[tuple[int, int]] = ()


@dataclass(frozen=True, slots=True)
class CacheStats:
    """Counts since start-up; tokens and pages."""

    pages: int
    pages_used: int
    hit_tokens: int
    missed_tokens: int
    evicted_pages: int


class OutOfPagesError(RuntimeError):
    """The batch at hand holds so many pages that too few are left for one more prefix."""


class PrefixCache:
    """Least-recently-used cache of prefixes over a fixed number of pages.

    Args:
        pages: the pool's number of pages. Page 0 is never handed out: unused page-table entries point to it.
        slots: of snapshots. Slot 0 is never handed out: it is what is before the first token. 0: there are no
            snapshots.
    """

    def __init__(self, pages: int, slots: int = 0) -> None:
        self._slots, self._free_slots = slots, list(range(slots - 1, 0, -1))
        self._snapshots: dict[int, Node] = {}
        self._root = Node(0, np.zeros(0, np.int32), None)
        self._free = list(range(pages - 1, 0, -1))
        self._removable: list[tuple[int, int, Node]] = []
        """A heap of every page that may be given up, by when it was last used as it was put there; and some others,
        which are passed over. The page's number tells two of one time apart."""
        self._pages = pages
        self._pinned = 0
        self._clock = 0
        self._hits = self._misses = self._evicted = 0

    def lookup(self, prefix: Tokens) -> list[Node]:
        """The longest path of pages that hold the prefix's own tokens, whole pages or its very end.

        Every page but the last is full. A last page with more tokens than the prefix has left serves too, since the
        reader stops at the prefix's length; but not with snapshots, which cannot be read in part.
        """
        path: list[Node] = []
        node = self._root
        for start in range(0, len(prefix), PAGE_TOKENS):
            piece = prefix[start : start + PAGE_TOKENS].tobytes()
            child = node.children.get(piece)
            if child is None and start + PAGE_TOKENS > len(prefix) and not self._slots:
                child = next((longer for key, longer in node.children.items() if key.startswith(piece)), None)
            if child is None:
                break
            path.append(child)
            node = child
        self._touch(path)
        return path

    @contextmanager
    def hold(self, prefix: Tokens, *, read_from: int | None = None) -> Generator[Held]:
        """Pages for a prefix, which stay its own inside of the ``with``; the least recently used are given up for it.

        The pages after the cached tokens are to be filled, and the snapshots at the cuts to be written, in the order
        in which prefixes are held.

        Args:
            read_from: the prefix's own tokens are read from this one on, so that a hybrid cannot begin behind it; None:
                none is.

        Raises:
            OutOfPagesError: too many pages or snapshots are held for others.
        """
        path = self.lookup(prefix)
        cached = min(len(prefix), len(path) * PAGE_TOKENS)
        missing = range(cached, len(prefix), PAGE_TOKENS)
        shared = len(path)
        self._pin(path)
        using: list[Node] = []
        on_the_way: list[int] = []
        try:
            if len(missing) > (left := self._pages - 1 - self._pinned):
                raise OutOfPagesError(
                    f"{len(missing)} more prefix pages are needed; {left} of {self._pages - 1} are left"
                )
            for at in missing:
                path.append(self._extend(path, prefix[at : at + PAGE_TOKENS]))
                self._pin(path[-1:])
            held = Held(path, cached)
            if self._slots:
                before = len(prefix) if read_from is None else read_from
                held = self._with_snapshots(path, shared, len(prefix), before, using, on_the_way)
            self._hits += held.cached
            self._misses += len(prefix) - held.cached
            yield held
        finally:
            for node in using:
                node.holders -= 1
            self._free_slots += on_the_way
            for node in path:
                node.pins -= 1
                self._pinned -= not node.pins
                self._queue(node)

    def _with_snapshots(
        self, path: list[Node], shared: int, length: int, before: int, using: list[Node], on_the_way: list[int]
    ) -> Held:
        """Where the prefix begins, and where its snapshots go: at its end, and where it leaves what came before, so
        that the next one can begin there.

        Args:
            shared: pages of the path that were there before.
            before: where it may begin at the latest.
            using: gets the nodes whose snapshots are in use.
            on_the_way: gets slots of snapshots that nobody needs afterwards: the pages have theirs.
        """
        ends = [min(number * PAGE_TOKENS, length) for number in range(len(path) + 1)]
        known = max((n for n, node in enumerate(path, 1) if node.snapshot and ends[n] <= before), default=0)
        begin = self._use(path[known - 1], using) if known else 0
        numbers = sorted({number for number in (shared, len(path)) if number > known})
        left = len(self._free_slots) + sum(not node.holders for node in self._snapshots.values())
        if len(numbers) > left:  # before a page has a snapshot that nobody writes
            raise OutOfPagesError(f"{len(numbers)} more snapshots are needed; {left} of {self._slots - 1} are left")
        cuts: list[tuple[int, int]] = []
        for number in numbers:
            node = path[number - 1]
            slot = self._take_slot()
            cuts.append((ends[number], slot))
            if node.snapshot:
                on_the_way.append(slot)
            else:
                node.snapshot, self._snapshots[slot] = slot, node
                self._use(node, using)
        return Held(path, ends[known], begin, cuts)

    @staticmethod
    def _use(node: Node, using: list[Node]) -> int:
        node.holders += 1
        using.append(node)
        return node.snapshot

    def _take_slot(self) -> int:
        if not self._free_slots:
            unheld = (node for node in self._snapshots.values() if not node.holders)
            oldest = min(unheld, key=lambda node: node.last_used)
            self._free_slots.append(oldest.snapshot)
            del self._snapshots[oldest.snapshot]
            oldest.snapshot = 0
        return self._free_slots.pop()

    def _extend(self, path: list[Node], tokens: Tokens) -> Node:
        """A page for the tokens that follow ``path``."""
        parent = path[-1] if path else self._root
        node = Node(self._take_page(), tokens.copy(), parent)
        parent.children[node.tokens.tobytes()] = node
        self._touch([node])
        return node

    def _pin(self, path: list[Node]) -> None:
        for node in path:
            self._pinned += not node.pins
            node.pins += 1

    @property
    def stats(self) -> CacheStats:
        return CacheStats(self._pages - 1, self._pages - 1 - len(self._free), self._hits, self._misses, self._evicted)

    def _touch(self, path: list[Node]) -> None:
        self._clock += 1
        for node in path:
            node.last_used = self._clock

    def _take_page(self) -> int:
        while not self._free:
            queued_at, _, node = heapq.heappop(self._removable)
            node.queued = False
            if queued_at < node.last_used:
                self._queue(node)
            elif node.removable:
                self._remove(node)
                self._evicted += 1
        return self._free.pop()

    def _queue(self, node: Node) -> None:
        """Put a page among those that may be given up, if it is one and is not there."""
        if node.removable and not node.queued and node is not self._root:
            node.queued = True
            heapq.heappush(self._removable, (node.last_used, node.page, node))

    def _remove(self, node: Node) -> None:
        assert node.parent is not None
        del node.parent.children[node.tokens.tobytes()]
        self._free.append(node.page)
        self._queue(node.parent)
        if node.snapshot:
            self._free_slots.append(node.snapshot)
            del self._snapshots[node.snapshot]


class SeenPrefixes:
    """Remembers the beginnings of prompts, in whole pages, to tell those that come again.

    By digest, which is the same on all hosts of a slice. A collision may keep a prefix that was not worth it, never
    change a score.

    Args:
        most: beginnings remembered; the oldest are forgotten.
    """

    def __init__(self, most: int = 16_384) -> None:
        self._most = most
        self._seen: dict[bytes, None] = {}

    def pages(self, tokens: Tokens) -> int:
        """Whole pages at the front of ``tokens`` that came before, at the front of a prompt; then remembers all."""
        known = 0
        digest = hashlib.blake2b(digest_size=16)
        for page in range(len(tokens) // PAGE_TOKENS):
            digest.update(tokens[page * PAGE_TOKENS : (page + 1) * PAGE_TOKENS].tobytes())
            key = digest.digest()
            if key in self._seen:
                known = page + 1
                del self._seen[key]
            self._seen[key] = None
        while len(self._seen) > self._most:
            del self._seen[next(iter(self._seen))]
        return known
