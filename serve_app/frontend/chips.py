"""Logs which TPU chips the cluster lacks."""

from __future__ import annotations

import asyncio
import logging

import ray

from serve_app.tpu import Tpu

logger = logging.getLogger("ray.serve")

WATCH_S = 5.0
"""Seconds between two looks at the cluster's chips."""


async def watch_chips(tpu: Tpu, replicas: int) -> None:
    """Log what the cluster lacks whenever that changes: Ray waits silently for nodes that may never come."""
    said = None
    while True:
        try:
            lacking = tpu.lacking(replicas, await asyncio.to_thread(ray.nodes))
        except Exception:
            logger.exception("the cluster's nodes cannot be listed")
        else:
            if lacking != said:
                logger.warning("TPU chips: %s", lacking or "there are enough now")
            said = lacking
        await asyncio.sleep(WATCH_S)
