"""The one configuration, and the Serve config files that carry it."""

from __future__ import annotations

import importlib
import inspect
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError
from ray.serve.schema import ServeDeploySchema

from serve_app.app import build
from serve_app.settings import Settings

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_config_files_are_what_serve_and_the_builder_take(path: Path):
    content: dict[str, Any] = yaml.safe_load(path.read_text())
    schema = ServeDeploySchema.model_validate(content)
    assert schema.applications
    for application in schema.applications:
        module, function = application.import_path.split(":")
        builder = getattr(importlib.import_module(module), function)
        Settings.model_validate(application.args)
        assert builder is build


def test_there_is_a_config_file():
    assert CONFIGS


def test_serve_can_parse_the_builders_argument():
    # Serve reads the class itself; a postponed annotation is a string, and it would pass a plain dict.
    (parameter,) = inspect.signature(build).parameters.values()
    assert parameter.annotation is Settings


def test_the_builder_takes_its_numbers_from_the_settings():
    application = build(
        Settings(scorer_replicas=3, scorer_cpus=2, ingress_replicas=2, ingress_cpus=0.25, model="org/name")
    )
    front = application._bound_deployment
    scorer = front.init_args[1]._bound_deployment
    assert (front.name, front.num_replicas, front.ray_actor_options["num_cpus"]) == ("Ingress", 2, 0.25)
    assert (scorer.name, scorer.num_replicas, scorer.ray_actor_options["num_cpus"]) == ("Scorer", 3, 2)
    assert front.init_args[0] == scorer.init_args[0]


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
        Settings.model_validate(arguments)


def test_words_of_serve_run_are_parsed():
    # ``serve run serve_app.app:build scorer_replicas=2`` hands over strings.
    assert Settings.model_validate({"scorer_replicas": "2", "timeout_s": "1.5"}).scorer_replicas == 2


def test_settings_are_frozen():
    with pytest.raises(ValidationError, match="frozen"):
        Settings().model = "other"  # pyright: ignore[reportAttributeAccessIssue]


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
    assert Settings(model=model, served_name=served_name).name == name
