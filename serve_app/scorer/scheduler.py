"""Decides which sequences of which jobs go to the device next. It has no threads, no event loop, no engine, no clock.

Its times are seconds on the caller's clock, which must be monotonic.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

import numpy as np

from serve_app.batches import cut, reads_of, shared_by_all, shared_tokens
from serve_app.contract import TokenBatch
from serve_app.scorer.speed import Speed

TURNS_PER_BATCH = 4
"""A job's turn is its first sequence and those after it that fit into the batch's tokens over ``TURNS_PER_BATCH``.
Shorter turns would be fairer, but every turn computes the part of a shared prefix beyond its whole pages again."""

PIECE_S = 1.0
"""Device time of one batch, by the measured speed. A small job waits about as long for the batch that runs when it
arrives."""
SMALLEST_PIECE = 64
"""Tokens of the smallest batch, however slow the device is."""

AHEAD_TOKENS = 1_024
"""A sequence that takes much longer than a piece is prefilled in pieces that end at multiples of this. On a CPU's
kernels its scores have the same bits wherever it is cut; elsewhere they differ by the dtype's rounding. The pages are
kept, and other jobs' batches go between."""

IN_ENGINE = 2
"""Device batches in the engine at once: the host plans the second and unpacks the first while the device works.

The second is formed only when half a piece waits. A batch that is formed early cannot hold what arrives later, which
costs little if it is full anyway."""
LEAD_S = 0.05
"""The second batch is formed this long before the first should end, which is more than planning takes. A batch that is
formed earlier is computed even if its callers leave, and holds nothing that arrives meanwhile."""

PATIENCE = 4
"""A batch counts as stalled after this many times its expected duration: a long prompt's attention takes longer than
the measured speed suggests, and so does a batch on a busy host."""


class QueuedJob:
    """The sequences of one job, and how many of them were handed out. They stay in order.

    Attributes:
        common: see ``TokenBatch.common``.
        lengths: tokens of each sequence.
        costs: tokens of each sequence that it does not share with the one before it.
        waiting_tokens: tokens to compute for the sequences that were not handed out.
        taken: sequences that were handed out.
    """

    def __init__(self, batch: TokenBatch) -> None:
        shared = shared_tokens(batch)
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


@dataclass(eq=False, slots=True)
class DeviceBatch(Generic[J]):
    """A device batch, from when it is formed until it leaves the engine.

    Attributes:
        expected: seconds that its tokens should take.
        begun: when the device was free for it; None: it waits for another.
    """

    parts: Sequence[Part[J]]
    expected: float
    begun: float | None

    def left(self, now: float) -> float:
        """Seconds that it should still take on the device."""
        return self.expected if self.begun is None else max(self.begun + self.expected - now, 0.0)

    def overdue(self, now: float) -> float:
        """Seconds on the device beyond what its tokens explain."""
        return 0.0 if self.begun is None else max(now - self.begun - PATIENCE * self.expected, 0.0)


