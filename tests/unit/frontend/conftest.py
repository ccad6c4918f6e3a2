"""What several tests of the front end need."""

from __future__ import annotations

import time

import pytest

from tests.stubs import Clock


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(time, "monotonic", clock)
    return clock
