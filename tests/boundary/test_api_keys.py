"""API keys over HTTP: the routes that need one, and the answers without one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest

from serve_app.frontend import middleware, pages
from serve_app.frontend.auth import ApiKeys
from serve_app.frontend.models import Models
from serve_app.frontend.routes import create_app
from serve_app.frontend.service import ModelService
from tests.boundary.asking import Http

KEY = {"authorization": "Bearer a-key"}
BODY = {"items": ["a"], "label_token_ids": [1]}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "keys"
    path.write_text("a-key\nanother-key\n")
    return path


@pytest.fixture
async def closed(service: ModelService, file: Path) -> AsyncIterator[Http]:
    models = Models(service)
    transport = httpx.ASGITransport(create_app(lambda: models, keys=ApiKeys(str(file))))
    async with httpx.AsyncClient(base_url="http://fake", transport=transport) as client:
        yield Http(client, info={})


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/v1/score"),
        ("POST", "/v1/rerank"),
        ("POST", "/generative_scoring"),
        ("POST", "/tokenize"),
        ("POST", "/detokenize"),
        ("GET", "/v1/models"),
        ("GET", "/v1/info"),
        ("GET", "/metrics"),
        ("GET", "/v1/nothing"),
        ("GET", "/health/"),
        ("GET", "/%2Fhealth"),
        ("GET", "/health/../v1/info"),
        ("DELETE", "/v1/score"),
    ],
)
async def test_every_other_route_needs_a_key(closed: Http, method: str, path: str):
    for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "Basic a-key"}):
        response = await closed.client.request(method, path, headers=headers | {"x-request-id": "abc"})
        error = closed.flat(response, 401)
        assert error["type"] == "AuthenticationError"
        assert "API key" in error["message"]
        assert response.headers["www-authenticate"] == "Bearer"
        assert response.headers["x-request-id"] == "abc"
    with_key = await closed.client.request(method, path, headers=KEY)
    assert with_key.status_code != 401


async def test_completions_refuse_in_openais_shape(closed: Http):
    body = {"prompt": "a", "max_tokens": 1}
    error = closed.nested(await closed.client.post("/v1/completions", json=body), 401)
    assert error["type"] == "AuthenticationError"
    assert (await closed.client.post("/v1/completions", json=body, headers=KEY)).status_code == 200


PAGE_FILES = sorted(
    f"/static/{file.name}" for file in Path(pages.__file__).with_name("static").iterdir() if file.suffix != ".html"
)


@pytest.mark.parametrize(
    "path", ["/health", "/ready", "/", *PAGE_FILES, "/docs", "/docs/swagger-ui.css", "/openapi.json"]
)
async def test_probes_and_pages_need_no_key(closed: Http, path: str):
    assert (await closed.client.get(path)).status_code == 200


async def test_each_key_is_accepted(closed: Http):
    for key in ("a-key", "another-key"):
        response = await closed.client.post("/v1/score", json=BODY, headers={"authorization": f"Bearer {key}"})
        assert len(response.json()["scores"]) == 1


async def test_a_refused_body_is_not_read(closed: Http):
    async def body() -> AsyncIterator[bytes]:
        raise AssertionError("the body was read")
        yield b""

    assert (await closed.client.post("/v1/score", content=body())).status_code == 401


async def test_keys_change_while_the_service_runs(closed: Http, file: Path):
    await asyncio.to_thread(file.write_text, "a-new-key\n")
    assert (await closed.client.get("/v1/info", headers=KEY)).status_code == 401
    new = {"authorization": "Bearer a-new-key"}
    assert (await closed.client.get("/v1/info", headers=new)).status_code == 200


async def test_openapi_says_which_routes_need_a_key(closed: Http, http: Http):
    schema = (await closed.client.get("/openapi.json")).json()
    assert schema["components"]["securitySchemes"] == {"ApiKey": {"type": "http", "scheme": "bearer"}}
    score = schema["paths"]["/v1/score"]["post"]
    assert score["security"] == [{"ApiKey": []}]
    reference = score["responses"]["401"]["content"]["application/json"]["schema"]["$ref"]
    assert reference.rsplit("/", 1)[1] in schema["components"]["schemas"]
    nested = schema["paths"]["/v1/completions"]["post"]["responses"]["401"]["content"]["application/json"]["schema"]
    assert nested["$ref"].endswith("/OpenAIErrorResponse")
    assert "security" not in schema["paths"]["/ready"]["get"]
    unclosed = (await http.client.get("/openapi.json")).json()
    assert "401" not in unclosed["paths"]["/v1/score"]["post"]["responses"]


async def test_requests_are_counted_and_logged_by_the_keys_name(
    service: ModelService, file: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    await asyncio.to_thread(file.write_text, "alice: a-key\nbob: another-key\n")
    models = Models(service)
    app = create_app(lambda: models, keys=ApiKeys(str(file)))
    middleware.logger.addHandler(caplog.handler)  # Ray's logger does not propagate
    async with httpx.AsyncClient(base_url="http://fake", transport=httpx.ASGITransport(app)) as client:
        for key, body in (("a-key", BODY), ("a-key", BODY | {"items": [[]]}), ("another-key", BODY)):
            await client.post("/v1/score", json=body, headers={"authorization": f"Bearer {key}"})
        assert models.tenant_outcomes == {
            "fake-judge": {"alice": {"answered": 1, "invalid": 1}, "bob": {"answered": 1}}
        }
        assert models.tenant_tokens == {"fake-judge": {"alice": 1, "bob": 1}}
        assert models.outcomes["fake-judge"] == {"answered": 2, "invalid": 1}
        monkeypatch.setattr(service, "answer", None)
        failed = await client.post("/v1/score", json=BODY, headers=KEY | {"x-request-id": "r1"})
    middleware.logger.removeHandler(caplog.handler)
    assert failed.status_code == 500
    (record,) = caplog.records
    assert record.getMessage() == "request r1 of alice: internal error"
    assert "a-key" not in caplog.text
