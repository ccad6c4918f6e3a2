"""``POST /v1/rerank``: its contract, on the fake or on a running service."""

from __future__ import annotations

from typing import Any

import pytest

from tests.boundary.asking import Http

ASK: dict[str, Any] = {"query": "who is lazy?", "documents": ["the fox", "the dog", "no", "a cat"]}


async def rerank(http: Http, path: str = "/v1/rerank", **body: Any) -> dict[str, Any]:
    response = await http.client.post(path, json=body)
    assert response.status_code == 200, response.text
    return response.json()


@pytest.mark.parametrize("path", ["/v1/rerank", "/v2/rerank", "/rerank"])
async def test_every_document_comes_back_once_best_first(http: Http, path: str):
    answer = await rerank(http, path, **ASK)
    assert set(answer) == {"id", "object", "model", "results", "meta", "usage"}
    assert answer["model"] == http.info["model"]
    assert [set(result) for result in answer["results"]] == [{"index", "relevance_score"}] * 4
    assert sorted(result["index"] for result in answer["results"]) == [0, 1, 2, 3]
    scores = [result["relevance_score"] for result in answer["results"]]
    assert scores == sorted(scores, reverse=True)
    assert all(0 < score < 1 for score in scores)
    usage = answer["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] == answer["meta"]["tokens"]["input_tokens"] > 0
    assert usage["completion_tokens"] == answer["meta"]["tokens"]["output_tokens"] == 0


async def test_a_document_scores_the_same_alone_and_in_both_forms(http: Http):
    together = {result["index"]: result["relevance_score"] for result in (await rerank(http, **ASK))["results"]}
    for index, text in enumerate(ASK["documents"]):
        for document in (text, {"text": text}, {"text": text, "title": "ignored", "rank": 3}):
            [result] = (await rerank(http, query=ASK["query"], documents=[document]))["results"]
            assert result["relevance_score"] == pytest.approx(together[index], rel=1e-4)


async def test_equal_scores_keep_the_order_of_the_documents(http: Http):
    answer = await rerank(http, query="q", documents=["same"] * 5)
    assert len({result["relevance_score"] for result in answer["results"]}) == 1
    assert [result["index"] for result in answer["results"]] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(("top_n", "count"), [(1, 1), (3, 3), (4, 4), (100, 4), (None, 4)])
async def test_top_n(http: Http, top_n: int | None, count: int):
    whole = (await rerank(http, **ASK))["results"]
    best = (await rerank(http, **ASK, top_n=top_n))["results"]
    assert [result["index"] for result in best] == [result["index"] for result in whole[:count]]


async def test_return_documents(http: Http):
    documents = ["the fox", {"text": "the dog", "id": "7"}]
    for result in (await rerank(http, query="q", documents=documents, return_documents=True))["results"]:
        assert result["document"] == {"text": ["the fox", "the dog"][result["index"]]}


async def test_no_documents(http: Http):
    answer = await rerank(http, query="q", documents=[])
    assert (answer["results"], answer["usage"]["prompt_tokens"]) == ([], 0)


async def test_the_instruction_matters(http: Http):
    plain, other = await rerank(http, **ASK), await rerank(http, **ASK, instruct="Find liars")
    assert plain["results"] != other["results"]


async def test_a_long_document_is_cut_and_the_answer_says_so(http: Http):
    long = "lazy " * 10 * http.info["limits"]["max_prompt_tokens"]
    answer = await rerank(http, query="q", documents=["short", long, long + "end"])
    assert len(answer["results"]) == 3
    [warning] = answer["meta"]["warnings"]
    assert "documents[1], documents[2]" in warning
    # The end that was cut off does not count.
    scores = {result["index"]: result["relevance_score"] for result in answer["results"]}
    assert scores[1] == pytest.approx(scores[2], rel=1e-4)


async def test_max_tokens_per_doc(http: Http):
    short, long = "lazy", "lazy dog and fox and the end"
    [whole] = (await rerank(http, query="q", documents=[short]))["results"]
    count = len(await http.ids(" " + short))  # as after the template
    cut = await rerank(http, query="q", documents=[short + " fox", long], max_tokens_per_doc=count)
    assert "meta" in cut
    assert "documents[0], documents[1]" in cut["meta"]["warnings"][0]
    for result in cut["results"]:
        assert result["relevance_score"] == pytest.approx(whole["relevance_score"], rel=1e-4)


@pytest.mark.parametrize(
    ("body", "param", "said"),
    [
        ({"documents": "a"}, "documents", 'must be a valid list, not "a"'),
        ({"documents": ["a", 3]}, "documents", "documents[1]"),
        ({"documents": [{"title": "a"}]}, "documents", "documents[0]"),
        ({"query": ["a"]}, "query", "must be a valid string"),
        ({"query": None}, "query", "not null"),
        ({"top_n": 0}, "top_n", "greater than or equal to 1, not 0"),
        ({"top_n": 1.5}, "top_n", "valid integer"),
        ({"return_documents": 1}, "return_documents", "valid boolean"),
        ({"max_tokens_per_doc": 0}, "max_tokens_per_doc", "greater than or equal to 1"),
        ({"rank_fields": ["a"]}, "rank_fields", "only the field text of a document is read"),
        ({"max_chunks_per_doc": 10}, "max_chunks_per_doc", "max_tokens_per_doc"),
        ({"priority": 5}, "priority", "must be 0 or left out"),
        ({"rank_field": ["a"]}, "rank_field", "unknown field"),
        ({"query": "a " * 10_000}, "query", "shorten"),
    ],
)
async def test_what_is_wrong_is_named(http: Http, body: dict[str, Any], param: str, said: str):
    error = await http.refused("/v1/rerank", **ASK | body)
    assert error["param"] == param
    assert said in error["message"]


async def test_missing_fields_unknown_models_and_too_many_documents(http: Http):
    assert (await http.refused("/v1/rerank", query="q"))["message"] == "documents is required"
    assert (await http.refused("/v1/rerank", documents=["a"]))["message"] == "query is required"
    error = await http.refused("/v1/rerank", status=404, **ASK, model="rerank-v3.5")
    assert "default" in error["message"]
    limit = http.info["limits"]["max_items"]
    error = await http.refused("/v1/rerank", status=413, query="q", documents=["a"] * (limit + 1))
    assert str(limit) in error["message"]
