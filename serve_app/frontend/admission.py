"""Admission to a front end: a bound on the tokens in flight, over all replicas."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Generator
from contextlib import contextmanager

from serve_app.contract import EVERYONE, Share
from serve_app.errors import OverloadedError
from serve_app.room import has_room

REMEMBERED_S = 30.0
"""Seconds of work from which the speed for Retry-After is estimated; older work counts less and less."""
LONGEST_RETRY_S = 60


class Admission:
    """Admits requests while their tokens fit, and refuses the others at once: a growing queue helps no caller.

    It has no locks, since it belongs to one event loop.

    Args:
        tokens_per_replica: tokens that may be in flight for each running replica. A request may have more if nothing
            else of its tenant is in flight, see ``has_room``.
    """

    def __init__(self, tokens_per_replica: float) -> None:
        self.tokens_per_replica = tokens_per_replica
        self._inside: Counter[Share] = Counter()
        self._answered = 0.0
        self._busy_s = 0.0
        self._since = time.monotonic()

    def check(self, tokens: int, replicas: int, share: Share = EVERYONE) -> None:
        """Raise OverloadedError when there is no room for ``tokens`` more.

        Args:
            share: whose tokens they are.
            replicas: number of running replicas. 0 counts as 1: requests may wait until a replica has started.
        """
        limit = int(self.tokens_per_replica * max(replicas, 1))
        if not has_room(tokens, share, self._inside, limit):
            wait = self._retry_after_s()
            raise OverloadedError(
                f"{self._inside.total():,} tokens are being scored and this request adds {tokens:,}; the limit is "
                f"{limit:,}; try again in {wait} s",
                retry_after_s=wait,
            )

    @contextmanager
    def inside(self, tokens: int, share: Share = EVERYONE) -> Generator[None]:
        """Count ``tokens`` as in flight while the block runs."""
        self._move(tokens, share)
        try:
            yield
            self._answered += tokens
        finally:
            self._move(-tokens, share)

    def _move(self, tokens: int, share: Share) -> None:
        now = time.monotonic()
        if any(self._inside.values()):
            self._busy_s += now - self._since
        self._since = now
        self._inside[share] += tokens
        if self._busy_s > REMEMBERED_S:
            self._busy_s /= 2
            self._answered /= 2

    def _retry_after_s(self) -> int:
        """Seconds until the work in flight may be done, at the speed so far."""
        if not self._answered:
            return 1
        return min(max(math.ceil(self._inside.total() * self._busy_s / self._answered), 1), LONGEST_RETRY_S)
