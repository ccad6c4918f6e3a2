"""``HEAD``, and pages of other origins."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest
from pydantic import ValidationError

from serve_app.frontend.auth import ApiKeys
from serve_app.frontend.models import Models
from serve_app.frontend.routes import create_app
from serve_app.frontend.service import ModelService
from serve_app.settings import ServiceSettings
from tests.boundary.asking import Http
from tests.served import KEY

PAGE = "https://page.example"
ASK = {"items": ["a"], "label_token_ids": [1]}


async def test_head_is_get_without_a_body_on_every_route(http: Http):
    paths = {path for path, own in (await http.client.get("/openapi.json")).json()["paths"].items() if "get" in own} | {
        "/",
        "/docs",
        "/openapi.json",
        "/docs/swagger-ui.css",
        "/nothing",
        "/v1/info?model=nobody",
    }
    assert {"/health", "/ready", "/metrics", "/v1/models", "/v1/info"} <= paths
    for path in paths:
        if "{" in path:
            continue
        got, head = await http.client.get(path), await http.client.head(path)
        assert (head.status_code, head.content) == (got.status_code, b"")
        for name in ("content-type", "content-length"):
            assert head.headers.get(name) == got.headers.get(name)
    assert (await http.client.head("/v1/score")).status_code == 405


@pytest.fixture
async def client(service: ModelService, tmp_path: Path) -> AsyncIterator[httpx.AsyncClient]:
    """A client of a service that needs a key and allows one page."""
    (tmp_path / "keys").write_text(KEY)
    app = create_app(
        lambda: Models(service), keys=ApiKeys(str(tmp_path / "keys")), cors_origins=("https://other.example", PAGE)
    )
    async with httpx.AsyncClient(base_url="http://fake", transport=httpx.ASGITransport(app)) as client:
        yield client


async def test_a_preflight_is_answered_without_a_key(client: httpx.AsyncClient):
    wish = {"access-control-request-method": "POST", "access-control-request-headers": "authorization, content-type"}
    answer = await client.options("/v1/score", headers={"origin": PAGE} | wish)
    assert answer.status_code == 200
    assert answer.headers["access-control-allow-origin"] == PAGE
    assert "POST" in answer.headers["access-control-allow-methods"]
    assert {"authorization", "content-type"} <= set(answer.headers["access-control-allow-headers"].split(", "))
    stranger = await client.options("/v1/score", headers={"origin": "https://page.example.evil"} | wish)
    assert stranger.status_code == 400
    assert "access-control-allow-origin" not in stranger.headers


async def test_answers_and_errors_can_be_read_by_the_page(client: httpx.AsyncClient):
    key = {"authorization": f"Bearer {KEY}"}
    answers = {
        200: await client.post("/v1/score", json=ASK, headers={"origin": PAGE} | key),
        400: await client.post("/v1/score", json={}, headers={"origin": PAGE} | key),
        401: await client.post("/v1/score", json=ASK, headers={"origin": PAGE}),
        404: await client.get("/nothing", headers={"origin": PAGE} | key),
    }
    for status, answer in answers.items():
        assert answer.status_code == status
        assert answer.headers["access-control-allow-origin"] == PAGE
        assert {"x-request-id", "retry-after"} <= set(answer.headers["access-control-expose-headers"].split(", "))
    stranger = await client.post("/v1/score", json=ASK, headers={"origin": "https://stranger.example"} | key)
    assert "access-control-allow-origin" not in stranger.headers


async def test_it_is_off_by_default(http: Http):
    answer = await http.client.post("/v1/score", json=ASK, headers={"origin": PAGE})
    assert "access-control-allow-origin" not in answer.headers
    assert ServiceSettings().cors_origins == ()


@pytest.mark.parametrize("origin", ["page.example", "https://page.example/", "https://*.example", "https://a b", ""])
def test_invalid_origins_are_refused(origin: str):
    with pytest.raises(ValidationError, match="is not an origin"):
        ServiceSettings(cors_origins=(origin,))


def test_origins():
    for origin in ("*", "null", "http://localhost:3000", "chrome-extension://abc"):
        assert ServiceSettings(cors_origins=(origin,)).cors_origins
