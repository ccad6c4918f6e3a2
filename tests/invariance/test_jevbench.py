"""jevbench asks the demo model over HTTP, several requests at once: other questions never change an answer's bits."""

from __future__ import annotations

from functools import cache

import pytest

from model.engine import Engine
from serve_app.frontend.models import Models
from serve_app.frontend.routes import create_app
from serve_app.frontend.service import ModelService
from serve_app.jobs.local_replicas import LocalReplicas
from serve_app.model_source import resolve
from serve_app.settings import ModelSettings
from serve_app.tasks.tokenizer import TextTokenizer
from tests.invariance.rows import BITS
from tests.local import no_metrics
from tests.served import serving

pytestmark = [pytest.mark.demo, pytest.mark.heavy, pytest.mark.slow]


def test_other_questions_change_no_bit_of_an_answer(demo_engine: Engine):
    jevbench = pytest.importorskip("jevbench")
    settings = ModelSettings()
    tokenizer = TextTokenizer.load(resolve("demo"))

    @cache
    def models() -> Models:
        """Made in the first request, on the server's event loop."""
        return Models(ModelService(settings, tokenizer, demo_engine.info, LocalReplicas(demo_engine, settings)))

    with serving(create_app(models, metrics=no_metrics)) as running:
        model = jevbench.systemone(f"{running.url}/v1/systemone", model="demo", per_replica=4)
        report = jevbench.evaluate(model, suite="examples", tolerance=BITS, cache=None, concurrency=4)
        model.client.close()
    assert report.scores["incomplete"] == []
    assert report.scores["n_checks"] == 50
    assert report.scores["pillars"]["BAT"] == 1.0
