"""Whose turn it is: the jobs of each tenant wait in a line of their own, and the lines share the device by weight.

The arithmetic is that of start-time fair queueing (Goyal, Vin and Cheng, 1996), with classes of priority above it.
"""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Generic

from serve_app.contract import Share
from serve_app.scorer.queued_job import J, Part

TURNS_PER_BATCH = 4
"""A job's turn is its first sequence and those after it that fit into the batch's tokens over ``TURNS_PER_BATCH``.
Shorter turns would be fairer, but every turn computes the part of a shared prefix beyond its whole pages again."""

PASSED_AT_MOST = 7
"""Device batches in a row that may pass over a class of priority that waits. The next one begins with a turn of it."""

Kind = tuple[bool, bool, int, float]


class Line(Generic[J]):
    """The jobs of one tenant. They take turns, the first one soon after they arrive.

    Attributes:
        used: tokens handed out, over the weight. Within a class the line with the least goes first.
    """

    def __init__(self, share: Share) -> None:
        self.share = share
        self.used = 0.0
        self._new: deque[J] = deque()
        """Jobs that had no turn yet, in the order in which they arrived."""
        self._ring: deque[J] = deque()
        """Other jobs with sequences to hand out; the next turn is the first one's."""
        self._new_went_first = self._new_go_first = False

    @property
    def jobs(self) -> list[J]:
        """All jobs that have sequences to hand out."""
        return [*self._new, *self._ring]

    @property
    def waiting_tokens(self) -> int:
        """Tokens to compute for all of them."""
        return sum(job.waiting_tokens for job in self.jobs)

    def add(self, job: J) -> None:
        """Let ``job`` wait for its first turn."""
        self._new.append(job)

    def discard(self, jobs: Collection[J]) -> None:
        """Drop ``jobs``."""
        self._new = deque(job for job in self._new if job not in jobs)
        self._ring = deque(job for job in self._ring if job not in jobs)

    def left_out(self, kind: Kind) -> bool:
        """Whether a job of this kind still waits for its first turn."""
        return any(not job.taken for job in self._new if job.kind == kind)

    def order(self, room: int) -> list[J]:
        """The jobs in the order of their turns: the one that has waited longest for it, the new ones, the others.

        If the first one's turn leaves no room for the first new one, the new ones go before it, every other time.

        Args:
            room: tokens of a batch.
        """
        if not self._ring:
            return list(self._new)
        first, *others = self._ring
        fills = bool(self._new) and first.next_cost + room // TURNS_PER_BATCH + self._new[0].next_cost > room
        self._new_go_first = fills and not self._new_went_first
        return [*self._new, first, *others] if self._new_go_first else [first, *self._new, *others]

    def went_ahead(self, job: J) -> None:
        """Put ``job`` last, after a piece of its next sequence was prefilled."""
        self._new_went_first = self._new_go_first
        self.discard([job])
        self._ring.append(job)

    def line_up(self, parts: Collection[Part[J]], kind: Kind) -> None:
        """Put the jobs in line for the next batch: those of ``parts`` go last, the others keep their places.

        New jobs of another kind go to the front, since the next batch is theirs.
        """
        self._new_went_first = self._new_go_first
        served = {part.job for part in parts}
        self._ring = deque(
            [
                *(job for job in self._new if job.kind != kind),
                *(job for job in self._ring if job not in served),
                *(part.job for part in parts if not part.job.exhausted),
            ]
        )
        self._new = deque(job for job in self._new if job.kind == kind and job not in served)


class Offer(Generic[J]):
    """What a line offers to a batch: a turn for each of its jobs of the batch's kind, then more of those that had one.

    Attributes:
        parts: what was taken, by the job.
    """

    def __init__(self, line: Line[J], kind: Kind, room: int) -> None:
        self.line = line
        self.parts: dict[J, Part[J]] = {}
        self._kind = kind
        self._waiting = deque(job for job in line.order(room) if job.kind == kind)

    def take(self, room: int, turn: int, *, whole: bool) -> int:
        """Hand out a turn.

        Args:
            room: tokens that are left in the batch.
            turn: tokens of a turn after its first sequence.
            whole: the turn is whole, whatever its sequences cost.

        Returns:
            Its cost; 0: nothing more of this line fits.
        """
        while self._waiting:
            job = self._waiting.popleft()
            if job.next_cost > room and not whole:
                continue
            start = job.taken
            spent = job.take_first()
            spent += job.take_more(turn if whole else min(turn, room - spent))
            self.parts[job] = Part(job, start, job.taken, spent)
            return spent
        if self.line.left_out(self._kind):  # a smaller batch lets the next come sooner
            return 0
        for job, part in self.parts.items():
            if not job.exhausted and job.next_cost <= room:
                more = job.take_more(min(room, max(turn, job.next_cost)))
                self.parts[job] = replace(part, stop=job.taken, cost=part.cost + more)
                return more
        return 0


class Lines(Generic[J]):
    """The lines of all tenants, and what each has used."""

    def __init__(self) -> None:
        self._lines: dict[Share, Line[J]] = {}
        self._clocks: defaultdict[int, float] = defaultdict(float)
        """For each class, the most that a line had used when it was served."""
        self._passed: Counter[int] = Counter()
        """For each class that waits, how many batches in a row had nothing of it."""

    def add(self, job: J, credit: int) -> None:
        """Let ``job`` wait for its turn.

        Args:
            credit: tokens by which a line that comes back may have used less than the others. So it goes first for that
                many, and no further however long it was away.
        """
        share = job.share
        line = self._lines.setdefault(share, Line(share))
        if not line.jobs:
            line.used = max(line.used, self._clocks[share.priority] - credit / share.weight)
        line.add(job)

    def discard(self, jobs: Collection[J]) -> None:
        """Hand out nothing more of ``jobs``."""
        for line in self._lines.values():
            line.discard(jobs)

    def waiting(self) -> list[Line[J]]:
        """The lines that have jobs."""
        return [line for line in self._lines.values() if line.jobs]

    def overdue(self) -> set[int]:
        """The classes that must not be passed over again."""
        return {priority for priority, batches in self._passed.items() if batches >= PASSED_AT_MOST}

    def charge(self, line: Line[J], tokens: int) -> None:
        """Count ``tokens`` that were handed out of ``line``."""
        priority, weight = line.share.priority, line.share.weight
        self._clocks[priority] = max(self._clocks[priority], line.used)
        line.used += tokens / weight

    def formed(self, waited: Sequence[Line[J]], served: Collection[Line[J]]) -> None:
        """Note that a batch was formed.

        Args:
            waited: the lines that had jobs.
            served: those of which it has something.
        """
        passed = {line.share.priority for line in waited} - {line.share.priority for line in served}
        self._passed = Counter({priority: self._passed[priority] + 1 for priority in passed})


def short(lines: Sequence[Line[J]], room: int) -> Sequence[Line[J]]:
    """The lines that need not wait for the rest of a batch: if all jobs of the first fit into its part, that one and
    those with little or no more than it. Otherwise all.

    Args:
        lines: in the order of their turns.
        room: tokens of the batch.
    """
    first = lines[0]
    if first.waiting_tokens > room * first.share.weight / sum(line.share.weight for line in lines):
        return lines
    little = max(first.waiting_tokens, room // TURNS_PER_BATCH)
    return [line for line in lines if line.waiting_tokens <= little]


def rank(line: Line[J], overdue: Collection[int]) -> tuple[bool, int, float]:
    """Sorts lines: a class that was passed over too often, then by class, then by what they have used."""
    return line.share.priority not in overdue, line.share.priority, line.used
