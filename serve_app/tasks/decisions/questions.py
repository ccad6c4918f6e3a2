"""Typed questions and their answers, free of any wire format: what the decision routes share."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from serve_app.errors import InvalidRequestError, ScoringError


class Kind(StrEnum):
    """The kinds of questions.

    ``NOUL`` asks whether something is true (TypeSafe's name; OpenAI calls it a predicate), ``CHOICE`` which of several
    options holds, ``SCORE`` which level of a scale.
    """

    NOUL = "noul"
    CHOICE = "choice"
    SCORE = "score"


class JsonText(str):
    """The text of a JSON value that is none itself, for profiles that show values in a way of their own."""

    __slots__ = ()


@dataclass(frozen=True, slots=True)
class Option:
    """One possible answer.

    Attributes:
        name: the option as the prompt shows it: an option's own text, a level's text, ``yes`` or ``no``.
        description: what the option means; None: its name says it.
    """

    name: str
    description: str | None = None


@dataclass(frozen=True, slots=True)
class Question:
    """One question about a state. Its id is not here: it must never reach a prompt.

    Attributes:
        instructions: what is asked; None: the options say it.
        options: the possible answers, in the order of the request. A ``NOUL`` has two, no and yes; a ``SCORE`` its
            levels, lowest first.
        where: the question's place in the request, such as ``("questions", "urgent")``, for errors.
    """

    kind: Kind
    instructions: str | None
    options: tuple[Option, ...]
    where: tuple[str | int, ...]


@dataclass(frozen=True, slots=True)
class Judgement:
    """The answer to one question.

    Attributes:
        probabilities: one for each option, in the order of the request; they sum to 1.
        raw: the same before calibration; None: they are not calibrated.
        calibration: the calibration's name; None: as ``raw``.
        label_mass: how much of the model's next-token distribution the options' labels cover, 0 to 1; None: the model
            reads its options with a head.
        permutations: the number of cyclic orders of the options that were averaged.
        reads: for each option in turn, the labels that stand for it, as text; none with a head.
    """

    probabilities: tuple[float, ...]
    label_mass: float | None
    permutations: int
    reads: tuple[tuple[str, ...], ...]
    raw: tuple[float, ...] | None = None
    calibration: str | None = None

    @property
    def top(self) -> int:
        """The place of the most probable option, the first of equals."""
        return max(range(len(self.probabilities)), key=self.probabilities.__getitem__)


Judged = Judgement | ScoringError
"""The answer to one question, or why it has none."""


@dataclass(frozen=True, slots=True)
class Decided:
    """The answers to all questions of a request.

    Attributes:
        judgements: one for each question, in the order of the request; an error where a question has no answer.
        input_tokens: the number of tokens of the prompts, what they all begin with counted once. It depends on the
            request alone.
        cached_tokens: how many of these did not have to be computed.
    """

    judgements: Sequence[Judged]
    input_tokens: int
    cached_tokens: int


def as_text(value: Any) -> str:
    """The text of a JSON value in a prompt: a string is itself, anything else JSON with its own characters.

    Raises:
        InvalidRequestError: the value is not JSON, or nested deeper than Python can follow. Bodies and requests are
            checked before, but Python's objects can be changed.
    """
    try:
        if isinstance(value, str):
            return value
        return JsonText(json.dumps(value, ensure_ascii=False, separators=(", ", ": ")))
    except (RecursionError, TypeError, ValueError) as error:
        raise InvalidRequestError(f"a value cannot be shown as JSON: {error}; send it simpler") from None
