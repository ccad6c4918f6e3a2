"""A shared query joined with many items: tokenised to the same tokens, in time that grows with the unique text.

Joined prompts are tokenised whole (contract), which repeats the work for a long query with every item. Byte-level BPE
tokenizers split text into words with a regular expression. It continues from the end of the last match and looks only a
few characters ahead. So a word boundary well before the end of the query stays a boundary whatever follows, and the
tokens before it are the same in every prompt. Normalisation to NFC does not change this if the word begins with an
ASCII character, which never composes with what precedes it. Tokenizers of other kinds tokenise every prompt whole.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Sequence
from typing import Any, cast

from tokenizers import Tokenizer

WORTHWHILE = 256
"""The shortest query, in characters, for which this saves time."""
MARGIN = 64
"""Characters that must be between the cut and the end of the query: more than any such expression looks ahead."""

TRIES = 8
"""Word boundaries to try before giving up."""

_LOOKS_BACK = re.compile(r"\(\?<[=!]|(?<!\[)\^|\$|\\[AbBGzZ]")
"""Parts of a regular expression that look back or at a text's ends; "[^" begins a character class and is none."""


def is_local(backend: Tokenizer) -> bool:
    """Whether the tokenizer finds words from left to right, each by the text after the last word alone."""
    description = json.loads(backend.to_str())
    plain = not any(
        token["lstrip"] or token["rstrip"] or token["single_word"] or token["normalized"]
        for token in description["added_tokens"]
    )
    return (
        plain
        and (description["normalizer"] is None or description["normalizer"] == {"type": "NFC"})
        and description["model"]["type"] == "BPE"
        and not description["model"].get("continuing_subword_prefix")
        and _splits_locally(description["pre_tokenizer"])
    )


def _splits_locally(step: dict[str, Any] | None) -> bool:
    match step:
        case {"type": "Sequence", "pretokenizers": list() as steps}:
            return all(_splits_locally(each) for each in cast(list[dict[str, Any]], steps))
        case {"type": "ByteLevel", "add_prefix_space": False} | {"type": "Digits"}:
            return True
        case {"type": "Split", "behavior": "Isolated", "invert": False, "pattern": {"Regex": str() as pattern}}:
            return not _LOOKS_BACK.search(pattern)
        case _:
            return False


def safe_cut(backend: Tokenizer, query: str, whole: Sequence[int]) -> int:
    """The number of the query's characters that have the same tokens whatever follows; 0 if too few to save time.

    The tokenizer must be local (``is_local``).

    Args:
        whole: the query's tokens, without special tokens.
    """
    added = _added(backend)
    last = len(query) - reach(backend)
    composed = backend.normalizer is not None
    if len(query) < WORTHWHILE or last <= 0 or backend.pre_tokenizer is None:
        return 0
    if composed and not unicodedata.is_normalized("NFC", query):
        return 0
    # Added tokens split the text before words are found: look for words between the last added token and the next.
    start = max((query.rfind(token, 0, last) + len(token) for token in added if token in query[:last]), default=0)
    stop = min((at for token in added if (at := query.find(token, start)) >= 0), default=len(query))
    words: list[tuple[str, tuple[int, int]]] = backend.pre_tokenizer.pre_tokenize_str(query[start:stop])
    begins = [start + begin for _, (begin, _) in words if start + begin <= last]
    begins = [begin for begin in begins if not composed or query[begin].isascii()]
    # A word may also depend on what follows it, as white space does. A cut is safe if the rest of the query, tokenised
    # alone, has the same tokens.
    for cut in reversed(begins[-TRIES:]):
        rest = ids(backend, query[cut:])
        if whole[len(whole) - len(rest) :] == rest:
            return cut
    return 0


def safe_end(backend: Tokenizer, text: str, whole: Sequence[int], margin: int) -> tuple[int, int] | None:
    """The place where the text can be cut so that nothing after the text changes the tokens before the cut.

    The tokenizer must be local (``is_local``).

    Args:
        whole: the text's tokens; special tokens may precede them.
        margin: the least number of characters between the cut and the text's end, see ``reach``.

    Returns:
        The number of tokens after the cut, and of characters before it; None if no cut saves time.
    """
    last = len(text) - margin
    if last <= 0:
        return None
    encoding = backend.encode(text, add_special_tokens=False)
    words, offsets = encoding.word_ids, encoding.offsets
    composed = backend.normalizer is not None
    tries = 0
    for token in range(len(words) - 1, 0, -1):
        # In some tokenizers, a word's offsets lack the space that the word begins with.
        begin = offsets[token][0] - (text[offsets[token][0] - 1 : offsets[token][0]] == " ")
        if begin > last or words[token] == words[token - 1] or (composed and not text[begin].isascii()):
            continue
        if tries == TRIES:
            return None
        tries += 1
        for cut in {begin, offsets[token][0]}:
            behind = len(words) - token
            if len(text) - cut < len(text) // 2 and ids(backend, text[cut:]) == list(whole[-behind:]):
                return behind, cut
    return None


def _added(backend: Tokenizer) -> list[str]:
    return [token.content for token in backend.get_added_tokens_decoder().values()]


def reach(backend: Tokenizer) -> int:
    """The number of characters at a text's end where text after it may change words and added tokens."""
    return max(MARGIN, *map(len, _added(backend)), 0)


def ids(backend: Tokenizer, text: str) -> list[int]:
    """The ids of the text's own tokens."""
    return backend.encode_batch_fast([text], add_special_tokens=False)[0].ids
