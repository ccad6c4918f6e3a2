"""The number of replicas that the work needs, computed from Serve's context."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from pydantic import ValidationError

from serve_app.app import LOAD_PERIOD_S, build
from serve_app.scorer.autoscaling import PENDING_TOKENS, PendingTokensPolicy, wanted_replicas
from serve_app.settings import Autoscaling, ModelSettings
from tests.local import service_of


@pytest.mark.parametrize(
    ("pending", "asked", "wanted"),
    [
        ({}, False, 0),
        ({}, True, 1),  # it waits at a front end
        ({"a": 0, "b": 0}, False, 0),
        ({"a": 10}, True, 1),
        ({"a": 10}, False, 0.1),  # not yet counted as asked: Serve rounds up, so that it stays
        ({"a": 100}, True, 1),
        ({"a": 101}, True, 1.01),
        ({"a": 250, "b": 50}, True, 3),  # as if it were shared evenly
        ({"a": 1_000_000}, True, 10_000),  # Serve cuts it to max_replicas
    ],
)
def test_the_number_follows_the_tokens(pending: dict[str, float], asked: bool, wanted: float):
    assert wanted_replicas(pending, 100, asked=asked) == wanted


def context(reports: dict[str, list[float]] | None, requests: float, *, running: int = 1, target: int = 1) -> Any:
    series = {name: [SimpleNamespace(value=value) for value in values] for name, values in (reports or {}).items()}
    metrics = None if reports is None else {PENDING_TOKENS: series, "another": {"a": [SimpleNamespace(value=9e9)]}}
    return SimpleNamespace(
        raw_metrics=metrics, total_num_requests=requests, current_num_replicas=running, target_num_replicas=target
    )


def test_the_newest_report_of_each_replica_counts():
    policy = PendingTokensPolicy(tokens_per_replica=100)
    assert policy(context({"a": [900, 100], "b": [0, 200], "c": []}, 5.0)) == (3, {})
    assert policy(context(None, 0.0)) == (0, {})
    assert policy(context(None, 0.3)) == (1, {})


def test_the_first_replica_is_not_stopped_before_it_has_started():
    policy = PendingTokensPolicy(tokens_per_replica=100)
    assert policy(context({}, 0.0, running=0, target=1)) == (1, {})
    assert policy(context({}, 0.0, running=0, target=0)) == (0, {})
    assert policy(context({}, 0.0, running=1, target=2)) == (0, {})


def test_serve_gets_the_bounds_and_the_policy():
    bounds = Autoscaling(min_replicas=0, max_replicas=7, tokens_per_replica=123, upscale_delay_s=1, downscale_delay_s=2)
    scorer = (
        build(service_of(ModelSettings(autoscaling=bounds, scorer_replicas=2)))
        ._bound_deployment.init_args[1]
        ._bound_deployment
    )
    config = scorer._deployment_config.autoscaling_config
    assert (config.min_replicas, config.initial_replicas, config.max_replicas) == (0, 2, 7)
    assert (config.upscale_delay_s, config.downscale_delay_s, config.metrics_interval_s) == (1, 2, LOAD_PERIOD_S)
    policy = config.policy.get_policy()(**config.policy.policy_kwargs)  # the controller creates it in the same way
    assert policy(context({"a": [246]}, 1.0)) == (2, {})


@pytest.mark.parametrize(
    ("bounds", "named"),
    [
        ({}, "max_replicas"),
        ({"min_replicas": -1, "max_replicas": 2}, "min_replicas"),
        ({"min_replicas": 2, "max_replicas": 4}, r"scorer_replicas is 1; .*min_replicas \(2\) to max_replicas \(4\)"),
        ({"max_replicas": 4, "target": 2}, "target"),
    ],
)
def test_wrong_bounds_are_refused_by_name(bounds: dict[str, Any], named: str):
    with pytest.raises(ValidationError, match=named):
        ModelSettings.model_validate({"autoscaling": bounds})


def test_the_start_may_be_anywhere_between_the_bounds():
    bounds = Autoscaling(min_replicas=2, max_replicas=4)
    assert [ModelSettings(autoscaling=bounds, scorer_replicas=number).most_replicas for number in (2, 4)] == [4, 4]
    assert ModelSettings(scorer_replicas=3).most_replicas == 3
