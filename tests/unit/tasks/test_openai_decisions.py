"""OpenAI's shape of decisions: what a request means, how it is refused, and how judgements become an answer."""

from __future__ import annotations

import json
from typing import Any

import pytest
from pydantic_core import to_json

from serve_app.errors import InvalidRequestError
from serve_app.tasks import openai_decisions
from serve_app.tasks.decisions.bodies import parse
from serve_app.tasks.decisions.conversation import transcript
from serve_app.tasks.decisions.questions import Decided, Judgement, Kind, Option, Question
from serve_app.tasks.openai_decisions import DecisionsRequest

PREDICATE: dict[str, Any] = {"type": "predicate", "instructions": "It is urgent."}
CHOICE: dict[str, Any] = {
    "type": "choice",
    "name": "team",
    "instructions": [{"type": "input_text", "text": "Which?"}, {"type": "input_json", "data": {"a": None}}],
    "choices": [{"value": "true", "description": "a text"}, {"value": True}, {"value": "no"}],
}
SCORE: dict[str, Any] = {
    "type": "score",
    "instructions": "How angry?",
    "levels": [{"label": "Calm"}, {"label": "Angry", "description": "shouts"}, {"label": "Calm"}],
}


def parsed(**fields: Any) -> DecisionsRequest:
    return parse(DecisionsRequest, json.dumps({"input": "a", "questions": [PREDICATE]} | fields).encode())


def state(*items: Any) -> str:
    return transcript(parsed(input=list(items)).input)


def refusal(**fields: Any) -> InvalidRequestError:
    def read() -> None:
        request = parsed(**fields)
        openai_decisions.questions(request)
        transcript(request.input)

    with pytest.raises(InvalidRequestError) as caught:
        read()
    return caught.value


def test_questions_of_each_kind():
    assert openai_decisions.questions(parsed(questions=[PREDICATE, CHOICE, SCORE])) == [
        Question(Kind.NOUL, "It is urgent.", (Option("no"), Option("yes")), ("questions", 0)),
        Question(
            Kind.CHOICE,
            'Which?\n{"a": null}',
            (Option("true", "a text"), Option("true"), Option("no")),
            ("questions", 1),
        ),
        Question(
            Kind.SCORE, "How angry?", (Option("Calm"), Option("Angry", "shouts"), Option("Calm")), ("questions", 2)
        ),
    ]


