"""Decides which sequences of which jobs go to the device next. It has no threads, no event loop, no engine, no clock.

Its times are seconds on the caller's clock, which must be monotonic.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Generic

from serve_app.contract import Share
from serve_app.scorer.lines import TURNS_PER_BATCH, Line, Lines, Offer, rank, short
from serve_app.scorer.queued_job import J, Part
from serve_app.scorer.speed import Speed

PIECE_S = 1.0
"""Device time of one batch, by the measured speed. A small job waits about as long for the batch that runs when it
arrives."""
SMALLEST_PIECE = 64
"""Tokens of the smallest batch, however slow the device is."""

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

    Tenants share the tokens of the batches by weight, and a tenant's jobs take turns, the first one soon after they
    arrive. A job's sequences stay in order, so those that share a prefix are neighbours.

    Attributes:
        max_batch_tokens: in one device batch, shared prefixes counted once. A batch's first sequence may be longer, and
            its job still gets a whole turn: it would otherwise compute its prefix again for every sequence.
    """

    def __init__(self, max_batch_tokens: int, speed: Speed) -> None:
        self.max_batch_tokens = max_batch_tokens
        self._speed = speed
        self._lines: Lines[J] = Lines()
        self._in_engine: list[DeviceBatch[J]] = []
        self._kept_small = False
        """Whether the last batch was left to tenants who waited for little."""

    def add(self, job: J) -> None:
        """Let ``job`` wait for its turn. It has sequences to hand out."""
        self._lines.add(job, credit=self.piece)

    def discard(self, jobs: Collection[J]) -> None:
        """Hand out nothing more of ``jobs``."""
        self._lines.discard(jobs)

    @property
    def queued_tokens(self) -> int:
        """Tokens that wait for the device, shared prefixes counted once."""
        return sum(self.held().values())

    def held(self) -> dict[Share, int]:
        """``queued_tokens`` of each tenant that has jobs."""
        return {line.share: line.waiting_tokens for line in self._lines.waiting()}

    @property
    def piece(self) -> int:
        """Tokens of a device batch of about ``PIECE_S``."""
        speed = self._speed.tokens_per_s
        if not speed:
            return self.max_batch_tokens
        return min(max(int(speed * PIECE_S), SMALLEST_PIECE), self.max_batch_tokens)

    def next_batch(self, now: float) -> DeviceBatch[J] | None:
        """Form the next device batch, if one is due; it is in the engine until ``finish``."""
        if self.next_due_in(now) != 0.0 or not (lines := self._lines.waiting()):
            return None
        overdue = self._lines.overdue()
        lines.sort(key=partial(rank, overdue=overdue))
        parts = self._prefill_ahead(lines[0]) or self._take_turns(lines, overdue)
        served = {part.job.share for part in parts}
        self._lines.formed(lines, [line for line in lines if line.share in served])
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

    def _prefill_ahead(self, line: Line[J]) -> list[Part[J]]:
        """A piece of the next sequence of the line's first job, which then goes last; empty if it is short."""
        job = line.order(self.piece)[0]
        start = job.taken
        taken = job.take_ahead(self.piece)
        if taken is None:
            return []
        line.went_ahead(job)
        upto, cost = taken
        self._lines.charge(line, cost)
        return [Part(job, start, start, cost, ahead=upto)]

    def _take_turns(self, lines: Sequence[Line[J]], overdue: set[int]) -> list[Part[J]]:
        """Turns of jobs of the first one's kind, while there is room, each of the line whose turn it is.

        Args:
            lines: in the order of their turns.
            overdue: classes that begin the batch with one turn.
        """
        kind = lines[0].order(self.piece)[0].kind
        # Jobs of another kind open the next batch. They wait for half a batch more, not for a whole one.
        alike = all(job.kind == kind for line in lines for job in line.jobs)
        room = self.piece if alike else self.piece // 2
        # A tenant that waits for little need not wait for work of others that goes on after this batch anyway. Every
        # other batch is filled: many small ones in a row would take the device from the others.
        some = lines if overdue or self._kept_small else short(lines, room)
        self._kept_small = len(some) < len(lines)
        turn, whole = room // TURNS_PER_BATCH, True
        offers = [Offer(line, kind, self.piece) for line in some]
        left = list(offers)
        while left:
            offer = min(left, key=lambda each: rank(each.line, overdue))
            spent = offer.take(room, turn, whole=whole)
            if not spent:
                left.remove(offer)
                continue
            room, whole = room - spent, False
            self._lines.charge(offer.line, spent)
            overdue.discard(offer.line.share.priority)
        for offer in offers:
            if offer.parts:
                offer.line.line_up(offer.parts.values(), kind)
        return [part for offer in offers for part in offer.parts.values()]
