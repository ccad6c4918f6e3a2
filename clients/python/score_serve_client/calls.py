"""Requests as data, which both clients send: where, what, and the type of the answer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from score_serve_client.answers import Answer, DecisionLine, Decisions, Models, Ranking, Row, Scores

if TYPE_CHECKING:
    import pandas as pd

A = TypeVar("A", bound=Answer)

ITEMS = 500
"""Items of one request for a Series."""


@dataclass(frozen=True)
class Call(Generic[A]):
    """One request.

    Attributes:
        body: the fields of a POST; None: a GET.
        answer: the type of the answer, or of each line of a stream but the last, which has the usage.
    """

    path: str
    answer: type[A]
    body: Mapping[str, Any] | None = None


def score(model: str, query: str, items: Iterable[str], options: Mapping[str, Any]) -> Call[Scores]:
    return Call("/v1/score", Scores, {"model": model, "query": query, "items": [*items], **options})


def stream(model: str, query: str, items: Iterable[str], options: Mapping[str, Any]) -> Call[Row]:
    return Call("/v1/score", Row, {"model": model, "query": query, "items": [*items], **options, "stream": True})


def series(model: str, query: str, items: pd.Series[Any], options: Mapping[str, Any]) -> Iterable[Call[Scores]]:
    texts = items.tolist()
    for at in range(0, len(texts), ITEMS):
        yield score(model, query, texts[at : at + ITEMS], options)


def frame(answers: list[Scores], items: pd.Series[Any], options: Mapping[str, Any]) -> pd.DataFrame:
    """The scores of all requests for a Series, with its index."""
    joined = Scores.model_construct(scores=[row for answer in answers for row in answer.scores])
    return joined.frame(labels=options.get("labels"), index=items.index)


def rerank(model: str, query: str, documents: Iterable[str], options: Mapping[str, Any]) -> Call[Ranking]:
    return Call("/v1/rerank", Ranking, {"model": model, "query": query, "documents": [*documents], **options})


def decide(model: str, state: Any, questions: Mapping[str, Any], options: Mapping[str, Any]) -> Call[Decisions]:
    return Call("/v1/systemone", Decisions, {"model": model, "state": state, "questions": dict(questions), **options})


def decide_each(model: str, state: Any, questions: Mapping[str, Any], options: Mapping[str, Any]) -> Call[DecisionLine]:
    asked = {"model": model, "state": state, "questions": dict(questions), **options, "stream": True}
    return Call("/v1/systemone", DecisionLine, asked)


MODELS = Call("/v1/models", Models)
