"""TypeSafe's shape: what a request means, how it is refused, and how judgements become an answer."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from pydantic import ValidationError

from serve_app.errors import InternalError, InvalidRequestError
from serve_app.scorer.fake_engine import FakeEngine
from serve_app.settings import Limits
from serve_app.tasks import systemone
from serve_app.tasks.decisions.bodies import MOST_NESTED, nested, parse
from serve_app.tasks.decisions.questions import Decided, Judgement, Kind, Option, Question
from serve_app.tasks.model_facts import ModelFacts
from serve_app.tasks.steps import finish
from serve_app.tasks.systemone import SystemOneRequest
from serve_app.tasks.tokenizer import TextTokenizer
from tests.local import CONTEXT, VOCAB_SIZE

NOUL: dict[str, Any] = {"type": "noul", "instructions": "Is it urgent?"}
CHOICE: dict[str, Any] = {"type": "choice", "criteria": {"Billing": "money", "Sales": None}}
SCORE: dict[str, Any] = {"type": "score", "criteria": ["Calm", "Angry", "Furious"]}


def parsed(**fields: Any) -> SystemOneRequest:
    return parse(SystemOneRequest, json.dumps({"state": "a", "questions": {"q": NOUL}} | fields).encode())


def question(asked: dict[str, Any]) -> Question:
    (own,) = systemone.questions(parsed(questions={"q": asked}))
    return own


def refusal(asked: dict[str, Any] | None = None, **fields: Any) -> InvalidRequestError:
    with pytest.raises(InvalidRequestError) as caught:
        systemone.questions(parsed(**fields) if asked is None else parsed(questions={"q": asked}))
    return caught.value


class TestQuestions:
    def test_a_noul_has_no_and_yes(self):
        asked = question({**NOUL, "criteria": {"true": "today", "false": None}})
        assert asked == Question(
            Kind.NOUL, "Is it urgent?", (Option("no"), Option("yes", "today")), where=("questions", "q")
        )

    def test_a_choice_has_its_options_in_order(self):
        assert question(CHOICE).options == (Option("Billing", "money"), Option("Sales"))
        assert question(CHOICE).instructions is None

    def test_a_score_has_its_levels_in_order(self):
        assert [level.name for level in question(SCORE).options] == ["Calm", "Angry", "Furious"]

    def test_objects_and_lists_are_shown_as_json(self):
        asked = question(
            {
                "type": "choice",
                "instructions": {"task": "raten", "ok": True, "like": ["ä", None]},
                "criteria": {"a": ["x"], "b": {"y": 1.5}},
            }
        )
        assert asked.instructions == '{"task": "raten", "ok": true, "like": ["ä", null]}'
        assert [option.description for option in asked.options] == ['["x"]', '{"y": 1.5}']
        levels = question({"type": "score", "criteria": [{"label": "low"}, ["high"]]}).options
        assert [level.name for level in levels] == ['{"label": "low"}', '["high"]']

    @pytest.mark.parametrize("nothing", [None, "", " \n", {}, []])
    def test_a_noul_must_ask_something(self, nothing: Any):
        error = refusal({"type": "noul", "instructions": nothing, "criteria": {"true": nothing}})
        assert error.where == ("questions", "q")
        assert "send instructions, or say what counts as yes" in error.message
        described = question({"type": "noul", "instructions": nothing, "criteria": {"false": "later"}})
        assert (described.instructions, described.options[0].description) == (None, "later")

    def test_ids_are_kept_as_they_are(self):
        ids = ["ticket-1", "q.2", " with space ", "질문", "e\u0301", "\u00e9", "🎯", "A", "a"]
        asked = systemone.questions(parsed(questions=dict.fromkeys(ids, NOUL)))
        assert [own.where[1] for own in asked] == ids


class TestRefusals:
    @pytest.mark.parametrize(
        ("asked", "where", "said"),
        [
            ({"instructions": "a"}, (), "questions.q.type is required"),
            ({"type": "boolean"}, (), "questions.q.type must be one of 'noul', 'choice', 'score', not \"boolean\""),
            ({"type": "box"}, (), "it takes no images"),
            ({**NOUL, "instruction": "b"}, ("noul", "instruction"), "unknown field questions.q.instruction"),
            ({**NOUL, "instructions": 7}, ("noul", "instructions"), "must be text, an object or a list, not 7"),
            ({**NOUL, "criteria": {"yes": "a"}}, ("noul", "criteria", "yes"), "unknown field questions.q.criteria.yes"),
            ({"type": "choice"}, ("choice", "criteria"), "questions.q.criteria is required"),
            ({"type": "choice", "criteria": {}}, ("choice", "criteria"), "has 0 entries; it must have at least 2"),
            ({"type": "choice", "criteria": {"a": None}}, ("choice", "criteria"), "has 1 entries; it must have at"),
            (
                {"type": "choice", "criteria": {str(i): None for i in range(256)}},
                ("choice", "criteria"),
                "has 256 entries; it must have at most 255",
            ),
            ({"type": "choice", "criteria": ["a", "b"]}, ("choice", "criteria"), "must be a valid object, not a list"),
            ({"type": "score", "criteria": ["a"]}, ("score", "criteria"), "has 1 entries; it must have at least 2"),
            (
                {"type": "score", "criteria": ["a"] * 11},
                ("score", "criteria"),
                "has 11 entries; it must have at most 10",
            ),
            ({"type": "score", "criteria": ["a", None]}, ("score", "criteria", 1), "criteria[1] must be text, an"),
            ({"type": "score", "criteria": {"0": "a"}}, ("score", "criteria"), "has sent lists since version 0.6"),
        ],
    )
    def test_a_wrong_question(self, asked: dict[str, Any], where: tuple[str | int, ...], said: str):
        error = refusal(asked)
        assert said in error.message
        assert error.where == ("questions", "q", *where)
        assert error.param == "questions"

    @pytest.mark.parametrize(
        ("fields", "said"),
        [
            ({"state": None}, "state must be text, an object or a list, not null"),
            ({"state": 7}, "state must be text"),
            ({"questions": {}}, "questions has 0 entries; it must have at least 1"),
            ({"questions": {str(i): NOUL for i in range(401)}}, "questions has 401 entries; it must have at most 400"),
            ({"questions": [NOUL]}, "questions must be a valid object"),
            ({"permutations": 0}, "permutations must be greater than or equal to 1, not 0"),
            ({"permutations": True}, "permutations must be a valid integer, not true"),
            ({"on_error": "ignore"}, "on_error must be 'fail' or 'item'"),
            ({"assets": {"a": {"type": "image"}}}, "assets must be {} or left out, not an object: this service reads"),
        ],
    )
    def test_a_wrong_request(self, fields: dict[str, Any], said: str):
        assert said in refusal(**fields).message

    def test_fields_that_are_missing(self):
        for name in ("state", "questions"):
            body = {"state": "a", "questions": {"q": NOUL}}
            del body[name]
            with pytest.raises(InvalidRequestError, match=f"^{name} is required") as caught:
                parse(SystemOneRequest, json.dumps(body).encode())
            assert caught.value.where == (name,)

    def test_a_request_that_is_made_in_python_holds_json(self):
        deep: Any = []
        for _ in range(MOST_NESTED):
            deep = [deep]
        endless: list[Any] = []
        endless.append(endless)
        shared: Any = {"a": 1}
        for _ in range(MOST_NESTED - 2):
            shared = [shared, shared]
        wrong: list[tuple[Any, str]] = [
            (deep, "nests lists and objects more than 64 deep"),
            ([endless], "nests lists and objects more than 64 deep"),
            ({1: 2}, "objects have texts for names"),
            ({"a": object}, "is no value of it"),
            ([math.nan], "NaN is no value of it"),
        ]
        ask = {"questions": {"q": {"type": "noul", "instructions": "urgent?"}}}
        for value, said in wrong:
            with pytest.raises(ValidationError) as caught:
                SystemOneRequest.model_validate({"state": value, **ask})
            assert said in str(caught.value)
            with pytest.raises(ValidationError):
                SystemOneRequest.model_validate(
                    {"state": "", "questions": {"q": {"type": "noul", "instructions": value}}}
                )
        for value in (deep[0], shared, {"a": [None, True, 1, 1.5, "x"]}):
            assert SystemOneRequest.model_validate({"state": value, **ask}).state is value

    @pytest.mark.parametrize("depth", [5_000, 200_000])
    def test_a_request_that_was_changed_in_python_is_refused_by_its_field(self, tokenizer: TextTokenizer, depth: int):
        deep: Any = []
        for _ in range(depth):
            deep = [deep]
        model = ModelFacts("m", tokenizer, FakeEngine(VOCAB_SIZE, CONTEXT).info, Limits())
        of_state = parsed().model_copy(update={"state": deep})
        of_question = parsed(questions={"q": SCORE})
        of_question.questions["q"].instructions = deep
        for request, param in ((of_state, "state"), (of_question, "questions")):
            with pytest.raises(InvalidRequestError, match="cannot be shown as JSON") as caught:
                finish(systemone.SYSTEMONE.builder(model)(request, ""))
            assert caught.value.param == param

    def test_unknown_fields_of_the_whole_are_ignored(self):
        request = parsed(x_trace_id="a", seed=7, stream=True, assets=None)
        assert request.model_extra is None


class TestBodies:
    @pytest.mark.parametrize(
        ("body", "said"),
        [
            (b"", "the body is empty"),
            (b"[]", "must be a JSON object, not a list of 0"),
            (b'{"state": "a", "questions": {', "the body is not valid JSON"),
            (b'{"state": "a\xff"}', "the body is not valid JSON"),
            (b'{"state": "\xed\xa0\x80"}', "the body is not valid JSON"),
            ('{"state": "\\ud800"}'.encode("utf-16"), "the body is not valid JSON"),
            (b'{"state": ["a", NaN]}', "the number NaN"),
            (b'{"state": [1e999]}', "the number 1e999"),
            (b'{"state": [' + b"1" * 5000 + b"]}", "the body is not valid JSON"),
            (b'{"state": {"a": "\\ud800"}}', "state.a must be text without lone surrogates"),
            (b'{"state": {"\\ud800": 1}}', "state must be text without lone surrogates"),
            (b'{"state": "a", "state": "b"}', '"state" is given twice'),
            (b'{"questions": {"q": {"type": "noul"}, "q": {"type": "noul"}}}', '"q" is given twice'),
            (b'{"state": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nests lists and objects 100001 deep"),
            (b'{"state": ' + b'{"a":' * 100_000, "nests lists and objects 100001 deep"),
        ],
    )
    def test_what_no_request_may_hold(self, body: bytes, said: str):
        with pytest.raises(InvalidRequestError) as caught:
            parse(SystemOneRequest, body)
        assert said in caught.value.message
        assert len(caught.value.message) < 500

    def test_nesting_is_counted_outside_strings(self):
        assert nested(b'{"a": "[[[[", "b": "\\"[[[\\\\", "c": [[1], {"d": []}]}') == 4
        deep = b"[" * (MOST_NESTED - 1) + b"]" * (MOST_NESTED - 1)
        state = parse(SystemOneRequest, b'{"state": ' + deep + b', "questions": {"q": {"type": "noul"}}}').state
        assert json.dumps(state).encode() == deep

    def test_pairs_of_surrogates_are_characters(self):
        assert parsed(state="\U0001f600").state == "😀"
        body = b'{"state": "\\ud83d\\ude00", "questions": {"q": {"type": "noul"}}}'
        assert parse(SystemOneRequest, body).state == "😀"


def answered(request: SystemOneRequest, *judged: Judgement | Exception) -> dict[str, Any]:
    decided: Any = Decided(judged, input_tokens=12, cached_tokens=3)  # pyright: ignore[reportArgumentType]
    return systemone._answer(request, "judge", decided).model_dump(exclude_none=True)  # pyright: ignore[reportPrivateUsage]


def judgement(*probabilities: float) -> Judgement:
    return Judgement(probabilities, 0.75, 2, tuple((label,) for label in "ABCDEFGHIJ"[: len(probabilities)]))


class TestAnswers:
    def test_each_kind(self):
        request = parsed(
            questions={"n": NOUL, "c": CHOICE, "s": {**SCORE, "criteria": ["Calm", ["a", None], {"b": None}]}}
        )
        answer = answered(request, judgement(0.25, 0.75), judgement(0.5, 0.5), judgement(0.25, 0.25, 0.5))
        read: dict[str, Any] = {"x_label_mass": 0.75, "x_permutations": 2}
        assert answer == {
            "model": "judge",
            "answers": {
                "n": {"type": "noul", "noul": 0.75, **read, "x_reads": [["A"], ["B"]]},
                "c": {
                    "type": "choice",
                    "choice": "Billing",
                    "probabilities": {"Billing": 0.5, "Sales": 0.5},
                    "confidence": 0.0,
                    **read,
                    "x_reads": [["A"], ["B"]],
                },
                "s": {
                    "type": "score",
                    "score": 1.25,
                    "legend": {"0": "Calm", "1": ["a", None], "2": {"b": None}},
                    "probabilities": {"0": 0.25, "1": 0.25, "2": 0.5},
                    # The mean distance from the top level is 0.75, an even spread's from its middle 2 / 3.
                    "confidence": 0.0,
                    **read,
                    "x_reads": [["A"], ["B"], ["C"]],
                },
            },
            "usage": {"input_tokens": 12, "output_tokens": 0},
            "x_cached_tokens": 3,
        }

    @pytest.mark.parametrize(
        ("probabilities", "confidence"),
        [((1.0, 0.0, 0.0), 1.0), ((0.5, 0.5, 0.0), 0.25), ((0.1, 0.8, 0.1), 0.7), ((0.0, 0.25, 0.75), 0.625)],
    )
    def test_confidence_in_a_score(self, probabilities: tuple[float, ...], confidence: float):
        request = parsed(questions={"s": SCORE})
        assert answered(request, judgement(*probabilities))["answers"]["s"]["confidence"] == pytest.approx(confidence)

    @pytest.mark.parametrize(("top", "confidence"), [(1.0, 1.0), (0.7, 0.55), (1 / 3, 0.0)])
    def test_confidence_in_a_choice(self, top: float, confidence: float):
        request = parsed(questions={"c": {"type": "choice", "criteria": dict.fromkeys("abc")}})
        answer = answered(request, judgement(top, (1 - top) / 2, (1 - top) / 2))["answers"]["c"]
        assert answer["confidence"] == pytest.approx(confidence)

    @pytest.mark.parametrize(("error", "code"), [(InvalidRequestError("no"), 422), (InternalError("no"), 500)])
    def test_a_question_without_an_answer(self, error: InvalidRequestError | InternalError, code: int):
        questions = {"a": NOUL, "b": NOUL}
        judged = judgement(0.5, 0.5)
        with pytest.raises(type(error)) as caught:
            answered(parsed(questions=questions), judged, error)
        assert caught.value.where == ("questions", "b")
        answers = answered(parsed(questions=questions, on_error="item"), judged, error)["answers"]
        assert answers["a"]["noul"] == 0.5
        assert answers["b"] == {"type": "error", "x_error": {"code": code, "message": "no"}}
