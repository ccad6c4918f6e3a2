"""HTTP itself: bodies, headers, errors and the small routes, on the fake or on a running service."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from serve_app.tasks.table import TASKS
from serve_app.tasks.task import AnyTask
from tests.boundary.asking import Http

GOOD = '{"items": ["a"], "label_token_ids": [1]}'


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"", "empty"),
        (b"  \n", "empty"),
        (b"{", "not valid JSON"),
        (b"{'items': 1}", "not valid JSON"),
        (GOOD.encode()[:-1] + b",}", "not valid JSON"),
        (GOOD.encode() + b"x", "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b'{"items":' * 5_000, "not valid JSON"),
        (b'{"items": "\xff\xfe"}', "not valid JSON"),
        (b'{"items": [[' + b"9" * 100_000 + b"]]}", "not valid JSON"),
        (b"\x00\x01\x02", "not valid JSON"),
        (b"[]", "must be a JSON object, not a list"),
        (b"null", "must be a JSON object, not null"),
        (b'"items"', 'must be a JSON object, not "items"'),
        (b"NaN", "must be a JSON object"),
    ],
)
async def test_bad_json(http: Http, body: bytes, said: str):
    error = http.flat(await http.post(body), 400)
    assert said in error["message"]
    assert len(error["message"]) < 300


@pytest.mark.parametrize(
    ("body", "field", "said"),
    [
        ({"items": ["a", 3]}, "items", "items[1] must be a valid string, not 3"),
        ({"items": [[1], [True]]}, "items", "items[1][0] must be a valid integer, not true"),
        ({"items": [[1], "b"]}, "items", 'items[1] must be a valid list, not "b"'),
        ({"items": [1]}, "items", "items[0] must be a valid string or a valid list, not 1"),
        ({"items": {"a": 1}}, "items", "items must be a valid list or a valid string, not an object"),
        ({"items": None}, "items", "not null"),
        ({"items": ["a", "x" * 10_000, 7]}, "items", "items[2]"),
        ({"items": [["x" * 10_000]]}, "items", "xxx..."),
        ({"label_token_ids": "7"}, "label_token_ids", 'must be a valid list, not "7"'),
        ({"label_token_ids": [[1], 2]}, "label_token_ids", "label_token_ids[1] must be a valid list, not 2"),
        ({"label_token_ids": None}, "label_token_ids", "label_token_ids is required, unless labels"),
        ({"labels": "yes"}, "labels", 'must be a valid list, not "yes"'),
        ({"labels": [1]}, "labels", "labels[0] must be a valid string or a valid list, not 1"),
        ({"truncate": "query"}, "truncate", "truncate must be 'error' or 'item', not \"query\""),
        ({"truncate": True}, "truncate", "not true"),
        ({"on_error": "skip"}, "on_error", "on_error must be 'fail' or 'item', not \"skip\""),
        ({"timeout_s": 0}, "timeout_s", "must be greater than 0, not 0"),
        ({"timeout_s": "1"}, "timeout_s", 'must be a valid number, not "1"'),
        ({"stream": 1}, "stream", "must be a valid boolean, not 1"),
        ({"length_normalize": "no"}, "length_normalize", "must be a valid boolean"),
        ({"return_label_mass": None}, "return_label_mass", "not null"),
        ({"return_prompt_token_ids": 0}, "return_prompt_token_ids", "not 0"),
        ({"add_special_tokens": []}, "add_special_tokens", "not a list of 0"),
        ({"query": 5}, "query", "query must be a valid string or a valid list, not 5"),
        ({"query": [1, "2"]}, "query", 'query[1] must be a valid integer, not "2"'),
        ({"apply_softmax": 1}, "apply_softmax", "must be a valid boolean, not 1"),
        ({"apply_softmax": "true"}, "apply_softmax", 'not "true"'),
        ({"item_first": None}, "item_first", "not null"),
        ({"model": 3}, "model", "must be a valid string, not 3"),
        ({"return_token_logprobs": []}, "return_token_logprobs", "not a list of 0"),
        ({"temperature": -1}, "temperature", "must be greater than 0, not -1"),
        ({"label_tokens_ids": [1]}, "label_tokens_ids", "did you mean 'label_token_ids'?"),
        ({"banana": 1}, "banana", "the fields are query, messages, items"),
        ({"label": ["yes"]}, "label", "did you mean 'labels'?"),
        ({"documents": ["a"]}, "documents", "/v1/rerank"),
        ({"text_1": "a", "text_2": "b"}, "text_1", "/v1/rerank"),
    ],
)
async def test_schema_errors_name_field_index_value_and_what_is_expected(
    http: Http, body: dict[str, Any], field: str, said: str
):
    error = await http.refused(**{"items": ["a"], "label_token_ids": [1]} | body)
    assert error["param"] == field
    assert said in error["message"]
    assert len(error["message"]) < 300


@pytest.mark.parametrize("field", ["items", "label_token_ids"])
async def test_missing_field(http: Http, field: str):
    body = json.loads(GOOD)
    del body[field]
    error = await http.refused(**body)
    assert error["message"].startswith(f"{field} is required")
    assert error["param"] == field


@pytest.mark.parametrize("twin", ['"items": ["b"]', '"\\u0069tems": ["b"]'])
async def test_a_field_given_twice(http: Http, twin: str):
    error = http.flat(await http.post(GOOD[:-1] + f", {twin}}}"), 400)
    assert error["message"] == "items is given twice; send it once"
    assert error["param"] == "items"


async def test_a_field_name_as_text_is_not_a_field(http: Http):
    await http.score(query="items", items=["items", "\u00e9"], label_token_ids=[1])


@pytest.mark.parametrize("content_type", ["text/plain", "application/x-www-form-urlencoded", "application/jsonx", ""])
async def test_other_content_types(http: Http, content_type: str):
    error = http.flat(await http.post(GOOD, content_type=content_type), 400)
    assert "application/json" in error["message"]


@pytest.mark.parametrize("content_type", ["application/json; charset=utf-8", "Application/JSON"])
async def test_json_content_types(http: Http, content_type: str):
    assert (await http.post(GOOD, content_type=content_type)).status_code == 200


async def test_unknown_route_and_method(http: Http):
    error = http.flat(await http.client.get("/v1/nothing"), 404)
    assert "/v1/nothing" in error["message"]
    assert error["type"] == "NotFoundError"
    response = await http.client.get("/v1/score")
    error = http.flat(response, 405)
    assert "GET" in error["message"]
    assert response.headers["allow"] == "POST"


class TestRequestId:
    async def test_is_echoed(self, http: Http):
        for response in (
            await http.post(GOOD, x_request_id="abc-123"),
            await http.post("{", x_request_id="abc-123"),
            await http.client.get("/nothing", headers={"x-request-id": "abc-123"}),
        ):
            assert response.headers.get_list("x-request-id") == ["abc-123"]

    async def test_is_made_if_absent(self, http: Http):
        first, second = await http.post(GOOD), await http.post(GOOD)
        assert first.headers["x-request-id"] != second.headers["x-request-id"]
        assert re.fullmatch(r"[0-9a-f-]{32,36}", first.headers["x-request-id"])


class TestRoutes:
    async def test_models(self, http: Http):
        listed = (await http.client.get("/v1/models")).json()
        assert listed["object"] == "list"
        assert {card["id"] for card in listed["data"]} | {"default"} == set(http.info["names"])
        for card in listed["data"]:
            assert card["object"] == "model"
            assert card["max_model_len"] == http.info["limits"]["max_prompt_tokens"]

    async def test_info(self, http: Http):
        info = http.info
        assert info["context_length"] >= info["limits"]["max_prompt_tokens"] > 0
        assert info["dtype"] in ("float32", "bfloat16")
        assert info["limits"]["max_items"] > 0
        assert info["limits"]["max_body_bytes"] > 0
        assert re.fullmatch(r"\d+\.\d+\.\d+.*", info["version"])

    async def test_health_and_ready(self, http: Http):
        for path in ("/health", "/ready", "/ready"):
            response = await http.client.get(path)
            assert (response.status_code, response.json()) == (200, {"status": "ok"})

    async def test_metrics(self, http: Http):
        response = await http.client.get("/metrics")
        assert response.status_code == 200
        assert response.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"

    async def test_tokenize_and_back(self, http: Http):
        text = "the quick 狐狸 🦊"
        one = (await http.client.post("/tokenize", json={"prompt": text})).json()
        assert one["count"] == len(one["tokens"]) == len(one["token_strs"])
        assert one["max_model_len"] == http.info["limits"]["max_prompt_tokens"]
        two = (await http.client.post("/tokenize", json={"prompt": [text, ""], "add_special_tokens": False})).json()
        assert [len(ids) for ids in two["tokens"]] == two["count"]
        assert two["count"][1] == 0
        assert [len(pieces) for pieces in two["token_strs"]] == two["count"]
        back = await http.client.post("/detokenize", json={"tokens": two["tokens"][0]})
        assert back.json() == {"prompt": text}

    async def test_detokenize_checks_ids(self, http: Http):
        error = await http.refused("/detokenize", tokens=[1, http.vocab_size])
        size = http.vocab_size
        assert error["message"] == f"tokens[1]: Token ID {size} is out of vocabulary (vocab size: {size})"
        assert error["param"] == "tokens"
        assert (await http.refused("/detokenize", tokens=[True]))["param"] == "tokens"
        assert (await http.client.post("/detokenize", json={"tokens": []})).json() == {"prompt": ""}

    async def test_tokenize_refuses_unknown_fields(self, http: Http):
        assert (await http.refused("/tokenize", text="a"))["param"] == "text"
        assert (await http.refused("/tokenize", prompt=[1]))["param"] == "prompt"

    async def test_openapi_describes_bodies_and_errors(self, http: Http):
        paths = (await http.client.get("/openapi.json")).json()["paths"]
        score = paths["/v1/score"]["post"]
        schema = score["requestBody"]["content"]["application/json"]["schema"]
        assert set(schema["required"]) == {"items"}
        assert set(score["responses"]["200"]["content"]) == {"application/json", "application/x-ndjson"}
        assert set(score["responses"]) >= {"200", "400", "404", "413", "500", "503", "504"}
        assert "422" not in score["responses"]

    async def test_openapi_has_a_text_for_every_field(self, http: Http):
        api = (await http.client.get("/openapi.json")).json()
        for own_of_fastapi in ("HTTPValidationError", "ValidationError"):
            del api["components"]["schemas"][own_of_fastapi]
        fields = [*described(api)]
        assert len(fields) > 200
        assert [where for where, text in fields if not text] == []

    @pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
    async def test_the_examples_work(self, http: Http, task: AnyTask):
        api = (await http.client.get("/openapi.json")).json()
        for path in task.paths:
            body = api["paths"][path]["post"]["requestBody"]["content"]["application/json"]
            assert body["example"] in [each.example for each in TASKS if path in each.paths]
            response = await http.client.post(path, json=task.example)
            assert response.status_code == 200, response.text


def described(schema: Any, where: str = "") -> Iterator[tuple[str, str | None]]:
    """Each field of each object in an OpenAPI document, and what is said about it."""
    if isinstance(schema, list):
        for number, each in enumerate(schema):
            yield from described(each, f"{where}/{number}")
    if isinstance(schema, dict):
        if schema.get("type") == "object":
            for name, field in schema.get("properties", {}).items():
                yield f"{where}/{name}", field.get("description")
        for name, each in schema.items():
            yield from described(each, f"{where}/{name}")


def timings(response: httpx.Response) -> dict[str, float]:
    """The stages in ``Server-Timing``, in milliseconds; there must be one such header, and well-formed."""
    (header,) = response.headers.get_list("server-timing")
    found = re.findall(r"(\w+);dur=(\d+\.\d)", header)
    assert ", ".join(f"{stage};dur={value}" for stage, value in found) == header
    return {stage: float(value) for stage, value in found}


class TestServerTiming:
    @pytest.mark.parametrize(
        ("path", "body"),
        [
            ("/v1/score", {"items": ["a", "b"], "label_token_ids": [1]}),
            ("/v1/score", {"items": ["a", "b"], "label_token_ids": [1], "stream": True}),
            ("/v1/rerank", {"query": "a", "documents": ["b", "c"]}),
            ("/v1/completions", {"prompt": "a", "max_tokens": 1}),
            ("/generative_scoring", {"query": "a", "items": ["b"], "label_token_ids": [1, 2]}),
        ],
    )
    async def test_every_answer_of_the_model_has_its_stages(self, http: Http, path: str, body: dict[str, Any]):
        response = await http.client.post(path, json=body)
        assert response.status_code == 200, response.text
        told = timings(response)
        assert list(told) == ["tokenise", "queue", "device", "total"]
        assert told["total"] >= told["tokenise"]

    async def test_other_answers_have_the_total(self, http: Http):
        assert list(timings(await http.client.get("/health"))) == ["total"]
        assert list(timings(await http.client.get("/nothing"))) == ["total"]
        assert list(timings(await http.post("{"))) == ["total"]

    async def test_a_request_that_ends_early_has_the_stages_that_it_reached(self, http: Http):
        response = await http.client.post("/v1/score", json={"items": [[1]], "label_token_ids": [http.vocab_size]})
        assert response.status_code == 400
        assert "device" not in timings(response)
