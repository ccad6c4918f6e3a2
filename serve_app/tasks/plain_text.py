"""Text of a request that is put into a prompt's markup: nothing in it becomes one of the tokenizer's control tokens.

A *mark*, a character that Unicode sets aside for use inside programs, is put into the text wherever a control token
could be read. So neither a chat template nor the tokenizer finds the token. A second tokenizer drops the marks, but
only after it has looked for control tokens.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_left
from collections.abc import Collection, Iterable, Iterator
from functools import cached_property
from typing import Any

from tokenizers import Encoding, Tokenizer

from serve_app.errors import InvalidRequestError

MARK = "\ufdd0"
_ESCAPE = "\ufdd1"
_ESCAPED = {MARK: _ESCAPE + "\ufdd2", _ESCAPE: _ESCAPE + "\ufdd3"}
"""How the two characters are written when a text has them."""
_TO_ESCAPE = re.compile(f"[{MARK}{_ESCAPE}]")
_DROPPED = {MARK: "", **{written: own for own, written in _ESCAPED.items()}}
"""What becomes of a guarded text's marks and of the characters that were written otherwise, in this order."""

_HTML = "table|caption|thead|tbody|tfoot|tr|th|td|h[1-6]|blockquote|strong|em|b|i|u|sub|sup|code"
_TEXT = re.compile(rf"\w+|</?(?:{_HTML})>")
"""Tokens that stand for ordinary text although the tokenizer's files add them to its vocabulary, unless they are
special: words, and the HTML tags of Gemma."""
_SPACE = re.compile(r"[\s▁]+")
_MARKUP = re.compile(r"<[^<>\s]+>|\[[^\[\]\s]+\]")
"""Words of a tokenizer that are control tokens although its files do not say so."""

_KEEP_ASCII = frozenset({"NFC", "NFD", "NFKC", "NFKD"})
"""Normalizers that leave ASCII text as it is."""


class PlainText:
    """Guards text against a tokenizer's control tokens.

    Args:
        words: tokens that text is split at although they are none of ``backend``'s added ones.

    Attributes:
        control: the control tokens with their ids: all tokens that the tokenizer's files add to its vocabulary, but for
            those that stand for ordinary text, such as white space, and those of ``words`` that look like markup.
    """

    def __init__(self, backend: Tokenizer, words: Collection[str] = ()) -> None:
        self._backend = backend
        self.control = {
            token.content: id
            for id, token in backend.get_added_tokens_decoder().items()
            if token.content and not _SPACE.fullmatch(token.content)
            if token.special or not _TEXT.fullmatch(token.content)
        }
        markup = ((word, backend.token_to_id(word)) for word in words if _MARKUP.fullmatch(word))
        self.control |= {word: id for word, id in markup if id is not None}
        self._ids = frozenset(self.control.values())
        self._begins = re.compile(rf"(?={_any_of(self.control)}).", re.DOTALL) if self.control else None
        self._edges = _Edges(self.control)
        normalizer = type(backend.normalizer).__name__ if backend.normalizer else None
        self._keeps_ascii = normalizer is None or normalizer in _KEEP_ASCII

    def guard(self, text: str) -> str:
        """The text, with marks if it has a control token, or a part of one that the text beside it may complete.

        Guarded texts may be joined with each other and with a template's own text.
        """
        if self._begins is None:
            return text
        text = _TO_ESCAPE.sub(lambda found: _ESCAPED[found[0]], text)
        guarded = self._begins.sub(lambda found: found[0] + MARK, text)
        if guarded == text and self._normalised_has_one(text):
            # Within the first one, so that the mark parts no token of ordinary text, such as one of line breaks.
            end = bisect_left(range(len(text)), True, key=lambda end: self._normalised_has_one(text[:end]))
            at = max(end - 1, 1)
            guarded = text[:at] + MARK + text[at:]
        return self._edges.guarded(guarded)

    def count(self, text: str) -> int:
        """The number of places in a guarded text at which a control token begins."""
        return sum(1 for _ in self._begins.finditer(text)) if self._begins else 0

    def encode(self, text: str, *, add_special_tokens: bool) -> Encoding:
        """Tokenise text that consists of guarded texts and a template's own; offsets are of ``text`` with its marks.

        Raises:
            InvalidRequestError: the tokenizer makes a control token of guarded text even when it is spelt out.
        """
        if not is_marked(text):
            return self._backend.encode(text, add_special_tokens=add_special_tokens)
        encoding = self._marked.encode(text, add_special_tokens=add_special_tokens)
        for id, (start, end) in zip(encoding.ids, encoding.offsets, strict=True):
            if id in self._ids and MARK in text[start:end] and id != self._unknown:
                raise InvalidRequestError(
                    f"this model's tokenizer reads {original(text[start:end])!r} as a control token even where it is "
                    "spelt as text; take it out of the request's texts"
                )
        return encoding

    @cached_property
    def _unknown(self) -> int | None:
        """The id of all characters that have no token. It does not say that the text names it."""
        model = json.loads(self._backend.model.__getstate__())
        return model["unk_id"] if "unk_id" in model else self._backend.token_to_id(model.get("unk_token") or "")

    def _normalised_has_one(self, text: str) -> bool:
        """Whether a control token is in the text only after normalisation, as one in full-width letters is."""
        if self._begins is None or not self._backend.normalizer or (self._keeps_ascii and text.isascii()):
            return False
        return bool(self._begins.search(self._backend.normalizer.normalize_str(text)))

    @cached_property
    def _marked(self) -> Tokenizer:
        """The tokenizer of marked text: it looks for control tokens, then drops the marks, then does as the first."""
        description: dict[str, Any] = json.loads(self._backend.to_str())
        drops: list[dict[str, Any]] = [
            {"type": "Replace", "pattern": {"String": written}, "content": own} for written, own in _DROPPED.items()
        ]
        own = [description["normalizer"]] if description["normalizer"] else []
        description["normalizer"] = {"type": "Sequence", "normalizers": drops + own}
        for token in description["added_tokens"]:
            # These would be looked for in normalised text, which has no marks any more.
            token["normalized"] = False
        made = Tokenizer.from_str(json.dumps(description))
        made.encode_special_tokens = self._backend.encode_special_tokens
        return made


