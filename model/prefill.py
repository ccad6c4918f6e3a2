"""Calls that fill the missing pages of prefixes."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from model import plan
from model.computations import Span, begins_with_pages, spans_of
from model.contract import PAGE_TOKENS
from model.inputs import Inputs
from model.pages import Node


class PinnedPrefix(NamedTuple):
    """A group and the pages of its prefix; the pages after ``cached`` tokens are to be filled.

    Attributes:
        begin, cuts: see ``pages.Held``.
    """

    group: plan.Group
    prefix: plan.Tokens
    path: Sequence[Node]
    cached: int
    begin: int = 0
    cuts: Sequence[tuple[int, int]] = ()

    @property
    def end(self) -> int:
        """Slot of the snapshot at the prefix's end."""
        return self.cuts[-1][1] if self.cuts else self.begin

    @property
    def start(self) -> int:
        """The first token that is computed: calls begin with whole pages, see ``computations.write``."""
        first_read = self.group.first_read
        return self.cached if first_read is None else min(self.cached, first_read - first_read % PAGE_TOKENS)


class PrefillChunk(NamedTuple):
    """Tokens ``start`` to ``stop`` of a prefix, computed together.

    Attributes:
        begin, end: slots of the snapshots that it begins with and leaves.
    """

    held: PinnedPrefix
    start: int
    stop: int
    begin: int = 0
    end: int = 0

    def sees(self) -> Iterator[int]:
        """The pages that it attends to."""
        return (node.page for node in self.held.path[: -(-self.start // PAGE_TOKENS)])

    def spans(self, at: int) -> list[Span]:
        """The page parts for its keys and values, from its first token's place ``at`` in a call."""
        spans: list[Span] = []
        for number in range(self.start // PAGE_TOKENS, -(-self.stop // PAGE_TOKENS)):
            page = number * PAGE_TOKENS
            first, last = max(self.start, self.held.cached, page), min(self.stop, page + PAGE_TOKENS)
            if first < last:  # others may be reading what is cached
                spans.append(Span(self.held.path[number].page, first - page, at + first - self.start, last - first))
        return spans


class PrefillCall:
    """Pieces of prefixes, to be computed in one call.

    Args:
        sizes: of calls, in tokens, ascending.
        prefixes: how many a call sees at most.
    """

    def __init__(self, sizes: Sequence[int], prefixes: int) -> None:
        self._sizes, self._prefixes = sizes, prefixes
        self._step = PAGE_TOKENS if begins_with_pages(sizes) else 1
        self.pieces: list[PrefillChunk] = []
        self.places: list[int] = []
        """Of each piece's first token."""
        self.spans: list[Span] = []
        self.tokens = 0
        """Up to the last piece's end."""

    @property
    def is_read(self) -> bool:
        """Some of its tokens are."""
        return any(piece.held.group.first_read is not None for piece in self.pieces)

    @property
    def computed(self) -> int:
        """Tokens that it computes."""
        return sum(piece.stop - piece.start for piece in self.pieces)

    @property
    def size(self) -> int:
        """The smallest size that has room, in tokens."""
        return next(size for size in self._sizes if size >= self.tokens and spans_of(size) >= len(self.spans))

    def add(self, piece: PrefillChunk) -> bool:
        """Take one more piece, if there is room and the call writes nothing that the piece sees."""
        at = -(-self.tokens // self._step) * self._step
        tokens, spans = at + piece.stop - piece.start, [*self.spans, *piece.spans(at)]
        largest = self._sizes[-1]
        if len(self.pieces) == self._prefixes or tokens > largest or len(spans) > spans_of(largest):
            return False
        if not {span.page for span in self.spans}.isdisjoint(piece.sees()):
            return False
        if piece.begin and piece.begin in (other.end for other in self.pieces):
            return False
        self.pieces.append(piece)
        self.places.append(at)
        self.tokens, self.spans = tokens, spans
        return True

    def fill(self, inputs: Inputs, adapters: Sequence[int]) -> None:
        """Write the call's tokens into all rows; a piece is a segment over the prefix of its own number.

        Args:
            adapters: each piece's, see ``lora.Rows.numbers``.
        """
        for number, (piece, at, adapter) in enumerate(zip(self.pieces, self.places, adapters, strict=True)):
            start, stop = piece.start, piece.stop
            place = slice(at, at + stop - start)
            inputs.tokens[:, place] = piece.held.prefix[start:stop]
            inputs.positions[:, place] = np.arange(start, stop)
            inputs.segments[:, place] = inputs.prefixes[:, place] = number
            inputs.adapted[:, place] = adapter  # nowhere without adapters


def calls(held: Sequence[PinnedPrefix], sizes: Sequence[int], prefixes: int) -> Iterator[PrefillCall]:
    """Calls that compute what is read, and fill all pages that are empty, in the order in which they must run.

    What is missing of a prefix is cut in the same places whatever else is in its calls, so its keys and values have the
    same bits.
    """
    call = PrefillCall(sizes, prefixes)
    for each in held:
        for piece in _pieces(each, sizes):
            if not call.add(piece):
                yield call
                call = PrefillCall(sizes, prefixes)
                added = call.add(piece)
                assert added, "a chunk fits an empty call"
    if call.pieces:
        yield call


def _pieces(held: PinnedPrefix, sizes: Sequence[int]) -> Iterator[PrefillChunk]:
    """What is missing of a prefix, cut where it leaves snapshots and where a call is full."""
    start, begin = held.start, held.begin
    for stop, slot in held.cuts or [(len(held.prefix), 0)]:
        for size in plan.chunks(stop - start, sizes):
            piece = PrefillChunk(held, start, min(start + size, stop), begin, slot)
            yield piece
            start, begin = piece.stop, slot
