"""The composition root: the only place that binds deployments."""

# No postponed annotations here: Serve reads the parameter's class to parse ``key=value`` words and ``args:``.

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any, cast

import ray
from ray import serve
from ray.serve import Application, Deployment
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy, BackpressureConfig, RequestRouterConfig

from serve_app.errors import RETRY_AFTER_S
from serve_app.frontend import ingress
from serve_app.frontend.router import PrefixRouter
from serve_app.scorer.autoscaling import PendingTokensPolicy
from serve_app.scorer.deployment import MAX_ONGOING, Scorer
from serve_app.scorer.engines import load_engine
from serve_app.settings import ModelSettings, ServiceSettings
from serve_app.tpu import CHIP_LABEL, RESOURCE, Tpu

HEALTH_PERIOD_S = 1.0
"""Seconds between two health checks, by which Serve notices that a process died."""
HEALTH_TIMEOUT_S = 30.0
LOAD_PERIOD_S = 2.0
"""Seconds between two reports of load to Serve's autoscaling. Ray 2.60 documents environment variables for this, and
never reads them."""
DRAIN_POLL_S = 0.5
DRAIN_S = 60.0
"""Seconds for a scorer that is being replaced to answer the jobs that it has accepted; the rest go to other scorers.
A front end has as long as a request may take, since no other front end can answer its requests."""

FRONT_SURGE_PERCENT = 1
"""One more front end during an update: front ends are small, and if a new one cannot start, the old one stays."""

_UNSAFE = re.compile(r"[^A-Za-z0-9_.-]")
"""Characters that a deployment's name must not have, since it becomes part of paths."""


def build(args: ServiceSettings) -> Application:
    """Build the whole service: the front ends and, for each model, its scorers.

    Serve calls it for ``serve run serve_app.app:build model=demo``, or for ``import_path`` and ``args`` in a config
    file. Neither the process that builds nor the front ends load jax.
    """
    nodes = ray.nodes() if ray.is_initialized() else []
    together = scorers_on_a_host(args, nodes)
    scorers = [_scorer(each, together, named=len(args.models) > 1) for each in on_cards(args.models, nodes)]
    front = cast(Deployment, ingress.Ingress).options(  # pyright: ignore[reportUnknownMemberType]
        num_replicas=args.ingress_replicas,
        ray_actor_options={"num_cpus": args.ingress_cpus, **_off_chips(args.replicas_on_chips())},
        max_surge_percent=FRONT_SURGE_PERCENT,
        max_ongoing_requests=MAX_ONGOING,
        max_queued_requests=4 * MAX_ONGOING,
        backpressure_config=BackpressureConfig(retry_after_s=RETRY_AFTER_S),
        health_check_period_s=HEALTH_PERIOD_S,
        health_check_timeout_s=HEALTH_TIMEOUT_S,
        graceful_shutdown_wait_loop_s=DRAIN_POLL_S,
        graceful_shutdown_timeout_s=max(each.timeout_s for each in args.models),
    )
    return front.bind(args, *scorers)  # pyright: ignore[reportUnknownMemberType]


def scorers_on_a_host(args: ServiceSettings, nodes: Sequence[Mapping[str, Any]]) -> int:
    """The number of scorers that share a host's memory, if they are spread over the cluster, as Serve does it. Those
    with chips have memory of their own.

    Args:
        nodes: the result of ``ray.nodes()``; empty: one host.
    """
    scorers = sum(each.most_replicas for each in args.models if each.tpu is None)
    hosts = sum(bool(node["Alive"] and node["Resources"].get("CPU")) for node in nodes)
    return math.ceil(scorers / max(1, hosts))


