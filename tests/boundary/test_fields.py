"""Fields that sglang does not have, except labels, on the fake or on a running service."""

from __future__ import annotations

import re
from typing import Any

import pytest

from tests.boundary.asking import Http

LABELS = [5, 7]
QUERY = "Is this text positive? "


def limit(http: Http) -> int:
    return http.info["limits"]["max_prompt_tokens"]


async def test_prompt_token_ids_are_what_the_model_saw(http: Http):
    items = ["the fox", "", "yes"]
    ask: dict[str, Any] = {"query": QUERY, "items": items, "label_token_ids": LABELS}
    answer = await http.score(**ask, return_prompt_token_ids=True)
    assert answer["prompt_token_ids"] == [await http.ids(QUERY + item) for item in items]
    ids = await http.score(query=[4], items=[[5], [6, 7]], label_token_ids=LABELS, return_prompt_token_ids=True)
    assert ids["prompt_token_ids"] == [[4, 5], [4, 6, 7]]
    assert "prompt_token_ids" not in await http.score(**ask)


@pytest.mark.parametrize("item_first", [False, True])
@pytest.mark.parametrize("query", [" the", "the quick brown fox jumps over the lazy dog. " * 8])
async def test_truncated_text_loses_the_end_of_its_item_alone(http: Http, query: str, item_first: bool):
    items = ["fox ", "yes no " * limit(http)]
    ask: dict[str, Any] = {"query": query, "items": items, "label_token_ids": LABELS, "item_first": item_first}
    error = await http.refused(**ask)
    assert 'truncate: "item"' in error["message"]
    answer = await http.score(**ask, truncate="item", return_prompt_token_ids=True)
    whole = [await http.ids(item + query if item_first else query + item) for item in items]
    short, long = answer["prompt_token_ids"]
    assert short == whole[0]
    assert len(long) == limit(http)
    text = (await http.client.post("/detokenize", json={"tokens": long})).json()["prompt"]
    if item_first:
        assert text.endswith(query)
        assert items[1].startswith(text.removesuffix(query))
    else:
        assert long == whole[1][: limit(http)]
        assert text.startswith(query)
    assert answer["truncated"] == [0, len(whole[1]) - limit(http)]
    assert answer["usage"]["prompt_tokens"] == len(short) + len(long)
    alone = await http.score(items=[long], label_token_ids=LABELS)
    assert answer["scores"][1] == pytest.approx(alone["scores"][0], rel=1e-5)


@pytest.mark.parametrize("item_first", [False, True])
async def test_truncated_ids(http: Http, item_first: bool):
    query, items = [1, 2, 3], [[4, 5], [6] + [7] * limit(http)]
    ask: dict[str, Any] = {"query": query, "items": items, "label_token_ids": LABELS, "item_first": item_first}
    answer = await http.score(**ask, truncate="item", return_prompt_token_ids=True)
    kept = [[4, 5], [6] + [7] * (limit(http) - 4)]
    wanted = [item + query if item_first else query + item for item in kept]
    assert answer["prompt_token_ids"] == wanted
    assert answer["truncated"] == [0, 4]


async def test_truncation_leaves_room_for_labels_of_several_tokens(http: Http):
    long = "yes no " * limit(http)
    ask: dict[str, Any] = {"items": ["fox", long], "labels": [" yes", " zzqq"], "return_prompt_token_ids": True}
    whole = (await http.refused(**ask, query="the "))["message"]
    assert "; this model reads at most" in whole
    assert "a label" not in whole  # labels are not read if the prompt alone is too long
    ids = await http.ids("the fox" + " yes" * limit(http))
    just = (await http.client.post("/detokenize", json={"tokens": ids[: limit(http)]})).json()["prompt"]
    refused = await http.refused(items=[just], labels=[" yes", " zzqq"])
    assert re.search(r", and a label adds \d+ before its last; ", refused["message"])
    for item_first in (False, True):
        answer = await http.score(**ask, query="the ", truncate="item", item_first=item_first)
        label = answer["label_tokens"][1][1]
        assert len(answer["prompt_token_ids"][1]) == limit(http) - (len(label) - 1)
        assert None not in answer["scores"]


