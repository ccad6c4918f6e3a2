"""Labels as the model reads them: which sequences and reads give the logprob of each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain, count
from typing import cast

import numpy as np

from serve_app.checks import check_ids
from serve_app.contract import Int32, Int64
from serve_app.errors import InvalidRequestError

_SHOWN = 60
"""Characters of a label that an error message repeats."""
_PIECES = 8
"""Tokens that an error message spells."""


@dataclass(frozen=True, slots=True)
class Layout:
    """How the labels of one item are read behind its prompt.

    A label's logprob is the sum of its tokens' logprobs, each given the prompt and the label's tokens before it. Every
    such read is made once, however many labels begin alike.

    Attributes:
        continuations: tokens behind the prompt, one tuple a sequence; ``((),)`` if all labels have one token.
        read_sequences: the continuation of each read, not descending.
        read_depths: how many tokens of its continuation precede each read, ascending within a continuation.
        targets: token ids of all reads, one after the other.
        target_counts: of each read.
        parts: for each label in turn, where its tokens stand among ``targets``.
        lengths: tokens of each label.
        disjoint: labels that do not begin with another one, whose probabilities may be summed.
    """

    continuations: tuple[tuple[int, ...], ...]
    read_sequences: Int32
    read_depths: Int32
    targets: Int32
    target_counts: Int64
    parts: Int64
    lengths: Int64
    disjoint: Sequence[int]

    @property
    def depth(self) -> int:
        """Tokens of the longest continuation."""
        return max(map(len, self.continuations))


def of_tokens(labels: Sequence[int]) -> Layout:
    """Of labels that are one token each."""
    number = len(labels)
    return Layout(
        continuations=((),),
        read_sequences=np.zeros(1, np.int32),
        read_depths=np.zeros(1, np.int32),
        targets=np.asarray(labels, np.int32),
        target_counts=np.array([number], np.int64),
        parts=np.arange(number, dtype=np.int64),
        lengths=np.ones(number, np.int64),
        disjoint=range(number),
    )


def of_words(labels: Sequence[tuple[int, ...]]) -> Layout:
    """Of labels that are one token or more each, no two the same."""
    after: dict[tuple[int, ...], dict[int, int]] = {}
    """For each context behind the prompt, the tokens to read there, and where each stands among the targets."""
    for label in labels:
        for depth, token in enumerate(label):
            after.setdefault(label[:depth], {})[token] = -1
    stems = sorted({label[:-1] for label in labels})
    # One that goes on from a stem comes right behind it, and holds its reads, too.
    last = len(stems) - 1
    continuations = tuple(s for at, s in enumerate(stems) if at == last or stems[at + 1][: len(s)] != s)
    reads: dict[tuple[int, ...], int] = {}
    for number, continuation in enumerate(continuations):
        for depth in range(len(continuation) + 1):
            reads.setdefault(continuation[:depth], number)
    positions = count()
    for context in reads:
        after[context] = dict(zip(after[context], positions, strict=False))
    known = set(labels)
    return Layout(
        continuations=continuations,
        read_sequences=np.fromiter(reads.values(), np.int32),
        read_depths=np.fromiter(map(len, reads), np.int32),
        targets=np.fromiter(chain.from_iterable(after[context] for context in reads), np.int32),
        target_counts=np.fromiter((len(after[context]) for context in reads), np.int64),
        parts=np.fromiter((after[label[:at]][token] for label in labels for at, token in enumerate(label)), np.int64),
        lengths=np.fromiter(map(len, labels), np.int64),
        disjoint=[
            number
            for number, label in enumerate(labels)
            if not any(label[:depth] in known for depth in range(1, len(label)))
        ],
    )


def added_tokens(prompt: list[int], labelled: list[int]) -> tuple[int, ...]:
    """The tokens of a word behind a prompt; none if it adds none or changes the prompt's own.

    Args:
        labelled: the tokens of the prompt with the word behind it.
    """
    return tuple(labelled[len(prompt) :]) if labelled[: len(prompt)] == prompt else ()


class Words:
    """Lays out labels that are text by the tokens that they add to a prompt.

    Args:
        pieces: the vocabulary's spelling of ids.
        vocab_size: ids below it are the model's.
    """

    def __init__(self, pieces: Callable[[Sequence[int]], list[str]], vocab_size: int) -> None:
        self._pieces = pieces
        self._vocab_size = vocab_size
        self._known: dict[tuple[tuple[int, ...], ...], tuple[Layout, list[list[str]]]] = {}
        """Most items of a request have the same labels, of the same tokens."""

    def layout(
        self, index: int, prompt: list[int], words: Sequence[str], labelled: Sequence[list[int]]
    ) -> tuple[Layout, list[list[str]]]:
        """The layout, and each label's tokens as the vocabulary spells them.

        Args:
            index: of the item, for errors.
            prompt: its tokens.
            labelled: the tokens of the prompt with each word behind it.

        Raises:
            InvalidRequestError: a word changes the prompt's tokens, adds none, or adds the same ones as another.
        """
        added = tuple(self._added(index, prompt, *each) for each in zip(words, labelled, strict=True))
        if added in self._known:
            return self._known[added]
        if len(set(added)) < len(added):
            first, second = next((a, b) for b, tokens in enumerate(added) for a in [added.index(tokens)] if a < b)
            raise InvalidRequestError(
                f"labels: {quoted(words[first])} and {quoted(words[second])} are the same tokens behind "
                f"items[{index}]; send one of them",
                param="labels",
                index=index,
            )
        self._known[added] = of_words(added), [self._pieces(tokens) for tokens in added]
        return self._known[added]

    def _added(self, index: int, prompt: list[int], word: str, labelled: list[int]) -> tuple[int, ...]:
        """The tokens of a word behind the prompt."""
        if own := added_tokens(prompt, labelled):
            check_ids(own, self._vocab_size, "labels", index)  # the tokenizer may have more tokens than the model
            return own
        same = next((at for at, (a, b) in enumerate(zip(prompt, labelled, strict=False)) if a != b), len(labelled))
        alone, together = (" ".join(self._pieces(ids[same : same + _PIECES])) for ids in (prompt, labelled))
        raise InvalidRequestError(
            f"labels: {quoted(word)} changes the last tokens of the prompt of items[{index}]: alone it ends in "
            f"{quoted(alone)}, with the label in {quoted(together)}; let the prompt end where a token ends: a space "
            'between them belongs to the label, as in " yes"',
            param="labels",
            index=index,
        )


def check(labels: Sequence[int | str], where: str, index: int | None, *, most: int, vocab_size: int) -> None:
    """One list of labels.

    Args:
        where: its field, and its place there if it is one of several; ``index`` is then its item.
        most: labels that a list may hold.

    Raises:
        InvalidRequestError: it is empty or too long, repeats a label, or holds one that cannot be any.
    """
    param = where.partition("[")[0]
    if not labels:
        raise InvalidRequestError(f"{where} is empty; name at least one label", param=param, index=index)
    if len(labels) > most:
        raise InvalidRequestError(
            f"{where} has {len(labels)} labels; this service takes at most {most}; ask for fewer, or in two requests",
            param=param,
            index=index,
        )
    if isinstance(labels[0], int):
        check_ids(cast(list[int], labels), vocab_size, param, index)
    if len(set(labels)) < len(labels):
        twice = next(label for position, label in enumerate(labels) if label in labels[:position])
        shown = twice if isinstance(twice, int) else quoted(twice)
        raise InvalidRequestError(f"{where} names {shown} more than once; name it once", param=param, index=index)
    if "" in labels:
        raise InvalidRequestError(f'{where} has "", which adds no token; leave it out', param=param, index=index)


def quoted(text: str) -> str:
    """A label for a message."""
    return '"' + (text if len(text) <= _SHOWN else text[:_SHOWN] + "...") + '"'
