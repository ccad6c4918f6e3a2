"""Rows as requests: grouped by query, halved around errors, and with the scores that each row has alone."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from typing import Any

import pytest

from serve_app.errors import InternalError, InvalidRequestError, TooLargeError
from serve_app.frontend.service import ModelService
from serve_app.jobs import columns, scoring
from serve_app.jobs.scoring import score
from serve_app.jobs.targets import Ask
from serve_app.schemas import ScoreRequest, ScoreResponse
from serve_app.scorer.fake_engine import FakeEngine
from serve_app.settings import Limits, ModelSettings
from serve_app.tasks.score import SCORE
from serve_app.tasks.tokenizer import TextTokenizer
from tests.local import CONTEXT, VOCAB_SIZE, DirectReplicas

REQUEST = ScoreRequest(items=[], labels=[" yes", " no"], apply_softmax=True)


class Asked:
    """The service in this process, with a list of its requests."""

    def __init__(self, tokenizer: TextTokenizer, limits: Limits | None = None) -> None:
        engine = FakeEngine(VOCAB_SIZE, CONTEXT)
        settings = ModelSettings(engine="fake", limits=limits or Limits())
        self._service = ModelService(settings, tokenizer, engine.info, DirectReplicas(engine))
        self.requests: list[ScoreRequest] = []

    def __call__(self, request: ScoreRequest) -> ScoreResponse:
        self.requests.append(request)
        return asyncio.run(self._service.answer(SCORE, request, request_id="r"))


def rows(rng: random.Random, count: int) -> list[tuple[int, str, str]]:
    words = ["the fox", "the lazy dog", "yes", "no", "quick"]
    queries = [f"{word}? " for word in words[:3]]
    made = [(rng.choice(queries), " ".join(rng.choices(words, k=rng.randrange(1, 5)))) for _ in range(count)]
    return [(3 * at, query if at % 4 else f"{at} {query}", item) for at, (query, item) in enumerate(made)]


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"item_first": True},
        {"apply_softmax": False, "return_token_logprobs": True, "return_label_mass": True},
        {"labels": [" by no means", " yes"], "length_normalize": True},
        {"truncate": "item"},
        {"add_special_tokens": False},
    ],
)
def test_each_row_has_the_scores_that_it_has_alone(bos_tokenizer: TextTokenizer, fields: dict[str, Any]):
    request = REQUEST.model_copy(update=fields)
    ask = Asked(bos_tokenizer)
    asked = rows(random.Random(0), 40)
    found, cost = score(request, asked, ask)
    assert len(ask.requests) < 15
    alone = Asked(bos_tokenizer)
    tokens = 0
    for at, query, item in asked:
        answer = alone(request.model_copy(update={"query": query, "items": [item]}))
        tokens += answer.usage.prompt_tokens
        wanted = {name: getattr(answer, name)[0] for name in columns.of_scores(request)}
        assert found[at] == wanted
    assert cost.prompt_tokens == tokens


def test_a_query_is_sent_once_and_lone_ones_go_together(tokenizer: TextTokenizer):
    ask = Asked(tokenizer)
    score(REQUEST, [(0, "a", "x"), (1, "b", "y"), (2, "a", "z"), (3, "c", "w")], ask)
    assert [(each.query, each.items) for each in ask.requests] == [("a", ["x", "z"]), ("", ["by", "cw"])]
    _, cost = score(REQUEST, [(0, "the fox ", "a"), (1, "the fox ", "b")], ask)
    assert cost.cached_tokens * 2 > cost.prompt_tokens - 4
    ask = Asked(tokenizer)
    score(REQUEST.model_copy(update={"truncate": "item"}), [(0, "a", "x"), (1, "b", "y")], ask)
    assert [(each.query, each.items) for each in ask.requests] == [("a", ["x"]), ("b", ["y"])]


def test_requests_are_bounded(tokenizer: TextTokenizer, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(scoring, "MOST_ITEMS", 3)
    monkeypatch.setattr(scoring, "MOST_CHARACTERS", 10)
    ask = Asked(tokenizer)
    items = ["a", "b", "c", "d", "long enough for two", "e", "12345", "123456"]
    found, _ = score(REQUEST, [(at, "q", item) for at, item in enumerate(items)], ask)
    assert [each.items for each in ask.requests] == [
        ["a", "b", "c"],
        ["d"],
        ["long enough for two"],
        ["e", "12345"],
        ["123456"],
    ]
    assert len(found) == len(items)


def test_requests_are_as_large_as_they_are_fast_and_each_tells_its_rows(
    tokenizer: TextTokenizer, monkeypatch: pytest.MonkeyPatch
):
    """A clock in which an item takes a tenth of a second: 20 items in the two seconds of a request."""
    ask, now, told = Asked(tokenizer), [0.0], list[int]()

    def slow(request: ScoreRequest) -> ScoreResponse:
        now[0] += 0.1 * len(request.items)
        return ask(request)

    monkeypatch.setattr(scoring.time, "monotonic", lambda: now[0])
    found, _ = score(REQUEST, [(at, "q ", "fox") for at in range(175)], slow, told.append)
    assert len(found) == 175
    assert told == [len(each.items) for each in ask.requests] == [100, 20, 20, 20, 15]


def test_a_bad_row_harms_no_other(tokenizer: TextTokenizer):
    ask = Asked(tokenizer)
    found, _ = score(REQUEST, [(0, "q ", "fox"), (1, "q ", "x" * 1_000), (2, "", "")], ask)
    assert isinstance(found[0], dict)
    assert str(found[1]).startswith("the item: the prompt has 1")
    assert str(found[2]).startswith("the item and the query are both empty")


def failing(ask: Ask, error: type[Exception], wrong: Callable[[list[str]], bool]) -> Ask:
    def asked(request: ScoreRequest) -> ScoreResponse:
        assert isinstance(request.items, list)
        if wrong([str(item) for item in request.items]):
            raise error("refused")
        return ask(request)

    return asked


def test_a_request_that_is_too_much_is_halved(tokenizer: TextTokenizer):
    ask = Asked(tokenizer, Limits(max_items=3))
    asked = [(at, "q ", f"fox {at}") for at in range(10)]
    found, cost = score(REQUEST, asked, ask)
    whole, once = score(REQUEST, asked, Asked(tokenizer))
    assert (found, cost.prompt_tokens) == (whole, once.prompt_tokens)
    for error in (InternalError, TooLargeError):
        found, _ = score(REQUEST, asked, failing(Asked(tokenizer), error, lambda items: "fox 7" in items))
        assert [at for at, one in found.items() if one == "refused"] == [7]


def test_an_error_of_every_row_ends_the_job(tokenizer: TextTokenizer):
    for fields, said in (
        ({"labels": [" yes", " yes"]}, "more than once"),
        ({"labels": None}, "label_token_ids is required"),
    ):
        with pytest.raises(InvalidRequestError, match=said):
            score(REQUEST.model_copy(update=fields), [(0, "q", "a")], Asked(tokenizer))
