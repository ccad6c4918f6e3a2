"""Text to tokens and back, with a Hugging Face fast tokenizer."""

from __future__ import annotations

import copy
from bisect import bisect_right
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import TypeVar

import numpy as np
from tokenizers import Encoding, Tokenizer

from serve_app.batches import common_prefix
from serve_app.errors import InvalidRequestError
from serve_app.tasks import shared_query, tokenizer_files
from serve_app.tasks.plain_text import PlainText, is_marked
from serve_app.tasks.tokenizer_files import TokenizerFacts
from serve_app.tasks.validation import Work

_CHUNK_CHARACTERS = 2**16
"""Characters that are joined and tokenised at a time, about 20 ms of work. The limit keeps others from waiting long,
and it bounds the memory for the query's copies, one in every prompt."""
_ENTRY_CHARACTERS = 64
"""Characters that take as long to tokenise as the work that every text costs, however short it is."""

S = TypeVar("S", str, list[int])


def in_chunks(entries: Iterable[S], repeated: int = 0) -> Iterator[list[S]]:
    """Split texts or ids into chunks of about 20 ms of work.

    Args:
        repeated: the number of characters or ids that are processed again with each entry.
    """
    chunk: list[S] = []
    work = 0
    for entry in entries:
        chunk.append(entry)
        work += repeated + len(entry) + _ENTRY_CHARACTERS
        if work >= _CHUNK_CHARACTERS:
            yield chunk
            chunk, work = [], 0
    if chunk:
        yield chunk


