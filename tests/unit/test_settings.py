"""The settings, and the Serve config files that hold them."""

from __future__ import annotations

import importlib
import inspect
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError
from ray.serve.schema import ServeDeploySchema

from serve_app.app import build, on_cards, scorer_resources, scorers_on_a_host
from serve_app.scorer.engines import card_environment
from serve_app.settings import Limits, ModelSettings, ServiceSettings
from serve_app.tpu import CHIP_LABEL

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_serve_and_the_builder_accept_the_config_files(path: Path):
    content: dict[str, Any] = yaml.safe_load(path.read_text())
    schema = ServeDeploySchema.model_validate(content)
    assert schema.applications
    for application in schema.applications:
        module, function = application.import_path.split(":")
        builder = getattr(importlib.import_module(module), function)
        ServiceSettings.model_validate(application.args)
        assert builder is build


def test_there_is_a_config_file():
    assert CONFIGS


def test_serve_can_parse_the_builders_argument():
    # Serve needs the class itself; a postponed annotation is a string, and Serve would pass a plain dict.
    (parameter,) = inspect.signature(build).parameters.values()
    assert parameter.annotation is ServiceSettings


def test_the_builder_takes_its_numbers_from_the_settings():
    application = build(
        ServiceSettings(
            models=(ModelSettings(scorer_replicas=3, scorer_cpus=2, model="org/name"),),
            ingress_replicas=2,
            ingress_cpus=0.25,
        )
    )
    front = application._bound_deployment
    scorer = front.init_args[1]._bound_deployment
    assert (front.name, front.num_replicas, front.ray_actor_options["num_cpus"]) == ("Ingress", 2, 0.25)
    assert (scorer.name, scorer.num_replicas, scorer.ray_actor_options["num_cpus"]) == ("Scorer", 3, 2)
    assert front.init_args[0].models == (scorer.init_args[0],)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"modle": "demo"}, "modle"),
        ({"limits": {"max_item": 5}}, "max_item"),
        ({"dtype": "float16"}, "dtype"),
        ({"engine": "torch"}, "engine"),
        ({"scorer_replicas": 0}, "scorer_replicas"),
        ({"max_batch_tokens": 63}, "max_batch_tokens"),
        ({"timeout_s": 0}, "timeout_s"),
        ({"stall_s": float("nan")}, "stall_s"),
        ({"limits": {"max_items": 0}}, "max_items"),
    ],
)
def test_wrong_settings_are_refused_by_name(arguments: dict[str, Any], named: str):
    with pytest.raises(ValidationError, match=named):
        ServiceSettings.model_validate(arguments)


@pytest.mark.parametrize(
    ("arguments", "places"),
    [
        ({"modle": "demo"}, ["modle"]),
        (
            {"limits": {"max_item": 5}, "timeout_s": 0, "ingress_replicas": 0},
            ["timeout_s", "limits.max_item", "ingress_replicas"],
        ),
        ({"scorer_replicas": 3, "autoscaling": {"max_replicas": 2}}, [""]),
        ({"modle": "demo", "models": [{"model": "a"}, {"model": "b"}]}, ["modle"]),
        (
            {"limits": {"max_item": 5}, "models": [{"model": "a", "limits": {"max_items": 0}}]},
            ["models.0.limits.max_items", "limits.max_item"],
        ),
        ({"models": [{"modle": "demo"}]}, ["models.0.modle"]),
        ({"engine": "fake", "models": [{"model": "a"}, {"modle": "b"}]}, ["models.1.modle"]),
        ({"engine": "fake", "models": [{"engine": "torch"}]}, ["models.0.engine"]),
    ],
)
def test_a_wrong_setting_is_named_where_it_was_given(arguments: dict[str, Any], places: list[str]):
    with pytest.raises(ValidationError) as caught:
        ServiceSettings.model_validate(arguments)
    assert [".".join(map(str, each["loc"])) for each in caught.value.errors()] == places


def test_string_arguments_of_serve_run_are_parsed():
    # ``serve run serve_app.app:build scorer_replicas=2`` passes strings.
    assert ServiceSettings.model_validate({"scorer_replicas": "2", "timeout_s": "1.5"}).models[0].scorer_replicas == 2


def test_settings_are_frozen():
    with pytest.raises(ValidationError, match="frozen"):
        ModelSettings().model = "other"  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize(
    ("model", "served_name", "name"),
    [
        ("demo", None, "demo"),
        ("org/name", None, "name"),
        ("/models/my-model/", None, "my-model"),
        ("/models/some.Q4_1.gguf", None, "some.Q4_1"),
        ("org/name", "judge", "judge"),
    ],
)
def test_the_served_name(model: str, served_name: str | None, name: str):
    assert ModelSettings(model=model, served_name=served_name).name == name


TWO = [{"model": "demo"}, {"model": "org/name", "served_name": "judge", "scorer_replicas": 2}]


