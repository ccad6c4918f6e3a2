"""Bodies and routes that clients of other services send, on the fake or on a running service."""

from __future__ import annotations

import math
from typing import Any

import httpx
import pytest

from serve_app.frontend.models import Models
from serve_app.frontend.routes import create_app
from serve_app.frontend.service import ModelService
from tests.boundary.asking import Http
from tests.local import no_metrics

QUERY, DOCUMENTS = "who is lazy?", ["the fox", "the dog", "no", "a cat"]
PAIRS: dict[str, Any] = {"query": QUERY, "documents": DOCUMENTS}
PROMPT: dict[str, Any] = {"prompt": "the quick brown fox"}


async def post(http: Http, path: str, body: dict[str, Any]) -> Any:
    response = await http.client.post(path, json=body)
    assert response.status_code == 200, response.text
    return response.json()


class TestCompletions:
    @pytest.mark.parametrize(
        "fields",
        [
            # OpenAI's reference, every field at its neutral value.
            {
                "best_of": 1, "echo": False, "frequency_penalty": 0, "logit_bias": None, "logprobs": None, "n": 1,
                "presence_penalty": 0, "seed": 7, "stop": None, "stream": False, "stream_options": None,
                "suffix": None, "temperature": 0, "top_p": 1, "user": "me",
            },
            # LangChain's OpenAI, also in older versions.
            {"temperature": 0, "top_p": 1, "frequency_penalty": 0, "presence_penalty": 0, "n": 1, "logit_bias": {}},
            # vLLM's own client
            {"temperature": 0, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0, "ignore_eos": True, "stop": [],
             "min_tokens": 0, "use_beam_search": False, "add_special_tokens": True, "priority": 0, "cache_salt": None},
        ],
    )  # fmt: skip
    async def test_neutral_values(self, http: Http, fields: dict[str, Any]):
        plain = await post(http, "/v1/completions", PROMPT | {"max_tokens": 1})
        answer = await post(http, "/v1/completions", PROMPT | {"max_tokens": 1} | fields)
        assert answer["choices"] == plain["choices"]

    @pytest.mark.parametrize("left_out", [{}, {"max_tokens": None}])
    async def test_max_tokens_left_out(self, http: Http, left_out: dict[str, Any]):
        """With the prompt's own logprobs it means 0; elsewhere OpenAI's default of 16 is refused."""
        rated = PROMPT | {"echo": True, "logprobs": 1}
        answer = await post(http, "/v1/completions", rated | left_out)
        assert answer["choices"] == (await post(http, "/v1/completions", rated | {"max_tokens": 0}))["choices"]
        for rest in ({}, {"echo": True}, {"logprobs": 1}):
            error = http.nested(await http.client.post("/v1/completions", json=PROMPT | rest | left_out), 400)
            assert error["param"] == "max_tokens"
            assert "means 16" in error["message"]
            assert "send max_tokens: 0, or 1" in error["message"]


