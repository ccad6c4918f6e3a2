"""Load on an application, and what went wrong under it."""

from __future__ import annotations

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
from serve_app.fake_engine import FakeEngine
from serve_app.settings import Settings

ITEMS = [[i, i + 1] for i in range(100, 160)]  # 0.12 s of a device: no scorer is idle under load
SECONDS_PER_TOKEN = 0.001


@pytest.fixture(scope="module")
def settings(model_folder: Path) -> Settings:
    """For the fake engine, with room for several replicas on any machine."""
    return Settings(model=str(model_folder), engine="fake", scorer_cpus=0.1, ingress_cpus=0.1, max_batch_tokens=128)


def application(settings: Settings) -> Any:
    """As ``build`` makes it, with an engine that takes its time."""

    def slow_engine(_settings: Settings) -> Engine:
        return FakeEngine(seconds_per_token=SECONDS_PER_TOKEN)

    front = build(settings)._bound_deployment
    return front.bind(settings, front.init_args[1]._bound_deployment.bind(settings, slow_engine))


def wait_for(condition: Callable[[], bool]) -> None:
    """The test's own time limit ends a wait that is in vain."""
    while not condition():
        time.sleep(0.05)


@dataclass
class Load:
    """What came of the calls so far."""

    done: int = 0
    failures: list[str] = field(default_factory=list)
    longest_s: float = 0.0

    def wait_for_more(self, calls: int) -> None:
        before = self.done
        wait_for(lambda: self.done >= before + calls)


@contextmanager
def under_load(ask: Callable[[], Any], callers: int = 4) -> Iterator[Load]:
    """So many callers in a closed loop. Whatever ``ask`` raises, or returns that is not what it first did, is a
    failure."""
    right = ask()
    load, stop = Load(), threading.Event()

    def caller() -> None:
        while not stop.is_set():
            started = time.monotonic()
            try:
                if (answer := ask()) != right:
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
