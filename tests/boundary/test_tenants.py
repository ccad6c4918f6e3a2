"""What holds for an API key by its name: its part of the device, its class and its quota, over HTTP."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest

from serve_app.contract import Share
from serve_app.errors import QuotaExceededError
from serve_app.frontend.auth import ApiKeys
from serve_app.frontend.models import Models
from serve_app.frontend.routes import create_app
from serve_app.frontend.service import ModelService
from serve_app.frontend.tenants import Tenants
from serve_app.scorer.fake_engine import FakeEngine
from serve_app.settings import ModelSettings, ServiceSettings
from serve_app.tasks.tokenizer import TextTokenizer
from tests.boundary.asking import Http
from tests.local import CONTEXT, VOCAB_SIZE, DirectReplicas

BODY = {"items": [[1, 2, 3, 4, 5]], "label_token_ids": [1]}
SETTINGS = ServiceSettings.model_validate(
    {"tenants": {"alice": {"weight": 4, "priority": "high"}, "bob": {"tokens_per_s": 1}, "carol": {"priority": "low"}}}
)


class Asked:
    def __init__(self, client: httpx.AsyncClient, replicas: DirectReplicas, models: Models) -> None:
        self.http = Http(client, info={})
        self.replicas = replicas
        self.models = models

    async def __call__(self, key: str, path: str = "/v1/score", **fields: object) -> httpx.Response:
        headers = {"authorization": f"Bearer {key}"}
        return await self.http.client.post(path, json=BODY | fields, headers=headers)


@pytest.fixture
async def ask(tokenizer: TextTokenizer, tmp_path: Path) -> AsyncIterator[Asked]:
    file = tmp_path / "keys"
    await asyncio.to_thread(file.write_text, "alice: a\nbob: b\nbob: b2\ncarol: c\nd\n")
    replicas = DirectReplicas(FakeEngine(VOCAB_SIZE, CONTEXT))
    service = ModelService(ModelSettings(model="fake-judge"), tokenizer, replicas.engine.info, replicas)
    models = Models(service)
    app = create_app(lambda: models, keys=ApiKeys(str(file)), tenants=Tenants(SETTINGS.tenants, front_ends=1))
    async with httpx.AsyncClient(base_url="http://fake", transport=httpx.ASGITransport(app)) as client:
        yield Asked(client, replicas, models)
    service.close()


async def test_jobs_take_the_turns_of_the_keys_name(ask: Asked):
    for key in "abcd":
        assert (await ask(key)).status_code == 200
    assert (await ask("a", stream=True)).status_code == 200
    alice, bob, carol, other, streamed = [job.share for job in ask.replicas.jobs]
    assert alice == streamed == Share("alice", 4.0, 0)
    assert bob == Share("bob")
    assert carol == Share("carol", 1.0, 2)
    assert other.tenant.startswith("key-")


async def test_beyond_its_quota_a_key_gets_a_429_which_says_when_to_retry(ask: Asked):
    for key in ("b", "b2"):  # two keys of one name have one quota
        assert (await ask(key)).status_code == 200
    refused = await ask("b")
    error = ask.http.flat(refused, 429)
    assert error["type"] == "RateLimitError"
    assert (
        "adds 5 tokens and the quota of this API key has 0 left; it gains 1 a second; try again in 5 s"
        in error["message"]
    )
    assert refused.headers["retry-after"] == "5"
    for key in "acd":
        assert (await ask(key)).status_code == 200
    nested = await ask.http.client.post(
        "/v1/completions", json={"prompt": [1] * 9, "max_tokens": 1}, headers={"authorization": "Bearer b"}
    )
    assert ask.http.nested(nested, 429)["type"] == "RateLimitError"
    assert ask.models.tenant_outcomes["fake-judge"]["bob"] == {"answered": 2, "over_quota": 2}
    assert len(ask.replicas.jobs) == 5


async def test_a_stream_is_let_in_with_its_first_piece_and_pays_for_all(ask: Asked):
    answer = await ask("b", items=[[number, *[1] * 9] for number in range(100)], stream=True)
    assert answer.status_code == 200
    assert len(answer.text.splitlines()) == 101
    assert int((await ask("b")).headers["retry-after"]) > 900
    assert ask.models.tenant_tokens["fake-judge"]["bob"] == 1_000


def test_each_front_end_has_an_equal_part_of_a_quota():
    bucket = Tenants(SETTINGS.tenants, front_ends=2).of("bob").bucket
    assert bucket
    bucket.take(5)
    with pytest.raises(QuotaExceededError, match=r"it gains 0\.5 a second; try again in 4 s"):
        bucket.take(2)


async def test_openapi_has_the_429_where_there_are_keys(ask: Asked, http: Http):
    paths = (await ask.http.client.get("/openapi.json")).json()["paths"]
    assert "429" in paths["/v1/score"]["post"]["responses"]
    assert "429" not in paths["/tokenize"]["post"]["responses"]
    assert "429" not in (await http.client.get("/openapi.json")).json()["paths"]["/v1/score"]["post"]["responses"]