class Scheduler(Generic[J]):
    """Forms device batches of about ``PIECE_S`` and at most ``max_batch_tokens`` from the jobs that wait.

    Jobs take turns, the first one soon after they arrive. A job's sequences stay in order, so those that share a prefix
    are neighbours.

    Attributes:
        max_batch_tokens: in one device batch, shared prefixes counted once. A batch's first sequence may be longer, and
            its job still gets a whole turn: it would otherwise compute its prefix again for every sequence.
    """

    def __init__(self, max_batch_tokens: int, speed: Speed) -> None:
        self.max_batch_tokens = max_batch_tokens
        self._speed = speed
        self._new: deque[J] = deque()
        """Jobs that had no turn yet, in the order in which they arrived."""
        self._ring: deque[J] = deque()
        """Other jobs with sequences to hand out; the next turn is the first one's."""
        self._new_went_first = False
        self._in_engine: list[DeviceBatch[J]] = []

    def add(self, job: J) -> None:
        """Let ``job`` wait for its turn. It has sequences to hand out."""
        self._new.append(job)

    def discard(self, jobs: Collection[J]) -> None:
        """Hand out nothing more of ``jobs``."""
        self._new = deque(job for job in self._new if job not in jobs)
        self._ring = deque(job for job in self._ring if job not in jobs)

    @property
    def queued_tokens(self) -> int:
        """Tokens that wait for the device, shared prefixes counted once."""
        return sum(job.waiting_tokens for job in (*self._new, *self._ring))

    @property
    def piece(self) -> int:
        """Tokens of a device batch of about ``PIECE_S``."""
        speed = self._speed.tokens_per_s
        if not speed:
            return self.max_batch_tokens
        return min(max(int(speed * PIECE_S), SMALLEST_PIECE), self.max_batch_tokens)

    def next_batch(self, now: float) -> DeviceBatch[J] | None:
        """Form the next device batch, if one is due; it is in the engine until ``finish``."""
        if self.next_due_in(now) != 0.0 or not (order := self._order()):
            return None
        parts = self._prefill_ahead(order[0]) or self._take_turns(order)
        expected = self._speed.seconds(sum(part.cost for part in parts))
        batch = DeviceBatch(parts, expected, begun=None if self._in_engine else now)
        self._in_engine.append(batch)
        return batch

    def finish(self, batch: DeviceBatch[J], now: float) -> None:
        """Note that ``batch`` has left the engine: the device is free for the other one."""
        self._in_engine.remove(batch)
        for other in self._in_engine:
            other.begun = other.begun or now

    def next_due_in(self, now: float) -> float | None:
        """Seconds until another batch may be formed. None: not before one has left the engine or more jobs wait."""
        if not self._in_engine:
            return 0.0
        if len(self._in_engine) == IN_ENGINE or self.queued_tokens < self.piece // 2:
            return None
        return max(self._in_engine[0].left(now) - LEAD_S, 0.0)

    def overdue(self, now: float) -> float:
        """Seconds that a batch has been on the device beyond what its tokens explain; 0.0 without one."""
        return max((batch.overdue(now) for batch in self._in_engine), default=0.0)

    def _order(self) -> list[J]:
        """The jobs in the order of their turns: the one that has waited longest for it, the new ones, the others.

        If the first one's turn leaves no room for the first new one, the new ones go before it, every other time.
        """
        if not self._ring:
            return list(self._new)
        first, *others = self._ring
        room = self.piece
        fills = bool(self._new) and first.next_cost + room // TURNS_PER_BATCH + self._new[0].next_cost > room
        self._new_went_first = fills and not self._new_went_first
        return [*self._new, first, *others] if self._new_went_first else [first, *self._new, *others]

    def _prefill_ahead(self, job: J) -> list[Part[J]]:
        """A piece of the next sequence of ``job``, which then goes to the end of the ring; empty if it is short."""
        start = job.taken
        taken = job.take_ahead(self.piece)
        if taken is None:
            return []
        self.discard([job])
        self._ring.append(job)
        upto, cost = taken
        return [Part(job, start, start, cost, ahead=upto)]

    def _take_turns(self, order: Sequence[J]) -> list[Part[J]]:
        """A turn for each job of the first one's kind, while there is room; then more of those that had one, unless a
        new job was left out."""
        kind = order[0].kind
        same = [job for job in order if job.kind == kind]
        # Jobs of another kind open the next batch. They wait for half a batch more, not for a whole one.
        room = self.piece if len(same) == len(order) else self.piece // 2
        parts, left = self._turns(same, room)
        if all(job.taken for job in self._new if job.kind == kind):  # else a smaller batch lets the next come sooner
            parts = _filled(parts, left)
        self._line_up(parts, kind)
        return parts

    def _turns(self, jobs: Sequence[J], room: int) -> tuple[list[Part[J]], int]:
        """One turn for each job whose next sequence fits, and the room that is left.

        The first job's turn is whole, whatever its sequences cost.
        """
        turn = room // TURNS_PER_BATCH
        parts: list[Part[J]] = []
        for job in jobs:
            start = job.taken
            if parts and job.next_cost > room:
                continue
            spent = job.take_first()
            spent += job.take_more(min(turn, room - spent) if parts else turn)
            room -= spent
            parts.append(Part(job, start, job.taken, spent))
        return parts, room

    def _line_up(self, parts: Sequence[Part[J]], kind: tuple[bool, bool, int, float]) -> None:
        """Put the jobs in line for the next batch: those of ``parts`` go last, the others keep their places.

        New jobs of another kind go to the front, since the next batch is theirs.
        """
        served = {part.job for part in parts}
        self._ring = deque(
            [
                *(job for job in self._new if job.kind != kind),
                *(job for job in self._ring if job not in served),
                *(part.job for part in parts if not part.job.exhausted),
            ]
        )
        self._new = deque(job for job in self._new if job.kind == kind and job not in served)


def _filled(parts: Sequence[Part[J]], room: int) -> list[Part[J]]:
    """``parts`` with the sequences that follow, as far as ``room`` goes, the first jobs' first."""
    filled: list[Part[J]] = []
    for part in parts:
        more = part.job.take_more(room)
        room -= more
        filled.append(replace(part, stop=part.job.taken, cost=part.cost + more))
    return filled
