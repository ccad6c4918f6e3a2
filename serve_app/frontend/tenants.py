"""Tenants: the callers of the service by the names of their API keys, and what holds for each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from serve_app.contract import EVERYONE, Share
from serve_app.frontend.quotas import Bucket
from serve_app.settings import PRIORITIES, TenantSettings


@dataclass(frozen=True, slots=True, eq=False)
class Tenant:
    """Who sends a request.

    Attributes:
        name: the name of the API key; empty without keys, and for callers inside the cluster.
        salt: callers with different ones share no cached prefix.
        share: whose turns its jobs take.
        bucket: what its quota leaves; None: it has no quota.
    """

    name: str = ""
    salt: str = ""
    share: Share = EVERYONE
    bucket: Bucket | None = None


NOBODY = Tenant()
"""The caller of a service without API keys."""


class Tenants:
    """All tenants, by name.

    Args:
        settings: what holds for some, by name; for the others the defaults hold.
        salted: each tenant has a salt of its own.
        front_ends: number of front ends. Each has an equal part of every quota, since they know nothing of each other.
    """

    def __init__(
        self, settings: Mapping[str, TenantSettings] | None = None, *, salted: bool = False, front_ends: int = 1
    ) -> None:
        self._settings = settings or {}
        self._salted = salted
        self._front_ends = front_ends
        self._made: dict[str, Tenant] = {}

    def of(self, name: str) -> Tenant:
        """The tenant of this name, always the same object."""
        return self._made.get(name) or self._made.setdefault(name, self._make(name))

    def _make(self, name: str) -> Tenant:
        own = self._settings.get(name, TenantSettings())
        return Tenant(
            name,
            salt=name if self._salted else "",
            share=Share(name, own.weight, PRIORITIES.index(own.priority)),
            bucket=Bucket(own.tokens_per_s / self._front_ends) if own.tokens_per_s else None,
        )
