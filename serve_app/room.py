"""How much of a bounded queue each tenant may fill: the same rule in the front ends and in the replicas."""

from __future__ import annotations

from collections.abc import Mapping

from serve_app.contract import Share


def has_room(tokens: int, share: Share, held: Mapping[Share, int], limit: int) -> bool:
    """Whether a tenant may add ``tokens`` to what is held.

    It may, if it holds none, if they fit into ``limit``, or if it stays within its part of ``limit``, which the tenants
    that hold some have by weight. So one that fills the queue keeps no other out, and n equal ones hold no more than
    1 + 1/2 + ... + 1/n times ``limit``, apart from requests that are larger than a part.

    Args:
        held: tokens in the queue, by tenant.
    """
    own = held.get(share, 0)
    if not own or sum(held.values()) + tokens <= limit:
        return True
    others = sum(each.weight for each, some in held.items() if some and each != share)
    return own + tokens <= limit * share.weight / (share.weight + others)
