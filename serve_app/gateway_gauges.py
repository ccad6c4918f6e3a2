"""Gauges under the names that inference gateways and autoscalers read: those of vLLM.

Gateway API's inference extension calls this its model server protocol, and KEDA's examples use the same names. Each is
made from our own gauges, over all replicas of a model: whoever reads a front end's page sees what is behind it.

Source: github.com/kubernetes-sigs/gateway-api-inference-extension, docs/proposals/003-model-server-protocol.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from prometheus_client.parser import text_string_to_metric_families

from serve_app.contract import PAGE_TOKENS

WAITING, RUNNING = "score_jobs_waiting", "score_jobs_running"
PAGES, PAGES_USED = "score_prefix_pages", "score_prefix_pages_used"
"""Our own gauges."""

_RAYS = "ray_"
"""Ray puts this before our names."""

Sums = Mapping[str, float]
"""Our gauges of one model, summed over its replicas."""


@dataclass(frozen=True, slots=True)
class _Gauge:
    """A gauge under a foreign name.

    Attributes:
        value: from our own gauges.
        labels: in addition to the model's name.
    """

    name: str
    description: str
    value: Callable[[Sums], float]
    labels: Callable[[Sums], Mapping[str, str]] = lambda _: {}


def _cache(sums: Sums) -> Mapping[str, str]:
    return {"block_size": str(PAGE_TOKENS), "num_gpu_blocks": str(int(sums[PAGES]))}


GAUGES = (
    _Gauge("vllm:num_requests_waiting", "Jobs of which nothing has gone to the device.", lambda sums: sums[WAITING]),
    _Gauge("vllm:num_requests_running", "Jobs that the device has begun.", lambda sums: sums[RUNNING]),
    _Gauge(
        "vllm:kv_cache_usage_perc",
        "Pages of the prefix cache that hold a prefix, 0 to 1.",
        lambda sums: sums[PAGES_USED] / (sums[PAGES] or 1),
    ),
    _Gauge("vllm:cache_config_info", "Tokens of a page of the prefix cache, and pages.", lambda _: 1, _cache),
)


def gateway_page(own: str) -> str:
    """The gauges in Prometheus' text format.

    Args:
        own: a page with our own metrics.
    """
    models: defaultdict[str, defaultdict[str, float]] = defaultdict(lambda: defaultdict(float))
    for family in text_string_to_metric_families(own):
        name = family.name.removeprefix(_RAYS)
        if name in (WAITING, RUNNING, PAGES, PAGES_USED):
            for sample in family.samples:
                models[sample.labels["model"]][name] += sample.value
    lines: list[str] = []
    for gauge in GAUGES if models else ():
        lines += [f"# HELP {gauge.name} {gauge.description}", f"# TYPE {gauge.name} gauge"]
        for model, sums in models.items():
            labels = {"model_name": model, **gauge.labels(sums)}
            shown = ",".join(f'{label}="{_escaped(value)}"' for label, value in labels.items())
            lines.append(f"{gauge.name}{{{shown}}} {float(gauge.value(sums))}")
    return "".join(f"{line}\n" for line in lines)


def _escaped(value: str) -> str:
    return value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
