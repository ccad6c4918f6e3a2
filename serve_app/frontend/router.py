"""Chooses a job's replica: one that has its prefix in the cache, unless another is much less busy."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from typing import Any

from ray.serve.handle import DeploymentHandle
from ray.serve.request_router import FIFOMixin, PendingRequest, RequestRouter, RunningReplica

from serve_app.contract import Affinity, ScoreJob
from serve_app.frontend import replica_counts

LOST_CALLS = 1_000_000
"""A replica that is lost counts as if it had so many calls more than the others."""


def running_replicas(handle: DeploymentHandle[Any]) -> int:
    """Number of running replicas of the handle's deployment; 0 before its first call."""
    router = replica_counts.routers.get(str(handle.deployment_id))
    return 0 if router is None else router.running


def ranked(affinity: Affinity | None, ongoing: Mapping[str, int]) -> list[str]:
    """Rank the replicas for a job, best first.

    A prefix gives the replicas an order that is the same in every front end (rendezvous hashing: when a replica comes
    or goes, only its own prefixes move). Each part of a split request starts one place further down, so that the parts
    go to different replicas. The first replica that is not too busy is the best, and the others follow in order.
    Without a prefix the order is random, and the best is one of the least busy.

    Args:
        ongoing: number of jobs at each replica, by the replica's id.
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

    Serve gives the chosen replica to the call that has waited longest. In a burst this may be another call than the one
    that was ranked, and its prefix may be cached on another replica. Serve's request id cannot match the two, since all
    parts of a request have the same id.
    """

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        """Make this router known. Serve calls this whenever a replica comes or goes."""
        super().update_replicas(replicas)
        replica_counts.routers[str(self._deployment_id)] = self

    @property
    def running(self) -> int:
        """Number of running replicas."""
        return len(self.curr_replicas)

    def best(self, job: object) -> RunningReplica | None:
        """The replica that should compute ``job``; None: none is running."""
        replicas = list(self.curr_replicas.values())
        return self._ranked(replicas, job)[0] if replicas else None

    def _ranked(self, replicas: list[RunningReplica], job: object) -> list[RunningReplica]:
        by_id = {replica.replica_id.unique_id: replica for replica in replicas}
        # Those that are lost come last. A replica that is not in the cache has no calls of this process; Serve asks it
        # before it sends one.
        ongoing = {
            name: (self.replica_queue_len_cache.get(each.replica_id) or 0)
            + replica_counts.direct[name]
            + LOST_CALLS * (name in replica_counts.lost)
            for name, each in by_id.items()
        }
        return [by_id[name] for name in ranked(job.affinity if isinstance(job, ScoreJob) else None, ongoing)]

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Return the best replica, and then the others, for when it accepts no more calls."""
        if not candidate_replicas:
            return []
        job: object = None
        if pending_request is not None:
            pending_request.routing_context.should_backoff = True  # else Serve asks again without a pause
            job = pending_request.args[0] if pending_request.args else None
        first, *others = self._ranked(candidate_replicas, job)
        return [[first], others]
