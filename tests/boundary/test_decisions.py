"""``POST /v1/systemone`` and ``POST /v1/decisions``, on the fake or on a running service."""

from __future__ import annotations

import gzip
import json
import math
from typing import Any

import httpx
import pytest
from backports import zstd

from tests.boundary.asking import Http

STATE = "I was charged twice for March. Please refund one payment today."
SYSTEM_ONE: dict[str, Any] = {
    "state": STATE,
    "questions": {
        "refund": {"type": "noul", "instructions": "Does the customer want money back?"},
        "team": {"type": "choice", "criteria": {"Billing": "payments", "Sales": None, "Technical": "bugs"}},
        "anger": {"type": "score", "instructions": "How angry?", "criteria": ["Calm", "Annoyed", "Furious"]},
    },
}
DECISIONS: dict[str, Any] = {
    "input": STATE,
    "questions": [
        {"type": "predicate", "name": "refund", "instructions": "Does the customer want money back?"},
        {
            "type": "choice",
            "instructions": "Which team?",
            "choices": [{"value": "Billing", "description": "payments"}, {"value": True}],
        },
        {
            "type": "score",
            "instructions": "How angry?",
            "levels": [{"label": label} for label in ("Calm", "Annoyed", "Furious")],
        },
    ],
}


async def ask(http: Http, **fields: Any) -> dict[str, Any]:
    response = await http.client.post("/v1/systemone", json=SYSTEM_ONE | fields)
    assert response.status_code == 200, response.text
    return response.json()


async def decide(http: Http, **fields: Any) -> dict[str, Any]:
    response = await http.client.post("/v1/decisions", json=DECISIONS | fields)
    assert response.status_code == 200, response.text
    return response.json()


