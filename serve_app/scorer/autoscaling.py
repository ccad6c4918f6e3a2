"""How many scorer replicas there should be, by the tokens that wait in them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ray.serve.config import AutoscalingContext

PENDING_TOKENS = "pending_tokens"
"""The number that each replica reports: tokens accepted and not answered, shared prefixes counted once."""


def wanted_replicas(pending: Mapping[str, float], tokens_per_replica: int, *, asked: bool) -> float:
    """The number of replicas that gives each ``tokens_per_replica``: a fraction, which Serve rounds up.

    Args:
        pending: tokens in each replica.
        asked: True if a request is in the system or may soon be, even if it has not reached a replica.
    """
    wanted = sum(pending.values()) / tokens_per_replica
    return max(wanted, 1.0) if asked else wanted


class PendingTokensPolicy:
    """Serve's hook around ``wanted_replicas``; Serve adds bounds and delays.

    Only the newest report of each replica counts, without an average: Serve's delays need several alike in a row.
    """

    def __init__(self, tokens_per_replica: int) -> None:
        self._tokens_per_replica = tokens_per_replica

    def __call__(self, context: AutoscalingContext) -> tuple[float, dict[str, Any]]:
        reports = (context.raw_metrics or {}).get(PENDING_TOKENS, {})
        pending = {str(replica): series[-1].value for replica, series in reports.items() if series}
        starting = context.current_num_replicas == 0 < context.target_num_replicas  # it has had no time to be asked
        asked = starting or context.total_num_requests > 0
        return wanted_replicas(pending, self._tokens_per_replica, asked=asked), {}
