"""Pairs of texts for an encoder, put together as the model's tokenizer puts them together."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from serve_app.contract import Int32, ModelInfo
from serve_app.errors import InvalidRequestError
from serve_app.tasks.tokenizer import TextTokenizer, in_chunks
from serve_app.tasks.validation import check_ids, of_field


@dataclass(frozen=True, slots=True)
class Pairs:
    """Pairs of one text with many others.

    Attributes:
        tokenizer: makes the texts' tokens, each text by itself.
        info: the model's facts: a token of the second type has an id that is ``vocab_size`` higher.
        text: the text of all pairs.
        field: its field in the request.
        others: the field of the other texts.
        last: whether ``text`` is the second of each pair.
        special: whether the tokenizer's special tokens are put around and between the texts.
    """

    tokenizer: TextTokenizer
    info: ModelInfo
    text: str
    field: str
    others: str
    last: bool = False
    special: bool = True

    @property
    def added(self) -> int:
        """The number of special tokens of a pair."""
        return sum(map(len, self._special))

    @property
    def shared(self) -> list[int]:
        """The ids of the text of all pairs.

        Raises:
            InvalidRequestError: it cannot be tokenised.
        """
        with of_field(self.field):
            (ids,) = self.tokenizer.encode([self.text], add_special_tokens=False)
        check_ids(ids, self.info.vocab_size, self.field, of_text=True)
        return ids

    def each(self, texts: Iterable[str]) -> Iterator[list[int]]:
        """The ids of the other texts, some tokenised at a time as they are asked for.

        Raises:
            InvalidRequestError: a text cannot be tokenised.
        """
        index = 0
        for chunk in in_chunks(texts):
            for ids in self.tokenizer.encode(chunk, add_special_tokens=False):
                check_ids(ids, self.info.vocab_size, f"{self.others}[{index}]", index, of_text=True)
                yield ids
                index += 1

    def together(self, shared: Sequence[int], other: Sequence[int]) -> Int32:
        """A pair's tokens with their types, and its special tokens."""
        before, between, behind = self._special
        types = self.tokenizer.pair.types
        first, second = (other, shared) if self.last else (shared, other)
        parts = (*before, *((id, types[0]) for id in first), *between, *((id, types[1]) for id in second), *behind)
        ids, kinds = np.array(parts, np.int32).reshape(-1, 2).T
        return ids + kinds * np.int32(self.info.vocab_size) if self.info.token_types > 1 else ids

    def checked(self, texts: Iterable[str]) -> Iterator[list[list[int] | InvalidRequestError]]:
        """Whole pairs, some tokenised at a time as they are asked for, as ``Joined.checked`` makes prompts.

        Raises:
            InvalidRequestError: the text of all pairs cannot be tokenised.
        """
        shared = self.shared
        for chunk in in_chunks(texts):
            yield [self._whole(shared, text) for text in chunk]

    def span(self, tokens: int) -> tuple[int, int]:
        """Where the other text's tokens are in a pair of so many tokens: the first's place, and that after the last."""
        before, between, behind = map(len, self._special)
        around = len(self.shared) + between
        return (before, tokens - behind - around) if self.last else (before + around, tokens - behind)

    def _whole(self, shared: Sequence[int], text: str) -> list[int] | InvalidRequestError:
        try:
            (ids,) = self.each([text])
        except InvalidRequestError as error:
            return error
        return self.together(shared, ids).tolist()

    @property
    def _special(self) -> Sequence[Sequence[tuple[int, int]]]:
        pair = self.tokenizer.pair
        return (pair.before, pair.between, pair.behind) if self.special else ((), (), ())


def shortened(first: int, second: int, room: int) -> tuple[int, int]:
    """How many tokens of two texts are kept, so that there are at most ``room``: those of the longer one are dropped.

    Source: ``TruncationStrategy::LongestFirst`` of tokenizers, by which sentence-transformers' CrossEncoder truncates.
    """
    if first + second <= room:
        return first, second
    if first > second:
        second, first = shortened(second, first, room)
        return first, second
    second = max(first, room - first)
    return (first, second) if first + second <= room else (room // 2, room - room // 2)
