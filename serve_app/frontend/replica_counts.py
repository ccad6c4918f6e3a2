"""How many replicas run, as this process's routers last heard.

Serve makes the routers itself and shows them to no one: this is where they and the front end meet. A module of its own,
since Serve pickles the router's module by value, and with it would go a copy of what it holds.
"""

from __future__ import annotations

replicas: dict[str, int] = {}
"""By deployment id, as text."""
