"""Requests of the decision routes: what they share, and how they are made of JSON.

They hold objects in objects, and data whose shape is the caller's own. So an error names the whole place of what is
wrong, nothing in the body may be given twice, and nesting has a limit.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Annotated, Any, TypeVar, cast

import numpy as np
from pydantic import ConfigDict, Field, Strict, ValidationError
from pydantic_core import ErrorDetails, PydanticCustomError

from serve_app import compat
from serve_app.errors import InvalidRequestError, Place
from serve_app.field_texts import Described
from serve_app.schemas import RequestBody, refused, shown
from serve_app.tasks.decisions.questions import Kind, Option, Question

MOST_QUESTIONS = 400
MOST_CHOICES = 255
MOST_LEVELS = 10
LEAST_OPTIONS = 2
"""Limits of a request: choices or levels of a question."""

MOST_NESTED = 64
"""The deepest that lists and objects may be nested in a body."""

_ESCAPE = re.compile(rb"\\.", re.DOTALL)
_STRING = re.compile(rb'"[^"]*"?')
_OPENS = ord("[")
_KINDS = bytes.maketrans(b"{}", b"[]")
_NO_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))
_SURROGATE = re.compile("[\ud800-\udfff]")

R = TypeVar("R", bound=RequestBody)


class DecisionRequest(RequestBody):
    """Fields of both routes that neither service has.

    Attributes:
        permutations: the number of cyclic orders of its options in which each question is asked, at most as many as it
            has options; their probabilities are averaged. 1: the order of the request alone.
        timeout_s: seconds after which the request gets a 504, see ``ScoreRequest``.
    """

    # Numbers and texts are not taken for each other in JSON without it; objects may be made of dicts in Python.
    model_config = ConfigDict(strict=False)

    permutations: Annotated[int, Strict(), Field(ge=1, le=MOST_CHOICES)] = 1
    timeout_s: Annotated[float, Strict(), Field(gt=0)] | None = None


class Part(Described):
    """An object inside a request. Unknown fields are refused: a misspelt field must not be ignored in silence."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


def parse(model: type[R], body: bytes) -> R:
    """Check a JSON body and return the request that it holds.

    Unknown fields of the whole are ignored if the request's type says so; inside it they are refused.

    Raises:
        InvalidRequestError: the body is wrong; the message names the place, the value and what is expected.
    """
    data = loaded(body)
    if not isinstance(data, dict):
        raise InvalidRequestError(f"the body must be a JSON object, not {shown(data)}")
    fields = cast(dict[str, Any], data)
    ignores = model.model_config.get("extra") == "ignore"
    for name in [name for name in fields if name not in model.model_fields]:
        value = fields.pop(name)
        if (name in model.foreign or not ignores) and (wrong := refused(name, value, model)):
            raise wrong
    try:
        return model.model_validate(fields)
    except ValidationError as error:
        raise invalid(error, fields) from None


def loaded(body: bytes) -> Any:
    """The value of a JSON text.

    Raises:
        InvalidRequestError: it is empty, not UTF-8, invalid or nested too deep, it gives a field twice, or it has a
            number beyond float64's range or text with a lone surrogate.
    """
    if not body.strip():
        raise InvalidRequestError("the body is empty; send a JSON object")
    if (levels := nested(body)) > MOST_NESTED:
        raise InvalidRequestError(
            f"the body nests lists and objects {levels} deep; this service takes at most {MOST_NESTED}; send it flatter"
        )
    try:
        # Not the bytes: from these it takes UTF-16, too, and encoded surrogates.
        value = json.loads(body.decode(), object_pairs_hook=_once, parse_constant=_finite, parse_float=_finite)
    except (ValueError, RecursionError) as error:
        raise InvalidRequestError(f"the body is not valid JSON: {error}") from None
    if b"\\u" in body and (where := _lone_surrogate(value)) is not None:
        raise InvalidRequestError(
            f"{named(where) or 'the body'} must be text without lone surrogates",
            param=_field(where),
            where=where,
        )
    return value


def nested(body: bytes) -> int:
    """How deep lists and objects are nested in a JSON text; the text may be invalid."""
    bare = _STRING.sub(b"", _ESCAPE.sub(b"", body) if b"\\" in body else body)
    brackets = np.frombuffer(bare.translate(_KINDS, _NO_BRACKETS), np.uint8)
    return int(np.cumsum(np.where(brackets == _OPENS, 1, -1)).max(initial=0))


def json_value(value: Any) -> Any:
    """A validator of a field whose shape is the caller's own: requests that are made in Python may hold anything."""
    layer, levels = [value], 0
    while layer:
        inside: dict[int, Any] = {}
        for each in layer:
            match each:
                case dict() as entries:
                    if not all(isinstance(name, str) for name in cast(dict[Any, Any], entries)):
                        raise wrong("must be JSON, whose objects have texts for names")
                    inside |= {id(own): own for own in cast(dict[str, Any], entries).values()}
                case list() | tuple() as entries:
                    inside |= {id(own): own for own in cast(Sequence[Any], entries)}
                case str() | bool() | int() | None:
                    pass
                case float() if math.isfinite(each):
                    pass
                case _:
                    raise wrong(f"must be JSON; {shown(each)} is no value of it")
        levels += any(isinstance(each, dict | list | tuple) for each in layer)
        if levels > MOST_NESTED:
            raise wrong(f"nests lists and objects more than {MOST_NESTED} deep; send it flatter")
        layer = list(inside.values())
    return value


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        (twice, _), *_ = Counter(name for name, _ in pairs).most_common(1)
        raise InvalidRequestError(f"{shown(twice)} is given twice in an object; send it once")
    return found


