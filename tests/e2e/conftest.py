"""What the end-to-end tests deploy."""

from __future__ import annotations

from pathlib import Path

import pytest

from serve_app.settings import Settings


@pytest.fixture(scope="module")
def settings(model_folder: Path) -> Settings:
    """For the fake engine, with room for several replicas on any machine."""
    return Settings(model=str(model_folder), engine="fake", scorer_cpus=0.1, ingress_cpus=0.1)
