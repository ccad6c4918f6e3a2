"""Metrics for operators: front ends and scorers record into Ray; ``/metrics`` shows those of all nodes.

On each node an agent of Ray answers Prometheus. The service's ``/metrics`` asks all agents, so it shows the same names
as a dashboard that reads the agents.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import httpx
import ray
from ray.serve.metrics import Counter, Gauge, Histogram

from serve_app.contract import EngineStats, JobResult, QueueStats
from serve_app.errors import OverloadedError
from serve_app.gateway_gauges import PAGES, PAGES_USED, RUNNING, WAITING, gateway_page
from serve_app.timing import TOKENISE, Timings

MODEL = "model"
"""The tag of every metric: the served name of the model."""

PREFIX = "ray_score_"
"""The prefix of our metrics on a page: Ray puts ``ray_`` before our names, and ``_total`` after a counter's."""

REPORT_S = 1.0
"""Seconds between two updates of Ray's metrics, which Ray itself collects every 10 s."""

SCRAPE_S = 10.0
"""Timeout of one agent, in seconds: Prometheus' own default."""

M = TypeVar("M", Counter, Gauge, Histogram)

_SECONDS = [0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0]
_SHARES = [0.01, 0.03, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0]


class ScorerMetrics:
    """Records a replica's numbers. Ray adds the tags ``application``, ``deployment`` and ``replica``.

    Args:
        model: the served name, added as a tag.
    """

    def __init__(self, model: str) -> None:
        def total(name: str, description: str, *tags: str) -> _Total:
            return _Total(_of(model, _counter(name, description, *tags)))

        def gauge(name: str, description: str) -> Gauge:
            return _of(model, Gauge(name, description, (MODEL,)))

        def histogram(name: str, description: str, bounds: list[float]) -> Histogram:
            return _of(model, Histogram(name, description, bounds, (MODEL,)))

        self._batches = total("score_batches", "Device batches.")
        self._sequences = total("score_sequences", "Prompts scored.")
        self._tokens = total(
            "score_tokens",
            "Prompt tokens: computed by the device, cached (shared or kept from earlier), and padding.",
            "kind",
        )
        self._refusals = total(
            "score_refusals", "Jobs that got no answer: overloaded, expired, cancelled or failed.", "reason"
        )
        self._busy = total("score_device_busy_seconds", "Seconds in which the engine had at least one batch.")
        self._compilations = total("score_compilations", "Programs compiled; none after the warm-up.")
        self._prefix_tokens = total("score_prefix_tokens", "Tokens of prefixes looked up: hit or missed.", "result")
        self._evicted = total("score_prefix_evicted_pages", "Pages of the prefix cache given to other prefixes.")
        self._pages = gauge(PAGES, "Pages that the prefix cache has.")
        self._pages_used = gauge(PAGES_USED, "Pages of the prefix cache that hold a prefix.")
        self._bytes_used = gauge("score_prefix_bytes_used", "Device memory of the pages that hold a prefix, in bytes.")
        self._waiting = gauge(WAITING, "Jobs of which nothing has gone to the device.")
        self._running = gauge(RUNNING, "Jobs that the device has begun.")
        self._queued_tokens = gauge(
            "score_queued_tokens", "Tokens waiting for the device, shared prefixes counted once."
        )
        self._queue_seconds = histogram("score_queue_seconds", "A job's wait for the device.", _SECONDS)
        self._device_seconds = histogram("score_device_seconds", "A job's time on the device.", _SECONDS)
        self._batch_fill = histogram(
            "score_batch_fill",
            "Tokens that a device batch computed, as a share of the most that it could have.",
            _SHARES,
        )

    def batch(self, fill: float) -> None:
        """Record one device batch."""
        self._batch_fill.observe(fill)

    def answered(self, job: JobResult) -> None:
        """Record one answered job."""
        self._queue_seconds.observe(job.queue_seconds)
        self._device_seconds.observe(job.device_seconds)

    def update(self, queue: QueueStats, engine: EngineStats) -> None:
        """Record the counts since the last call."""
        self._batches.reach(queue.batches)
        self._sequences.reach(queue.sequences)
        self._tokens.reach(engine.computed_tokens, kind="computed")
        self._tokens.reach(queue.cached_tokens, kind="cached")
        self._tokens.reach(engine.padded_tokens, kind="padded")
        self._refusals.reach(queue.refused, reason="overloaded")
        self._refusals.reach(queue.expired, reason="expired")
        self._refusals.reach(queue.cancelled, reason="cancelled")
        self._refusals.reach(queue.failed, reason="failed")
        self._busy.reach(queue.device_seconds)
        self._compilations.reach(engine.compilations)
        self._prefix_tokens.reach(engine.prefix_hit_tokens, result="hit")
        self._prefix_tokens.reach(engine.prefix_missed_tokens, result="missed")
        self._evicted.reach(engine.prefix_evicted_pages)
        self._pages.set(engine.prefix_pages)
        self._pages_used.set(engine.prefix_pages_used)
        self._bytes_used.set(engine.prefix_pages_used * engine.prefix_page_bytes)
        self._queued_tokens.set(queue.queued_tokens)
        self._waiting.set(queue.queued_jobs - queue.running_jobs)
        self._running.set(queue.running_jobs)