def test_settings_outside_of_models_are_the_default_of_each_model():
    settings = ServiceSettings.model_validate(
        {
            "engine": "fake",
            "scorer_replicas": 3,
            "timeout_s": 5,
            "limits": {"max_items": 7, "max_body_bytes": 2048},
            "models": [TWO[0] | {"limits": {"max_labels": 2}}, TWO[1]],
        }
    )
    first, second = settings.models
    assert (first.name, second.name) == ("demo", "judge")
    assert (first.scorer_replicas, second.scorer_replicas) == (3, 2)
    for each in (first, second):
        assert (each.engine, each.timeout_s) == ("fake", 5)
        assert (each.limits.max_items, each.limits.max_body_bytes) == (7, 2048)
    assert (first.limits.max_labels, second.limits.max_labels) == (2, 1_000)


def test_the_settings_of_one_model_may_be_among_those_of_the_service():
    given = {"model": "org/name", "aliases": ["judge"], "scorer_replicas": 2, "ingress_replicas": 3}
    model = ModelSettings(model="org/name", aliases=("judge",), scorer_replicas=2)
    settings = ServiceSettings.model_validate(given)
    assert settings == ServiceSettings(models=(model,), ingress_replicas=3)
    assert settings.models[0].names == ("name", "judge")
    assert ServiceSettings.model_validate({"models": [TWO[0]]}) == ServiceSettings.model_validate(TWO[0])
    assert ServiceSettings() == ServiceSettings(models=(ModelSettings(),))


def test_settings_survive_a_copy():
    settings = ServiceSettings.model_validate({"limits": {"max_body_bytes": 2048, "max_items": 7}, "models": TWO})
    assert ServiceSettings.model_validate(settings.model_dump()) == settings
    assert ServiceSettings.model_validate(settings.model_dump(exclude_unset=True)) == settings


def test_scorers_that_share_a_hosts_memory_are_counted():
    chips = {"chip": "v6e", "topology": "2x2"}
    models = [
        {"model": "a", "autoscaling": {"max_replicas": 4}},
        {"model": "b"},
        {"model": "c", "tpu": chips, "scorer_replicas": 4},
    ]
    settings = ServiceSettings.model_validate({"models": models})
    front = build(settings)._bound_deployment
    assert [bound._bound_deployment.init_args[1].keywords for bound in front.init_args[1:]] == [{"scorers": 5}] * 3
    host, head = {"Alive": True, "Resources": {"CPU": 4}}, {"Alive": True, "Resources": {}}
    assert scorers_on_a_host(settings, [host, host, head, {**host, "Alive": False}]) == 3


def test_each_scorer_has_a_graphics_card_or_an_equal_share():
    """Without this every scorer takes the first card. Cards that a model asks for are not shared by the others."""
    nodes = [{"Alive": True, "Resources": {"CPU": 8, "GPU": 2}}, {"Alive": False, "Resources": {"GPU": 8}}]

    def shares(*models: dict[str, object], cards: list[dict[str, object]] = nodes) -> list[object]:
        settings = ServiceSettings.model_validate({"models": list(models)})
        return [scorer_resources(each).get("num_gpus") for each in on_cards(settings.models, cards)]

    a, b = {"model": "a"}, {"model": "b"}
    assert shares(a, b) == [1, 1]
    assert shares(a | {"scorer_replicas": 3}, b) == [0.5, 0.5]
    assert shares(a | {"autoscaling": {"max_replicas": 5}}) == [pytest.approx(1 / 3)]
    assert shares(a | {"scorer_gpus": 1}, b | {"scorer_replicas": 2}) == [1, 0.5]
    assert shares(a | {"scorer_gpus": 0.5, "scorer_replicas": 4}, b) == [0.5, None]
    assert shares(a | {"scorer_gpus": 0}, b) == [None, 1]
    assert shares(a | {"engine": "fake"}, b | {"tpu": {"chip": "v6e", "topology": "2x2"}}) == [None, None]
    assert shares(a, b, cards=[]) == [None, None]


