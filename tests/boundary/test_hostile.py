"""More than a thousand malformed requests: never a 5xx, and a good request is answered right afterwards."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schemathesis.checks import CHECKS

from serve_app.frontend.models import Models
from serve_app.frontend.routes import create_app
from serve_app.frontend.service import ModelService
from serve_app.scorer.fake_engine import FakeEngine
from serve_app.settings import ModelSettings
from serve_app.tasks.tokenizer import TextTokenizer
from tests.boundary.asking import Http
from tests.local import CONTEXT, VOCAB_SIZE, DirectReplicas, no_metrics, save_tokenizer

GOOD: dict[str, Any] = {"query": "the ", "items": ["fox", "dog"], "label_token_ids": [5, 7]}
OTHERS: dict[str, dict[str, Any]] = {
    "/v1/rerank": {"query": "the ", "documents": ["fox", {"text": "dog"}]},
    "/v1/completions": {"prompt": ["fox", "dog"], "max_tokens": 1, "logprobs": 1, "echo": True},
    "/v1/logprobs": {"input": [[5, 7, 9], [3, 4]], "start": [2, 1], "top": 2, "candidates": [[[1, 2]], [[]]]},
    "/generate": {
        "input_ids": [[5, 7, 9], [3, 4]],
        "sampling_params": {"max_new_tokens": 0},
        "return_logprob": True,
        "logprob_start_len": [0, 1],
        "top_logprobs_num": 2,
        "token_ids_logprob": [[1, 2], None],
    },
    "/generative_scoring": GOOD,
    "/classify": {"input": ["the", "fox"], "use_activation": False},
    "/pooling": {"messages": [{"role": "user", "content": "the"}, {"role": "assistant", "content": "fox"}]},
    "/v1/embeddings": {"input": "the fox", "encoding_format": "base64", "on_error": "item"},
    "/get_reward": {"query": ["the", "fox"], "prompts": ["the", "fox"], "labels": ["fox", None]},
    "/v1/systemone": {
        "state": {"the": ["fox"]},
        "questions": {
            "a": {"type": "noul", "criteria": {"true": ["fox"]}},
            "b": {"type": "choice", "instructions": "the", "criteria": {"fox": None, "dog": {"a": 1}}},
            "c": {"type": "score", "criteria": ["fox", ["dog"]]},
        },
    },
    "/v1/decisions": {
        "input": [{"role": "user", "content": [{"type": "input_text", "text": "the"}]}],
        "questions": [
            {"type": "predicate", "instructions": "fox"},
            {"type": "choice", "instructions": "the", "choices": [{"value": "fox"}, {"value": True}]},
            {"type": "score", "instructions": "the", "levels": [{"label": "fox"}, {"label": "dog"}]},
        ],
    },
}
LAST = {
    "/v1/score": {"object", "usage"},
    "/generative_scoring": {"object", "usage"},
    "/v1/systemone": {"model", "usage"},
}
"""Fields of the line that ends a stream, by route."""
FAKE = ModelSettings(model="fake-judge", engine="fake")
PATHS = st.sampled_from(["/v1/score", "/tokenize", "/detokenize", *OTHERS])

# All examples use one service on purpose: it must survive them.
HOSTILE = settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    phases=[Phase.explicit, Phase.generate, Phase.shrink],
)

anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=12,
)
ids = st.integers(-2, VOCAB_SIZE + 1) | st.sampled_from([10**12, 10**30, -(10**30), True, 1.5, "1", None])
id_lists = st.lists(ids, max_size=5)
texts = st.lists(st.text(max_size=20), max_size=5)
FIELDS: dict[str, st.SearchStrategy[Any]] = {
    "query": st.text(max_size=20) | id_lists | anything,
    "items": st.text(max_size=20) | texts | st.lists(id_lists, max_size=4) | anything,
    "label_token_ids": id_lists | st.lists(id_lists, max_size=4) | anything,
    "apply_softmax": st.booleans() | anything,
    "item_first": st.booleans() | anything,
    "temperature": st.floats() | st.integers() | anything,
    "model": st.sampled_from(["default", "judge"]) | st.text(max_size=10) | anything,
    "return_token_logprobs": st.booleans() | anything,
    "labels": texts | st.lists(texts, max_size=4) | anything,
    "length_normalize": st.booleans() | anything,
    "return_label_mass": st.booleans() | anything,
    "return_prompt_token_ids": st.booleans() | anything,
    "truncate": st.sampled_from(["error", "item"]) | anything,
    "on_error": st.sampled_from(["fail", "item"]) | anything,
    "stream": st.booleans() | anything,
    "timeout_s": st.floats() | st.integers() | anything,
    "prompt": st.text(max_size=20) | texts | anything,
    "tokens": id_lists | anything,
    "add_special_tokens": st.booleans() | anything,
    "documents": texts | st.lists(st.fixed_dictionaries({"text": st.text(max_size=20)}), max_size=3) | anything,
    "top_n": st.integers(-1, 3) | anything,
    "max_tokens": st.integers(-1, 2) | anything,
    "logprobs": st.integers(-1, 2) | anything,
    "echo": st.booleans() | anything,
    "state": anything,
    "input": st.text(max_size=20) | texts | id_lists | st.lists(id_lists, max_size=4) | anything,
    "questions": st.dictionaries(st.text(max_size=5), st.deferred(lambda: asked), max_size=3)
    | st.lists(st.deferred(lambda: asked), max_size=3)
    | anything,
    "start": st.integers(-1, 5) | st.lists(st.integers(-1, 3), max_size=3) | anything,
    "top": st.integers(-1, 3) | st.integers(500, 1100) | anything,
    "candidates": st.lists(st.lists(id_lists, max_size=3), max_size=3) | anything,
    "format": st.sampled_from(["json", "npz"]) | anything,
    "prompt_logprobs": st.integers(-1, 3) | st.integers(500, 1100) | anything,
    "sampling_params": st.fixed_dictionaries({"max_new_tokens": st.integers(-1, 2)}) | anything,
    "logprob_start_len": st.integers(-2, 3) | st.lists(st.integers(-2, 3), max_size=3) | anything,
    "top_logprobs_num": st.integers(-1, 3) | st.lists(st.integers(-1, 3), max_size=3) | anything,
    "token_ids_logprob": id_lists | st.lists(id_lists, max_size=3) | anything,
    "permutations": st.integers(-1, 300) | anything,
    "unknown": anything,
}
asked = st.fixed_dictionaries(
    {"type": st.sampled_from(["noul", "predicate", "choice", "score", "box"])},
    optional={
        "name": st.text(max_size=5) | anything,
        "instructions": st.text(max_size=20) | anything,
        "criteria": st.dictionaries(st.text(max_size=5), anything, max_size=3) | texts | anything,
        "choices": st.lists(st.fixed_dictionaries({"value": st.text(max_size=5) | st.booleans()}), max_size=4),
        "levels": st.lists(st.fixed_dictionaries({"label": st.text(max_size=5)}), max_size=4) | anything,
        "unknown": anything,
    },
)


@st.composite
def almost_right(draw: st.DrawFn, good: Mapping[str, Any] = GOOD) -> dict[str, Any]:
    """A good request with up to three fields made wrong, or one left out."""
    request = dict(good)
    for field in draw(st.lists(st.sampled_from(sorted(FIELDS)), max_size=3)):
        request[field] = draw(FIELDS[field])
    left_out = draw(st.none() | st.sampled_from(sorted(good)))
    request.pop(left_out, None)
    return request


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    """A good body with some bytes removed and others inserted."""
    body = bytearray(json.dumps(draw(st.sampled_from([GOOD, *OTHERS.values()]))).encode())
    for _ in range(draw(st.integers(1, 3))):
        start = draw(st.integers(0, len(body)))
        end = draw(st.integers(start, min(len(body), start + 6)))
        body[start:end] = draw(st.binary(max_size=6) | st.sampled_from([b'"', b"[", b"]", b"{", b"\\", b"\\u", b","]))
    return bytes(body)


async def survives(http: Http, path: str, body: bytes) -> None:
    response = await http.post(body, path)
    if response.headers["content-type"] == "application/x-ndjson":
        assert "NaN" not in response.text
        *_, last = [json.loads(line) for line in response.text[:-1].split("\n")]
        assert LAST[path] <= set(last) or "error" in last or last.get("object") == "error"
    elif response.status_code == 200:
        assert "NaN" not in response.text
        if path == "/v1/score":
            for row in response.json()["scores"]:
                assert row is None or all(0 <= value <= 1 for value in row)
    else:
        invalid = 422 if path == "/v1/systemone" else 400
        # A deadline may be as short as the caller likes.
        assert response.status_code in (invalid, 404, 413, 504 if b"timeout_s" in body else invalid), response.text
        shapes = {"/v1/completions": http.nested, "/v1/decisions": http.nested, "/v1/systemone": http.typesafe}
        shapes.get(path, http.flat)(response, response.status_code)
        assert len(response.content) < 2000
    answer = await http.score(**GOOD)
    assert [len(row) for row in answer["scores"]] == [2, 2]


@settings(HOSTILE, max_examples=300)
@given(path=PATHS, body=st.binary(max_size=200) | damaged())
async def test_bytes(http: Http, path: str, body: bytes):
    await survives(http, path, body)


@settings(HOSTILE, max_examples=200)
@given(path=PATHS, value=anything | almost_right())
async def test_json(http: Http, path: str, value: Any):
    await survives(http, path, json.dumps(value).encode())


@settings(HOSTILE, max_examples=300)
@given(request=almost_right())
async def test_almost_right_requests(http: Http, request: dict[str, Any]):
    await survives(http, "/v1/score", json.dumps(request).encode())


@settings(HOSTILE, max_examples=40)
@pytest.mark.parametrize("path", OTHERS)
@given(data=st.data())
async def test_almost_right_requests_of_other_routes(http: Http, path: str, data: st.DataObject):
    await survives(http, path, json.dumps(data.draw(almost_right(OTHERS[path]))).encode())


@pytest.mark.parametrize("path", LAST)
async def test_streams(http: Http, path: str):
    await survives(http, path, json.dumps(OTHERS.get(path, GOOD) | {"stream": True}).encode())


@cache
def service() -> ModelService:
    """The service without a queue: schemathesis gives each request an event loop of its own."""
    engine = FakeEngine(VOCAB_SIZE, CONTEXT)
    with TemporaryDirectory() as folder:
        tokenizer = TextTokenizer.load(save_tokenizer(Path(folder), adds_bos=False))
    return ModelService(FAKE, tokenizer, engine.info, DirectReplicas(engine))


api = schemathesis.openapi.from_asgi("/openapi.json", create_app(lambda: Models(service()), metrics=no_metrics))


@api.parametrize()
@settings(max_examples=25, suppress_health_check=list(HealthCheck))
def test_answers_as_its_openapi_says(case: schemathesis.Case):
    # A body that fits the schema may still be refused: the vocabulary's size, the limits and the models' names are not
    # in the schema. And the caller may set a deadline that is over at once: without it a wrong request may be right.
    excluded = [CHECKS.get_one("positive_data_acceptance")]
    if isinstance(case.body, dict) and isinstance(case.body.get("timeout_s"), float | int):
        del case.body["timeout_s"]
        excluded.append(CHECKS.get_one("negative_data_rejection"))
    case.call_and_validate(excluded_checks=excluded)
