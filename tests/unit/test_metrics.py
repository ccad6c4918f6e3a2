"""What is recorded into Ray, and what is made of the pages of its agents."""

from __future__ import annotations

import pytest
import ray

from serve_app.contract import EngineStats, JobResult, QueueStats
from serve_app.errors import OverloadedError
from serve_app.metrics import FrontMetrics, ScorerMetrics, merged, scrape
from serve_app.timing import Timings

Record = tuple[str, float, dict[str, str]]


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> list[Record]:
    """What Ray's metrics would hand to its agent."""
    records: list[Record] = []

    def record(metric: ray.util.metrics.Metric, value: float, tags: dict[str, str] | None = None) -> None:
        records.append((metric.info["name"], value, tags or {}))

    monkeypatch.setattr("ray.util.metrics.Metric._record", record)
    return records


def test_counters_get_what_was_added_and_gauges_what_is(recorded: list[Record]):
    metrics = ScorerMetrics("judge")
    metrics.update(QueueStats(batches=2, refused=1, queued_tokens=7), EngineStats(compilations=5, padded_tokens=10))
    assert ("score_batches", 2, {}) in recorded
    assert ("score_refusals", 1, {"reason": "overloaded"}) in recorded
    assert ("score_tokens", 10, {"kind": "padded"}) in recorded
    assert ("score_compilations", 5, {}) in recorded
    assert ("score_queued_tokens", 7, {}) in recorded
    recorded.clear()
    metrics.update(
        QueueStats(batches=3, refused=1, expired=2, cancelled=3, failed=4, cached_tokens=6),
        EngineStats(
            compilations=5,
            computed_tokens=8,
            padded_tokens=10,
            prefix_hit_tokens=128,
            prefix_missed_tokens=256,
            prefix_evicted_pages=1,
            prefix_pages=9,
            prefix_pages_used=3,
            prefix_page_bytes=100,
        ),
    )
    assert sorted(recorded, key=str) == sorted(
        [
            ("score_batches", 1, {}),
            ("score_refusals", 2, {"reason": "expired"}),
            ("score_refusals", 3, {"reason": "cancelled"}),
            ("score_refusals", 4, {"reason": "failed"}),
            ("score_tokens", 6, {"kind": "cached"}),
            ("score_tokens", 8, {"kind": "computed"}),
            ("score_prefix_tokens", 128, {"result": "hit"}),
            ("score_prefix_tokens", 256, {"result": "missed"}),
            ("score_prefix_evicted_pages", 1, {}),
            ("score_prefix_pages", 9, {}),
            ("score_prefix_pages_used", 3, {}),
            ("score_prefix_bytes_used", 300, {}),
            ("score_queued_tokens", 0, {}),
        ],
        key=str,
    )


def test_an_answered_job_is_observed(recorded: list[Record]):
    ScorerMetrics("judge").answered(JobResult(None, queue_seconds=0.25, device_seconds=0.5))  # type: ignore[arg-type]
    assert recorded == [("score_queue_seconds", 0.25, {}), ("score_device_seconds", 0.5, {})]


def test_a_device_batch_is_observed(recorded: list[Record]):
    ScorerMetrics("judge").batch(0.75)
    assert recorded == [("score_batch_fill", 0.75, {})]


def test_an_answered_request_is_observed(recorded: list[Record]):
    timings = Timings()
    timings.add("tokenise", 0.25)
    FrontMetrics().answered("judge", timings)
    (_, total, tags) = recorded.pop()
    assert recorded == [("score_tokenise_seconds", 0.25, {"model": "judge"})]
    assert 0 < total < 60
    assert tags == {"model": "judge"}


def test_a_front_end_counts_requests_and_items_of_each_model(recorded: list[Record]):
    metrics = FrontMetrics()
    metrics.update({"judge": {"answered": 2}, "": {"invalid": 1}}, {"judge": 7, "other": 0})
    metrics.update({"judge": {"answered": 5}, "": {"invalid": 1}}, {"judge": 9, "other": 0})
    assert recorded == [
        ("score_requests", 2, {"model": "judge", "outcome": "answered"}),
        ("score_requests", 1, {"model": "", "outcome": "invalid"}),
        ("score_items", 7, {"model": "judge"}),
        ("score_requests", 3, {"model": "judge", "outcome": "answered"}),
        ("score_items", 2, {"model": "judge"}),
    ]


def page(node: str) -> str:
    return (
        "# HELP ray_score_batches_total Device batches.\n"
        "# TYPE ray_score_batches_total counter\n"
        f'ray_score_batches_total{{node="{node}",replica="a"}} 1.0\n'
        "# HELP ray_node_cpu Not ours.\n"
        "# TYPE ray_node_cpu gauge\n"
        f'ray_node_cpu{{node="{node}"}} 1.0\n'
        "# HELP ray_score_queued_tokens Waiting.\n"
        "# TYPE ray_score_queued_tokens gauge\n"
        f'ray_score_queued_tokens{{node="{node}"}} 0.0\n'
    )


def test_the_pages_of_several_nodes_become_one_with_each_family_once():
    assert merged([page("one"), page("two")]).splitlines() == [
        "# HELP ray_score_batches_total Device batches.",
        "# TYPE ray_score_batches_total counter",
        'ray_score_batches_total{node="one",replica="a"} 1.0',
        'ray_score_batches_total{node="two",replica="a"} 1.0',
        "# HELP ray_score_queued_tokens Waiting.",
        "# TYPE ray_score_queued_tokens gauge",
        'ray_score_queued_tokens{node="one"} 0.0',
        'ray_score_queued_tokens{node="two"} 0.0',
    ]


async def test_an_agent_that_does_not_answer_is_an_error_not_a_gap(monkeypatch: pytest.MonkeyPatch):
    node = {"Alive": True, "NodeManagerAddress": "127.0.0.1", "MetricsExportPort": 1}
    monkeypatch.setattr(ray, "nodes", lambda: [node])
    with pytest.raises(OverloadedError, match="agent"):
        await scrape()
    monkeypatch.setattr(ray, "nodes", lambda: [node | {"Alive": False}])
    assert await scrape() == ""
