"""Which replica gets a job: one that has its prefix, as long as another is not much less busy."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from typing import Any

from ray.serve.handle import DeploymentHandle
from ray.serve.request_router import FIFOMixin, PendingRequest, RequestRouter, RunningReplica

from serve_app.contract import Affinity, ScoreJob
from serve_app.frontend import replica_counts


def running_replicas(handle: DeploymentHandle[Any]) -> int:
    """Replicas of the handle's deployment that run now; 0 before its first call."""
    return replica_counts.replicas.get(str(handle.deployment_id), 0)


def ranked(affinity: Affinity | None, ongoing: Mapping[str, int]) -> list[str]:
    """The replicas to try, best first.

    A prefix gives all replicas an order, the same in every front end (rendezvous hashing: when one comes or goes, only
    its own prefixes move). A part of a split request starts further down, so that the parts part company. The first
    that is not too busy comes first, then the others. Without a prefix the order is random, and the least busy first.

    Args:
        ongoing: jobs at each replica, by its id.
    """
    key, part, worth = (affinity.key, affinity.part, affinity.worth) if affinity else (os.urandom(8), 0, 0.0)
    order = sorted(ongoing, key=lambda replica: hashlib.blake2b(replica.encode(), key=key, digest_size=8).digest())
    start = part % len(order)
    order = order[start:] + order[:start]
    least = min(ongoing.values())
    first = next(replica for replica in order if ongoing[replica] <= least + worth)
    return [first, *(replica for replica in order if replica != first)]


class PrefixRouter(FIFOMixin, RequestRouter):
    """Serve's hook around ``ranked``.

    Serve gives the replica to the call that has waited longest, which under a burst may be another than the one that
    was asked about; it then computes a prefix that is elsewhere. Matching them by Serve's request id would not do: all
    parts of a request have the same.
    """

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        """Serve calls it whenever a replica comes or goes."""
        super().update_replicas(replicas)
        replica_counts.replicas[str(self._deployment_id)] = len(replicas)

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """The best replica, then, if it takes no more, the others."""
        if not candidate_replicas:
            return []
        job: object = None
        if pending_request is not None:
            pending_request.routing_context.should_backoff = True  # else Serve asks again without a pause
            job = pending_request.args[0] if pending_request.args else None
        by_id = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        # What is not known is not busy with calls of this process; Serve asks such a replica before it sends one.
        ongoing = {name: self.replica_queue_len_cache.get(each.replica_id) or 0 for name, each in by_id.items()}
        first, *others = ranked(job.affinity if isinstance(job, ScoreJob) else None, ongoing)
        return [[by_id[first]], [by_id[other] for other in others]]