class TestSystemOne:
    async def test_each_kind_of_question(self, http: Http):
        answer = await ask(http)
        assert set(answer) == {"model", "answers", "usage", "x_cached_tokens"}
        assert answer["model"] == http.info["model"]
        assert set(answer["usage"]) == {"input_tokens", "output_tokens"}
        assert answer["usage"]["input_tokens"] > 0
        assert list(answer["answers"]) == ["refund", "team", "anger"]
        for own in answer["answers"].values():
            assert 0 <= own["x_label_mass"] <= 1
            assert own["x_permutations"] == 1
        noul, choice, score = answer["answers"].values()
        assert 0 <= noul["noul"] <= 1
        assert list(choice["probabilities"]) == ["Billing", "Sales", "Technical"]
        assert choice["probabilities"][choice["choice"]] == max(choice["probabilities"].values())
        assert score["legend"] == {"0": "Calm", "1": "Annoyed", "2": "Furious"}
        assert score["score"] == math.fsum(int(level) * p for level, p in score["probabilities"].items())
        for own in (choice, score):
            assert sum(own["probabilities"].values()) == pytest.approx(1)
            assert 0 <= own["confidence"] <= 1

    async def test_names_are_kept_as_they_are(self, http: Http):
        names = ["ticket-1", " with space ", "질문", "e\u0301", "\u00e9", "🎯", ""]
        questions = dict.fromkeys(names, SYSTEM_ONE["questions"]["refund"])
        answers = (await ask(http, questions=questions))["answers"]
        assert list(answers) == names
        assert len({own["noul"] for own in answers.values()}) == 1
        options = {"환불 요청": "고객", "e\u0301": None, "\u00e9": None, "🙂 기타": None}
        (own,) = (await ask(http, questions={"q": {"type": "choice", "criteria": options}}))["answers"].values()
        assert list(own["probabilities"]) == list(options)

    async def test_the_default_model_has_typesafes_names(self, http: Http):
        for name in ("jev-latest", "jev-preview", "default", "", http.info["model"]):
            assert (await ask(http, model=name))["model"] == http.info["model"]
        response = await http.client.post("/v1/systemone", json=SYSTEM_ONE | {"model": "jev-1.13.0"})
        error = http.typesafe(response, 404)
        assert error["detail"]["error_type"] == "not_found_error"
        assert "the names are" in error["detail"]["message"]
        for path, body in (("/v1/decisions", DECISIONS), ("/v1/score", {"items": ["a"], "label_token_ids": [1]})):
            response = await http.client.post(path, json=body | {"model": "jev-latest"})
            assert response.status_code == 404

    async def test_orders_of_the_options(self, http: Http):
        answers = (await ask(http, permutations=3))["answers"]
        assert [own["x_permutations"] for own in answers.values()] == [1, 3, 3]

    async def test_encoded_bodies(self, http: Http):
        body = json.dumps(SYSTEM_ONE).encode()
        plain = await http.post(body, "/v1/systemone")
        for name, encoded in (("zstd", zstd.compress(body)), ("gzip", gzip.compress(body))):
            answer = await http.post(encoded, "/v1/systemone", content_encoding=name)
            assert answer.json()["answers"] == plain.json()["answers"]
        response = await http.post(body, "/v1/systemone", content_encoding="br")
        assert http.typesafe(response, 415)["detail"]["error_type"] == "unsupported_encoding_error"
        bomb = zstd.compress(b" " * (http.info["limits"]["max_body_bytes"] + 1))
        response = await http.post(bomb, "/v1/systemone", content_encoding="zstd")
        assert http.typesafe(response, 413)["detail"]["error_type"] == "request_too_large_error"

    @pytest.mark.parametrize(
        ("body", "loc"),
        [
            (b"{", []),
            (b"", []),
            (b'{"state": ' + b"[" * 10_000, []),
            ({"questions": SYSTEM_ONE["questions"]}, ["state"]),
            (SYSTEM_ONE | {"questions": {}}, ["questions"]),
            (SYSTEM_ONE | {"questions": {"q": {"type": "box"}}}, ["questions", "q"]),
            (SYSTEM_ONE | {"questions": {"q": {"type": "noul"}}}, ["questions", "q"]),
            (
                SYSTEM_ONE | {"questions": {"q": {"type": "score", "criteria": {}}}},
                ["questions", "q", "score", "criteria"],
            ),
            (SYSTEM_ONE | {"assets": {"a": {"type": "image"}}}, ["assets"]),
        ],
    )
    async def test_an_invalid_request_is_a_422_with_its_place(self, http: Http, body: Any, loc: list[str]):
        sent = body if isinstance(body, bytes) else json.dumps(body).encode()
        (found,) = http.typesafe(await http.post(sent, "/v1/systemone"), 422)["detail"]
        assert found["loc"] == ["body", *loc]

    async def test_files_are_refused(self, http: Http):
        files = {"request": ("request", json.dumps(SYSTEM_ONE).encode(), "application/json"), "asset-0": b"\x89PNG"}
        response = await http.client.post("/v1/systemone", files=files)
        (found,) = http.typesafe(response, 422)["detail"]
        assert found["loc"] == ["body", "assets"]
        assert "multipart/form-data" in found["msg"]
        response = await http.client.post("/v1/systemone", content=b"{}", headers={"content-type": "text/plain"})
        (found,) = http.typesafe(response, 422)["detail"]
        assert found["loc"] == ["body"]

    @pytest.mark.parametrize("path", ["/v1/systemone/", "/v1/v1/systemone", "/systemone"])
    async def test_errors_beside_the_route(self, http: Http, path: str):
        error = http.typesafe(await http.client.post(path, json=SYSTEM_ONE), 404)
        assert error["detail"]["error_type"] == "not_found_error"
        error = http.typesafe(await http.client.get("/v1/systemone"), 405)
        assert error["detail"]["error_type"] == "method_not_allowed_error"


