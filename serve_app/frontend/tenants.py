"""Tenants: the callers of the service by the names of their API keys, and what holds for each."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Tenant:
    """Who sends a request.

    Attributes:
        name: the name of the API key; empty without keys, and for callers inside the cluster.
        salt: callers with different ones share no cached prefix.
    """

    name: str = ""
    salt: str = ""


NOBODY = Tenant()
"""The caller of a service without API keys."""


class Tenants:
    """All tenants, by name.

    Args:
        salted: each tenant has a salt of its own.
    """

    def __init__(self, *, salted: bool = False) -> None:
        self._salted = salted

    def of(self, name: str) -> Tenant:
        """The tenant of this name."""
        return Tenant(name, salt=name if self._salted else "")
