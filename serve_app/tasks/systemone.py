"""Decisions in TypeSafe's shape, ``POST /v1/systemone``: questions by name, answers by the same names.

What is beyond TypeSafe's own service: ``permutations``, ``on_error``, ``stream``, ``cache_salt`` and ``timeout_s`` in
a request; names that begin with ``x_`` in an answer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, ConfigDict, Field, Strict, WithJsonSchema

from serve_app import compat
from serve_app.errors import SYSTEM_ONE, ScoringError
from serve_app.schemas import ResponseBody, Text
from serve_app.tasks.decisions.answers import Read, choice_confidence, expected_level, read_of, score_confidence
from serve_app.tasks.decisions.bodies import (
    LEAST_OPTIONS,
    MOST_CHOICES,
    MOST_LEVELS,
    MOST_QUESTIONS,
    DecisionRequest,
    Part,
    json_value,
    noul,
    one_of,
    parse,
)
from serve_app.tasks.decisions.decider import builder, streams
from serve_app.tasks.decisions.questions import Decided, Judged, Judgement, Kind, Option, Question, as_text
from serve_app.tasks.task import Lines, Task
from serve_app.tasks.validation import of_field

_TEXT_OR_DATA: dict[str, Any] = {"anyOf": [{"type": kind} for kind in ("string", "object", "array")]}

Content = Annotated[
    Any,
    AfterValidator(one_of(str, dict, list, expected="text, an object or a list")),
    AfterValidator(json_value),
    WithJsonSchema(_TEXT_OR_DATA),
]
"""A text; or an object or a list, which the model sees as JSON."""


class NoulCriteria(Part):
    """What counts as yes, and what as no.

    Attributes:
        true: what counts as yes.
        false: what counts as no.
    """

    true: Content | None = None
    false: Content | None = None


class NoulQuestion(Part):
    """A question whose answer is yes or no. It has instructions, or says what counts as one of the two.

    Attributes:
        criteria: what counts as yes, and what as no.
    """

    type: Literal["noul"]
    instructions: Content | None = None
    criteria: NoulCriteria | None = None


class ChoiceQuestion(Part):
    """A question whose answer is one of several options.

    Attributes:
        criteria: the options' names, each with a description or null.
    """

    type: Literal["choice"]
    instructions: Content | None = None
    criteria: Annotated[dict[Text, Content | None], Field(min_length=LEAST_OPTIONS, max_length=MOST_CHOICES)]


class ScoreQuestion(Part):
    """A question whose answer is a level of a scale.

    Attributes:
        criteria: what each level means, lowest first.
    """

    type: Literal["score"]
    instructions: Content | None = None
    criteria: Annotated[list[Content], Field(min_length=LEAST_OPTIONS, max_length=MOST_LEVELS)]


AnyQuestion = Annotated[NoulQuestion | ChoiceQuestion | ScoreQuestion, Field(discriminator="type")]


class SystemOneRequest(DecisionRequest):
    """Typed questions about a state: ``POST /v1/systemone``.

    Attributes:
        state: what all questions are about.
        questions: by names that the model never sees; the answers have the same names.
        on_error: ``"item"``: a question that cannot be answered has an answer of the type ``error``. ``"fail"``: it
            fails the request.
        stream: send answers as lines of JSON (``AnswerLine``) as they are read, then a line with the rest of the whole
            answer (``AnswersEnd``).
    """

    model_config = ConfigDict(extra="ignore")

    foreign = compat.SYSTEM_ONE

    model: Text = "default"
    state: Content
    questions: Annotated[dict[Text, AnyQuestion], Field(min_length=1, max_length=MOST_QUESTIONS)]
    on_error: Literal["fail", "item"] = "fail"
    stream: Annotated[bool, Strict()] = False


class NoulAnswer(Read):
    """The probability of yes.

    Attributes:
        noul: the probability of yes, 0 to 1.
    """

    type: Literal["noul"] = "noul"
    noul: float


class ChoiceAnswer(Read):
    """The most probable option, the first of equals, and the probabilities of all.

    Attributes:
        choice: the name of the most probable option.
    """

    type: Literal["choice"] = "choice"
    choice: str
    probabilities: dict[str, float]
    confidence: float


class ScoreAnswer(Read):
    """The mean level, counted from 0, and the probabilities of all levels by their numbers.

    Attributes:
        legend: the levels as the request has them, by their numbers.
        score: the mean level.
    """

    type: Literal["score"] = "score"
    score: float
    legend: dict[str, Content]
    probabilities: dict[str, float]
    confidence: float


class QuestionError(ResponseBody):
    """Why a question has no answer.

    Attributes:
        code: the HTTP status of a request with this question alone.
    """

    code: int
    message: str


class ErrorAnswer(ResponseBody):
    """In place of an answer, with ``on_error: "item"``.

    Attributes:
        x_error: why there is no answer.
    """

    type: Literal["error"] = "error"
    x_error: QuestionError


class SystemOneUsage(ResponseBody):
    """The number of tokens of the prompts, what they all begin with counted once. Nothing is ever generated."""

    input_tokens: int
    output_tokens: int = 0


AnyAnswer = NoulAnswer | ChoiceAnswer | ScoreAnswer | ErrorAnswer


class AnswersEnd(ResponseBody):
    """The last line of a streamed answer, after all answers.

    Attributes:
        x_cached_tokens: how many of ``usage.input_tokens`` did not have to be computed.
    """

    model: str
    usage: SystemOneUsage
    x_cached_tokens: int


class SystemOneResponse(ResponseBody):
    """One answer for each question.

    Attributes:
        x_cached_tokens: how many of ``usage.input_tokens`` did not have to be computed.
        answers: the answers, by the questions' names.
    """

    model: str
    answers: dict[str, AnyAnswer]
    usage: SystemOneUsage
    x_cached_tokens: int


class AnswerLine(ResponseBody):
    """One line of a streamed answer.

    Attributes:
        id: the question's name in the request.
    """

    id: str
    answer: AnyAnswer


class ValidationDetail(ResponseBody):
    """What is wrong with a request, and where in it.

    Attributes:
        loc: the place in the request, from the outside in.
        msg: what is wrong there.
    """

    loc: list[str | int]
    msg: str
    type: str


class ErrorDetail(ResponseBody):
    """Any other error.

    Attributes:
        error_type: the error's kind.
    """

    error_type: str
    message: str


class SystemOneErrorResponse(ResponseBody):
    """TypeSafe's error object, with OpenAI's beside it.

    Attributes:
        detail: what is wrong.
        error: the same, as OpenAI's clients read it.
    """

    detail: list[ValidationDetail] | ErrorDetail
    error: dict[str, str | int | None]


def questions(request: SystemOneRequest) -> list[Question]:
    """The request's questions, free of its shape.

    Raises:
        InvalidRequestError: a question asks nothing.
    """
    with of_field("questions"):
        return [_question(asked, ("questions", name)) for name, asked in request.questions.items()]


def _question(asked: NoulQuestion | ChoiceQuestion | ScoreQuestion, where: tuple[str | int, ...]) -> Question:
    instructions = _given(asked.instructions)
    match asked:
        case NoulQuestion(criteria=criteria):
            no, yes = (_given(criteria.false), _given(criteria.true)) if criteria else (None, None)
            return noul(instructions, no, yes, where)
        case ChoiceQuestion(criteria=criteria):
            options = tuple(Option(name, _given(described)) for name, described in criteria.items())
            return Question(Kind.CHOICE, instructions, options, where)
        case ScoreQuestion(criteria=criteria):
            levels = tuple(Option(as_text(level)) for level in criteria)
            return Question(Kind.SCORE, instructions, levels, where)


def _given(content: Any) -> str | None:
    """The content as text; None if it says nothing."""
    return as_text(content) if content and (not isinstance(content, str) or content.strip()) else None


def _answer(request: SystemOneRequest, model: str, decided: Decided) -> SystemOneResponse:
    """Put the judgements into TypeSafe's shape.

    Raises:
        ScoringError: a question cannot be answered, and the request does not have ``on_error: "item"``.
    """
    lines = _lines(request, dict(enumerate(decided.judgements)))
    return SystemOneResponse(
        model=model,
        answers={line.id: line.answer for line in lines},
        usage=SystemOneUsage(input_tokens=decided.input_tokens),
        x_cached_tokens=decided.cached_tokens,
    )


def _lines(request: SystemOneRequest, judgements: Mapping[int, Judged]) -> list[AnswerLine]:
    """Put some judgements, by the numbers of their questions, into TypeSafe's shape.

    Raises:
        ScoringError: see ``_answer``.
    """
    asked = list(request.questions.items())
    return [
        AnswerLine(id=asked[number][0], answer=_one(request, *asked[number], own)) for number, own in judgements.items()
    ]


def _end(model: str, input_tokens: int, cached_tokens: int) -> AnswersEnd:
    return AnswersEnd(model=model, usage=SystemOneUsage(input_tokens=input_tokens), x_cached_tokens=cached_tokens)


def _one(
    request: SystemOneRequest, name: str, asked: NoulQuestion | ChoiceQuestion | ScoreQuestion, judged: Judged
) -> AnyAnswer:
    if not isinstance(judged, ScoringError):
        return _answered(asked, judged)
    if request.on_error == "item":
        code, _ = judged.answer_on(SYSTEM_ONE)
        return ErrorAnswer(x_error=QuestionError(code=code, message=judged.message))
    raise judged.at(judged.where or ("questions", name))


def _answered(
    asked: NoulQuestion | ChoiceQuestion | ScoreQuestion, judged: Judgement
) -> NoulAnswer | ChoiceAnswer | ScoreAnswer:
    p = judged.probabilities
    read: Mapping[str, Any] = read_of(judged)
    match asked:
        case NoulQuestion():
            return NoulAnswer(noul=p[1], **read)
        case ChoiceQuestion(criteria=criteria):
            names = list(criteria)
            return ChoiceAnswer(
                choice=names[judged.top],
                probabilities=dict(zip(names, p, strict=True)),
                confidence=choice_confidence(p),
                **read,
            )
        case ScoreQuestion(criteria=criteria):
            return ScoreAnswer(
                score=expected_level(p),
                legend=_by_level(criteria),
                probabilities=_by_level(p),
                confidence=score_confidence(p),
                **read,
            )


def _by_level(values: Sequence[Any]) -> dict[str, Any]:
    return {str(level): value for level, value in enumerate(values)}


def _state(request: SystemOneRequest) -> str:
    with of_field("state"):
        return as_text(request.state)


SYSTEMONE = Task[SystemOneRequest, SystemOneResponse](
    name="systemone",
    paths=(SYSTEM_ONE,),
    description="""Typed questions about a state, in TypeSafe's shape: a probability for each option of each question.

The models' names `jev-latest` and `jev-preview` mean the default model. Unknown fields of the request itself are
ignored.""",
    example={
        "state": "Where is my parcel? It was due on Monday.",
        "questions": {
            "late": {"type": "noul", "instructions": "Is the parcel late?"},
            "team": {
                "type": "choice",
                "instructions": "Who should answer?",
                "criteria": {"billing": "invoices and refunds", "shipping": "parcels and addresses"},
            },
        },
    },
    request=SystemOneRequest,
    response=SystemOneResponse,
    builder=builder(_state, questions, _answer),
    error=SystemOneErrorResponse,
    lines=Lines(
        "With stream: a line of JSON for each question as soon as it is read, {id, answer} with an answer as in the "
        "whole one; then {model, usage, x_cached_tokens}, or an error object.",
        streams(_state, questions, _lines, _end),
    ),
    parse=parse,
    aliases=("jev-latest", "jev-preview"),
)
