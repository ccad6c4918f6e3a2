"""What each field of a request or an answer means, for the OpenAPI description: the "Attributes" of its class."""

from __future__ import annotations

from functools import cache
from typing import Any

import docstring_parser
from pydantic import BaseModel, GetJsonSchemaHandler
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

SHARED = {
    "model": 'The name of a served model, see `GET /v1/models`; "default" is the first.',
    "usage": "Numbers of tokens. Nothing is ever generated.",
    "object": "The kind of this object.",
    "type": "The kind of this object.",
    "id": "The name of this object.",
    "created": "When it was made, in seconds since 1970.",
    "index": "Its place in the request, counted from 0.",
    "name": "Its name in the request.",
    "text": "The text, as it was sent.",
    "role": "Who says it.",
    "query": "What the texts are judged for.",
    "code": "The HTTP status.",
    "message": "What is wrong, with the value, the limit and the remedy.",
    "param": "The field of the request that is wrong.",
    "status": "How it stands.",
    "instructions": "What is asked.",
    "probability": "0 to 1.",
    "probabilities": "The probability of each option or level, 0 to 1; they sum to 1.",
    "confidence": "How far the first choice is above an even spread, 0 to 1.",
    "prompt_tokens": "Tokens of all prompts.",
    "input_tokens": "Tokens of all prompts.",
    "total_tokens": "Tokens of all prompts.",
    "completion_tokens": "0: nothing is ever generated.",
    "output_tokens": "0: nothing is ever generated.",
    "reasoning_tokens": "0: nothing is ever generated.",
    "prompt_tokens_details": "Which of the prompt's tokens were computed before.",
}
"""Fields that mean the same wherever no class describes them."""


class Described(BaseModel):
    """A model whose OpenAPI description has a text for every field."""

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        described = handler(schema)
        properties: dict[str, dict[str, Any]] = handler.resolve_ref_schema(described).get("properties", {})
        for name, each in properties.items():
            if text := _texts(cls).get(name) or SHARED.get(name):
                each.setdefault("description", text)
        return described


@cache
def _texts(cls: type[BaseModel]) -> dict[str, str]:
    """The fields' texts by name, of a class and its bases."""
    texts: dict[str, str] = {}
    for each in reversed(cls.__mro__):
        if issubclass(each, Described) and each.__doc__:
            for attribute in docstring_parser.parse(each.__doc__).params:
                said = " ".join((attribute.description or "").split()).replace("``", "`")
                texts |= dict.fromkeys(attribute.arg_name.split(", "), said[:1].upper() + said[1:])
    return texts
