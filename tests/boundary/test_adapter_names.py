"""Requests that choose a LoRA adapter by ``model``, over HTTP with the fake engine."""

from pathlib import Path
from typing import Any

import httpx
import pytest

from serve_app.frontend.models import Models
from serve_app.frontend.routes import create_app
from serve_app.frontend.service import ModelService
from serve_app.jobs.local_replicas import LocalReplicas
from serve_app.scorer.adapters import AdapterSlots
from serve_app.scorer.fake_engine import FakeEngine
from serve_app.settings import ModelSettings
from serve_app.tasks.tokenizer import TextTokenizer
from tests.local import CONTEXT, VOCAB_SIZE

ADAPTERS = {"formal": "/adapters/formal", "kind": "/adapters/kind"}
SETTINGS = ModelSettings(model="fake-judge", aliases=("judge:2",), engine="fake", adapters=ADAPTERS)


@pytest.fixture
async def client(tokenizer: TextTokenizer) -> Any:
    engine = FakeEngine(VOCAB_SIZE, CONTEXT, adapters=SETTINGS.adapter_room)
    replicas = LocalReplicas(engine, SETTINGS)
    replicas.adapters = AdapterSlots(engine, find=Path)
    await replicas.adapters.change(ADAPTERS)
    service = ModelService(SETTINGS, tokenizer, engine.info, replicas)
    app = create_app(lambda: Models(service))
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
        yield client
    service.close()
    await replicas.queue.close()


async def scores(client: httpx.AsyncClient, model: str, **more: Any) -> list[Any]:
    body = {"model": model, "query": "Is it good? ", "items": ["yes", "no"], "label_token_ids": [5, 6], **more}
    response = await client.post("/v1/score", json=body)
    assert response.status_code == 200, response.text
    return response.json()["scores"]


async def test_a_name_alone_or_after_any_name_of_its_model(client: httpx.AsyncClient) -> None:
    plain, formal, kind = [await scores(client, name) for name in ("fake-judge", "formal", "kind")]
    assert plain != formal != kind != plain
    for model in ("fake-judge", "default", "judge:2"):
        assert await scores(client, model) == plain
        assert await scores(client, f"{model}:kind") == kind
    assert await scores(client, "kind", cache_salt="mine") == kind


async def test_other_routes_choose_it_too(client: httpx.AsyncClient) -> None:
    found = []
    for model in ("default", "formal"):
        body = {
            "model": model,
            "state": "The sky is blue.",
            "questions": {"q": {"type": "noul", "instructions": "Is it?"}},
        }
        answers = [await client.post("/v1/systemone", json=body)]
        answers.append(await client.post("/v1/rerank", json={"model": model, "query": "sky", "documents": ["blue"]}))
        body = {"model": model, "prompt": "The sky", "max_tokens": 1, "logprobs": 1}
        answers.append(await client.post("/v1/completions", json=body))
        assert [each.status_code for each in answers] == [200] * 3, [each.text for each in answers]
        assert {each.json()["model"] for each in answers} == {"fake-judge" if model == "default" else model}
        found.append([{**each.json(), "model": "", "id": "", "created": 0} for each in answers])
    assert all(one != other for one, other in zip(*found, strict=True))


async def test_the_answer_has_the_name_that_was_asked(client: httpx.AsyncClient) -> None:
    body = {"query": "a", "items": ["b", "c"], "label_token_ids": [5, 6]}
    for model, named in (("default", "fake-judge"), ("kind", "kind"), ("judge:2:kind", "judge:2:kind")):
        answer = await client.post("/v1/score", json={**body, "model": model})
        assert answer.json()["model"] == named
        streamed = await client.post("/v1/score", json={**body, "model": model, "stream": True})
        assert f'"model":"{named}"' in streamed.text.splitlines()[-1]


async def test_an_unknown_one_is_a_404_that_names_what_is_there(client: httpx.AsyncClient) -> None:
    for model in ("fake-judge:rude", "rude", "formal:kind", "kind:"):
        response = await client.post("/v1/score", json={"model": model, "query": "a", "items": ["b"], "labels": ["c"]})
        assert response.status_code == 404
        message = response.json()["message"]
        assert model in message
        assert "formal, kind" in message


async def test_lists_name_them_with_their_model(client: httpx.AsyncClient) -> None:
    listed = {each["id"]: each.get("parent") for each in (await client.get("/v1/models")).json()["data"]}
    assert listed == {"fake-judge": None, "judge:2": None, "formal": "fake-judge", "kind": "fake-judge"}
    info = (await client.get("/v1/info")).json()
    assert (info["names"], info["adapters"]) == (["fake-judge", "judge:2", "default"], ["formal", "kind"])


def test_two_models_cannot_share_an_adapters_name() -> None:
    from serve_app.settings import ServiceSettings

    models = [{"model": "a", "adapters": {"x": "1"}}, {"model": "b", "served_name": "x"}]
    with pytest.raises(ValueError, match="both named 'x'"):
        ServiceSettings.model_validate({"models": models})
