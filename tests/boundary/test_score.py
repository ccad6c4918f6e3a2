"""``POST /v1/score``: its contract, on the fake or on a running service."""

from __future__ import annotations

import asyncio
import math
from typing import Any

import pytest

from tests.boundary.asking import Http

LABELS = [5, 7, 11]
ASK: dict[str, Any] = {
    "query": "Is this text positive? ",
    "items": ["the fox is lazy", "yes", "no no no"],
    "label_token_ids": LABELS,
}
TOLERANCE = 1e-5
"""Difference in logprob between two batch compositions, in float32."""


def assert_same(a: list[list[float]], b: list[list[float]]) -> None:
    """Check that probabilities agree within ``TOLERANCE`` in logprob."""
    assert len(a) == len(b)
    for row_a, row_b in zip(a, b, strict=True):
        assert row_a == pytest.approx(row_b, rel=TOLERANCE, abs=1e-30)


async def test_envelope(http: Http):
    answer = await http.score(**ASK)
    assert set(answer) == {"scores", "model", "usage", "object"}
    assert answer["object"] == "scoring"
    assert answer["model"] == http.info["model"]
    assert [len(row) for row in answer["scores"]] == [3, 3, 3]
    usage = answer["usage"]
    tokens = sum([len(await http.ids(ASK["query"] + item)) for item in ASK["items"]])
    assert usage["prompt_tokens"] == usage["total_tokens"] == tokens
    assert usage["completion_tokens"] == usage["reasoning_tokens"] == 0
    assert 0 <= usage["prompt_tokens_details"]["cached_tokens"] < tokens


async def test_softmax_is_off_by_default_and_scores_are_probabilities_of_the_whole_vocabulary(http: Http):
    answer = await http.score(**ASK, return_token_logprobs=True)
    for scores, logprobs in zip(answer["scores"], answer["token_logprobs"], strict=True):
        assert scores == pytest.approx([math.exp(value) for value in logprobs], rel=1e-6)
        assert 0 < sum(scores) < 1


async def test_probabilities_over_the_whole_vocabulary_sum_to_1(http: Http):
    step, size = http.info["limits"]["max_labels"], http.vocab_size
    total = 0.0
    for start in range(0, size, step):
        answer = await http.score(query="yes", items=[""], label_token_ids=list(range(start, min(start + step, size))))
        total += sum(answer["scores"][0])
    assert total == pytest.approx(1, abs=1e-4)


async def test_softmax_rows_sum_to_1_and_are_the_same_distribution_renormalised(http: Http):
    plain = await http.score(**ASK)
    softmax = await http.score(**ASK, apply_softmax=True)
    for row, full in zip(softmax["scores"], plain["scores"], strict=True):
        assert sum(row) == pytest.approx(1, abs=1e-12)
        assert row == pytest.approx([value / sum(full) for value in full], rel=1e-4)


@pytest.mark.parametrize("count", [1, 2, 4, 8])
async def test_label_counts(http: Http, count: int):
    answer = await http.score(query="yes ", items=["a", "b"], label_token_ids=list(range(count)), apply_softmax=True)
    assert [len(row) for row in answer["scores"]] == [count, count]


@pytest.mark.parametrize("count", [1, 2, 4, 8])
async def test_item_counts(http: Http, count: int):
    items = [f"item {i}" for i in range(count)]
    together = (await http.score(query="q ", items=items, label_token_ids=LABELS))["scores"]
    alone = [(await http.score(query="q ", items=[item], label_token_ids=LABELS))["scores"][0] for item in items]
    assert_same(together, alone)


async def test_labels_keep_their_order(http: Http):
    forward = await http.score(**ASK)
    backward = await http.score(**ASK | {"label_token_ids": LABELS[::-1]})
    assert_same(forward["scores"], [row[::-1] for row in backward["scores"]])


async def test_different_items_get_different_scores_and_the_same_item_the_same(http: Http):
    answer = await http.score(**ASK | {"items": ["red", "blue", "red"]})
    assert answer["scores"][0] != answer["scores"][1]
    assert_same([answer["scores"][0]], [answer["scores"][2]])


async def test_a_request_is_answered_the_same_twice(http: Http):
    first, second = await http.score(**ASK), await http.score(**ASK)
    assert_same(first["scores"], second["scores"])


async def test_tokens_score_as_their_text(http: Http):
    text = await http.score(**ASK)
    items = [await http.ids(ASK["query"] + item) for item in ASK["items"]]
    tokens = await http.score(query=[], items=items, label_token_ids=LABELS)
    assert_same(text["scores"], tokens["scores"])
    assert text["usage"]["prompt_tokens"] == tokens["usage"]["prompt_tokens"]
    halves = await http.score(query=items[0][:2], items=[items[0][2:]], label_token_ids=LABELS)
    assert_same(text["scores"][:1], halves["scores"])