class TestRerank:
    @pytest.mark.parametrize(
        "fields",
        [
            {"top_n": None, "return_documents": False, "max_chunks_per_doc": None, "rank_fields": None},  # Cohere, v1
            {"max_tokens_per_doc": None, "priority": 0},  # Cohere, v2
            {"rank_fields": ["text"], "max_chunks_per_doc": 1},
            {"top_n": 4, "return_documents": False, "truncation": True, "return_embeddings": False},  # Jina
            {"raw_scores": False, "return_documents": False},  # Infinity
            {"truncate_prompt_tokens": None, "user": "me", "priority": 0, "request_id": "r"},  # vLLM
            {"truncate_prompt_tokens": -1, "activation": None, "use_activation": None, "mm_processor_kwargs": None},
            {"truncate": True},
        ],
    )
    @pytest.mark.parametrize("path", ["/rerank", "/v1/rerank", "/v2/rerank"])
    async def test_neutral_values(self, http: Http, path: str, fields: dict[str, Any]):
        plain, answer = await post(http, path, PAIRS), await post(http, path, PAIRS | fields)
        assert answer["results"] == plain["results"]

    async def test_vllms_instruction(self, http: Http):
        ours = await post(http, "/v1/rerank", PAIRS | {"instruct": "Find liars"})
        theirs = await post(http, "/v1/rerank", PAIRS | {"instruction": "Find liars"})
        assert ours["results"] == theirs["results"]
        error = await http.refused("/v1/rerank", **PAIRS, instruction="a", instruct="b")
        assert error["param"] in ("instruct", "instruction")
        assert (await http.refused("/v1/rerank", **PAIRS, instruction=3))["param"] == "instruction"

    async def test_tei(self, http: Http):
        ours = (await post(http, "/rerank", PAIRS))["results"]
        plain = {"query": QUERY, "texts": DOCUMENTS}
        for fields in (
            {},
            {"raw_scores": False, "return_text": False, "truncate": True, "truncation_direction": "Right"},
        ):
            ranks = await post(http, "/rerank", plain | fields)
            assert ranks == [{"index": each["index"], "score": each["relevance_score"]} for each in ours]
        texts = await post(http, "/rerank", plain | {"return_text": True})
        assert [rank["text"] for rank in texts] == [DOCUMENTS[each["index"]] for each in ours]
        assert await post(http, "/rerank", {"query": QUERY, "texts": []}) == []
        assert (await http.refused("/rerank", query=QUERY, texts=["a", 3]))["param"] == "texts"
        both = await http.refused("/rerank", **plain, documents=["a"])
        assert both["param"] == "texts"
        # In texts these words are no fields.
        assert len(await post(http, "/rerank", {"query": '"documents":', "texts": ["documents", "texts"]})) == 2
        assert len((await post(http, "/rerank", {"query": 'the "texts":', "documents": ["texts"]}))["results"]) == 1

    @pytest.mark.parametrize("fields", [{"documents": DOCUMENTS}, {"texts": DOCUMENTS}])
    async def test_raw_scores_are_before_the_logistic_function(self, http: Http, fields: dict[str, Any]):
        def scores(answer: Any) -> list[tuple[int, float]]:
            if isinstance(answer, list):
                return [(each["index"], each["score"]) for each in answer]
            return [(each["index"], each["relevance_score"]) for each in answer["results"]]

        body = {"query": QUERY, **fields}
        plain, raw = (
            scores(await post(http, "/rerank", body)),
            scores(await post(http, "/rerank", body | {"raw_scores": True})),
        )
        assert [index for index, _ in raw] == [index for index, _ in plain]
        for (_, probability), (_, logit) in zip(plain, raw, strict=True):
            assert probability == pytest.approx(1 / (1 + math.exp(-logit)), rel=1e-6)

    async def test_truncate_prompt_tokens(self, http: Http):
        long = {"query": "q", "documents": ["lazy dog", "lazy dog and fox and the end"]}
        whole = await post(http, "/v1/rerank", long)
        used = (await post(http, "/v1/rerank", long | {"documents": ["lazy dog"]}))["usage"]["prompt_tokens"]
        cut = await post(http, "/v1/rerank", long | {"truncate_prompt_tokens": used})
        assert cut["usage"]["prompt_tokens"] == 2 * used < whole["usage"]["prompt_tokens"]
        assert "documents[1]" in cut["meta"]["warnings"][0]
        assert len({each["relevance_score"] for each in cut["results"]}) == 1
        error = await http.refused("/v1/rerank", **long, truncate_prompt_tokens=1)
        assert "truncate_prompt_tokens allows at most 1" in error["message"]
        await http.refused("/v1/rerank", **long, truncate_prompt_tokens=-2)

    async def test_a_document_that_must_not_be_cut(self, http: Http):
        long = "lazy " * 10 * http.info["limits"]["max_prompt_tokens"]
        for body in ({"documents": ["a", long]}, {"texts": ["a", long]}):
            error = await http.refused("/rerank", query="q", **body, truncate=False)
            assert "documents[1] makes a prompt of" in error["message"]
            await post(http, "/rerank", {"query": "q", "truncate": True, **body})
            await post(
                http, "/rerank", {"query": "q", "truncate": False} | {name: texts[:1] for name, texts in body.items()}
            )


@pytest.mark.parametrize(
    "fields",
    [
        {
            "apply_softmax": False,
            "item_first": False,
            "model": "default",
            "return_pooled_hidden_states": False,
        },  # sglang
        {"user": "me", "rid": None, "priority": 0, "request_id": "r", "embed_overrides": None},
    ],
)
async def test_score(http: Http, fields: dict[str, Any]):
    ask: dict[str, Any] = {"items": ["a"], "label_token_ids": [1]}
    assert (await http.score(**ask, **fields))["scores"] == (await http.score(**ask))["scores"]
    assert (await http.refused(**ask, priority=1))["param"] == "priority"


