"""Settings that the end-to-end tests deploy."""

from __future__ import annotations

from pathlib import Path

import pytest

from serve_app.settings import ModelSettings


@pytest.fixture(scope="module")
def settings(model_folder: Path) -> ModelSettings:
    """Settings for the fake engine, with room for several replicas on any machine."""
    return ModelSettings(model=str(model_folder), engine="fake", scorer_cpus=0.1)
