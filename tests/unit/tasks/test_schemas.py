"""The wire types in Python, and the errors that callers get there."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from pydantic import ValidationError

from serve_app.errors import InvalidRequestError
from serve_app.schemas import RequestBody, ScoreRequest, TokenizeRequest, invalid, parse, shown
from serve_app.tasks.remote_reward import RemoteRewardRequest
from serve_app.tasks.rerank import RerankRequest
from serve_app.tasks.rewards.inputs import RewardRequest


def test_requests_are_built_in_python_as_over_http():
    built = ScoreRequest(query="q", items=["a"], label_token_ids=[1])
    assert built == parse(ScoreRequest, b'{"query": "q", "items": ["a"], "label_token_ids": [1]}')
    assert (built.apply_softmax, built.item_first, built.temperature, built.model) == (False, False, 1.0, "default")
    assert not built.return_token_logprobs
    ids = ScoreRequest(query=[1], items=[[2, 3]], label_token_ids=[[4], [5]], temperature=2)
    assert parse(ScoreRequest, ids.model_dump_json().encode()) == ids


def test_integers_of_any_size_keep_their_value():
    request = parse(ScoreRequest, b'{"items": [[%d]], "label_token_ids": [-1]}' % 10**30)
    assert request.items == [[10**30]]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"label_token_ids": [1]}, "items is required"),
        ({"items": ["a"], "labels": ["a", 1]}, "labels[1] must be a valid string, not 1"),
        ({"items": ["a"], "labels": [["a"], "b"]}, 'labels[1] must be a valid list, not "b"'),
        ({"items": ["a", b"b"], "label_token_ids": [1]}, "items[1] must be a valid string"),
        ({"items": ["a", "\ud800"], "label_token_ids": [1]}, "items[1] must be text without lone surrogates"),
        ({"items": "\udfff", "label_token_ids": [1]}, "text without lone surrogates"),
        ({"items": ("a",), "label_token_ids": [1]}, "items must be a valid list or a valid string, not a tuple of 1"),
        ({"items": ["a"], "label_token_ids": [1], "x" * 200: 1}, f"unknown field '{'x' * 60}...'"),
        ({"items": ["a"], "label_token_ids": [1], "temperature": float("nan")}, "a finite number, not NaN"),
        ({"items": ["a"], "label_token_ids": [1], "query": object}, "query must be"),
        (
            {"items": ["a"], "label_token_ids": [1.5]},
            "label_token_ids[0] must be a valid integer or a valid list, not 1.5",
        ),
    ],
)
def test_errors_in_python(fields: dict[str, Any], message: str):
    with pytest.raises(ValidationError) as caught:
        ScoreRequest(**fields)
    assert message in invalid(caught.value, ScoreRequest).message


def test_the_index_of_an_item_goes_with_the_error():
    with pytest.raises(InvalidRequestError) as caught:
        parse(ScoreRequest, b'{"items": [[1], [2], ["x"]], "label_token_ids": [1]}')
    assert (caught.value.param, caught.value.index) == ("items", 2)
    with pytest.raises(InvalidRequestError) as caught:
        parse(ScoreRequest, b'{"items": [[1]], "label_token_ids": [1, "x"]}')
    assert (caught.value.param, caught.value.index) == ("label_token_ids", None)


def test_a_million_wrong_ids_are_one_error():
    body = json.dumps({"items": [["x"] * 100_000], "label_token_ids": [1]}).encode()
    with pytest.raises(ValidationError) as caught:
        ScoreRequest.model_validate_json(body)
    assert caught.value.error_count() <= 3


def test_an_unknown_field_is_named_before_a_missing_one():
    with pytest.raises(InvalidRequestError, match="unknown field 'text'") as caught:
        parse(TokenizeRequest, b'{"text": "a"}')
    assert caught.value.param == "text"


@pytest.mark.parametrize(
    "body", [b'{"prompt": "\\u00e9"}', b'{"prompt": "\\u0000 \\"prompt\\""}', b'{"prompt": "prompt"}']
)
def test_text_that_only_looks_like_a_field_given_twice(body: bytes):
    parse(TokenizeRequest, body)


def test_a_field_given_twice_in_escapes():
    with pytest.raises(InvalidRequestError, match="prompt is given twice"):
        parse(TokenizeRequest, b'{"prompt": "a", "\\u0070rompt": "b"}')


WRONG: list[Any] = [
    None, True, 5, -1, 1.5, 1e300, "x", [], {}, [None], [True], [1], [1.5], ["a"], [[]], [{}], [[1]], [["a"]], [[{}]],
    [[[1]]], ["a", 1], ["a", {}], [1, "a"], [1, 1.5], [[1], "a"], [[1], [None]], [["a"], [1]], [{"text": 5}],
    [{"text": None}], [{"title": "a"}], ["a", {"text": ["a"]}], {"text": "a"},
]  # fmt: skip
GOOD: dict[str, Any] = {
    "query": "q", "items": ["a"], "label_token_ids": [1], "documents": ["a"], "prompt": "a", "max_tokens": 1,
    "tokens": [1], "texts": ["a"], "input": "a",
}  # fmt: skip
"""A valid value for every required field."""
OWN: dict[type[RequestBody], dict[str, Any]] = {RemoteRewardRequest: {"query": ["q"]}}
"""Those of requests whose fields of these names are of another kind."""
KINDS = {
    "a valid string": (str,),
    "a valid integer": (int,),
    "a valid number": (int, float),
    "a finite number": (int, float),
    "a valid boolean": (bool,),
    "a valid list": (list,),
    "an object": (dict,),
}
OTHER = r"'\w+'( or '\w+')?|(greater|less) than( or equal to)? \d+(\.\d+)?|(0|1|false|true)( or [^,]+)?(, since .+)?"
"""Expectations in the errors of values of the right kind."""


def requests() -> list[type[RequestBody]]:
    found = [*RequestBody.__subclasses__(), *RewardRequest.__subclasses__()]
    return [each for each in found if each.__name__.endswith("Request")]


@pytest.mark.parametrize("schema", requests(), ids=lambda schema: schema.__name__)
def test_every_field_of_every_request_says_what_is_wrong_where(schema: type[RequestBody]):
    """The message names the place of the value that it shows, and the kinds that it expects, which the value is not."""
    valid = GOOD | OWN.get(schema, {})
    good = {name: valid[name] for name, field in schema.model_fields.items() if field.is_required()}
    parse(schema, json.dumps(good).encode())
    for field in schema.model_fields:
        refused = 0
        for value in WRONG:
            try:
                parse(schema, json.dumps({**good, field: value}).encode())
                continue
            except InvalidRequestError as caught:
                error = caught
            refused += 1
            assert error.param == field
            place, said = re.fullmatch(rf"({field}(?:\[\d+\]|\.\w+)*) (.+)", error.message).groups()
            *way, last = [
                int(number) if number else name for number, name in re.findall(r"\[(\d+)\]|\.(\w+)", "[0]" + place)
            ]
            there: Any = [value]
            for step in way:
                there = there[step]
            if said == "is required":
                assert last not in there
                continue
            there = there[last]
            expected, told = re.fullmatch("must be (.+), not (.+)", said).groups()
            assert told == shown(there)
            kinds = [kind for kind in KINDS if kind in expected]
            if not kinds:
                assert re.fullmatch(OTHER, expected), error.message
            else:
                assert expected == " or ".join(sorted(kinds, key=expected.index)), error.message
                assert not any(type(there) in KINDS[kind] for kind in kinds), error.message
        if field != "labels" or schema is not RemoteRewardRequest:  # a list of anything
            assert refused > len(WRONG) / 3


@pytest.mark.parametrize(
    ("document", "message"),
    [
        (3, "documents[1] must be a valid string or an object, not 3"),
        ({}, "documents[1].text is required"),
        ({"title": "a"}, "documents[1].text is required"),
        ({"text": 3}, "documents[1].text must be a valid string, not 3"),
    ],
)
def test_what_is_wrong_with_a_document(document: Any, message: str):
    with pytest.raises(InvalidRequestError) as caught:
        parse(RerankRequest, json.dumps({"query": "q", "documents": ["a", document]}).encode())
    assert (caught.value.message, caught.value.param) == (message, "documents")