@dataclass(frozen=True, slots=True)
class Ending:
    """The end of a text, which can be tokenised with a word after it in place of the whole text.

    Attributes:
        before: the text's first tokens, which nothing after the text can change.
        text: the rest of the text, after those tokens.
        behind: the special tokens that are added after every text.
        special: whether special tokens are added around ``text``, since it is the whole text.
        work: counts the characters that are tokenised; None: nobody does.
    """

    tokenizer: TextTokenizer
    before: list[int]
    text: str
    behind: list[int]
    special: bool = False
    work: Work | None = None

    def followed_by(self, words: Sequence[str]) -> Iterator[list[int]]:
        """Tokenise the whole text followed by each word, some words at a time as they are asked for.

        Raises:
            TooLargeError: there are more characters than ``work`` has left.
        """
        at_once = max(1, _CHUNK_CHARACTERS // (len(self.text) + max(map(len, words), default=0) + 1))
        for start in range(0, len(words), at_once):
            texts = [self.text + word for word in words[start : start + at_once]]
            self._spend(sum(map(len, texts)))
            for ids in self.tokenizer.encode(texts, add_special_tokens=self.special):
                yield [*self.before, *ids, *self.behind]

    def last_cut(self, word: str) -> int | None:
        """Find the last place to cut ``text``, in characters, so that the rest, followed by the word, only adds tokens.

        None: a few tries found no such place.
        """
        if len(self.text) > _CHUNK_CHARACTERS:
            return None  # each try would take long
        self._spend((1 + shared_query.TRIES) * len(self.text))
        ids, ends = self.tokenizer.encode_with_ends(self.text + word, add_special_tokens=self.special)
        cuts = [(kept, end) for kept, end in enumerate([0, *ends]) if end < len(self.text) and kept + len(self.before)]
        for kept, end in cuts[: -shared_query.TRIES - 1 : -1]:
            (own,) = self.tokenizer.encode([self.text[:end]], add_special_tokens=self.special)
            if own == ids[:kept]:
                return end
        return None

    def _spend(self, characters: int) -> None:
        if self.work:
            self.work.spend(characters)


@dataclass(frozen=True, slots=True)
class PairTemplate:
    """How a tokenizer puts two texts together: special tokens, each with its type, and the types of both texts."""

    before: Sequence[tuple[int, int]]
    between: Sequence[tuple[int, int]]
    behind: Sequence[tuple[int, int]]
    types: tuple[int, int]


class TextTokenizer:
    """A Hugging Face fast tokenizer. Encoding releases the GIL, and threads may share a tokenizer.

    Args:
        backend: the Rust tokenizer; its truncation and padding are switched off.
        bos_id: the id of the begin-of-sequence token, or None.
        facts: facts that the service returns to clients; nothing here depends on them.
        words: see ``LoadedTokenizer``.

    Attributes:
        plain: the guard of text that is put into a prompt's markup.
    """

    def __init__(
        self,
        backend: Tokenizer,
        bos_id: int | None,
        facts: TokenizerFacts | None = None,
        words: Collection[str] = (),
    ) -> None:
        self.facts = facts or TokenizerFacts()
        backend.no_truncation()
        backend.no_padding()
        self.backend = backend
        self.plain = PlainText(backend, words)
        self._reads_marks = False
        self._local = shared_query.is_local(backend)
        # Only a tokenizer that adds a BOS by itself can put a second one before the one in the text.
        self._added_bos = bos_id if backend.encode("").ids[:1] == [bos_id] else None
        self._reach = shared_query.reach(backend)
        self._around = _added_around(backend)

    @classmethod
    def load(cls, folder: Path) -> TextTokenizer:
        """Load the tokenizer of a local folder in Hugging Face layout.

        Raises:
            ModelSourceError: the folder has no usable tokenizer, or the tokenizer is not the model's.
        """
        return cls(*tokenizer_files.load(folder))

    @cached_property
    def guarded(self) -> TextTokenizer:
        """The same tokenizer for text that ``plain.guard`` made, joined or put into a template."""
        guarded = copy.copy(self)
        guarded._reads_marks = True
        return guarded

    @cached_property
    def pair(self) -> PairTemplate:
        """How two texts are put together.

        Raises:
            InvalidRequestError: not one after the other, each in one type.
        """
        found = self.backend.encode("a b", "b a")
        pieces = list(zip(found.ids, found.type_ids, strict=True))
        first, second = ([at for at, of in enumerate(found.sequence_ids) if of == number] for number in (0, 1))
        types = [{pieces[at][1] for at in own} for own in (first, second)]
        if any(len(own) != 1 for own in types) or max(first) > min(second):
            raise InvalidRequestError("this model's tokenizer has no template for pairs of texts", param="model")
        before, between, behind = pieces[: first[0]], pieces[first[-1] + 1 : second[0]], pieces[second[-1] + 1 :]
        return PairTemplate(before, between, behind, (types[0].pop(), types[1].pop()))

    def encode(self, texts: Sequence[str], *, add_special_tokens: bool = True) -> list[list[int]]:
        """Tokenise each text. There is at most one BOS at the front, even if the text begins with one too.

        Raises:
            InvalidRequestError: a guarded text cannot be spelt without control tokens.
        """
        if any(map(self._has_marks, texts)):
            encodings = [self._encoding(text, add_special_tokens) for text in texts]
        else:
            encodings = self.backend.encode_batch_fast(list(texts), add_special_tokens=add_special_tokens)
        return self._with_one_bos([encoding.ids for encoding in encodings], add_special_tokens)

    def encode_with_ends(self, text: str, *, add_special_tokens: bool = True) -> tuple[list[int], list[int]]:
        """Tokenise a text as ``encode`` does, and find the character where each token ends. Ends do not descend.

        Tokens that are added in front end at 0. Tokens that are added at the end have an end past the text's.
        """
        encoding = self._encoding(text, add_special_tokens)
        ends = [end for _, end in encoding.offsets]
        behind = len(ends)
        while behind and encoding.special_tokens_mask[behind - 1]:
            behind -= 1
            ends[behind] = len(text) + 1
        (ids,) = self._with_one_bos([encoding.ids], add_special_tokens)
        return ids, ends[len(ends) - len(ids) :]

    def encode_joined(self, query: str, items: Sequence[str], *, add_special_tokens: bool = True) -> list[list[int]]:
        """Tokenise ``query + item`` for each item, to the tokens of ``encode``, but read a long query about once."""
        return Joined(self, query, add_special_tokens=add_special_tokens, many=len(items) > 1).encode(items)

    def local_front(self, query: str, add_special_tokens: bool) -> tuple[list[int], int, list[int]] | None:
        """The front that a long query gives its prompts; None if the prompts must be tokenised whole.

        Returns:
            The query's tokens, the number of its characters with tokens that never depend on the text after it, and the
            tokens that are added after every text.
        """
        if not self._local or self._around is None or self._has_marks(query):
            return None
        whole = shared_query.ids(self.backend, query)
        if whole[:1] == [self._added_bos]:
            return None
        cut = shared_query.safe_cut(self.backend, query, whole)
        before, behind = self._around if add_special_tokens else ([], [])
        return (before + whole, cut, behind) if cut else None

    def ending(
        self, text: str, ids: Sequence[int], *, add_special_tokens: bool, work: Work | None = None
    ) -> Ending | None:
        """The end of ``text``, which has the tokens ``ids``; None if it is not much shorter than the whole text."""
        if not self._local or len(text) < shared_query.WORTHWHILE or self._around is None or self._has_marks(text):
            return None
        behind = self._around[1] if add_special_tokens else []
        own = list(ids[: len(ids) - len(behind)])
        if own + behind != list(ids) or (found := shared_query.safe_end(self.backend, text, own, self._reach)) is None:
            return None
        tokens, cut = found
        return Ending(self, own[:-tokens], text[cut:], behind, work=work)

    def last_boundary(self, text: str) -> int:
        """The last place in ``text`` where tokens begin that depend on nothing before it: an added token, or a line.

        0 if there is no such place.
        """
        found = [at for content in self.plain.control if (at := text.rfind(content)) >= 0]
        return max(found) if found else max(text.rfind("\n"), 0) if self._local else 0

    def decode(self, ids: Sequence[int]) -> str:
        """Decode ids to text, including special tokens. An id without a token in the vocabulary adds nothing."""
        return self.backend.decode(ids, skip_special_tokens=False)

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """The pieces of the vocabulary that the ids stand for."""
        return [self.backend.id_to_token(i) or "" for i in ids]

    def _has_marks(self, text: str) -> bool:
        return self._reads_marks and is_marked(text)

    def _encoding(self, text: str, add_special_tokens: bool) -> Encoding:
        encode = self.plain.encode if self._has_marks(text) else self.backend.encode
        return encode(text, add_special_tokens=add_special_tokens)

    def _with_one_bos(self, sequences: list[list[int]], added: bool) -> list[list[int]]:
        if added and self._added_bos is not None:
            for ids in sequences:
                while ids[1:2] == [self._added_bos]:
                    del ids[0]
        return sequences


class Joined:
    """One query joined with items: tokenised a few items at a time, to the tokens of the joined strings.

    Args:
        many: whether more than one item will come, so that it pays to find the part of a long query that never changes.

    Attributes:
        query_tokens: the number of tokens at the front of the first prompt that are the query's alone; 0 before that
            prompt is made.
        work: counts the characters that are tokenised for words after the endings; None: nobody does.
    """

    def __init__(
        self, tokenizer: TextTokenizer, query: str, *, add_special_tokens: bool, many: bool, work: Work | None = None
    ) -> None:
        self._tokenizer = tokenizer
        self.work = work
        self._query = query
        self._special = add_special_tokens
        worthwhile = many and len(query) >= shared_query.WORTHWHILE
        self._front = tokenizer.local_front(query, add_special_tokens) if worthwhile else None
        self.query_tokens = 0

    def encode(self, items: Sequence[str]) -> list[list[int]]:
        """Tokenise ``query + item`` for each item."""
        if self._front is None:
            return self._encode_whole(items)
        front, cut, behind = self._front
        rest, *rests = self._tokenizer.encode(
            [self._query[cut:] + item for item in ("", *items)], add_special_tokens=False
        )
        before = front[: len(front) - len(rest)]
        prompts = [before + rest + behind for rest in rests]
        if not self.query_tokens:
            self.query_tokens = common_prefix(np.asarray(front, np.int32), np.asarray(prompts[0], np.int32))
        return prompts

    def checked(self, items: Iterable[str]) -> Iterator[list[list[int] | InvalidRequestError]]:
        """Tokenise ``query + item`` for each item, a chunk at a time as it is asked for.

        An item whose text cannot be tokenised has an error in place of its ids.

        Raises:
            InvalidRequestError: the query's text cannot be tokenised.
        """
        for chunk in in_chunks(items, len(self._query)):
            try:
                yield list(self.encode(chunk))
            except InvalidRequestError:
                self._tokenizer.encode([self._query], add_special_tokens=self._special)
                yield list(map(self._checked, chunk))

    def _checked(self, item: str) -> list[int] | InvalidRequestError:
        try:
            return self.encode([item])[0]
        except InvalidRequestError as error:
            return error

    def each(self, items: Iterable[str]) -> Iterator[list[int]]:
        """Tokenise ``query + item`` for each item, and give one item's ids at a time."""
        return chain.from_iterable(map(self.encode, in_chunks(items, len(self._query))))

    def ending(self, item: str, ids: Sequence[int]) -> Ending:
        """The end of ``query + item``, which has the tokens ``ids``, see ``Ending``."""
        special, work = self._special, self.work
        if found := self._tokenizer.ending(self._query + item, ids, add_special_tokens=special, work=work):
            return found
        if self._front is None:
            return Ending(self._tokenizer, [], self._query + item, [], special, work)
        front, cut, behind = self._front
        (rest,) = self._tokenizer.encode([self._query[cut:]], add_special_tokens=False)
        before = front[: len(front) - len(rest)]
        return Ending(self._tokenizer, before, self._query[cut:] + item, behind, work=work)

    def _encode_whole(self, items: Sequence[str]) -> list[list[int]]:
        texts = [self._query + item for item in items]
        if self.query_tokens or not self._query:
            return self._tokenizer.encode(texts, add_special_tokens=self._special)
        # The first is tokenised with offsets: they say where the query ends, without another pass over it.
        first, ends = self._tokenizer.encode_with_ends(texts[0], add_special_tokens=self._special)
        self.query_tokens = bisect_right(ends, len(self._query))
        return [first, *self._tokenizer.encode(texts[1:], add_special_tokens=self._special)]


def _added_around(backend: Tokenizer) -> tuple[list[int], list[int]] | None:
    """The special tokens that are added before and after a text's own; None if they cannot be told apart."""
    bare, whole = (backend.encode("a", add_special_tokens=special).ids for special in (False, True))
    fronts = [at for at in range(len(whole) - len(bare) + 1) if whole[at : at + len(bare)] == bare]
    if not bare or len(fronts) != 1:
        return None
    return whole[: fronts[0]], whole[fronts[0] + len(bare) :]
