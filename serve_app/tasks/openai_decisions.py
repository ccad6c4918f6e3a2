"""Decisions in OpenAI's shape, ``POST /v1/decisions``: a list of questions, and answers in the same order.

What is beyond OpenAI's own service: ``permutations``, ``cache_salt`` and ``timeout_s`` in a request; names that begin
with ``x_`` in an answer. What it lacks: images.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, SerializerFunctionWrapHandler, WithJsonSchema, model_serializer

from serve_app import compat
from serve_app.errors import DECISIONS, ScoringError
from serve_app.schemas import ResponseBody, Text
from serve_app.tasks.completions import OpenAIErrorResponse
from serve_app.tasks.decisions import conversation
from serve_app.tasks.decisions.answers import Read, choice_confidence, expected_level, read_of, score_confidence
from serve_app.tasks.decisions.bodies import (
    LEAST_OPTIONS,
    MOST_CHOICES,
    MOST_LEVELS,
    MOST_QUESTIONS,
    DecisionRequest,
    Part,
    noul,
    one_of,
    parse,
    wrong,
)
from serve_app.tasks.decisions.conversation import Content, Input, transcript
from serve_app.tasks.decisions.decider import builder
from serve_app.tasks.decisions.questions import Decided, Judgement, Kind, Option, Question, as_text
from serve_app.tasks.task import Task

MOST_IDENTIFIER = 128
"""The most characters of a ``safety_identifier``, as OpenAI has it."""

Value = Annotated[
    Any,
    AfterValidator(one_of(str, bool, expected="text or a boolean")),
    WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "boolean"}]}),
]


class Choice(Part):
    """One of several options. The boolean true is another value than the text ``true``.

    Attributes:
        value: what is returned, and what the model reads.
        description: what it means.
    """

    value: Value
    description: Text | None = None


class Level(Part):
    """A level of a scale.

    Attributes:
        label: what the model reads.
        description: what it means.
    """

    label: Text
    description: Text | None = None


def _differ(choices: list[Choice]) -> list[Choice]:
    seen: set[tuple[type, Any]] = set()
    for choice in choices:
        if (key := (type(choice.value), choice.value)) in seen:
            raise wrong(f"has the value {as_text(choice.value)[:60]!r} twice; send each once")
        seen.add(key)
    return choices


class PredicateQuestion(Part):
    """A statement that is true or false."""

    type: Literal["predicate"]
    name: Text | None = None
    instructions: Content


class ChoiceQuestion(Part):
    """A question whose answer is one of several options.

    Attributes:
        choices: the options, each with another value.
    """

    type: Literal["choice"]
    name: Text | None = None
    instructions: Content
    choices: Annotated[list[Choice], Field(min_length=LEAST_OPTIONS, max_length=MOST_CHOICES), AfterValidator(_differ)]


class ScoreQuestion(Part):
    """A question whose answer is a level of a scale, lowest first.

    Attributes:
        levels: the levels, lowest first.
    """

    type: Literal["score"]
    name: Text | None = None
    instructions: Content
    levels: Annotated[list[Level], Field(min_length=LEAST_OPTIONS, max_length=MOST_LEVELS)]


AnyQuestion = Annotated[PredicateQuestion | ChoiceQuestion | ScoreQuestion, Field(discriminator="type")]


class CacheOptions(Part):
    """OpenAI's options of caching; accepted, and of no effect.

    Attributes:
        mode: of no effect.
        ttl: of no effect.
    """

    mode: Literal["implicit", "explicit"] | None = None
    ttl: Literal["30m"] | None = None


class DecisionsRequest(DecisionRequest):
    """Typed questions about an input: ``POST /v1/decisions``.

    Attributes:
        input: what all questions are about: a text, or a conversation, which the model reads as a plain transcript.
        questions: their names are returned, and the model never sees them.
        prompt_cache_key: OpenAI's name for ``cache_salt``.
        prompt_cache_options: accepted, and of no effect.
        safety_identifier: accepted, and of no effect.
    """

    foreign = compat.DECISIONS

    model: Text = "default"
    input: Input
    questions: Annotated[list[AnyQuestion], Field(min_length=1, max_length=MOST_QUESTIONS, fail_fast=True)]
    prompt_cache_key: Text | None = None
    prompt_cache_options: CacheOptions | None = None
    safety_identifier: Annotated[Text, Field(max_length=MOST_IDENTIFIER)] | None = None


class Named(ResponseBody):
    """An answer with its question's name, which is null if the question has none."""

    name: str | None

    @model_serializer(mode="wrap")
    def _with_name(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # Null fields are left out of answers, but clients expect this one.
        return {**handler(self), "name": self.name}


class PredicateAnswer(Named, Read):
    """The probability that a statement is true."""

    type: Literal["predicate"] = "predicate"
    probability: float


class ChoiceProbability(ResponseBody):
    """The probability of an option.

    Attributes:
        value: the option's value.
    """

    value: str | bool
    probability: float


class ChoiceAnswer(Named, Read):
    """The most probable option, the first of equals, and the probabilities of all."""

    type: Literal["choice"] = "choice"
    choice: str | bool
    probabilities: list[ChoiceProbability]
    confidence: float


class LevelProbability(ResponseBody):
    """The probability of a level; ``value`` is its number, counted from 0.

    Attributes:
        value: the level's number, counted from 0.
        label: the level's label.
    """

    value: int
    label: str
    probability: float


class ScoreAnswer(Named, Read):
    """The mean level, counted from 0, and the probabilities of all levels."""

    type: Literal["score"] = "score"
    score: float
    probabilities: list[LevelProbability]
    confidence: float


class RefusalAnswer(Named):
    """In place of an answer to a question that cannot be answered.

    Attributes:
        x_reason: why.
    """

    type: Literal["refusal"] = "refusal"
    x_reason: str


class InputTokensDetails(ResponseBody):
    """Details of ``DecisionsUsage.input_tokens``.

    Attributes:
        cached_tokens: input tokens that did not have to be computed.
        cache_write_tokens: 0: nothing is charged for them.
    """

    cached_tokens: int
    cache_write_tokens: int = 0


class OutputTokensDetails(ResponseBody):
    """Nothing is ever generated."""

    reasoning_tokens: int = 0


class DecisionsUsage(ResponseBody):
    """The number of tokens of the prompts, what they all begin with counted once. Nothing is ever generated.

    Attributes:
        input_tokens_details: which of them were computed before.
        output_tokens_details: none: nothing is ever generated.
    """

    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int = 0
    output_tokens_details: OutputTokensDetails
    total_tokens: int


AnyAnswer = PredicateAnswer | ChoiceAnswer | ScoreAnswer | RefusalAnswer


class DecisionsResponse(ResponseBody):
    """One answer for each question, in the order of the request.

    Attributes:
        answers: one for each question.
    """

    model: str
    answers: list[AnyAnswer]
    usage: DecisionsUsage


def questions(request: DecisionsRequest) -> list[Question]:
    """The request's questions, free of its shape.

    Raises:
        InvalidRequestError: a question asks nothing.
    """
    return [_question(asked, ("questions", index)) for index, asked in enumerate(request.questions)]


def _question(asked: PredicateQuestion | ChoiceQuestion | ScoreQuestion, where: tuple[str | int, ...]) -> Question:
    instructions = conversation.text(asked.instructions)
    said = instructions if instructions.strip() else None
    match asked:
        case PredicateQuestion():
            return noul(said, None, None, where)
        case ChoiceQuestion(choices=choices):
            options = tuple(Option(as_text(choice.value), choice.description) for choice in choices)
            return Question(Kind.CHOICE, said, options, where)
        case ScoreQuestion(levels=levels):
            return Question(Kind.SCORE, said, tuple(Option(level.label, level.description) for level in levels), where)


def _answer(request: DecisionsRequest, model: str, decided: Decided) -> DecisionsResponse:
    return DecisionsResponse(
        model=model,
        answers=[
            RefusalAnswer(name=asked.name, x_reason=judged.message)
            if isinstance(judged, ScoringError)
            else _answered(asked, judged)
            for asked, judged in zip(request.questions, decided.judgements, strict=True)
        ],
        usage=DecisionsUsage(
            input_tokens=decided.input_tokens,
            input_tokens_details=InputTokensDetails(cached_tokens=decided.cached_tokens),
            output_tokens_details=OutputTokensDetails(),
            total_tokens=decided.input_tokens,
        ),
    )


def _answered(
    asked: PredicateQuestion | ChoiceQuestion | ScoreQuestion, judged: Judgement
) -> PredicateAnswer | ChoiceAnswer | ScoreAnswer:
    p = judged.probabilities
    read = read_of(judged)
    match asked:
        case PredicateQuestion():
            return PredicateAnswer(name=asked.name, probability=p[1], **read)
        case ChoiceQuestion(choices=choices):
            return ChoiceAnswer(
                name=asked.name,
                choice=choices[judged.top].value,
                probabilities=[
                    ChoiceProbability(value=choice.value, probability=own)
                    for choice, own in zip(choices, p, strict=True)
                ],
                confidence=choice_confidence(p),
                **read,
            )
        case ScoreQuestion(levels=levels):
            return ScoreAnswer(
                name=asked.name,
                score=expected_level(p),
                probabilities=[
                    LevelProbability(value=value, label=level.label, probability=own)
                    for value, (level, own) in enumerate(zip(levels, p, strict=True))
                ],
                confidence=score_confidence(p),
                **read,
            )


OPENAI_DECISIONS = Task[DecisionsRequest, DecisionsResponse](
    name="decisions",
    paths=(DECISIONS,),
    description="Typed questions about an input, in OpenAI's shape: a probability for each option of each question.",
    example={
        "input": "Where is my parcel? It was due on Monday.",
        "questions": [
            {"type": "predicate", "name": "late", "instructions": "The parcel is late."},
            {
                "type": "choice",
                "name": "team",
                "instructions": "Who should answer?",
                "choices": [{"value": "billing"}, {"value": "shipping"}],
            },
        ],
    },
    request=DecisionsRequest,
    response=DecisionsResponse,
    builder=builder(lambda request: transcript(request.input), questions, _answer, field="input"),
    error=OpenAIErrorResponse,
    parse=parse,
)