class TestDecisions:
    async def test_each_kind_of_question(self, http: Http):
        answer = await decide(http)
        assert set(answer) == {"model", "answers", "usage"}
        predicate, choice, score = answer["answers"]
        assert [own["name"] for own in answer["answers"]] == ["refund", None, None]
        assert 0 <= predicate["probability"] <= 1
        assert [own["value"] for own in choice["probabilities"]] == ["Billing", True]
        assert choice["choice"] in ("Billing", True)
        assert [(own["value"], own["label"]) for own in score["probabilities"]] == [
            (0, "Calm"),
            (1, "Annoyed"),
            (2, "Furious"),
        ]
        assert score["score"] == math.fsum(own["value"] * own["probability"] for own in score["probabilities"])
        usage = answer["usage"]
        assert usage["total_tokens"] == usage["input_tokens"] > 0
        assert usage["output_tokens"] == usage["output_tokens_details"]["reasoning_tokens"] == 0
        assert set(usage["input_tokens_details"]) == {"cached_tokens", "cache_write_tokens"}

    async def test_both_routes_give_the_same_answers(self, http: Http):
        noul = (await ask(http))["answers"]["refund"]
        predicate = (await decide(http))["answers"][0]
        assert predicate["probability"] == noul["noul"]

    async def test_a_conversation(self, http: Http):
        messages = [{"role": "user", "content": STATE}, {"role": "assistant", "content": "Which invoice?"}]
        alone, both = [await decide(http, input=messages[:count]) for count in (1, 2)]
        assert alone["answers"] == (await decide(http))["answers"]
        assert both["usage"]["input_tokens"] > alone["usage"]["input_tokens"]

    @pytest.mark.parametrize(
        ("body", "param", "status"),
        [
            (b"{", None, 400),
            (b'{"input": ' + b"[" * 10_000, None, 400),
            ({"questions": DECISIONS["questions"]}, "input", 400),
            (DECISIONS | {"questions": []}, "questions", 400),
            (DECISIONS | {"questions": [{"type": "predicate", "instructions": ""}]}, "questions", 400),
            (DECISIONS | {"input": "a" * 600_000}, "input", 400),
            (DECISIONS | {"stream": True}, "stream", 400),
            (DECISIONS | {"x_trace_id": "a"}, "x_trace_id", 400),
            (DECISIONS | {"model": "none"}, "model", 404),
        ],
    )
    async def test_errors_are_openais(self, http: Http, body: Any, param: str | None, status: int):
        sent = body if isinstance(body, bytes) else json.dumps(body).encode()
        assert http.nested(await http.post(sent, "/v1/decisions"), status)["param"] == param

    async def test_errors_beside_the_route(self, http: Http):
        http.nested(await http.client.get("/v1/decisions"), 405)
        http.nested(await http.client.post("/v1/v1/decisions", json=DECISIONS), 404)


async def test_models_have_typesafes_cards(http: Http):
    answer = (await http.client.get("/v1/models")).json()
    assert [card["name"] for card in answer["models"]] == [card["id"] for card in answer["data"]]
    for card in answer["models"]:
        assert set(card) == {"name", "description", "release_date"}
        assert all(isinstance(value, str) and value for value in card.values())


async def test_the_request_id_has_typesafes_name_too(http: Http):
    async def sent(path: str, body: Any) -> httpx.Response:
        return await http.client.post(path, json=body, headers={"x-request-id": "abc"})

    for response in (await sent("/v1/systemone", SYSTEM_ONE), await sent("/v1/systemone", {})):
        assert response.headers["x-typesafe-request-id"] == response.headers["x-request-id"] == "abc"


async def test_openapi_has_all_that_it_refers_to(http: Http):
    api = (await http.client.get("/openapi.json")).json()

    def check(part: Any) -> None:
        if isinstance(part, dict):
            for name, value in part.items():
                if name == "$ref" or (name == "mapping" and isinstance(value, dict)):
                    for reference in value.values() if isinstance(value, dict) else [value]:
                        found = api
                        for step in reference.removeprefix("#/").split("/"):
                            found = found[step]
                check(value)
        elif isinstance(part, list):
            for value in part:
                check(value)

    check(api)
    assert {code for code in api["paths"]["/v1/systemone"]["post"]["responses"] if code != "200"} == {
        *("404", "413", "415", "422", "500", "503", "504")
    }
    assert "400" in api["paths"]["/v1/decisions"]["post"]["responses"]
