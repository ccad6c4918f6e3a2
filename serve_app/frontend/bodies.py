"""Reads a request's body as JSON in UTF-8, and decodes it within a size limit."""

from __future__ import annotations

import asyncio
import json
import zlib
from collections.abc import Callable, Iterator, Mapping

from backports import zstd
from starlette.requests import Request

from serve_app import compat
from serve_app.errors import InvalidRequestError, TooLargeError, UnsupportedEncodingError

STEP_BYTES = 2**18
"""The most bytes decoded in one step."""

_ZSTD_WINDOW = 2**23
"""The largest window in bytes that a zstd body may need (RFC 9659)."""


async def read(request: Request, limit: int) -> bytes:
    """Read the body as UTF-8. It is refused as soon as it exceeds ``limit`` bytes, encoded or decoded.

    Raises:
        InvalidRequestError: its Content-Type is not JSON, it is not in UTF-8, or it does not match its
            Content-Encoding.
        TooLargeError: it is longer than ``limit``.
        UnsupportedEncodingError: its Content-Encoding is not one of ``ENCODINGS``.
    """
    content_type = request.headers.get("content-type", "application/json").split(";")[0].strip().lower()
    if content_type != "application/json":
        said = f"Content-Type is {content_type[:60]!r}; send JSON as 'application/json'"
        if content_type.startswith("multipart/"):  # as TypeSafe's client sends images, the assets of its request
            raise InvalidRequestError(f"{said}; {compat.READS_TEXT}", where=("assets",))
        raise InvalidRequestError(said)
    encoding = _encoding(request)
    body = await _received(request, limit)
    if encoding and body:
        body = await asyncio.to_thread(decoded, body, encoding, limit)
    return utf8(body)


def decoded(body: bytes, encoding: str, limit: int) -> bytes:
    """Decode ``body`` piece by piece.

    Raises:
        InvalidRequestError: it is incomplete or not in that encoding, or something follows it.
        TooLargeError: it decodes to more than ``limit`` bytes.
    """
    whole = bytearray()
    try:
        for piece in ENCODINGS[encoding](body):
            whole += piece
            if len(whole) > limit:
                raise _too_large(limit, ", decoded,")
    except (zlib.error, zstd.ZstdError, EOFError) as error:
        raise InvalidRequestError(
            f"the body is not valid {encoding} (its Content-Encoding): {error}; send it whole, encoded once"
        ) from None
    return bytes(whole)


def utf8(body: bytes) -> bytes:
    """Return a JSON text without its byte-order mark.

    Raises:
        InvalidRequestError: it is in UTF-16 or UTF-32.
    """
    found = json.detect_encoding(body)
    if found == "utf-8-sig":
        return body[3:]
    if found != "utf-8":
        name = found.upper().removesuffix("-BE").removesuffix("-LE")
        raise InvalidRequestError(f"the body is not valid JSON: it seems to be {name}; send UTF-8")
    return body


def _encoding(request: Request) -> str | None:
    given = ",".join(request.headers.getlist("content-encoding")).lower()
    named = [name.strip().removeprefix("x-") for name in given.split(",")]
    named = [name for name in named if name not in ("", "identity")]
    if not named:
        return None
    if len(named) > 1 or named[0] not in ENCODINGS:
        raise UnsupportedEncodingError(
            f"Content-Encoding is {given[:60]!r}; send one of {', '.join(ENCODINGS)}, or the body as it is"
        )
    return named[0]


async def _received(request: Request, limit: int) -> bytes:
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared[:20]) > limit:
        raise _too_large(limit)
    chunks: list[bytes] = []
    size = 0
    async for chunk in request.stream():
        size += len(chunk)
        if size > limit:
            raise _too_large(limit)
        chunks.append(chunk)
    return b"".join(chunks)


def _too_large(limit: int, how: str = "") -> TooLargeError:
    return TooLargeError(f"the body is{how} larger than {limit} bytes, the most that this service takes; split it")


def _gzip(body: bytes) -> Iterator[bytes]:
    return _inflated(body, 16 + zlib.MAX_WBITS)


def _deflate(body: bytes) -> Iterator[bytes]:
    """Deflate with zlib's header, as HTTP defines it, or without, as some clients send it."""
    headed = len(body) > 1 and body[0] & 15 == zlib.DEFLATED and int.from_bytes(body[:2], "big") % 31 == 0
    return _inflated(body, zlib.MAX_WBITS if headed else -zlib.MAX_WBITS)


def _inflated(body: bytes, wbits: int) -> Iterator[bytes]:
    inflater = zlib.decompressobj(wbits)
    fed = memoryview(body)
    for start in range(0, len(body), STEP_BYTES):
        waiting: bytes | memoryview = fed[start : start + STEP_BYTES]
        while waiting:
            _check_end(inflater.eof)
            yield inflater.decompress(waiting, STEP_BYTES)
            waiting = inflater.unused_data or inflater.unconsumed_tail
    # The output that is left fits into one piece, since there is no more input.
    yield inflater.decompress(b"", STEP_BYTES)
    _check_whole(inflater.eof)


def _zstd(body: bytes) -> Iterator[bytes]:
    options: dict[int, int] = {zstd.DecompressionParameter.window_log_max: _ZSTD_WINDOW.bit_length() - 1}
    decompressor = zstd.ZstdDecompressor(options=options)
    yield decompressor.decompress(body, STEP_BYTES)
    while not decompressor.eof and not decompressor.needs_input:
        yield decompressor.decompress(b"", STEP_BYTES)
    _check_whole(decompressor.eof)
    _check_end(bool(decompressor.unused_data))


def _check_whole(ended: bool) -> None:
    if not ended:
        raise EOFError("its end is missing")


def _check_end(more: bool) -> None:
    if more:
        raise EOFError("something follows its end")


ENCODINGS: Mapping[str, Callable[[bytes], Iterator[bytes]]] = {"gzip": _gzip, "deflate": _deflate, "zstd": _zstd}
"""Content encodings of bodies, each with its decoder, which yields pieces of at most ``STEP_BYTES``."""
