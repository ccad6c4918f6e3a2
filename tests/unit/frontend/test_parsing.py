"""Parsing in pieces accepts what parsing as a whole accepts, with the same values and the same errors."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve_app.errors import InvalidRequestError
from serve_app.frontend.parsing import parse_in_pieces, parse_large
from serve_app.schemas import DetokenizeRequest, RequestBody, ScoreRequest, parse
from serve_app.tasks.completions import CompletionRequest
from serve_app.tasks.rerank import RerankRequest

MODELS: list[type[RequestBody]] = [ScoreRequest, RerankRequest, CompletionRequest, DetokenizeRequest]

texts = st.text(st.sampled_from('a,:[]{}"\\ é狐\n'), max_size=6)
ids = st.lists(st.integers(0, 99), max_size=6)
lists = (
    st.lists(texts, max_size=6) | ids | st.lists(ids, max_size=4) | st.lists(st.lists(texts, max_size=3), max_size=4)
)
values = lists | texts | st.lists(st.none() | st.booleans() | texts | ids, max_size=4)
names = ["query", "items", "label_token_ids", "labels", "documents", "prompt", "tokens", "max_tokens", "no\\such"]
requests = st.lists(st.tuples(st.sampled_from(names), values), max_size=4).map(
    lambda pairs: "{" + ", ".join(f"{json.dumps(name)}: {json.dumps(value)}" for name, value in pairs) + "}"
)


def outcome(call: Any, *given: Any) -> Any:
    try:
        made = call(*given)
        return made, made.model_fields_set
    except InvalidRequestError as error:
        return error.message, error.param, error.index


@given(requests, st.sampled_from(MODELS), st.sampled_from([1, 4, 12]))
def test_pieces_parse_as_the_whole(text: str, model: type[RequestBody], piece_bytes: int):
    body = text.encode()
    assert outcome(parse_in_pieces, model, body, piece_bytes) == outcome(parse, model, body)


@given(requests, st.sampled_from(MODELS), st.data())
def test_pieces_of_invalid_json_fail_as_the_whole(text: str, model: type[RequestBody], data: st.DataObject):
    at = data.draw(st.integers(0, len(text) - 1))
    broken = text[:at] + data.draw(st.sampled_from(["", ",", '"', "[", "]", "}", "\\", "1,"])) + text[at + 1 :]
    assert outcome(parse_in_pieces, model, broken.encode(), 1) == outcome(parse, model, broken.encode())


@pytest.mark.parametrize(
    "items",
    [
        '["a", "b"]',
        "[[1], [2, 3], [4]]",
        '["a", [1]]',
        "[[1], 2]",
        "[1,]",
        "[,[1]]",
        "[[1],,[2]]",
        '["a]", "b\\\\", "c"]',
    ],
)
def test_lists_that_are_cut(items: str):
    body = f'{{"items": {items}, "query": null, "label_token_ids": [1, 2, 3]}}'.encode()
    assert outcome(parse_in_pieces, ScoreRequest, body, 1) == outcome(parse, ScoreRequest, body)


async def test_the_event_loop_goes_on_while_a_large_body_is_parsed():
    body = json.dumps({"items": [[*range(100)]] * 10_000, "label_token_ids": [1]}).encode()
    parsing = asyncio.create_task(parse_large(ScoreRequest, body))
    turns = 0
    while not parsing.done():
        await asyncio.sleep(0)
        turns += 1
    assert turns > 20
    assert (await parsing).items == [[*range(100)]] * 10_000


def test_no_more_than_a_piece_is_parsed_at_once(monkeypatch: pytest.MonkeyPatch):
    """Between the pieces the event loop answers other requests."""
    seen: list[int] = []
    whole = RequestBody.model_validate_json.__func__  # pyright: ignore

    def counting(model: type[RequestBody], body: bytes, **options: Any) -> RequestBody:
        seen.append(len(body))
        return whole(model, body, **options)

    monkeypatch.setattr(RequestBody, "model_validate_json", classmethod(counting))
    for body in (
        {"items": ["some words"] * 20_000, "label_token_ids": [1]},
        {"items": [[*range(100)]] * 1_000, "query": [*range(30_000)], "label_token_ids": [[1]] * 1_000},
    ):
        assert parse_in_pieces(ScoreRequest, json.dumps(body).encode(), 4096) == ScoreRequest(**body)
    assert len(seen) > 80
    assert max(seen) < 4 * 4096