class FrontMetrics:
    """Records a front end's numbers."""

    def __init__(self) -> None:
        self._requests = _Total(
            _counter(
                "score_requests",
                "Requests for scores: answered, invalid, over_quota, overloaded, expired, cancelled (the client left), "
                "failed.",
                "outcome",
            )
        )
        self._items = _Total(_counter("score_items", "Items, documents and prompts scored."))
        self._tenant_requests = _Total(
            _counter("score_tenant_requests", "Requests of each API key, by its name.", "tenant", "outcome")
        )
        self._tenant_tokens = _Total(
            _counter(
                "score_tenant_tokens",
                "Tokens of the answered requests of each API key, shared prefixes counted once.",
                "tenant",
            )
        )
        self._tokenise_seconds = Histogram(
            "score_tokenise_seconds", "Time to build the prompts of an answered request.", _SECONDS, (MODEL,)
        )
        self._request_seconds = Histogram(
            "score_request_seconds", "Time from an answered request's arrival to its last row.", _SECONDS, (MODEL,)
        )

    def answered(self, model: str, timings: Timings) -> None:
        """Record one answered request."""
        self._tokenise_seconds.observe(timings.seconds.get(TOKENISE, 0.0), {MODEL: model})
        self._request_seconds.observe(timings.total, {MODEL: model})

    def update(self, outcomes: Mapping[str, Mapping[str, int]], items: Mapping[str, int]) -> None:
        """Record the counts since the last call, by the model's name."""
        for model, own in outcomes.items():
            for outcome, total in own.items():
                self._requests.reach(total, model=model, outcome=outcome)
        for model, total in items.items():
            self._items.reach(total, model=model)

    def update_tenants(
        self, outcomes: Mapping[str, Mapping[str, Mapping[str, int]]], tokens: Mapping[str, Mapping[str, int]]
    ) -> None:
        """Record the counts since the last call, by the model's name and the tenant's."""
        for model, tenants in outcomes.items():
            for tenant, own in tenants.items():
                for outcome, total in own.items():
                    self._tenant_requests.reach(total, model=model, tenant=tenant, outcome=outcome)
        for model, totals in tokens.items():
            for tenant, total in totals.items():
                self._tenant_tokens.reach(total, model=model, tenant=tenant)


class _Total:
    """A counter that takes totals. Ray's takes increments above 0, so it appears with the first one."""

    def __init__(self, counter: Counter) -> None:
        self._counter = counter
        self._reached: dict[tuple[str, ...], float] = {}

    def reach(self, total: float, **tags: str) -> None:
        """Raise the counter with these tags to ``total``."""
        added = total - self._reached.get((*tags.values(),), 0)
        if added > 0:
            self._counter.inc(added, tags)
            self._reached[*tags.values()] = total


def _counter(name: str, description: str, *tags: str) -> Counter:
    keys: Any = (MODEL, *tags)  # Serve's annotation has one key
    return Counter(name, description, keys)


def _of(model: str, metric: M) -> M:
    """Put the model's name on all that ``metric`` records. Returns it."""
    metric.set_default_tags({MODEL: model})
    return metric


async def scrape() -> str:
    """Fetch the service's metrics, some seconds old, from Ray's agents on all nodes, in Prometheus' text format.

    Raises:
        OverloadedError: an agent does not answer. A page without its node's numbers would look as if they had dropped.
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
        raise OverloadedError(f"Ray's metrics agent on a node does not answer: {what}; try again") from error


def merged(pages: Sequence[str]) -> str:
    """Merge pages into one that has only our metric families, and those that gateways read. Each appears once, with the
    samples of all pages."""
    families: dict[str, dict[str, None]] = {}
    for page in pages:
        lines: dict[str, None] = {}
        for line in page.splitlines():
            if line.startswith("# HELP "):  # begins a family
                lines = families.setdefault(line.split(" ", 3)[2], {})
            lines[line] = None
    ours = [line for name, lines in families.items() if name.startswith(PREFIX) for line in lines]
    page = "".join(f"{line}\n" for line in ours)
    return page + gateway_page(page)
