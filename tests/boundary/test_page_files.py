"""The page at ``/`` and its files, without a browser."""

from __future__ import annotations

import json
import re
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
from tests.documents import ROOT
from tests.local import VOCAB_SIZE, DirectReplicas

STATIC = ROOT / "serve_app" / "frontend" / "static"
ROUTES = {"decide": "/v1/systemone", "score": "/v1/score", "rerank": "/v1/rerank"}
TYPES = {".css": "text/css", ".js": "text/javascript", ".json": "application/json"}
EXAMPLES: dict[str, dict[str, dict[str, Any]]] = json.loads((STATIC / "examples.json").read_text("utf-8"))


@pytest.mark.parametrize(("tab", "title"), [(tab, title) for tab, own in EXAMPLES.items() for title in own])
async def test_each_example_is_a_valid_request(tokenizer: TextTokenizer, tab: str, title: str):
    engine = FakeEngine(VOCAB_SIZE, 2048)  # the tokenizer makes more tokens of a text than those of real models
    service = ModelService(ModelSettings(engine="fake"), tokenizer, engine.info, DirectReplicas(engine))
    models = Models(service)
    transport = httpx.ASGITransport(create_app(lambda: models))
    async with httpx.AsyncClient(base_url="http://fake", transport=transport) as client:
        response = await client.post(ROUTES[tab], json=EXAMPLES[tab][title])
    service.close()
    assert response.status_code == 200, response.text


def test_the_examples_show_each_kind_of_question():
    asked = [own for example in EXAMPLES["decide"].values() for own in example["questions"].values()]
    assert {own["type"] for own in asked} == {"noul", "choice", "score"}


async def test_the_page_loads_its_own_files_only(http: Http):
    policy = (await http.client.get("/")).headers["content-security-policy"]
    assert "unsafe" not in policy
    assert set(re.findall(r"https?://[^\s'\"]+", (STATIC / "index.html").read_text("utf-8"))) == {
        "http://www.w3.org/2000/svg"  # the name of a format
    }
    for file in STATIC.iterdir():
        for name in re.findall(r"(?:from \"\./|\"static/)([a-z.]+)\"", file.read_text("utf-8")):
            answer = await http.client.get(f"/static/{name}")
            assert answer.status_code == 200
            assert answer.content == (STATIC / name).read_bytes()
            assert answer.headers["content-type"].split(";")[0] == TYPES[(STATIC / name).suffix]
