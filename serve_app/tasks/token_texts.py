"""Texts of tokens: where each token begins in a text, and a name that distinguishes it from other tokens.

A token may be a part of a character: the bytes of "狐" are two or three tokens in most vocabularies. Such a token has
no text, and decoders make U+FFFD of it. Its name is its bytes, ``bytes:\\xe7\\x8b``, as in OpenAI's API, and it begins
where its character does.
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
"""A pattern for one byte as vocabularies with byte fallback spell it."""


@dataclass(frozen=True, slots=True)
class TokenTexts:
    """A text and its tokens.

    Attributes:
        starts: the number of characters before each token.
        names: the name of each token. It is in the text at the token's start, unless it begins with ``bytes:``. It is
            empty if the token adds nothing.
    """

    text: str
    starts: list[int]
    names: list[str]

    def without_front(self, length: int) -> TokenTexts:
        """Remove the text's first characters, such as those of a begin-of-sequence token."""
        names = [
            # A token that is removed completely keeps its name.
            (name[max(0, length - start) :] or name) if self.text.startswith(name, start) else name
            for name, start in zip(self.names, self.starts, strict=True)
        ]
        return TokenTexts(self.text[length:], [max(0, start - length) for start in self.starts], names)


class TokenReader:
    """Reads tokens as parts of a text.

    Args:
        backend: the tokenizer. By its decoder, the tokens that are bytes are all (byte-level), those that are spelt
            ``<0x0A>`` (byte fallback), or none.
    """

    def __init__(self, backend: Tokenizer) -> None:
        self._backend = backend
        kinds = set(_kinds(json.loads(backend.decoder.__getstate__()) if backend.decoder else {}))
        self._byte_level = "ByteLevel" in kinds
        self._byte_fallback = "ByteFallback" in kinds

    def read(self, ids: Sequence[int]) -> TokenTexts:
        """Decode the ids, including special tokens, to a text and its tokens."""
        parts = self._parts(ids)
        text = self._backend.decode(ids, skip_special_tokens=False)
        starts = [min(start, len(text)) for start in _starts(self._valid(parts))]
        names = [self._name(part, text, start) for part, start in zip(parts, starts, strict=True)]
        return TokenTexts(text, starts, names)

    def names(self, before: Sequence[int], ids: Sequence[int]) -> list[str]:
        """The name of each id after the id before it: some decoders remove a space from the beginning of a text."""
        parts = [*map(self._part, ids, self._added(before, ids))]
        return [self._name(part) for part in parts]

    def _parts(self, ids: Sequence[int]) -> list[str | bytes]:
        """The part of the text that each token adds: text, or bytes that may form characters with those of others."""
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
            own = [BYTES.get(character) for character in spelling]
            # Added tokens may be spelt in plain text.
            return spelling.encode() if None in own else bytes(byte for byte in own if byte is not None)
        if self._byte_fallback and (found := _FALLBACK.fullmatch(spelling)):
            return bytes.fromhex(found[1])
        return None

    def _added(self, before: Sequence[int], ids: Sequence[int]) -> list[str]:
        """The text that each id adds after the id before it."""
        if self._byte_level:
            return [""] * len(ids)  # not needed: the spelling gives the bytes
        decode = self._backend.decode_batch
        left = decode([[token] for token in before], skip_special_tokens=False)
        alone = decode([[token] for token in ids], skip_special_tokens=False)
        both = decode([list(pair) for pair in zip(before, ids, strict=False)], skip_special_tokens=False)
        return [
            whole[len(front) :] if whole.startswith(front) else own
            for front, own, whole in zip(left, alone, both, strict=False)
        ]

    def _valid(self, parts: Sequence[str | bytes]) -> Iterator[str | bytes]:
        """The parts as they are decoded. Byte fallback decodes a run of bytes at once; if not UTF-8, each is U+FFFD."""
        for is_bytes, run in groupby(parts, key=lambda part: isinstance(part, bytes)):
            own = list(run)
            if self._byte_fallback and is_bytes:
                whole = b"".join(part for part in own if isinstance(part, bytes))
                own = own if _text(whole) is not None else ["\ufffd"] * len(own)
            yield from own

    def _name(self, part: str | bytes, text: str | None = None, start: int = 0) -> str:
        """The name of a token that begins at ``start`` of a text, or of a token in any text."""
        own = part if isinstance(part, str) else _text(part)
        ambiguous = self._byte_fallback and isinstance(part, bytes) and own and self._is_spelt(own)
        if own and not ambiguous and (text is None or text.startswith(own, start)):
            return own
        if isinstance(part, bytes) and part:
            return f"bytes:{repr(part)[2:-1]}"
        return ""

    def _is_spelt(self, text: str) -> bool:
        """Whether the vocabulary also has a token that is spelt as this text, a byte's."""
        return self._backend.token_to_id(text.replace(" ", "▁")) is not None


def _starts(parts: Iterator[str | bytes]) -> Iterator[int]:
    """The start of each part, in characters. Bytes that are not UTF-8 count as U+FFFD, as in decoders."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    total = 0
    for part in parts:
        if part and not (isinstance(part, bytes) and part[0] & 0xC0 == 0x80):
            # A character begins here, even if the one before it is incomplete.
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
    """The characters with which GPT-2 spells bytes: printable bytes as in Latin-1, the others from U+0100 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + at): byte for at, byte in enumerate(others)}


BYTES = _byte_characters()
