"""What operators see: the numbers of front ends and scorers as Ray metrics, and the page with those of all nodes.

A replica records into Ray, whose agent on each node answers Prometheus; the service's ``/metrics`` asks all agents, so
that it and a dashboard on the agents show the same names.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

import httpx
import ray
from ray.serve.metrics import Counter, Gauge, Histogram

from serve_app.contract import EngineStats, JobResult
from serve_app.device_queue import QueueStats
from serve_app.errors import OverloadedError

PREFIX = "ray_score_"
"""Ray puts its own before ours, and ``_total`` behind a counter's name."""

REPORT_S = 1.0
"""Between two looks at the counters for Ray's metrics, which Ray itself collects every 10 s."""

SCRAPE_S = 10.0
"""Prometheus' own limit, by default."""

_SECONDS = [0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0]


class ScorerMetrics:
    """Records a replica's numbers. Ray adds the tags ``application``, ``deployment`` and ``replica``."""

    def __init__(self) -> None:
        self._batches = _Total("score_batches", "Device batches.")
        self._sequences = _Total("score_sequences", "Prompts scored.")
        self._tokens = _Total(
            "score_tokens",
            "Prompt tokens: computed by the device, cached (shared or kept from earlier), and padding.",
            "kind",
        )
        self._refusals = _Total(
            "score_refusals", "Jobs without an answer: overloaded, expired, cancelled or failed.", "reason"
        )
        self._busy = _Total("score_device_busy_seconds", "While the engine had at least one batch.")
        self._compilations = _Total("score_compilations", "Programs compiled; none after the warm-up.")
        self._prefix_tokens = _Total("score_prefix_tokens", "Tokens of prefixes looked up: hit or missed.", "result")
        self._evicted = _Total("score_prefix_evicted_pages", "Pages of the prefix cache given to other prefixes.")
        self._pages = Gauge("score_prefix_pages", "Pages that the prefix cache has.")
        self._pages_used = Gauge("score_prefix_pages_used", "Pages of the prefix cache that hold a prefix.")
        self._bytes_used = Gauge("score_prefix_bytes_used", "Device memory of those pages.")
        self._queued_tokens = Gauge("score_queued_tokens", "Waiting for the device, shared prefixes counted once.")
        self._queue_seconds = Histogram("score_queue_seconds", "A job's wait for the device.", _SECONDS)
        self._device_seconds = Histogram("score_device_seconds", "A job's time on the device.", _SECONDS)

    def answered(self, job: JobResult) -> None:
        """Record one answered job."""
        self._queue_seconds.observe(job.queue_seconds)
        self._device_seconds.observe(job.device_seconds)

    def update(self, queue: QueueStats, engine: EngineStats) -> None:
        """Record what was counted since the last call."""
        self._batches.reach(queue.batches)
        self._sequences.reach(queue.sequences)
        self._tokens.reach(engine.computed_tokens, "computed")
        self._tokens.reach(queue.cached_tokens, "cached")
        self._tokens.reach(engine.padded_tokens, "padded")
        self._refusals.reach(queue.refused, "overloaded")
        self._refusals.reach(queue.expired, "expired")
        self._refusals.reach(queue.cancelled, "cancelled")
        self._refusals.reach(queue.failed, "failed")
        self._busy.reach(queue.device_seconds)
        self._compilations.reach(engine.compilations)
        self._prefix_tokens.reach(engine.prefix_hit_tokens, "hit")
        self._prefix_tokens.reach(engine.prefix_missed_tokens, "missed")
        self._evicted.reach(engine.prefix_evicted_pages)
        self._pages.set(engine.prefix_pages)
        self._pages_used.set(engine.prefix_pages_used)
        self._bytes_used.set(engine.prefix_pages_used * engine.prefix_page_bytes)
        self._queued_tokens.set(queue.queued_tokens)


class FrontMetrics:
    """Records a front end's numbers."""

    def __init__(self) -> None:
        self._requests = _Total(
            "score_requests",
            "Requests for scores: answered, invalid, overloaded, expired, cancelled (the client left) or failed.",
            "outcome",
        )

    def update(self, outcomes: Mapping[str, int]) -> None:
        """Record what was counted since the last call."""
        for outcome, total in outcomes.items():
            self._requests.reach(total, outcome)


class _Total:
    """A counter that is told its total. Ray's takes what was added, and no 0: it shows with the first that was."""

    def __init__(self, name: str, description: str, tag: str | None = None) -> None:
        self._tag = tag
        self._counter = Counter(name, description, (tag,) if tag else None)
        self._reached: dict[str, float] = {}

    def reach(self, total: float, value: str = "") -> None:
        """Count up to ``total``.

        Args:
            value: of the tag, if the counter has one.
        """
        added = total - self._reached.get(value, 0)
        if added > 0:
            self._counter.inc(added, {self._tag: value} if self._tag else {})
            self._reached[value] = total


async def scrape() -> str:
    """The service's metrics from Ray's agents on all nodes, as Prometheus reads them; some seconds old.

    Raises:
        OverloadedError: an agent does not answer. Numbers without its node's would look like a loss.
    """
    nodes: list[dict[str, Any]] = await asyncio.to_thread(ray.nodes)
    urls = [
        httpx.URL(scheme="http", host=node["NodeManagerAddress"], port=node["MetricsExportPort"], path="/metrics")
        for node in nodes
        if node["Alive"]
    ]
    try:
        async with httpx.AsyncClient(trust_env=False, timeout=SCRAPE_S) as client:
            pages = await asyncio.gather(*(client.get(url) for url in urls))
        return merged([page.raise_for_status().text for page in pages])
    except httpx.HTTPError as error:
        what = str(error) or type(error).__name__
        raise OverloadedError(f"Ray's metrics agent of a node does not answer: {what}; try again") from error


def merged(pages: Sequence[str]) -> str:
    """One page of the families that are ours; each appears once, with the samples of all pages."""
    families: dict[str, dict[str, None]] = {}
    for page in pages:
        lines: dict[str, None] = {}
        for line in page.splitlines():
            if line.startswith("# HELP "):  # begins a family
                lines = families.setdefault(line.split(" ", 3)[2], {})
            lines[line] = None
    ours = [line for name, lines in families.items() if name.startswith(PREFIX) for line in lines]
    return "".join(f"{line}\n" for line in ours)