@pytest.mark.parametrize("kind", ["text", "ids"])
async def test_the_query_is_never_truncated(http: Http, kind: str):
    query, item = ("yes " * limit(http), "no") if kind == "text" else ([1] * limit(http), [2])
    for item_first in (False, True):
        ask: dict[str, Any] = {"query": query, "items": [item], "item_first": item_first, "truncate": "item"}
        error = await http.refused(**ask, label_token_ids=LABELS)
        assert error["param"] == "query"
        assert "items[0]" in error["message"]
        assert str(limit(http)) in error["message"]
        assert "shorten the query" in error["message"]


async def test_wrong_items_harm_no_others(http: Http):
    items = [[1], [http.vocab_size], [], [2], [3] * (limit(http) + 1)]
    ask: dict[str, Any] = {"items": items, "label_token_ids": LABELS, "return_token_logprobs": True}
    await http.refused(**ask)
    extras: dict[str, Any] = {"return_label_mass": True, "return_prompt_token_ids": True}
    answer = await http.score(**ask, **extras, on_error="item")
    good = await http.score(items=[[1], [2]], label_token_ids=LABELS)
    for name in ("scores", "token_logprobs", "label_mass", "prompt_token_ids"):
        assert [row is None for row in answer[name]] == [False, True, True, False, True]
    for row, alone in zip((0, 3), good["scores"], strict=True):
        assert answer["scores"][row] == pytest.approx(alone, rel=1e-5)
    assert [(error["index"], error["code"]) for error in answer["errors"]] == [(1, 400), (2, 400), (4, 400)]
    said = [error["message"] for error in answer["errors"]]
    assert all(part in message for part, message in zip(("vocab", "both empty", "reads at most"), said, strict=True))
    assert answer["usage"]["prompt_tokens"] == 2


async def test_labels_that_are_wrong_for_one_item(http: Http):
    ask: dict[str, Any] = {"items": ["a", "b", "c"], "on_error": "item"}
    answer = await http.score(**ask, label_token_ids=[[1], [2, 2], [3, 4]])
    assert [row and len(row) for row in answer["scores"]] == [1, None, 2]
    assert answer["errors"][0]["index"] == 1
    assert "label_token_ids[1] names 2 more than once" in answer["errors"][0]["message"]
    # An error of the whole request fails it.
    for fields in ({"label_token_ids": [1, 1]}, {"label_token_ids": [[1]]}, {"query": [1], "label_token_ids": [1]}):
        await http.refused(**ask, **fields)


async def test_all_items_may_be_wrong_or_right(http: Http):
    wrong = await http.score(items=[[], []], label_token_ids=LABELS, on_error="item")
    assert wrong["scores"] == [None, None]
    assert len(wrong["errors"]) == 2
    assert wrong["usage"]["prompt_tokens"] == wrong["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    right = await http.score(items=[[1]], label_token_ids=LABELS, on_error="item")
    assert right["errors"] == []


async def test_timeout_s_is_the_services_at_most(http: Http):
    most = http.info["limits"]["timeout_s"]
    await http.score(items=["a"], label_token_ids=LABELS, timeout_s=most)
    error = await http.refused(items=["a"], label_token_ids=LABELS, timeout_s=2 * most)
    assert error["param"] == "timeout_s"
    assert f"{most:g} s" in error["message"]


async def test_without_special_tokens(http: Http):
    ask: dict[str, Any] = {"query": "the ", "items": ["fox"], "label_token_ids": LABELS, "add_special_tokens": False}
    answer = await http.score(**ask, return_prompt_token_ids=True)
    plain = await http.client.post("/tokenize", json={"prompt": "the fox", "add_special_tokens": False})
    assert answer["prompt_token_ids"] == [plain.json()["tokens"]]
