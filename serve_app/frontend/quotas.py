"""Quotas: a bucket for each tenant, which fills at a steady rate."""

from __future__ import annotations

import math
import time

from serve_app.errors import QuotaExceededError

FULL_AFTER_S = 10.0
"""Seconds in which an empty bucket fills: a tenant may send that much at once after a pause."""


class Bucket:
    """The tokens that a tenant may still ask for. It has no locks, since it belongs to one event loop.

    Args:
        tokens_per_s: the rate at which it fills.
    """

    def __init__(self, tokens_per_s: float) -> None:
        self._rate = tokens_per_s
        self._most = self._level = tokens_per_s * FULL_AFTER_S
        self._at = time.monotonic()

    def take(self, tokens: int) -> None:
        """Take ``tokens`` for a request.

        A request for more than the bucket holds is covered by a full one, which then owes the rest.

        Raises:
            QuotaExceededError: it does not cover them; the error says when it will, if nothing else is taken.
        """
        needed = min(tokens, self._most) - self._filled()
        if needed > 0:
            wait = max(math.ceil(needed / self._rate), 1)
            raise QuotaExceededError(
                f"this request adds {tokens:,} tokens and the quota of this API key has {max(int(self._level), 0):,} "
                f"left; it gains {self._rate:,.6g} a second; try again in {wait:,} s",
                retry_after_s=wait,
            )
        self._level -= tokens

    def owe(self, tokens: int) -> None:
        """Take ``tokens`` for a request that was let in before, even if they are not there."""
        self._filled()
        self._level -= tokens

    def _filled(self) -> float:
        """What the bucket has now."""
        now = time.monotonic()
        self._level = min(self._level + (now - self._at) * self._rate, self._most)
        self._at = now
        return self._level