def on_cards(models: Sequence[ModelSettings], nodes: Sequence[Mapping[str, Any]]) -> list[ModelSettings]:
    """Return the models with ``scorer_gpus`` decided: those that leave it out share the cluster's other cards equally.

    Args:
        nodes: the result of ``ray.nodes()``.
    """
    cards = sum(int(node["Resources"].get("GPU", 0)) for node in nodes if node["Alive"])
    cards -= math.ceil(sum(each.most_replicas * (each.scorer_gpus or 0) for each in models))
    open_ones = [each for each in models if each.scorer_gpus is None and each.tpu is None and each.engine != "fake"]
    scorers = sum(each.most_replicas for each in open_ones)
    if cards < 1:
        return list(models)
    share = 1 / math.ceil(scorers / cards) if scorers else 0
    return [each.model_copy(update={"scorer_gpus": share}) if each in open_ones else each for each in models]


def _scorer(model: ModelSettings, together: int, *, named: bool) -> Application:
    """The deployment of one model's scorers.

    Args:
        together: scorers of all models on one host.
        named: the deployment has the model's name, where there are several models.
    """
    deployment = serve.deployment(  # pyright: ignore[reportUnknownMemberType]
        name=f"Scorer-{_UNSAFE.sub('-', model.name)}" if named else "Scorer",
        **_scorer_count(model),
        ray_actor_options=scorer_resources(model),
        max_surge_percent=model.max_surge_percent,
        max_ongoing_requests=MAX_ONGOING,
        request_router_config=RequestRouterConfig(
            request_router_class=PrefixRouter  # pyright: ignore[reportArgumentType]
        ),
        health_check_period_s=HEALTH_PERIOD_S,
        health_check_timeout_s=HEALTH_TIMEOUT_S,
        graceful_shutdown_wait_loop_s=DRAIN_POLL_S,
        graceful_shutdown_timeout_s=DRAIN_S,
    )
    return deployment(Scorer).bind(model, partial(load_engine, scorers=together))


def _scorer_count(model: ModelSettings) -> dict[str, Any]:
    bounds = model.autoscaling
    if bounds is None:
        return {"num_replicas": model.scorer_replicas}
    policy = AutoscalingPolicy(
        policy_function=PendingTokensPolicy, policy_kwargs={"tokens_per_replica": bounds.tokens_per_replica}
    )
    return {
        "autoscaling_config": AutoscalingConfig(
            min_replicas=bounds.min_replicas,
            initial_replicas=model.scorer_replicas,
            max_replicas=bounds.max_replicas,
            metrics_interval_s=LOAD_PERIOD_S,
            upscale_delay_s=bounds.upscale_delay_s,
            downscale_delay_s=bounds.downscale_delay_s,
            policy=policy,
        )
    }


def scorer_resources(model: ModelSettings) -> dict[str, Any]:
    """The resources that Ray reserves for one scorer.

    A scorer with a card, or a share of one, sees no other cards (CUDA_VISIBLE_DEVICES).

    Ray places a scorer with TPU chips on a host that has them, and hides all others from it (TPU_VISIBLE_CHIPS). A
    scorer on a slice of several hosts computes nothing in its own process, and reserves the slice when it starts.
    """
    if model.tpu is None:
        return {"num_cpus": model.scorer_cpus, **({"num_gpus": model.scorer_gpus} if model.scorer_gpus else {})}
    if model.tpu.hosts > 1:
        return {"num_cpus": model.scorer_cpus, **_off_chips([model.tpu])}
    return {
        "num_cpus": model.scorer_cpus,
        "resources": {RESOURCE: model.tpu.chips},
        "label_selector": model.tpu.labels,
    }


def _off_chips(tpus: Iterable[Tpu]) -> dict[str, Any]:
    """Options that prefer a host without chips: a process that computes nothing should leave TPU hosts free."""
    chips = sorted({tpu.labels[CHIP_LABEL] for tpu in tpus})
    if not chips:
        return {}
    return {
        "label_selector": {CHIP_LABEL: f"!{chips[0]}" if len(chips) == 1 else f"!in({','.join(chips)})"},
        "fallback_strategy": [{"label_selector": {}}],
    }