def _finite(number: str) -> float:
    if not math.isfinite(value := float(number)):
        raise InvalidRequestError(f"the body has the number {number[:40]}; send numbers that float64 holds")
    return value


def _lone_surrogate(value: Any, where: Place = ()) -> Place | None:
    """The place of the first text with a lone surrogate."""
    if isinstance(value, str):
        return where if _SURROGATE.search(value) else None
    inside: Sequence[tuple[str | int, Any]] = ()
    if isinstance(value, dict):
        inside = list(cast(dict[str, Any], value).items())
        if any(_SURROGATE.search(str(name)) for name, _ in inside):
            return where
    elif isinstance(value, list):
        inside = list(enumerate(cast(list[Any], value)))
    found = (_lone_surrogate(own, (*where, name)) for name, own in inside)
    return next((place for place in found if place is not None), None)


def invalid(error: ValidationError, data: Any) -> InvalidRequestError:
    """Make one error of Pydantic's findings: of a wrong type or an unknown field if there is one, else of the first.

    Args:
        data: what was validated.
    """
    found = error.errors(include_url=False)
    # An object of another type has other fields, too.
    finding = min(found, key=lambda each: (each["loc"][-1:] != ("type",), each["type"] != "extra_forbidden"))
    where = tuple(part for part in finding["loc"] if part != "[key]")
    return InvalidRequestError(_said(finding, named(_place(where, data))), param=_field(where), where=where)


def _place(where: Place, data: Any) -> Place:
    """The place without the names of the kinds of objects, which Pydantic adds."""
    place: list[str | int] = []
    for part in where:
        try:
            data = data[part]
        except (KeyError, IndexError, TypeError):
            continue
        place.append(part)
    missing = where[-1:] if tuple(place[-1:]) != where[-1:] else ()
    return (*place, *missing)


def _said(finding: ErrorDetails, place: str) -> str:
    given, context = finding["input"], finding.get("ctx", {})
    match finding["type"]:
        case "missing":
            return f"{place} is required"
        case "extra_forbidden":
            return f"unknown field {place}; correct its name, or leave it out"
        case "too_short" | "too_long" as kind:
            most, bound = ("at least", "min_length") if kind == "too_short" else ("at most", "max_length")
            what = "characters" if isinstance(given, str) else "entries"
            return f"{place} has {len(given)} {what}; it must have {most} {context[bound]}"
        case "union_tag_not_found":
            return f"{place}.type is required"
        case "union_tag_invalid":
            return f"{place}.type must be one of {context['expected_tags']}, not {_shown_type(context['tag'])}"
        case "literal_error":
            return f"{place} must be {context['expected']}, not {_shown_type(given)}"
        case "list_type" if isinstance(given, dict) and place.endswith(".criteria"):
            return (
                f"{place} must be a list of the levels' descriptions, lowest first, not an object: "
                "TypeSafe's SDK has sent lists since version 0.6"
            )
        case "model_type" | "model_attributes_type":
            return f"{place} must be an object, not {shown(given)}"
        case "wrong":
            return f"{place} {finding['msg']}"
        case _:
            expected = finding["msg"].removeprefix("Input should be ").replace("array", "list")
            return f"{place} must be {expected.replace('dictionary', 'object')}, not {shown(given)}"


def _shown_type(given: Any) -> str:
    advice = compat.NOT_HERE.get(given) if isinstance(given, str) else None
    return f"{shown(given)}: {advice}" if advice else shown(given)


def named(where: Place) -> str:
    """The place as a caller would write it: ``questions[3].choices``."""
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part[:60]}" for part in where)
    return text.removeprefix(".")


def _field(where: Place) -> str | None:
    return str(where[0]) if where else None


def wrong(said: str) -> PydanticCustomError:
    """An error of a field, for its validator to raise.

    Args:
        said: continues a sentence that begins with the field's place; braces stand for themselves.
    """
    return PydanticCustomError("wrong", "{said}", {"said": said})


def noul(instructions: str | None, no: str | None, yes: str | None, where: Place) -> Question:
    """A question whose answer is yes or no.

    Args:
        no: what counts as no; None: nothing is said of it.

    Raises:
        InvalidRequestError: neither instructions nor an outcome say what is asked.
    """
    if instructions is no is yes is None:
        raise InvalidRequestError(
            f"{named(where)} asks nothing; send instructions, or say what counts as yes or as no",
            param=_field(where),
            where=where,
        )
    return Question(Kind.NOUL, instructions, (Option("no", no), Option("yes", yes)), where)


def one_of(*kinds: type, expected: str) -> Callable[[Any], Any]:
    """A validator of a field that takes several kinds of JSON values; a union would report each kind by itself."""

    def check(value: Any) -> Any:
        if not isinstance(value, kinds):
            raise wrong(f"must be {expected}, not {shown(value)}")
        return value

    return check
