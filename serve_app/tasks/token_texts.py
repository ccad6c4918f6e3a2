"""Tokens as parts of a text: where each begins, and a name that tells it from other tokens.

A token may be a part of a character: the bytes of "狐" are two or three tokens in most vocabularies. Such a token has
no text, and decoders make U+FFFD of it. It is named by its bytes, ``bytes:\\xe7\\x8b``, as OpenAI's API does, and
begins where its character does.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from tokenizers import Tokenizer

_FALLBACK = re.compile(r"<0x([0-9A-F]{2})>")
"""The spelling of one byte in vocabularies with byte fallback."""


@dataclass(frozen=True, slots=True)
class TokenTexts:
    """A text and its tokens.

    Attributes:
        starts: characters before each token.
        names: of each token; but for ``bytes:`` they stand in the text at its start. Empty where a token adds nothing.
    """

    text: str
    starts: list[int]
    names: list[str]

    def without_front(self, length: int) -> TokenTexts:
        """The same for the text without its first characters, such as those of a begin-of-sequence token."""
        names = [
            # A token that is cut off whole keeps its name.
            (name[max(0, length - start) :] or name) if self.text.startswith(name, start) else name
            for name, start in zip(self.names, self.starts, strict=True)
        ]
        return TokenTexts(self.text[length:], [max(0, start - length) for start in self.starts], names)


class TokenReader:
    """Says what tokens are in a text.

    Args:
        backend: its decoder tells which tokens are bytes: all (byte-level), those spelt ``<0x0A>`` (byte fallback), or
            none.
    """

    def __init__(self, backend: Tokenizer) -> None:
        self._backend = backend
        kinds = set(_kinds(json.loads(backend.decoder.__getstate__()) if backend.decoder else {}))
        self._byte_level = "ByteLevel" in kinds
        self._byte_fallback = "ByteFallback" in kinds

    def read(self, ids: Sequence[int]) -> TokenTexts:
        """The text of the ids, special tokens included, and its tokens."""
        parts = self._parts(ids)
        text = self._backend.decode(ids, skip_special_tokens=False)
        starts = [min(start, len(text)) for start in _starts(self._valid(parts))]
        names = [self._name(part, text, start) for part, start in zip(parts, starts, strict=True)]
        return TokenTexts(text, starts, names)

    def names(self, before: Sequence[int], ids: Sequence[int]) -> list[str]:
        """The name of each id behind the one before it: some decoders take a space from a text's beginning."""
        parts = [*map(self._part, ids, self._added(before, ids))]
        return [self._name(part) for part in parts]

    def _parts(self, ids: Sequence[int]) -> list[str | bytes]:
        """What each token adds to the text: bytes, of which characters may be made with those of others, or text."""
        known = [token for token in ids if self._backend.id_to_token(token) is not None]
        if not known:
            return [""] * len(ids)
        first = self._backend.decode(known[:1], skip_special_tokens=False)
        added = iter([first, *self._added(known, known[1:])])
        return ["" if self._backend.id_to_token(token) is None else self._part(token, next(added)) for token in ids]

    def _part(self, token: int, added: str) -> str | bytes:
        own = self._bytes(self._backend.id_to_token(token) or "")
        return added if own is None else own

    def _bytes(self, spelling: str) -> bytes | None:
        if self._byte_level:
            own = [_BYTES.get(character) for character in spelling]
            # Added tokens may be spelt in plain text.
            return spelling.encode() if None in own else bytes(byte for byte in own if byte is not None)
        if self._byte_fallback and (found := _FALLBACK.fullmatch(spelling)):
            return bytes.fromhex(found[1])
        return None

    def _added(self, before: Sequence[int], ids: Sequence[int]) -> list[str]:
        """The text that each id adds behind the one before it."""
        if self._byte_level:
            return [""] * len(ids)  # which their bytes tell
        decode = self._backend.decode_batch
        left = decode([[token] for token in before], skip_special_tokens=False)
        alone = decode([[token] for token in ids], skip_special_tokens=False)
        both = decode([list(pair) for pair in zip(before, ids, strict=False)], skip_special_tokens=False)
        return [
            whole[len(front) :] if whole.startswith(front) else own
            for front, own, whole in zip(left, alone, both, strict=False)
        ]

    def _valid(self, parts: Sequence[str | bytes]) -> Iterator[str | bytes]:
        """Byte fallback decodes a run of bytes whole: if it is not UTF-8, each byte is U+FFFD."""
        for is_bytes, run in groupby(parts, key=lambda part: isinstance(part, bytes)):
            own = list(run)
            if self._byte_fallback and is_bytes:
                whole = b"".join(part for part in own if isinstance(part, bytes))
                own = own if _text(whole) is not None else ["\ufffd"] * len(own)
            yield from own

    def _name(self, part: str | bytes, text: str | None = None, start: int = 0) -> str:
        """The name of a token that begins at ``start`` of a text, or in any text."""
        own = part if isinstance(part, str) else _text(part)
        ambiguous = self._byte_fallback and isinstance(part, bytes) and own and self._is_spelt(own)
        if own and not ambiguous and (text is None or text.startswith(own, start)):
            return own
        if isinstance(part, bytes) and part:
            return f"bytes:{repr(part)[2:-1]}"
        return ""

    def _is_spelt(self, text: str) -> bool:
        """Whether the vocabulary has another token for the text of a byte."""
        return self._backend.token_to_id(text.replace(" ", "▁")) is not None


def _starts(parts: Iterator[str | bytes]) -> Iterator[int]:
    """Characters before each part. Bytes that are no UTF-8 are U+FFFD, as decoders have it."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    total = 0
    for part in parts:
        if part and not (isinstance(part, bytes) and part[0] & 0xC0 == 0x80):
            # A character begins here, even if the one before was not whole.
            total += len(decoder.decode(b"", final=True))
        yield total
        total += len(decoder.decode(part) if isinstance(part, bytes) else part)


def _text(content: bytes) -> str | None:
    try:
        return content.decode()
    except UnicodeDecodeError:
        return None


def _kinds(decoder: dict[str, Any]) -> Iterator[str]:
    yield decoder.get("type", "")
    for own in decoder.get("decoders", ()):
        yield from _kinds(own)


def _byte_characters() -> dict[str, int]:
    """GPT-2's spelling of bytes: printable ones as in Latin-1, the others from U+0100 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + at): byte for at, byte in enumerate(others)}


_BYTES = _byte_characters()
