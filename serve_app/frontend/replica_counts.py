"""The number of running replicas, as this process's routers last heard.

Serve makes the routers and gives no access to them, so they write the numbers here and the front end reads them. This
is a separate module, since Serve pickles the router's module by value, with a copy of its variables.
"""

from __future__ import annotations

replicas: dict[str, int] = {}
"""Number of running replicas by deployment id, as text."""