async def test_item_first(http: Http):
    text = await http.score(query=" fox", items=["lazy", "quick"], label_token_ids=LABELS, item_first=True)
    joined = await http.score(query="", items=["lazy fox", "quick fox"], label_token_ids=LABELS)
    assert_same(text["scores"], joined["scores"])
    tokens = await http.score(query=[4, 5], items=[[6], [7, 8]], label_token_ids=LABELS, item_first=True)
    joined = await http.score(items=[[6, 4, 5], [7, 8, 4, 5]], label_token_ids=LABELS)
    assert_same(tokens["scores"], joined["scores"])


async def test_text_is_joined_before_it_is_tokenised(http: Http):
    split = await http.score(query="the qui", items=["ck brown"], label_token_ids=LABELS)
    whole = await http.score(query="the quick brown", items=[""], label_token_ids=LABELS)
    assert split["scores"] == whole["scores"]
    assert split["usage"] == whole["usage"]


async def test_no_items(http: Http):
    for query in ("q", [1]):
        answer = await http.score(query=query, items=[], label_token_ids=LABELS, return_token_logprobs=True)
        assert answer["scores"] == answer["token_logprobs"] == []
        assert answer["usage"]["prompt_tokens"] == answer["usage"]["prompt_tokens_details"]["cached_tokens"] == 0


async def test_a_single_string_is_one_item_and_an_empty_item_scores_the_query(http: Http):
    single = await http.score(query="q ", items="yes", label_token_ids=LABELS)
    assert_same(single["scores"], (await http.score(query="q ", items=["yes"], label_token_ids=LABELS))["scores"])
    empty = await http.score(query="q yes", items=[""], label_token_ids=LABELS)
    assert_same(single["scores"], empty["scores"])


async def test_query_may_be_left_out_or_null(http: Http):
    left_out = await http.score(items=["yes"], label_token_ids=LABELS)
    null = await http.score(query=None, items=["yes"], label_token_ids=LABELS)
    assert_same(left_out["scores"], null["scores"])
    await http.score(items=[[1, 2]], label_token_ids=LABELS)


async def test_large_batch(http: Http):
    items = [f"document number {i}" for i in range(150)]
    answer = await http.score(query="relevant? ", items=items, label_token_ids=LABELS)
    assert len(answer["scores"]) == 150
    for i in (0, 77, 149):
        alone = await http.score(query="relevant? ", items=[items[i]], label_token_ids=LABELS)
        assert_same([answer["scores"][i]], alone["scores"])


async def test_concurrent_requests_are_answered_as_sequential_ones(http: Http):
    requests = [
        {"query": f"query {i} ", "items": [f"a{i}", "b" * i], "label_token_ids": LABELS[: 1 + i % 3]}
        | ({"apply_softmax": True, "temperature": 0.5 + i} if i % 2 else {})
        for i in range(12)
    ]
    sequential = [(await http.score(**request))["scores"] for request in requests]
    concurrent = await asyncio.gather(*(http.score(**request) for request in requests))
    for one, other in zip(sequential, concurrent, strict=True):
        assert_same(one, other["scores"])


async def test_labels_per_item(http: Http):
    items = ["a", "b", "c"]
    lists = [[1], [2, 3], [4, 5, 6]]
    answer = await http.score(query="q ", items=items, label_token_ids=lists, return_token_logprobs=True)
    assert [len(row) for row in answer["scores"]] == [len(row) for row in answer["token_logprobs"]] == [1, 2, 3]
    for item, labels, row in zip(items, lists, answer["scores"], strict=True):
        alone = await http.score(query="q ", items=[item], label_token_ids=labels)
        assert_same([row], alone["scores"])


async def test_labels_per_item_must_match_the_items(http: Http):
    error = await http.refused(query="q", items=["a", "b", "c"], label_token_ids=[[1], [2]])
    assert "2 lists for 3 items" in error["message"]
    assert error["param"] == "label_token_ids"


@pytest.mark.parametrize("temperature", [1e-300, 0.01, 0.5, 2, 1e300])
async def test_temperature(http: Http, temperature: float):
    ask = ASK | {"apply_softmax": True, "return_token_logprobs": True}
    answer = await http.score(**ask, temperature=temperature)
    for row, logprobs in zip(answer["scores"], answer["token_logprobs"], strict=True):
        weights = [math.exp((value - max(logprobs)) / temperature) for value in logprobs]
        assert row == pytest.approx([weight / sum(weights) for weight in weights], rel=1e-5)
    plain = await http.score(**ask)
    for scaled, unscaled in zip(answer["token_logprobs"], plain["token_logprobs"], strict=True):
        assert scaled == pytest.approx(unscaled, abs=TOLERANCE)


@pytest.mark.parametrize("value", ["0", "-1", "NaN", "Infinity", "1e999", "true", '"1"', "null", "[1]"])
async def test_temperature_must_be_a_positive_number(http: Http, value: str):
    body = f'{{"items": ["a"], "label_token_ids": [1], "apply_softmax": true, "temperature": {value}}}'
    error = http.flat(await http.post(body), 400)
    assert error["param"] == "temperature"


