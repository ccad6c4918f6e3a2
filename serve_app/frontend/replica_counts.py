"""The routers of this process, and the jobs that it sent to replicas without Serve's calls.

Serve makes the routers and gives no access to them, so they put themselves here and the front end reads them. This is
a separate module, since Serve pickles the router's module by value, with a copy of its variables.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any, Protocol


class Router(Protocol):
    """What the front end reads of a ``PrefixRouter``."""

    @property
    def running(self) -> int:
        """Number of running replicas."""
        ...

    def best(self, job: object) -> Any:
        """Serve's wrapper of the replica that should compute ``job``; None: none is running."""
        ...


routers: dict[str, Router] = {}
"""The router of each deployment, by its id as text."""

direct: Counter[str] = Counter()
"""Jobs in flight that were sent directly, by the replica's id."""

lost: set[str] = set()
"""Ids of replicas that ended such a connection. They are stopping or dead, and Serve may not know it yet."""


@contextmanager
def counted(replica: str) -> Generator[None]:
    """Count one more such job while the block runs."""
    direct[replica] += 1
    try:
        yield
    finally:
        direct[replica] -= 1
        if not direct[replica]:
            del direct[replica]