class TestInput:
    def test_a_text_and_one_message_of_a_user_are_the_same(self):
        message = {"role": "user", "content": "a"}
        parts = {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "a"}]}
        assert {transcript(parsed(input=given).input) for given in ("a", [message], [parts])} == {"a"}
        assert transcript(parsed(input="").input) == transcript(parsed(input=[]).input) == ""

    def test_a_conversation_is_a_transcript(self):
        mark = {"prompt_cache_breakpoint": {"mode": "explicit"}}
        assert (
            state(
                {"role": "system", "content": "Be brief."},
                {"role": "developer", "content": [{"type": "input_text", "text": "Be kind.", **mark}]},
                {
                    "role": "user",
                    "content": [{"type": "input_text", "text": "Look:"}, {"type": "input_json", "data": [{"ä": 1}]}],
                },
                {"role": "assistant", "phase": "commentary", "content": [{"type": "output_text", "text": "Hm."}]},
                {"role": "assistant", "content": [{"type": "refusal", "refusal": "No."}], "phase": None},
                {"type": "function_call", "call_id": "1", "name": "find", "arguments": '{"n": 7}', "namespace": "db"},
                {"type": "custom_tool_call", "call_id": "1", "name": "sh", "input": "ls", "id": None},
                {"type": "custom_tool_call_output", "call_id": "1", "output": "a.txt"},
                {
                    "type": "function_call_output",
                    "call_id": "1",
                    "output": [{"type": "input_text", "text": "paid"}, {"type": "input_text", "text": "twice"}],
                    "status": "completed",
                },
            )
            == """developer: Be brief.

developer: Be kind.

user: Look:
[{"ä": 1}]

assistant (commentary): Hm.

assistant: No.

tool call db.find: {"n": 7}

tool call sh: ls

tool output sh: a.txt

tool output db.find: paid
twice"""
        )

    @pytest.mark.parametrize(
        ("item", "said"),
        [
            (
                {"type": "function_call_output", "call_id": "1", "output": "a"},
                "input[0].call_id must be that of a call",
            ),
            ({"role": "tool", "content": "a"}, "input[0].type must be one of 'user', 'developer'"),
            ({"content": "a"}, "input[0].type is required"),
            ("a", "input[0].type is required"),
            ({"role": "user"}, "input[0].content is required"),
            ({"role": "user", "content": 7}, "input[0].content must be a valid list, not 7"),
            (
                {"role": "user", "content": [{"type": "input_image", "image_url": "data:"}]},
                "input[0].content[0].type must be one of 'input_text', 'input_json', not \"input_image\": this service",
            ),
            (
                {"role": "system", "content": [{"type": "input_image", "image_url": "data:"}]},
                "input[0].content[0].type must be 'input_text', not \"input_image\": this service reads text",
            ),
            ({"role": "user", "content": [{"type": "input_json", "data": 7}]}, "data must be an object or a list of"),
            ({"role": "user", "content": [{"type": "input_json", "data": [7]}]}, "data must be an object or a list of"),
        ],
    )
    def test_wrong_items(self, item: Any, said: str):
        error = refusal(input=[item])
        assert said in error.message
        assert error.param == "input"

    def test_calls_come_before_their_outputs_and_are_of_their_kind(self):
        call = {"type": "function_call", "call_id": "1", "name": "find", "arguments": ""}
        output = {"type": "function_call_output", "call_id": "1", "output": "a"}
        assert state(call, output).endswith("tool output find: a")
        assert "call before it" in refusal(input=[output, call]).message
        assert "call before it" in refusal(input=[call, {**output, "type": "custom_tool_call_output"}]).message

    def test_json_has_openais_limits(self):
        def data(value: Any) -> dict[str, Any]:
            return {"input": [{"role": "user", "content": [{"type": "input_json", "data": value}]}]}

        def deep(levels: int) -> Any:
            return {"a": deep(levels - 1)} if levels else 1

        parsed(**data(deep(32)))
        assert "has 33 levels" in refusal(**data(deep(33))).message
        parsed(**data({"a": [0] * 9_998}))
        assert "has 10001 values; it may have at most 10000" in refusal(**data({"a": [0] * 9_999})).message
        most = 256 * 1024 - len('{"a":""}')
        parsed(**data({"a": "ä" * (most // 2)}))
        assert "bytes; it may have at most 262144" in refusal(**data({"a": "ä" * (most // 2 + 1)})).message


class TestRefusals:
    @pytest.mark.parametrize(
        ("question", "said"),
        [
            ({"type": "noul", "instructions": "a"}, "questions[0].type must be one of 'predicate', 'choice', 'score'"),
            ({"type": "predicate"}, "questions[0].instructions is required"),
            ({**PREDICATE, "instructions": " "}, "questions[0] asks nothing"),
            ({**PREDICATE, "instructions": [{"type": "input_image", "image_url": "a"}]}, "this service reads text"),
            ({**PREDICATE, "criteria": {}}, "unknown field questions[0].criteria"),
            ({**CHOICE, "choices": [{"value": "a"}]}, "questions[0].choices has 1 entries"),
            ({**CHOICE, "choices": [{"value": str(i)} for i in range(256)]}, "it must have at most 255"),
            ({**CHOICE, "choices": [{"value": "a"}, {"value": "a"}]}, "questions[0].choices has the value 'a' twice"),
            ({**CHOICE, "choices": [{"value": True}, {"value": True}]}, "has the value 'true' twice"),
            ({**CHOICE, "choices": [{"value": 1}, {"value": 2}]}, "choices[0].value must be text or a boolean, not 1"),
            ({**SCORE, "levels": [{"label": "a"}]}, "questions[0].levels has 1 entries"),
            ({**SCORE, "levels": [{"label": "a"}] * 11}, "it must have at most 10"),
        ],
    )
    def test_a_wrong_question(self, question: dict[str, Any], said: str):
        error = refusal(questions=[question])
        assert said in error.message
        assert error.param == "questions"

    @pytest.mark.parametrize(
        ("fields", "said"),
        [
            ({"questions": []}, "questions has 0 entries"),
            ({"questions": [PREDICATE] * 401}, "questions has 401 entries; it must have at most 400"),
            ({"stream": True}, "stream must be false or left out, not true: the answer comes whole"),
            ({"temperature": 0.5}, "temperature must be left out, not 0.5: nothing is sampled"),
            ({"question": []}, "unknown field 'question': did you mean 'questions'?"),
            ({"safety_identifier": "a" * 129}, "safety_identifier has 129 characters; it must have at most 128"),
        ],
    )
    def test_a_wrong_request(self, fields: dict[str, Any], said: str):
        assert said in refusal(**fields).message

    def test_every_documented_parameter_is_taken(self):
        request = parsed(
            model="judge",
            prompt_cache_key="tenant",
            prompt_cache_options={"mode": "explicit", "ttl": "30m"},
            safety_identifier="a" * 128,
            metadata={"a": "b"},
            stream=False,
            permutations=2,
            cache_salt="salt",
        )
        assert (request.prompt_cache_key, request.cache_salt, request.permutations) == ("tenant", "salt", 2)


def test_answers_of_each_kind():
    request = parsed(questions=[PREDICATE, CHOICE, SCORE, {**PREDICATE, "name": "odd"}])
    judged = [
        Judgement(p, 0.75, 1, tuple(("A",) for _ in p)) for p in ((0.25, 0.75), (0.25, 0.5, 0.25), (0.0, 0.5, 0.5))
    ]
    decided = Decided([*judged, InvalidRequestError("too long")], input_tokens=12, cached_tokens=3)
    answer = openai_decisions._answer(request, "judge", decided)  # pyright: ignore[reportPrivateUsage]
    read: dict[str, Any] = {"x_label_mass": 0.75, "x_permutations": 1}
    assert json.loads(to_json(answer, exclude_none=True)) == {
        "model": "judge",
        "answers": [
            {"type": "predicate", "name": None, "probability": 0.75, **read, "x_reads": [["A"]] * 2},
            {
                "type": "choice",
                "name": "team",
                "choice": True,
                "probabilities": [
                    {"value": "true", "probability": 0.25},
                    {"value": True, "probability": 0.5},
                    {"value": "no", "probability": 0.25},
                ],
                "confidence": 0.25,
                **read,
                "x_reads": [["A"]] * 3,
            },
            {
                "type": "score",
                "name": None,
                "score": 1.5,
                "probabilities": [
                    {"value": 0, "label": "Calm", "probability": 0.0},
                    {"value": 1, "label": "Angry", "probability": 0.5},
                    {"value": 2, "label": "Calm", "probability": 0.5},
                ],
                "confidence": 0.25,
                **read,
                "x_reads": [["A"]] * 3,
            },
            {"type": "refusal", "name": "odd", "x_reason": "too long"},
        ],
        "usage": {
            "input_tokens": 12,
            "input_tokens_details": {"cached_tokens": 3, "cache_write_tokens": 0},
            "output_tokens": 0,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": 12,
        },
    }