async def test_temperature_needs_the_softmax(http: Http):
    error = await http.refused(**ASK, temperature=0.5)
    assert error["param"] == "temperature"
    assert "apply_softmax" in error["message"]
    await http.score(**ASK, temperature=1.0)


@pytest.mark.parametrize(
    "text", ["这部电影很好看。", "great 🎉👩‍👩‍👧", "naïve café", "\x00\n\t", "e\u0301", "\u202e abc"]
)
async def test_unicode(http: Http, text: str):
    answer = await http.score(query="评价: ", items=[text, text[::-1]], label_token_ids=LABELS)
    assert len(answer["scores"]) == 2
    back = await http.client.post("/detokenize", json={"tokens": await http.ids(text)})
    assert text in back.json()["prompt"]


async def test_every_name_is_the_same_model(http: Http):
    scores = [(await http.score(**ASK, model=name))["scores"] for name in http.info["names"]]
    assert "default" in http.info["names"]
    for other in scores[1:]:
        assert_same(scores[0], other)


async def test_unknown_model_lists_the_names(http: Http):
    for path, body in (("/v1/score", ASK), ("/tokenize", {"prompt": "a"}), ("/detokenize", {"tokens": [1]})):
        error = await http.refused(path, status=404, **body, model="gpt-oss")
        assert error["param"] == "model"
        assert all(name in error["message"] for name in ["gpt-oss", *http.info["names"]])


@pytest.mark.parametrize(("query", "items"), [("q", [[1]]), ([1], ["a"]), ([1], "a"), ("", [[1]]), ([], ["a"])])
async def test_query_and_items_must_be_of_one_kind(http: Http, query: Any, items: Any):
    error = await http.refused(query=query, items=items, label_token_ids=[1])
    assert error["message"] == "Invalid combination of query/items types for score_request."


@pytest.mark.parametrize("labels", [[], [[]], [[1], []], [3, 3], [[1, 2], [4, 4]]])
async def test_label_lists_are_neither_empty_nor_repeat(http: Http, labels: Any):
    error = await http.refused(query="q", items=["a"] * max(1, len(labels)), label_token_ids=labels)
    assert error["param"] == "label_token_ids"


async def test_a_prompt_without_tokens_names_its_item(http: Http):
    error = await http.refused(query=[], items=[[1], []], label_token_ids=[1])
    assert error["param"] == "items"
    assert "items[1]" in error["message"]


async def test_the_context_is_the_limit(http: Http):
    limit = http.info["limits"]["max_prompt_tokens"]
    await http.score(query=[1] * (limit - 1), items=[[2]], label_token_ids=[1])
    error = await http.refused(query=[1] * (limit - 1), items=[[2], [2, 3]], label_token_ids=[1])
    assert error["param"] == "items"
    assert all(word in error["message"] for word in ("items[1]", str(limit), str(limit + 1), "shorten"))


class TestIds:
    """Ids at the edges, for labels and for inputs."""

    @pytest.mark.parametrize("field", ["label_token_ids", "items", "query"])
    async def test_edges(self, http: Http, field: str):
        size = http.vocab_size
        for good in (0, size - 1):
            await http.score(**self.ask(field, good))
        for bad in (-1, size, 10**12, 10**30, -(10**30)):
            error = await http.refused(**self.ask(field, bad))
            place = "items[0][1]" if field == "items" else f"{field}[1]"
            assert error["message"] == f"{place}: Token ID {bad} is out of vocabulary (vocab size: {size})"
            assert error["param"] == field

    @pytest.mark.parametrize("field", ["label_token_ids", "items", "query"])
    @pytest.mark.parametrize("bad", ["true", "false", "1.5", "1.0", "1e2", '"1"', "null", "{}", "NaN"])
    async def test_not_an_integer(self, http: Http, field: str, bad: str):
        body = {"query": "[1]", "items": "[[1]]", "label_token_ids": "[2]"}
        body[field] = f"[[4, {bad}]]" if field == "items" else f"[4, {bad}]"
        fields = ", ".join(f'"{name}": {value}' for name, value in body.items())
        error = http.flat(await http.post("{" + fields + "}"), 400)
        assert error["param"] == field
        assert ("items[0][1]" if field == "items" else f"{field}[1]") in error["message"]

    async def test_an_added_special_token(self, http: Http):
        [special] = await http.ids("<|im_end|>")
        for field in ("label_token_ids", "items", "query"):
            await http.score(**self.ask(field, special))

    def ask(self, field: str, value: int) -> dict[str, Any]:
        ask: dict[str, Any] = {"query": [4], "items": [[5]], "label_token_ids": [6]}
        ask[field] = [[5, value]] if field == "items" else [7, value]
        return ask
