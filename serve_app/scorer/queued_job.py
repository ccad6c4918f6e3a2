"""A job in the queue: which of its sequences were handed out, and its part of a device batch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Generic, TypeVar

import numpy as np

from serve_app.batches import cut, reads_of, shared_tokens
from serve_app.contract import EVERYONE, Share, TokenBatch, shared_by_all

AHEAD_TOKENS = 1_024
"""A sequence that takes much longer than a piece is prefilled in pieces that end at multiples of this. On a CPU's
kernels its scores have the same bits wherever it is cut; elsewhere they differ by the dtype's rounding. The pages are
kept, and other jobs' batches go between."""


class QueuedJob:
    """The sequences of one job, and how many of them were handed out. They stay in order.

    Attributes:
        share: whose turns it takes.
        common: see ``TokenBatch.common``.
        lengths: tokens of each sequence.
        costs: tokens of each sequence that it does not share with the one before it.
        waiting_tokens: tokens to compute for the sequences that were not handed out.
        taken: sequences that were handed out.
    """

    def __init__(self, batch: TokenBatch, share: Share = EVERYONE) -> None:
        shared = shared_tokens(batch)
        self.share = share
        self.batch = replace(batch, shared=shared)
        self.common = np.array([shared_by_all(shared), len(shared)], np.int32)
        self.lengths: list[int] = batch.lengths.tolist()
        self.costs: list[int] = (batch.lengths - shared).tolist()
        self.tokens = self.waiting_tokens = sum(self.costs)
        self.taken = 0
        self._ahead = self._ahead_cost = 0
        """Tokens of the next sequence that were prefilled, and how many of them count in its cost."""

    @property
    def kind(self) -> tuple[bool, bool, int, float]:
        """What its reads need. Only jobs of one kind share a device batch."""
        return self.batch.kind

    @property
    def begun(self) -> bool:
        """True when something of it was handed out."""
        return self.taken > 0 or self._ahead > 0

    @property
    def exhausted(self) -> bool:
        """True when all its sequences were handed out."""
        return self.taken == len(self.costs)

    @property
    def next_cost(self) -> int:
        """Tokens to compute for the next sequence, without those that it shares or that were prefilled."""
        return self.costs[self.taken] - self._ahead_cost

    def take_first(self) -> int:
        """Hand out the next sequence. Returns its cost."""
        cost = self.next_cost
        self.waiting_tokens -= cost
        self.taken, self._ahead, self._ahead_cost = self.taken + 1, 0, 0
        return cost

    def take_more(self, room: int) -> int:
        """Hand out the sequences that follow while they fit into ``room`` tokens. Returns their cost."""
        spent = 0
        while not self.exhausted and spent + self.costs[self.taken] <= room:
            spent += self.costs[self.taken]
            self.taken += 1
        self.waiting_tokens -= spent
        return spent

    def take_ahead(self, room: int) -> tuple[int, int] | None:
        """Hand out about ``room`` tokens of the next sequence, if it has many more before its first read.

        Returns:
            Where in the sequence they end, and their cost.
        """
        known = max(self._ahead, self.lengths[self.taken] - self.costs[self.taken])
        upto = known - known % AHEAD_TOKENS + max(room - room % AHEAD_TOKENS, AHEAD_TOKENS)
        reads = reads_of(self.batch, self.taken, self.taken + 1)
        first_read = int(self.batch.read_positions[reads][:1].min(initial=2**31 - 1))
        if upto + AHEAD_TOKENS // 2 > min(first_read, self.lengths[self.taken]):
            return None
        cost = upto - known
        self._ahead, self._ahead_cost = upto, self._ahead_cost + cost
        self.waiting_tokens -= cost
        return upto, cost


J = TypeVar("J", bound=QueuedJob)


@dataclass(frozen=True, slots=True)
class Part(Generic[J]):
    """A job's share of one device batch.

    Attributes:
        start: the first of its sequences.
        stop: the one after its last.
        cost: tokens to compute.
        ahead: tokens at the front of sequence ``start`` that are prefilled and kept; then ``stop`` is ``start``.
            0: whole sequences.
    """

    job: J
    start: int
    stop: int
    cost: int
    ahead: int = 0

    def batch(self) -> TokenBatch:
        """The sequences, as an engine takes them."""
        if not self.ahead:
            part = cut(self.job.batch, self.start, self.stop)
            return replace(part, common=np.tile(self.job.common, (self.sequences, 1)))
        one = cut(self.job.batch, self.start, self.start + 1)
        nothing = slice(0, 0)
        return replace(
            one,
            tokens=one.tokens[: self.ahead],
            offsets=np.array([0, self.ahead], np.int64),
            read_sequences=one.read_sequences[nothing],
            read_positions=one.read_positions[nothing],
            targets=one.targets[nothing],
            target_offsets=one.target_offsets[:1],
            keep=True,
        )

    @property
    def sequences(self) -> int:
        """Sequences in its batch."""
        return 1 if self.ahead else self.stop - self.start

    def reads(self) -> slice:
        """Where its reads stand among the job's."""
        return reads_of(self.job.batch, self.start, self.stop)

    def targets(self) -> slice:
        """Where its targets stand among the job's."""
        offsets, reads = self.job.batch.target_offsets, self.reads()
        return slice(int(offsets[reads.start]), int(offsets[reads.stop]))
