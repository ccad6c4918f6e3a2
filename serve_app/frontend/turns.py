"""Turns by tenant, for work that one event loop gives out."""

from __future__ import annotations

import asyncio
from collections import deque


class Turns:
    """Lets in a bounded number at a time, the tenants in turn, and of each the one that has waited longest.

    Args:
        most: how many may be inside.
    """

    def __init__(self, most: int) -> None:
        self._free = most
        self._waiting: dict[str, deque[asyncio.Future[None]]] = {}
        """Those who wait, by tenant; the next turn is the first tenant's."""

    def ask(self, tenant: str) -> asyncio.Future[None]:
        """A future that is done when it is this one's turn. Whatever becomes of it, give it to ``leave``."""
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(tenant, deque()).append(turn)
        self._let_in()
        return turn

    def leave(self, turn: asyncio.Future[None]) -> None:
        """End a turn, or stop waiting for it."""
        if turn.cancel() or turn.cancelled():  # it had not come
            return
        self._free += 1
        self._let_in()

    def _let_in(self) -> None:
        while self._free and self._waiting:
            tenant = next(iter(self._waiting))
            own = self._waiting.pop(tenant)
            turn = own.popleft()
            if own:
                self._waiting[tenant] = own  # behind the others
            if not turn.done():
                turn.set_result(None)
                self._free -= 1