class _Edges:
    """The beginnings and ends of control tokens, which text on both sides of a join may make whole."""

    def __init__(self, tokens: Collection[str]) -> None:
        self._tokens = sorted(tokens)
        self._reversed = sorted(token[::-1] for token in tokens)
        self._longest = max(map(len, tokens), default=0)
        self._firsts = frozenset(token[0] for token in tokens)
        self._lasts = frozenset(token[-1] for token in tokens)

    def guarded(self, text: str) -> str:
        """The text with a mark at an edge that is a part of a control token. Templates may strip white space."""
        own = text.strip()
        if not own:
            return text
        head, tail = own[: self._longest - 1], own[1 - self._longest :] if self._longest > 1 else ""
        if any(char in self._firsts and _begins_one(self._tokens, tail[at:]) for at, char in enumerate(tail)):
            end = len(text.rstrip())
            text = text[:end] + MARK + text[end:]
        if any(
            at and char in self._lasts and _begins_one(self._reversed, head[at::-1]) for at, char in enumerate(head)
        ):
            # Not before the first character: some tokenizers put a space before a text that begins at once.
            second = text.index(own[0]) + 1
            text = text[:second] + MARK + text[second:]
        return text


def is_marked(text: str) -> bool:
    """Whether a text that consists of guarded texts has marks, so that it must be tokenised without them."""
    return bool(_TO_ESCAPE.search(text))


def original(text: str) -> str:
    """A guarded text as it was before."""
    for written, own in _DROPPED.items() if is_marked(text) else ():
        text = text.replace(written, own)
    return text


def _begins_one(tokens: list[str], text: str) -> bool:
    """Whether one of the sorted tokens begins with the text."""
    at = bisect_left(tokens, text)
    return at < len(tokens) and tokens[at].startswith(text)


def _any_of(tokens: Iterable[str]) -> str:
    """A regular expression that matches where one of the tokens does; tokens with the same beginning share it."""
    trie: dict[str, Any] = {}
    for token in tokens:
        node = trie
        for char in token:
            node = node.setdefault(char, {})
        node[""] = {}
    return "".join(_written(trie))


def _written(node: dict[str, Any]) -> Iterator[str]:
    while node and "" not in node:
        if len(node) > 1:
            yield "(?:" + "|".join(re.escape(char) + "".join(_written(rest)) for char, rest in node.items()) + ")"
            return
        ((char, node),) = node.items()
        yield re.escape(char)
