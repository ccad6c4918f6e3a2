"""Labels in words are scored by the tokens that they add in context, on the fake or on a running service."""

from __future__ import annotations

import math
from typing import Any

import pytest

from tests.boundary.asking import Http

QUERY = "Is this text positive?"
ITEMS = ["the fox is lazy", "yes", "no no no"]
ONE = [" yes", " no"]
"""Labels of one token each."""
SEVERAL = [" yes", " zzqq", " no", " zzqx", " zz"]
"""Labels with a common beginning, one of which is the beginning of others."""


async def added(http: Http, prompt: str, label: str) -> tuple[list[int], list[int]]:
    """The tokens of the prompt, and the tokens that the label adds."""
    alone, together = await http.ids(prompt), await http.ids(prompt + label)
    assert together[: len(alone)] == alone
    return alone, together[len(alone) :]


async def token_logprobs(http: Http, prompt: str, label: str) -> list[float]:
    """The logprob of each token of a label, requested one by one as token ids."""
    alone, tokens = await added(http, prompt, label)
    items = [alone + tokens[:at] for at in range(len(tokens))]
    ids = [[token] for token in tokens]
    answer = await http.score(items=items, label_token_ids=ids, return_token_logprobs=True)
    return [row[0] for row in answer["token_logprobs"]]


async def test_labels_of_one_token_score_as_their_ids(http: Http):
    ids = [(await added(http, QUERY, label))[1] for label in ONE]
    assert [len(tokens) for tokens in ids] == [1, 1]
    options: dict[str, Any]
    for options in ({}, {"apply_softmax": True, "temperature": 0.5}, {"item_first": True}, {"length_normalize": True}):
        items = [item + QUERY for item in ITEMS] if options.get("item_first") else [" " + item for item in ITEMS]
        ask: dict[str, Any] = {"query": "" if options.get("item_first") else QUERY, "items": items, **options}
        words = await http.score(**ask, labels=ONE)
        tokens = await http.score(**ask, label_token_ids=[tokens[0] for tokens in ids])
        for word_row, token_row in zip(words["scores"], tokens["scores"], strict=True):
            assert word_row == pytest.approx(token_row, rel=1e-5)
        assert words["usage"]["prompt_tokens"] == tokens["usage"]["prompt_tokens"]


@pytest.mark.parametrize("item_first", [False, True])
async def test_a_label_of_several_tokens_has_the_sum_of_their_logprobs(http: Http, item_first: bool):
    items = [" " + item for item in ITEMS]
    ask: dict[str, Any] = {"query": QUERY, "items": items, "labels": SEVERAL, "item_first": item_first}
    answer = await http.score(**ask, return_token_logprobs=True)
    mean = await http.score(**ask, return_token_logprobs=True, length_normalize=True)
    softmax = await http.score(**ask, apply_softmax=True, temperature=2.0)
    normalised = await http.score(**ask, apply_softmax=True, length_normalize=True)
    for row, item in enumerate(items):
        each = [await token_logprobs(http, item + QUERY if item_first else QUERY + item, label) for label in SEVERAL]
        assert max(map(len, each)) > 1
        sums, means = [math.fsum(values) for values in each], [math.fsum(values) / len(values) for values in each]
        assert answer["token_logprobs"][row] == pytest.approx(sums, abs=1e-4)
        assert answer["scores"][row] == pytest.approx([math.exp(value) for value in sums], rel=1e-4)
        assert mean["token_logprobs"][row] == pytest.approx(means, abs=1e-4)
        assert mean["scores"][row] == pytest.approx([math.exp(value) for value in means], rel=1e-4)
        for scores, values in ((softmax, [value / 2 for value in sums]), (normalised, means)):
            weights = [math.exp(value - max(values)) for value in values]
            assert scores["scores"][row] == pytest.approx([weight / sum(weights) for weight in weights], rel=1e-4)


