"""The scoring service on Ray Serve: HTTP ingress, fan-out, scorer replicas, clients.

Only the functions in ``engines.py`` may import ``model`` or jax; everything else stays free of them.
"""

from importlib.metadata import version

__version__ = version("llm-score-serve")
