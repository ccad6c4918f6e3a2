"""Metrics recorded with Ray, and the page made from those of its agents."""

from __future__ import annotations

import asyncio
import json

import pytest
import ray
from prometheus_client.parser import text_string_to_metric_families

from serve_app.contract import EngineStats, QueueStats, ScoreJob
from serve_app.errors import OverloadedError
from serve_app.gateway_gauges import gateway_page
from serve_app.metrics import FrontMetrics, ScorerMetrics, merged, scrape
from serve_app.scorer.dispatcher import Dispatcher
from serve_app.timing import Timings
from tests.batches import batch_of
from tests.stubs import HeldEngine

Record = tuple[str, float, dict[str, str]]


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> list[Record]:
    """Collect the values that Ray's metrics would send to its agent."""
    records: list[Record] = []

    def record(metric: ray.util.metrics.Metric, value: float, tags: dict[str, str] | None = None) -> None:
        records.append((metric.info["name"], value, tags or {}))

    monkeypatch.setattr("ray.util.metrics.Metric._record", record)
    return records


def test_a_counter_gets_increments_and_a_gauge_the_current_value(recorded: list[Record]):
    metrics = ScorerMetrics("judge")
    metrics.update(QueueStats(batches=2, refused=1, queued_tokens=7), EngineStats(compilations=5))
    assert ("score_batches", 2, {}) in recorded
    assert ("score_refusals", 1, {"reason": "overloaded"}) in recorded
    assert ("score_queued_tokens", 7, {}) in recorded
    recorded.clear()
    metrics.update(QueueStats(batches=3, refused=1, expired=2, queued_tokens=4), EngineStats(compilations=5))
    raised = [(name, value, tags) for name, value, tags in recorded if value]
    assert raised == [
        ("score_batches", 1, {}),
        ("score_refusals", 2, {"reason": "expired"}),
        ("score_queued_tokens", 4, {}),
    ]


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


def test_a_front_end_counts_requests_and_tokens_of_each_tenant(recorded: list[Record]):
    metrics = FrontMetrics()
    metrics.update_tenants({"judge": {"alice": {"answered": 2}, "bob": {"invalid": 1}}}, {"judge": {"alice": 70}})
    metrics.update_tenants({"judge": {"alice": {"answered": 5}, "bob": {"invalid": 1}}}, {"judge": {"alice": 90}})
    assert recorded == [
        ("score_tenant_requests", 2, {"model": "judge", "tenant": "alice", "outcome": "answered"}),
        ("score_tenant_requests", 1, {"model": "judge", "tenant": "bob", "outcome": "invalid"}),
        ("score_tenant_tokens", 70, {"model": "judge", "tenant": "alice"}),
        ("score_tenant_requests", 3, {"model": "judge", "tenant": "alice", "outcome": "answered"}),
        ("score_tenant_tokens", 20, {"model": "judge", "tenant": "alice"}),
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


def exported(recorded: list[Record], model: str, replica: str) -> str:
    """The page of the agent of a replica that recorded these values."""
    lines: list[str] = []
    for name, value, _ in recorded:
        lines += [f"# HELP ray_{name} It.", f"# TYPE ray_{name} gauge"]
        lines.append(f'ray_{name}{{model="{model}",replica="{replica}"}} {value}')
    return "\n".join(lines) + "\n"


async def test_gateways_read_the_queues_own_counts_under_load(recorded: list[Record]):
    """``test_jobs_wait_until_something_of_them_has_gone_to_the_device`` compares these with the jobs themselves."""
    pages: list[str] = []
    counts: list[QueueStats] = []
    for replica, jobs in (("a", 40), ("b", 9)):
        engine = HeldEngine()
        queue = Dispatcher(engine, max_batch_tokens=64, max_queued_tokens=10_000)
        answers = [asyncio.get_running_loop().create_future() for _ in range(jobs)]
        for number, answer in enumerate(answers):
            queue.submit(ScoreJob("r", batch_of([[number, 1, 2, i] for i in range(20)])), answer)
        assert await asyncio.to_thread(engine.entered.wait, 30)
        counts.append(queue.stats())
        recorded.clear()
        ScorerMetrics("judge").update(counts[-1], EngineStats(prefix_pages=100, prefix_pages_used=jobs))
        pages.append(exported([each for each in recorded if not each[2]], "judge", replica))
        engine.gate.set()
        await asyncio.gather(*answers)
        await queue.close()
    samples = {
        sample.name: (sample.value, sample.labels)
        for family in text_string_to_metric_families(merged(pages))
        for sample in family.samples
        if sample.name.startswith("vllm:")
    }
    running = sum(each.running_jobs for each in counts)
    assert 0 < running < 49 == sum(each.queued_jobs for each in counts)
    assert samples == {
        "vllm:num_requests_waiting": (49 - running, {"model_name": "judge"}),
        "vllm:num_requests_running": (running, {"model_name": "judge"}),
        "vllm:kv_cache_usage_perc": (0.245, {"model_name": "judge"}),
        "vllm:cache_config_info": (1.0, {"model_name": "judge", "block_size": "128", "num_gpu_blocks": "200"}),
    }


def test_a_models_name_is_escaped_and_models_are_told_apart():
    names = ['a "b"', "c\\d"]
    own = "# TYPE ray_score_jobs_waiting gauge\n" + "".join(
        f"ray_score_jobs_waiting{{model={json.dumps(name)}}} {number}\n" for number, name in enumerate(names, 3)
    )
    families = {family.name: family.samples for family in text_string_to_metric_families(gateway_page(own))}
    waiting = families["vllm:num_requests_waiting"]
    assert {sample.labels["model_name"]: sample.value for sample in waiting} == dict(zip(names, (3, 4), strict=True))


async def test_an_agent_that_does_not_answer_is_an_error(monkeypatch: pytest.MonkeyPatch):
    node = {"Alive": True, "NodeManagerAddress": "127.0.0.1", "MetricsExportPort": 1}
    monkeypatch.setattr(ray, "nodes", lambda: [node])
    with pytest.raises(OverloadedError, match="agent"):
        await scrape()
    monkeypatch.setattr(ray, "nodes", lambda: [node | {"Alive": False}])
    assert await scrape() == ""