def test_a_scorer_takes_its_share_of_a_cards_memory_or_no_card():
    assert card_environment(None) == {}
    assert card_environment(0) == {"JAX_PLATFORMS": "cpu"}
    assert card_environment(1) == {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.900"}
    assert card_environment(1 / 3) == {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.300"}


def test_a_scorer_has_chips_or_a_graphics_card():
    with pytest.raises(ValueError, match="leave out tpu or scorer_gpus"):
        ModelSettings.model_validate({"scorer_gpus": 1, "tpu": {"chip": "v6e", "topology": "2x2"}})


def test_each_model_has_a_scorer_deployment_of_its_own():
    bounds = {"min_replicas": 0, "max_replicas": 4}
    models = [TWO[0], {"model": "a", "served_name": "org/a b", "autoscaling": bounds}]
    front = build(ServiceSettings.model_validate({"models": models, "scorer_cpus": 2}))._bound_deployment
    first, second = [bound._bound_deployment for bound in front.init_args[1:]]
    assert (first.name, second.name) == ("Scorer-demo", "Scorer-org-a-b")
    assert (first.num_replicas, second._deployment_config.autoscaling_config.max_replicas) == (1, 4)
    assert [each.ray_actor_options["num_cpus"] for each in (first, second)] == [2, 2]
    assert [each.init_args[0].name for each in (first, second)] == ["demo", "org/a b"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"models": [{"modle": "demo"}]}, "modle"),
        ({"model": "demo", "models": TWO}, "model: models cannot share it; set it in each"),
        ({"served_name": "a", "aliases": ["b"], "models": TWO}, "aliases, served_name: models cannot share it"),
        ({"trust_config": ["a"], "models": TWO}, "trust_config: models cannot share it"),
        ({"models": [{"model": "a/x"}, {"model": "b/x"}]}, "'a/x' and 'b/x' are both named 'x'; give one"),
        ({"models": [{"model": "a"}, {"model": "b", "aliases": ["a"]}]}, "both named 'a'"),
        ({"models": [{"model": "a"}, {"model": "default"}]}, "'default', a name of the first model; put it first"),
        ({"models": [{"model": "a", "limits": {"max_body_bytes": 2048}}, {"model": "b"}]}, "set it outside of models"),
        ({"models": []}, "models is empty; add a model"),
        ({"models": "demo", "engine": "fake"}, "models must be a list"),
        ({"models": ["demo"], "engine": "fake"}, "models must be a list of mappings"),
        ({"models": [{"model": "a", "limits": 5}], "engine": "fake"}, "and limits a mapping, from name to value"),
        (
            {"autoscaling": {"max_replicas": 2}, "models": [{"model": "a"}, {"model": "b", "scorer_replicas": 3}]},
            r"scorer_replicas is 3; .* max_replicas \(2\)",
        ),
        ({"models": [{"model": "a", "ingress_replicas": 2}]}, "ingress_replicas"),
    ],
)
def test_models_that_conflict_are_refused(arguments: dict[str, Any], said: str):
    with pytest.raises(ValidationError, match=said):
        ServiceSettings.model_validate(arguments)


def test_settings_of_all_models_may_go_only_with_those_of_one():
    models = [{"model": "a", "autoscaling": {"min_replicas": 2, "max_replicas": 4}}]
    assert ServiceSettings.model_validate({"scorer_replicas": 3, "models": models}).models[0].scorer_replicas == 3


def test_chips_of_all_models_are_counted_together():
    tpu = {"chip": "v6e", "topology": "2x2"}
    models = [
        {"model": "a", "scorer_replicas": 2},
        {"model": "b", "autoscaling": {"max_replicas": 3}},
        {"model": "c", "tpu": {"chip": "v5e", "topology": "2x2"}},
    ]
    settings = ServiceSettings.model_validate({"tpu": tpu, "models": models})
    assert [*settings.replicas_on_chips().values()] == [3, 1]
    assert [*settings.replicas_on_chips(most=True).values()] == [5, 1]
    front = build(settings)._bound_deployment
    assert front.ray_actor_options["label_selector"] == {CHIP_LABEL: "!in(TPU-V5LITEPOD,TPU-V6E)"}


def test_reconfiguring_a_replica_keeps_all_other_settings():
    settings = ModelSettings(model="org/name", limits=Limits(max_items=5, max_labels=6), timeout_s=3)
    live = settings.live({"limits": {"max_items": 7}, "aliases": ["judge"]})
    assert live == ModelSettings(
        model="org/name", limits=Limits(max_items=7, max_labels=6), timeout_s=3, aliases=("judge",)
    )
    assert settings.live({}) == settings


@pytest.mark.parametrize("fixed", ["model", "dtype", "scorer_replicas", "ingress_replicas", "modle"])
def test_settings_that_need_a_restart_are_named_with_those_that_do_not(fixed: str):
    with pytest.raises(
        ValueError, match=rf"^{fixed}: cannot change in a running replica, only adapters, aliases, limits,"
    ):
        ModelSettings().live({fixed: 1, "timeout_s": 3})
    with pytest.raises(ValueError, match=r"limits\.max_body_bytes: a body is read"):
        ModelSettings().live({"limits": {"max_body_bytes": 5_000}})


@pytest.mark.parametrize("percent", [0, 25])
def test_an_update_adds_one_front_end_and_the_configured_share_of_scorers(percent: int):
    front = build(ServiceSettings(models=(ModelSettings(max_surge_percent=percent),)))._bound_deployment
    scorer = front.init_args[1]._bound_deployment
    assert [each._deployment_config.max_surge_percent for each in (front, scorer)] == [1, percent]


def test_a_front_end_that_is_replaced_may_finish_the_longest_request():
    models = [{"model": "org/one", "timeout_s": 700}, {"model": "org/two"}]
    front = build(ServiceSettings.model_validate({"models": models, "timeout_s": 90}))._bound_deployment
    assert front._deployment_config.graceful_shutdown_timeout_s == 700