async def test_label_tokens_are_what_a_label_adds(http: Http):
    answer = await http.score(query=QUERY, items=[" a", " b"], labels=SEVERAL)
    for row, item in zip(answer["label_tokens"], (" a", " b"), strict=True):
        for pieces, label in zip(row, SEVERAL, strict=True):
            _, tokens = await added(http, QUERY + item, label)
            spelled = await http.client.post("/tokenize", json={"prompt": QUERY + item + label})
            assert pieces == spelled.json()["token_strs"][-len(tokens) :]
    assert "label_tokens" not in await http.score(query=QUERY, items=["a"], label_token_ids=[1])


async def test_usage_counts_prompts_without_labels(http: Http):
    words = await http.score(query=QUERY, items=[" a", " b"], labels=SEVERAL, return_prompt_token_ids=True)
    assert words["prompt_token_ids"] == [await http.ids(QUERY + " a"), await http.ids(QUERY + " b")]
    assert words["usage"]["prompt_tokens"] == sum(map(len, words["prompt_token_ids"]))
    assert 0 <= words["usage"]["prompt_tokens_details"]["cached_tokens"] <= words["usage"]["prompt_tokens"]


async def test_one_list_an_item(http: Http):
    lists = [[" yes", " no"], [" zzqq"], [" no", " zz", " yes"]]
    answer = await http.score(query=QUERY, items=ITEMS, labels=lists, apply_softmax=True)
    for item, labels, row in zip(ITEMS, lists, answer["scores"], strict=True):
        alone = await http.score(query=QUERY, items=[item], labels=labels, apply_softmax=True)
        assert row == pytest.approx(alone["scores"][0], rel=1e-5)


async def test_label_mass_is_what_the_labels_cover(http: Http):
    ask: dict[str, Any] = {"query": QUERY, "items": [" a", " b"]}
    plain = await http.score(**ask, label_token_ids=[5, 7, 11])
    mass = await http.score(**ask, label_token_ids=[5, 7, 11], apply_softmax=True, return_label_mass=True)
    assert mass["label_mass"] == pytest.approx([sum(row) for row in plain["scores"]], rel=1e-5)
    # The mass of " zz" includes labels that begin with it.
    words = await http.score(**ask, labels=SEVERAL, length_normalize=True, return_label_mass=True)
    whole = await http.score(**ask, labels=[" yes", " no", " zz"])
    assert words["label_mass"] == pytest.approx([sum(row) for row in whole["scores"]], rel=1e-4)


async def test_a_label_that_changes_the_prompts_last_tokens(http: Http):
    error = await http.refused(query="the ", items=["fox", "qui"], labels=[" yes", "ck"])
    assert error["param"] == "labels"
    assert all(said in error["message"] for said in ("items[1]", '"ck"', "alone it ends in", "with the label in"))
    answer = await http.score(query="the ", items=["fox", "qui"], labels=[" yes", "ck"], on_error="item")
    assert answer["scores"][1] is answer["label_tokens"][1] is None
    assert len(answer["scores"][0]) == 2
    assert [(error["index"], error["code"]) for error in answer["errors"]] == [(1, 400)]


@pytest.mark.parametrize(
    ("fields", "param", "said"),
    [
        ({"labels": []}, "labels", "labels is empty"),
        ({"labels": [[" yes"], []]}, "labels", "labels[1] is empty"),
        ({"labels": [[" yes"]]}, "labels", "1 lists for 2 items"),
        ({"labels": [" yes", ""]}, "labels", 'labels has "", which adds no token'),
        ({"labels": [" yes", " yes"]}, "labels", 'names " yes" more than once'),
        ({"labels": [[" yes"], [" no", " no"]]}, "labels", 'labels[1] names " no" more than once'),
        ({"labels": [" yes"], "label_token_ids": [1]}, "labels", "are both given"),
        ({"labels": [" yes"], "items": [[1], [2]]}, "labels", "send label_token_ids"),
        ({}, "label_token_ids", "label_token_ids is required, unless labels"),
    ],
)
async def test_wrong_labels(http: Http, fields: dict[str, Any], param: str, said: str):
    error = await http.refused(**{"items": ["a", "b"]} | fields)
    assert error["param"] == param
    assert said in error["message"]
