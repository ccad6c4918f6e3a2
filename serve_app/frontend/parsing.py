"""Parses large bodies in pieces: pydantic holds Python's lock while it parses, which would stop all other requests."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any, TypeVar

from pydantic import ValidationError, create_model

from serve_app.errors import InvalidRequestError
from serve_app.schemas import RequestBody, parse

R = TypeVar("R", bound=RequestBody)

LARGE_BYTES = 2**17
"""A body with this many bytes or more is parsed in a thread."""
PIECE_BYTES = 2**15
"""Approximate bytes of a list that are parsed at once, which takes a few milliseconds."""

_OUTER = re.compile(rb'["\[\]{}]|[^"\[\]{}]{1,4096}+')
_INNER = re.compile(rb'"[^"\\]{0,256}+"|\[[^"\[\]{}]{0,4096}+\]|["\[\]{}]|[^"\[\]{}]{1,4096}+')
"""A quote, a bracket, or the text between them; inside a list also a short string, or a short list of numbers."""
_TEXT = re.compile(rb'(?:[^"\\]{1,4096}+|\\.){0,256}+', re.DOTALL)
"""A part of a string. All patterns take bounded time."""
_OPEN, _CLOSE, _LIST, _QUOTE = b"[{", b"]}", b"["[0], b'"'[0]


class _NotInPiecesError(Exception):
    """The body must be parsed as a whole: it is invalid or unusual."""


async def parse_large(model: type[R], body: bytes, own: Callable[[type[R], bytes], R] | None = None) -> R:
    """Do the same as ``parse``, while the event loop goes on.

    Args:
        own: the function that parses this body, in place of ``parse``.

    Raises:
        InvalidRequestError: see ``parse``.
    """
    if len(body) < LARGE_BYTES:
        return (own or parse)(model, body)
    return await asyncio.to_thread(own or parse_in_pieces, model, body)


def parse_in_pieces(model: type[R], body: bytes, piece_bytes: int = PIECE_BYTES) -> R:
    """Do the same as ``parse``: first without most entries of the body's lists, then with these in runs.

    If any of this fails, the body is parsed as a whole, for the right error.
    """
    validators = model.__pydantic_decorators__
    if validators.model_validators or validators.field_validators:  # they would see only a part
        return parse(model, body)
    try:
        return _parsed(model, body, piece_bytes)
    except (_NotInPiecesError, ValidationError):
        return parse(model, body)


def _parsed(model: type[R], body: bytes, piece_bytes: int) -> R:
    lists: dict[str, list[tuple[int, int]]] = {}
    for name, runs in _lists(body, piece_bytes):
        if len(runs) > 1 and name in model.model_fields:
            if name in lists:
                raise _NotInPiecesError
            lists[name] = runs
    if not lists:
        raise _NotInPiecesError
    kept = bytearray()
    start = 0
    for runs in lists.values():
        kept += body[start : runs[0][1]]
        start = runs[-1][1]
    request = _kept(model, bytes(kept + body[start:]))
    for name, runs in lists.items():
        values = getattr(request, name)
        for begin, end in runs[1:]:
            piece = _piece(model, name).model_validate_json(b'{"%s":[%s]}' % (name.encode(), body[begin:end]))
            more = getattr(piece, name)
            # A comma needs values on both sides, and a list of texts may not go on with lists.
            if not values or not more or type(values[0]) is not type(more[0]):
                raise _NotInPiecesError
            values.extend(more)
    return request


def _kept(model: type[R], body: bytes) -> R:
    """Parse the part of a body that was kept. If it has a fault, parsing the whole body will report it."""
    try:
        return parse(model, body)
    except InvalidRequestError:
        raise _NotInPiecesError from None


@cache
def _piece(model: type[RequestBody], name: str) -> type[RequestBody]:
    """A model with only this field."""
    field = model.model_fields[name]
    fields: dict[str, Any] = {name: (field.annotation, field)}
    return create_model(name, __base__=RequestBody, **fields)


def _lists(body: bytes, piece_bytes: int) -> Iterator[tuple[str, list[tuple[int, int]]]]:
    """Find the lists among an object's fields: each name, and the start and end of runs of about ``piece_bytes``."""
    depth = end = begin = 0
    text = name = None
    runs: list[tuple[int, int]] | None = None
    while part := (_INNER if depth > 1 else _OUTER).match(body, end):
        start, end = part.span()
        first = body[start]
        if first == _QUOTE:
            if end - start == 1:
                end = _end_of_string(body, end)
            if depth == 1:
                text = body[start + 1 : end - 1]
        elif first in _OPEN and end - start == 1:
            depth += 1
            if depth == 2 and first == _LIST and name is not None:
                runs, begin = [], end
        elif first in _CLOSE:
            if depth == 2 and runs is not None and name is not None:
                yield name, [*runs, (begin, start)]
                runs = None
            depth -= 1
        elif depth == 1:
            if body.find(b":", start, end) >= 0:
                name = text.decode("ascii", "replace") if text is not None else None
        elif depth == 2 and first != _LIST and runs is not None and end - begin >= piece_bytes:
            comma = body.rfind(b",", start, end)
            if comma > begin:
                runs.append((begin, comma))
                begin = comma + 1


def _end_of_string(body: bytes, at: int) -> int:
    while (part := _TEXT.match(body, at)) and part.end() > at:
        at = part.end()
    if body[at : at + 1] != b'"':
        raise _NotInPiecesError
    return at + 1
