"""The columns that a job adds to its input's: the one place that names them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from serve_app.schemas import ScoreRequest, ScoreResponse
from serve_app.tasks.logprobs import LogprobsRequest, SequenceLogprobs
from serve_app.tasks.systemone import AnyAnswer, AnyQuestion, NoulQuestion


class Column(NamedTuple):
    """A column that a job adds.

    Attributes:
        value: the type of its values, or of those in its lists.
        labels: the names of the values in a list. CSV has a column for each, such as ``scores[ yes]``. None: a row has
            a single value.
        depth: values without names are in lists, in so many; in CSV they are JSON.
    """

    value: type[float] | type[int] | type[str]
    labels: Sequence[str] | None = None
    depth: int = 0


def of_scores(request: ScoreRequest, labels: Sequence[str] = ()) -> dict[str, Column]:
    """The columns of label scores by name, which is also that of the answer's field: a list with an entry per item."""
    columns = {
        "scores": (Column(float, labels), True),
        "token_logprobs": (Column(float, labels), request.return_token_logprobs),
        "label_mass": (Column(float), request.return_label_mass),
        "truncated": (Column(int), request.truncate == "item"),
    }
    return {name: column for name, (column, requested) in columns.items() if requested}


def scored(request: ScoreRequest, answer: ScoreResponse, index: int) -> dict[str, Any]:
    """An item's value in each column of its scores."""
    return {name: getattr(answer, name)[index] for name in of_scores(request)}


def of_logprobs(request: LogprobsRequest) -> dict[str, Column]:
    """The columns of a sequence's logprobs by name, which is also that of the answer's field."""
    columns = {"token_ids": Column(int, depth=1), "logprobs": Column(float, depth=1)}
    tops = {"top_ids": Column(int, depth=2), "top_logprobs": Column(float, depth=2)}
    return columns | (tops if request.top else {})


def taught(request: LogprobsRequest, answer: SequenceLogprobs) -> dict[str, Any]:
    """A row's value in each column of its logprobs."""
    return {name: getattr(answer, name) for name in of_logprobs(request)}


_SPREAD = {".probabilities": "probabilities", ".confidence": "confidence"}
_MASS = {".label_mass": "x_label_mass"}
_DECISIONS: Mapping[str, Mapping[str, str]] = {
    "noul": {"": "noul", **_MASS},
    "choice": {"": "choice", **_SPREAD, **_MASS},
    "score": {"": "score", **_SPREAD, **_MASS},
}
"""For each type of question, what follows its name in its columns' names, and the field of the answer that is there."""


def of_decisions(questions: Mapping[str, AnyQuestion]) -> dict[str, Column]:
    """The columns of the answers to questions, by name.

    Raises:
        ValueError: two columns would have the same name.
    """
    columns = [
        (f"{name}{suffix}", _column(question, field))
        for name, question in questions.items()
        for suffix, field in _DECISIONS[question.type].items()
    ]
    ((twice, count),) = Counter(name for name, _ in columns).most_common(1)
    if count > 1:
        raise ValueError(f"{count} output columns would be called {twice!r}; rename one of the questions")
    return dict(columns)


def decided(answers: Mapping[str, AnyAnswer]) -> dict[str, Any]:
    """A row's value in each column of its answers."""
    return {
        f"{name}{suffix}": _value(getattr(answer, field))
        for name, answer in answers.items()
        for suffix, field in _DECISIONS[answer.type].items()
    }


def _column(question: AnyQuestion, field: str) -> Column:
    if field != "probabilities" or isinstance(question, NoulQuestion):
        return Column(str if field == "choice" else float)
    criteria = question.criteria
    return Column(float, [*criteria] if isinstance(criteria, dict) else [str(level) for level in range(len(criteria))])


def _value(found: Any) -> Any:
    return [*found.values()] if isinstance(found, dict) else found
