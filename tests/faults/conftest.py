"""Load on an application, and a record of the failures under it."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from serve_app.app import build
from serve_app.contract import Engine
from serve_app.local_ray import APP_NAME
from serve_app.scorer.fake_engine import FakeEngine
from serve_app.settings import ModelSettings
from tests.local import service_of

ITEMS = [[i, i + 1] for i in range(100, 160)]  # 0.12 s on a device: no scorer is idle under load
SECONDS_PER_TOKEN = 0.001


@pytest.fixture(scope="module")
def settings(model_folder: Path) -> ModelSettings:
    """Settings for the fake engine, with room for several replicas on any machine."""
    return ModelSettings(model=str(model_folder), engine="fake", scorer_cpus=0.1, max_batch_tokens=128)


def application(settings: ModelSettings, *, gate: Path | None = None, front_ends: int = 1) -> Any:
    """Build the application with a slow engine.

    Args:
        gate: an engine is not warm before this file is there.
    """
    waits_for = None if gate is None else str(gate)

    def slow_engine(_settings: ModelSettings) -> Engine:
        import os

        while waits_for is not None and not os.path.exists(waits_for):  # noqa: PTH110 - Path would drag this module along
            time.sleep(0.02)
        return FakeEngine(seconds_per_token=SECONDS_PER_TOKEN)

    return loading_with(slow_engine, settings, front_ends)


def loading_with(load: Callable[[Any], Engine], settings: ModelSettings, front_ends: int = 1) -> Any:
    """Build the application with ``load`` in place of ``engines.load_engine``."""
    service = service_of(settings, front_ends=front_ends)
    front = build(service)._bound_deployment
    return front.bind(service, front.init_args[1]._bound_deployment.bind(settings, load))


def actors(deployment: str) -> list[Any]:
    """Ray's handles of the deployment's replicas."""
    import ray

    named = ray.util.list_named_actors(all_namespaces=True)
    prefix = f"SERVE_REPLICA::{APP_NAME}#{deployment}#"
    return [ray.get_actor(each["name"], each["namespace"]) for each in named if each["name"].startswith(prefix)]


def inside(actor: Any, call: Callable[[Any], Any]) -> Any:
    """Run ``call`` in the actor's process. It lacks the tests' modules, so the code is sent with the call."""
    import ray
    from ray import cloudpickle

    module = sys.modules[call.__module__]
    cloudpickle.register_pickle_by_value(module)
    try:
        return ray.get(actor.__ray_call__.remote(call), timeout=60)
    finally:
        cloudpickle.unregister_pickle_by_value(module)


def wait_for(condition: Callable[[], bool]) -> None:
    """Wait until ``condition`` holds; the test's own time limit ends a vain wait."""
    while not condition():
        time.sleep(0.05)


@dataclass
class Load:
    """Results of the calls so far."""

    done: int = 0
    failures: list[str] = field(default_factory=list)
    longest_s: float = 0.0
    """The longest time of one call."""
    silent_s: float = 0.0
    """The longest time without a right answer to any call."""
    answered: float = field(default_factory=time.monotonic)
    """Time of the last right answer."""

    def right(self) -> None:
        now = time.monotonic()
        self.silent_s = max(self.silent_s, now - self.answered)
        self.answered = now

    def __str__(self) -> str:
        return (
            f"{self.done} calls, {len(self.failures)} lost or wrong, the longest took {self.longest_s:.1f} s, "
            f"no answer for {self.silent_s:.1f} s at most"
        )

    def wait_for_more(self, calls: int) -> None:
        before = self.done
        wait_for(lambda: self.done >= before + calls)


@contextmanager
def under_load(ask: Callable[[], Any], callers: int = 4) -> Iterator[Load]:
    """Run ``callers`` closed loops of ``ask``. An error, or an answer that differs from the first one, is a failure."""
    right = ask()
    load, stop = Load(), threading.Event()

    def caller() -> None:
        while not stop.is_set():
            started = time.monotonic()
            try:
                if (answer := ask()) == right:
                    load.right()
                else:
                    load.failures.append(f"wrong: {answer}")
            except Exception as error:
                load.failures.append(repr(error))
            load.longest_s = max(load.longest_s, time.monotonic() - started)
            load.done += 1

    with ThreadPoolExecutor(callers) as pool:
        running = [pool.submit(caller) for _ in range(callers)]
        try:
            yield load
        finally:
            stop.set()
        for each in running:
            each.result()
    print(load)  # shown by pytest -rP
