"""A model with a decision head over HTTP, on the fake: it answers questions, and every other score is refused."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from serve_app.frontend.models import Models
from serve_app.frontend.routes import create_app
from serve_app.frontend.service import ModelService
from serve_app.scorer.fake_engine import FakeEngine
from serve_app.settings import ModelSettings
from serve_app.tasks.tokenizer import TextTokenizer
from tests.boundary.asking import Http
from tests.boundary.test_decisions import DECISIONS, SYSTEM_ONE
from tests.local import VOCAB_SIZE, DirectReplicas, no_metrics, save_tokenizer

ITEMS: dict[str, Any] = {"items": ["the fox"]}


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> TextTokenizer:
    return TextTokenizer.load(save_tokenizer(tmp_path_factory.mktemp("heads"), adds_bos=False))


@pytest.fixture
async def http(own: TextTokenizer, tmp_path: Path) -> AsyncIterator[Http]:
    engine = FakeEngine(VOCAB_SIZE, 2_048, decision_head="candidate")
    settings = ModelSettings(model="org/decides", engine="fake")
    (tmp_path / "decision_config.json").write_text('{"prompt_version": "decision2-segmented-options-global-query-v1"}')
    models = Models(ModelService(settings, own, engine.info, DirectReplicas(engine), folder=tmp_path))
    transport = httpx.ASGITransport(create_app(lambda: models, metrics=no_metrics))
    async with httpx.AsyncClient(base_url="http://fake", transport=transport, timeout=120) as client:
        yield Http(client, (await client.get("/v1/info")).json())


async def test_questions_are_answered_without_labels(http: Http):
    info = http.info
    assert (info["decision_head"], info["decision_profile"]) == ("candidate", "decision2-v1")
    assert "rerank_template" not in info
    answer = (await http.client.post("/v1/systemone", json=SYSTEM_ONE)).json()
    for name, own in answer["answers"].items():
        assert not {"x_label_mass", "x_reads"} & set(own), name
        assert own["x_permutations"] == 1
    assert sum(answer["answers"]["team"]["probabilities"].values()) == pytest.approx(1)
    of_openai = (await http.client.post("/v1/decisions", json=DECISIONS)).json()
    assert [each["type"] for each in of_openai["answers"]] == ["predicate", "choice", "score"]
    assert of_openai["answers"][0]["probability"] == answer["answers"]["refund"]["noul"]
    streamed = await http.client.post("/v1/systemone", json=SYSTEM_ONE | {"stream": True})
    assert '"x_label_mass"' not in streamed.text
    assert streamed.text.count('"answer"') == 3


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/score", ITEMS | {"labels": [" yes"]}),
        ("/v1/score", ITEMS),
        ("/v1/rerank", {"query": "fox", "documents": ["the fox"]}),
        ("/v1/logprobs", {"input": "the fox"}),
        ("/generative_scoring", ITEMS | {"query": "is", "label_token_ids": [1, 2]}),
        ("/v1/completions", {"prompt": "the fox", "max_tokens": 0, "echo": True, "logprobs": 1}),
    ],
)
async def test_other_routes_are_refused(http: Http, path: str, body: dict[str, Any]):
    response = await http.client.post(path, json=body)
    assert response.status_code == 400, response.text
    assert "typed questions with a candidate head" in response.text
    assert "use /v1/systemone or /v1/decisions" in response.text


async def test_the_self_test_passes(http: Http):
    assert (await http.client.get("/ready")).status_code == 200


async def test_a_wrong_question_names_its_place(http: Http):
    long = {"long": {"type": "choice", "instructions": "x", "criteria": {"a": "word " * 3_000, "b": None}}}
    response = await http.client.post("/v1/systemone", json=SYSTEM_ONE | {"questions": long})
    error = http.typesafe(response, 422)
    assert error["detail"][0]["loc"] == ["body", "questions", "long"]
    assert "shorten the state or the question" in error["detail"][0]["msg"]


async def test_rewards_are_the_answers_to_the_models_question(http: Http):
    answer = (await http.client.post("/classify", json={"input": ["good", "bad"]})).json()
    assert len({each["probs"][-1] for each in answer["data"]}) == 2
