"""Several models at one address: the model that a request names answers it, as if there were no other."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest

from serve_app.client import ScoreClient
from serve_app.errors import NotFoundError
from serve_app.frontend.models import NO_MODEL, Models
from serve_app.frontend.routes import create_app
from serve_app.frontend.service import ModelService
from serve_app.schemas import ScoreRequest
from serve_app.scorer.fake_engine import FakeEngine
from serve_app.settings import Limits, ModelSettings
from serve_app.tasks.tokenizer import TextTokenizer
from tests.local import CONTEXT, VOCAB_SIZE, DirectReplicas
from tests.served import serving

WORDS = {"query": "is it a fox?", "labels": [" yes", " no"]}
ASKED: dict[str, dict[str, Any]] = {
    "/v1/score": {"items": ["the fox", "the dog"], **WORDS},
    "/v1/rerank": {"query": "who is lazy?", "documents": ["the fox", "the dog"]},
    "/rerank": {"query": "who is lazy?", "documents": ["the fox", "the dog"]},
    "/v2/rerank": {"query": "who is lazy?", "documents": ["the fox", "the dog"]},
    "/v1/completions": {"prompt": "the quick fox", "max_tokens": 1, "echo": True, "logprobs": 1},
    "/generative_scoring": {"query": "is it?", "items": ["a fox"], "label_token_ids": [5, 6], "request_id": "r"},
    "/classify": {"input": ["the fox", "the dog"], "request_id": "r"},
    "/pooling": {"input": ["the fox", "the dog"], "use_activation": False},
    "/v1/embeddings": {"input": ["the fox", "the dog"]},
    "/get_reward": {"query": ["the fox", "the dog"]},
    "/tokenize": {"prompt": "the quick fox"},
    "/detokenize": {"tokens": [0, 5, 260]},
}
UNTIMED = {"id", "created"}


def small(tokenizer: TextTokenizer) -> ModelService:
    engine = FakeEngine(VOCAB_SIZE, CONTEXT)
    settings = ModelSettings(model="org/small", aliases=("mini",), engine="fake", limits=Limits(max_items=4))
    return ModelService(settings, tokenizer, engine.info, DirectReplicas(engine))


def large(tokenizer: TextTokenizer) -> ModelService:
    """A model with another tokenizer, a larger vocabulary and a shorter context."""
    engine = FakeEngine(VOCAB_SIZE + 88, CONTEXT // 2)
    settings = ModelSettings(model="org/large", served_name="judge", engine="fake", limits=Limits(max_items=2))
    return ModelService(settings, tokenizer, engine.info, DirectReplicas(engine))


@asynccontextmanager
async def asking(services: Models) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(create_app(lambda: services))
    async with httpx.AsyncClient(base_url="http://fake", transport=transport) as client:
        yield client


@pytest.fixture
def both(tokenizer: TextTokenizer, bos_tokenizer: TextTokenizer) -> Models:
    return Models(small(tokenizer), large(bos_tokenizer))


@pytest.fixture
async def client(both: Models) -> AsyncIterator[httpx.AsyncClient]:
    async with asking(both) as client:
        yield client


def content(response: httpx.Response) -> dict[str, Any]:
    assert response.status_code == 200, response.text
    return {name: value for name, value in response.json().items() if name not in UNTIMED}


@pytest.mark.parametrize("path", ASKED)
async def test_every_route_answers_by_the_named_model(
    client: httpx.AsyncClient, tokenizer: TextTokenizer, bos_tokenizer: TextTokenizer, path: str
):
    headers = {"x-request-id": "r"}
    answers: list[dict[str, Any]] = []
    for alone, names in ((small(tokenizer), ["small", "mini", "default"]), (large(bos_tokenizer), ["judge"])):
        async with asking(Models(alone)) as only:
            wanted = content(await only.post(path, json=ASKED[path], headers=headers))
        for name in names:
            body = {**ASKED[path], "model": name}
            assert content(await client.post(path, json=body, headers=headers)) == wanted
        answers.append(wanted)
    assert content(await client.post(path, json=ASKED[path], headers=headers)) == answers[0]
    assert path == "/detokenize" or answers[0] != answers[1]  # their answers differ


async def test_a_stream_comes_from_the_named_model(client: httpx.AsyncClient):
    whole = content(await client.post("/v1/score", json={**ASKED["/v1/score"], "model": "judge"}))
    body = {**ASKED["/v1/score"], "model": "judge", "stream": True}
    *rows, end = map(json.loads, (await client.post("/v1/score", json=body)).text.splitlines())
    assert [row["scores"] for row in sorted(rows, key=lambda row: row["index"])] == whole["scores"]
    assert end["model"] == "judge"


@pytest.mark.parametrize("path", ASKED)
async def test_an_unknown_model_is_404_with_the_names(client: httpx.AsyncClient, both: Models, path: str):
    response = await client.post(path, json={**ASKED[path], "model": "org/small"})
    assert response.status_code == 404
    error = response.json()
    error = error.get("error", error)
    assert error["message"] == ("model 'org/small' is not served here; the names are small, mini, judge, default")
    assert error["param"] == "model"
    shown = (await client.post(path, json={**ASKED[path], "model": "x" * 1000})).json()
    assert len(json.dumps(shown)) < 400
    assert both.outcomes[NO_MODEL] == {"invalid": 2}


async def test_each_model_has_its_own_limits_vocabulary_and_context(client: httpx.AsyncClient):
    for name, last, items, longest in (("small", 511, 4, 256), ("judge", 599, 2, 128)):
        info = (await client.get("/v1/info", params={"model": name})).json()
        assert info["vocab_size"] == last + 1
        assert info["limits"]["max_items"] == items
        assert info["limits"]["max_prompt_tokens"] == longest
        ask = {"model": name, "items": [[1]], "label_token_ids": [last]}
        assert (await client.post("/v1/score", json=ask)).status_code == 200
        wrong: list[tuple[dict[str, Any], int, str]] = [
            ({"label_token_ids": [last + 1]}, 400, f"vocab size: {last + 1}"),
            ({"items": [[1]] * (items + 1)}, 413, f" {items}"),
            ({"items": [[1] * (longest + 1)]}, 400, f"at most {longest}"),
        ]
        for change, status, said in wrong:
            answer = await client.post("/v1/score", json=ask | change)
            assert (answer.status_code, said in answer.json()["message"]) == (status, True), answer.text


async def test_models_and_info_list_all_names(client: httpx.AsyncClient):
    listed = (await client.get("/v1/models")).json()["data"]
    assert [(card["id"], card["max_model_len"]) for card in listed] == [("small", 256), ("mini", 256), ("judge", 128)]
    names = {"small": ["small", "mini", "default"], "judge": ["judge"]}
    for name, own in names.items():
        assert (await client.get("/v1/info", params={"model": name})).json()["names"] == own
    assert (await client.get("/v1/info")).json()["model"] == "small"
    unknown = await client.get("/v1/info", params={"model": "large"})
    assert (unknown.status_code, "small, mini, judge, default" in unknown.json()["message"]) == (404, True)


async def test_the_service_is_ready_when_all_models_are(tokenizer: TextTokenizer):
    class Mixing(FakeEngine):
        def score(self, batch: Any) -> Any:
            result = super().score(batch)
            result.values[:] = result.values[0] - (len(batch.offsets) == 3) * 9.0 * (batch.targets == 0)
            return result

    engine = Mixing(VOCAB_SIZE, CONTEXT)
    broken = ModelService(ModelSettings(model="broken", engine="fake"), tokenizer, engine.info, DirectReplicas(engine))
    async with asking(Models(small(tokenizer), broken)) as client:
        answer = await client.get("/ready")
        assert (answer.status_code, "broken is not ready" in answer.json()["message"]) == (503, True)
        assert (await client.get("/ready", params={"model": "small"})).status_code == 200
        assert (await client.get("/ready", params={"model": "broken"})).status_code == 503
        assert (await client.get("/ready", params={"model": "none"})).status_code == 404


async def test_outcomes_are_counted_by_model(both: Models, client: httpx.AsyncClient):
    ask = {"items": [[1]], "label_token_ids": [1]}
    for model in ("judge", "default", "mini"):
        await client.post("/v1/score", json={**ask, "model": model})
    await client.post("/v1/score", json={"items": [[1]], "label_token_ids": [600], "model": "judge"})
    assert both.outcomes == {"small": {"answered": 2}, "judge": {"answered": 1, "invalid": 1}, NO_MODEL: {}}
    assert both.items == {"small": 2, "judge": 1}


async def test_one_model_is_full_while_another_takes_work(tokenizer: TextTokenizer):
    """Each model has its own admission."""
    limits = Limits(max_queued_tokens=3)
    engine = FakeEngine(VOCAB_SIZE, CONTEXT)
    settings = ModelSettings(model="full", engine="fake", limits=limits)
    full = ModelService(settings, tokenizer, engine.info, DirectReplicas(engine))
    services = Models(full, small(tokenizer))
    ask = ScoreRequest(items=[[1, 2]], label_token_ids=[1])
    with full._admission.inside(3):
        async with asking(services) as client:
            body = ask.model_dump(exclude_unset=True)
            assert (await client.post("/v1/score", json=body)).status_code == 503
            assert (await client.post("/v1/score", json={**body, "model": "small"})).status_code == 200


def test_the_client_asks_about_its_own_model(both: Models):
    with serving(create_app(lambda: both)) as served:
        with ScoreClient(served.url, model="judge") as client:
            assert client.info().model == client.score([1], [[2]], label_token_ids=[599]).model == "judge"
        with ScoreClient(served.url, model="none") as client, pytest.raises(NotFoundError):
            client.info()
