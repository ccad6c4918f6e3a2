"""``POST /generative_scoring``: the scores of ``/v1/score`` in vLLM's shape."""

from __future__ import annotations

from typing import Any

import pytest

from tests.boundary.asking import Http

ASK: dict[str, Any] = {"query": "Is this positive? ", "items": ["the fox", "yes"], "label_token_ids": [5, 7, 11]}


async def ask(http: Http, **body: Any) -> dict[str, Any]:
    response = await http.client.post("/generative_scoring", json=body)
    assert response.status_code == 200, response.text
    return response.json()


@pytest.mark.parametrize(
    "body",
    [
        ASK,
        ASK | {"apply_softmax": False},
        ASK | {"item_first": True},
        ASK | {"query": [4], "items": [[5], [6, 7]]},
    ],
)
async def test_scores_are_those_of_the_first_label(http: Http, body: dict[str, Any]):
    answer = await ask(http, **body)
    plain = await http.score(**{"apply_softmax": True} | body)
    assert [item["score"] for item in answer["data"]] == pytest.approx([row[0] for row in plain["scores"]], rel=1e-5)
    assert answer["usage"]["prompt_tokens"] == plain["usage"]["prompt_tokens"]


async def test_envelope(http: Http):
    answer = await ask(http, **ASK, request_id="mine", priority=0, model="default")
    assert set(answer) == {"id", "object", "created", "model", "data", "usage"}
    assert answer["id"] == "generative-scoring-mine"
    assert answer["object"] == "list"
    assert [(item["index"], item["object"]) for item in answer["data"]] == [(0, "score"), (1, "score")]
    assert (await ask(http, **ASK))["id"] != (await ask(http, **ASK))["id"]


async def test_without_special_tokens_in_vllms_shape(http: Http):
    plain = (await http.client.post("/tokenize", json={"prompt": "the fox", "add_special_tokens": False})).json()
    answer = await ask(http, query="the ", items=["fox"], label_token_ids=[5, 7], add_special_tokens=False)
    ids = await ask(http, query=[], items=[plain["tokens"]], label_token_ids=[5, 7])
    assert answer["data"][0]["score"] == pytest.approx(ids["data"][0]["score"], rel=1e-5)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"items": []}, "items"),
        ({"items": "a"}, "items"),
        ({"query": None}, "query"),
        ({"label_token_ids": [[1], [2]]}, "label_token_ids"),
        ({"label_token_ids": []}, "label_token_ids"),
        ({"label_token_ids": [10**9]}, "label_token_ids"),
        ({"priority": 1}, "priority"),
        ({"temperature": 1.0}, "temperature"),
    ],
)
async def test_what_is_wrong_is_named(http: Http, body: dict[str, Any], param: str):
    assert (await http.refused("/generative_scoring", **ASK | body))["param"] == param


async def test_missing_fields_and_unknown_models(http: Http):
    for field in ASK:
        error = await http.refused("/generative_scoring", **{name: ASK[name] for name in ASK if name != field})
        assert error["message"] == f"{field} is required"
    await http.refused("/generative_scoring", status=404, **ASK, model="other")
