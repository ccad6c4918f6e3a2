"""Fields of other services: a value that asks for nothing is accepted, one that asks for more is refused by name."""

from __future__ import annotations

import json
from typing import Any

import pytest

from serve_app.compat import EVERYWHERE, Foreign
from serve_app.errors import InvalidRequestError
from serve_app.schemas import DetokenizeRequest, RequestBody, ScoreRequest, TokenizeRequest, parse
from serve_app.tasks.classify import ClassifyRequest
from serve_app.tasks.completions import CompletionRequest
from serve_app.tasks.generative import GenerativeScoringRequest
from serve_app.tasks.pooling import EmbeddingsRequest, PoolingRequest
from serve_app.tasks.remote_reward import RemoteRewardRequest
from serve_app.tasks.rerank import RerankRequest
from serve_app.tasks.tei import TeiRerankRequest

ASKED: dict[type[RequestBody], dict[str, Any]] = {
    ScoreRequest: {"items": ["a"], "label_token_ids": [1]},
    RerankRequest: {"query": "q", "documents": ["a"], "instruct": "i"},
    TeiRerankRequest: {"query": "q", "texts": ["a"]},
    CompletionRequest: {"prompt": "a", "max_tokens": 1},
    GenerativeScoringRequest: {"query": "q", "items": ["a"], "label_token_ids": [1]},
    ClassifyRequest: {"input": "a"},
    PoolingRequest: {"input": "a"},
    EmbeddingsRequest: {"input": "a"},
    RemoteRewardRequest: {"query": ["a"]},
    TokenizeRequest: {"prompt": "a"},
    DetokenizeRequest: {"tokens": [1]},
}
VALUES: list[Any] = [
    False,
    True,
    0,
    1,
    0.0,
    1.0,
    2,
    -1,
    0.5,
    "",
    "text",
    [],
    ["text"],
    ["a"],
    {},
    {"type": "text"},
    {"a": 1},
]


def taken(schema: type[RequestBody], **fields: Any) -> RequestBody:
    return parse(schema, json.dumps(ASKED[schema] | fields).encode())


CASES = [(schema, name) for schema in ASKED for name in schema.foreign if name not in schema.model_fields]


@pytest.mark.parametrize(("schema", "name"), CASES, ids=lambda part: getattr(part, "__name__", part))
def test_every_field_of_every_table(schema: type[RequestBody], name: str):
    field, plain = schema.foreign[name], taken(schema)
    if name in ASKED[schema] or name in ("instruction", "activation", "softmax"):
        return  # a real field by another name
    for value in [None, *VALUES, *(field.neutral or ())]:
        if value is None or field.neutral is None or field.allows(value):
            assert taken(schema, **{name: value}) == plain
            continue
        with pytest.raises(InvalidRequestError) as caught:
            taken(schema, **{name: value})
        assert caught.value.param == name
        assert caught.value.message.startswith(f"{name} must be ")
        assert caught.value.message.endswith(f": {field.advice}")


def test_true_is_not_one():
    assert Foreign("", (1,)).allows(1.0)
    assert not Foreign("", (1,)).allows(True)
    assert not Foreign("", (0,)).allows(False)


@pytest.mark.parametrize(
    ("schema", "fields", "message"),
    [
        (CompletionRequest, {"stop": ["a"]}, 'stop must be [] or "" or left out, not a list of 1: at most one token'),
        (CompletionRequest, {"n": 2}, "n must be 1 or left out, not 2: "),
        (CompletionRequest, {"stream": True, "n": 1}, "stream must be false or left out, not true: "),
        (RerankRequest, {"rank_fields": ["title"]}, 'rank_fields must be ["text"] or left out, not a list of 1: '),
        (RerankRequest, {"instruction": "j"}, 'instruction must be left out, not "j": send instruct or instruction'),
        (RerankRequest, {"texts": ["a"]}, "texts must be left out, not a list of 1: send documents or texts"),
        # Neither an error in a known field nor a field that asks for nothing hides an unknown field.
        (CompletionRequest, {"max_tokens": 16, "user": "me"}, "max_tokens must be 0 or 1"),
        (CompletionRequest, {"max_tokens": 16, "user": "me", "logprob": 1}, "unknown field 'logprob'"),
        (CompletionRequest, {"max_tokens": 16, "n": 3}, "n must be 1"),
        (ScoreRequest, {"user": "me", "label": ["a"]}, "unknown field 'label': did you mean 'labels'?"),
    ],
)
def test_messages(schema: type[RequestBody], fields: dict[str, Any], message: str):
    with pytest.raises(InvalidRequestError) as caught:
        taken(schema, **fields)
    assert caught.value.message.startswith(message)


def test_every_request_knows_the_fields_that_clients_send_everywhere():
    for schema in ASKED:
        assert EVERYWHERE.items() <= schema.foreign.items()