class TestRoutes:
    @pytest.mark.parametrize(
        ("path", "said"),
        [
            ("/v1/score/", "did you mean POST /v1/score?"),
            ("//v1/score", "did you mean POST /v1/score?"),
            ("/v1//score", "did you mean POST /v1/score?"),
            ("/V1/Score", "did you mean POST /v1/score?"),
            ("/v1/v1/rerank", "did you mean POST /v1/rerank?"),
            ("/v1/generative_scoring", "did you mean POST /generative_scoring?"),
            ("/v1/tokenize", "did you mean POST /tokenize?"),
            ("/info", "did you mean GET /v1/info?"),
            ("/v1/models/", "did you mean GET /v1/models?"),
            ("/healthz", "did you mean GET /health?"),
            ("/score", "score labels with POST /v1/score, and pairs of texts with POST /v1/rerank"),
            ("/embeddings", "rewards are at POST /v1/embeddings"),
            ("/v1/embed", "makes no embeddings"),
            ("/nothing/like/it", "see /docs"),
        ],
    )
    async def test_the_right_one_is_named(self, http: Http, path: str, said: str):
        for response in (
            await http.client.get(str(http.client.base_url).rstrip("/") + path),
            await http.client.post(str(http.client.base_url).rstrip("/") + path, json={"items": ["a"]}),
        ):
            if response.status_code == 405:
                assert path == "/v1/models/"
                continue
            error = http.flat(response, 404)
            assert error["message"].startswith(f"there is no route {path}")
            assert said in error["message"]

    @pytest.mark.parametrize("path", ["/completions", "/v1/completions/", "//v1/completions", "/v1/chat/completions"])
    async def test_openais_clients_get_openais_errors(self, http: Http, path: str):
        error = http.nested(await http.client.post(path, json={}), 404)
        assert "POST /v1/completions" in error["message"]

    async def test_openais_clients_get_openais_errors_under_a_prefix(self, service: ModelService):
        """Serve mounts an application with a ``route_prefix`` like this."""
        app = create_app(lambda: Models(service), metrics=no_metrics)
        transport = httpx.ASGITransport(app, root_path="/judge")
        async with httpx.AsyncClient(base_url="http://fake/judge", transport=transport) as client:
            http = Http(client, {})
            http.nested(await client.post("/v1/completions", json={}), 400)
            http.nested(await client.post("/openai/v1/completions", json={}), 404)
            http.flat(await client.get("/v1/models/completions"), 404)
            http.flat(await client.post("/v1/score", json={}), 400)

    @pytest.mark.parametrize(
        ("method", "path", "right"),
        [
            ("GET", "/v1/score", "POST"),
            ("PUT", "/rerank", "POST"),
            ("POST", "/v1/models", "GET"),
            ("POST", "/health", "GET"),
        ],
    )
    async def test_the_right_method_is_named(self, http: Http, method: str, path: str, right: str):
        response = await http.client.request(method, path)
        error = http.flat(response, 405)
        assert error["message"].startswith(f"{path} does not take {method}; send {right}")
        assert right in response.headers["allow"]


async def test_one_model(http: Http):
    listed = (await http.client.get("/v1/models")).json()["data"]
    for card in listed:
        assert (await http.client.get(f"/v1/models/{card['id']}")).json() == card
    assert (await http.client.get("/v1/models/default")).json()["id"] == "default"
    error = http.flat(await http.client.get("/v1/models/org/none"), 404)
    assert "'org/none' is not served here; the names are" in error["message"]
    # The error is this route's own, even if the model's name looks like an OpenAI route.
    http.flat(await http.client.get("/v1/models/completions"), 404)


async def test_tokenizer_info(http: Http):
    info = (await http.client.get("/tokenizer_info")).json()
    assert {"tokenizer_class", "bos_token", "eos_token", "pad_token", "chat_template"} <= set(info)
    assert info["model_max_length"] == http.info["limits"]["max_prompt_tokens"]
    body = {"prompt": info["eos_token"], "add_special_tokens": False}
    assert len((await http.client.post("/tokenize", json=body)).json()["tokens"]) == 1
    assert (await http.client.get("/tokenizer_info", params={"model": "none"})).status_code == 404
