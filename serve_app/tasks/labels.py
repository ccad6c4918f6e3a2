"""Layouts of labels: which sequences and reads give the logprob of each label."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import cast

import numpy as np

from serve_app.contract import Int32, Int64
from serve_app.errors import InvalidRequestError
from serve_app.tasks.plain_text import original
from serve_app.tasks.tokenizer import Ending
from serve_app.tasks.validation import check_ids

_SHOWN = 60
"""The most characters of a label that an error message repeats."""
_PIECES = 8
"""The most tokens that an error message spells."""


@dataclass(frozen=True, slots=True)
class Layout:
    """Layout of one item's labels: how they are read after its prompt.

    A label's logprob is the sum of its tokens' logprobs, each given the prompt and the label's tokens before it. Every
    such read is made once, however many labels have the same beginning.

    Attributes:
        continuations: the tokens after the prompt, one tuple per sequence; ``((),)`` if all labels have one token.
        read_sequences: the continuation of each read, not descending.
        read_depths: the number of tokens of its continuation before each read, ascending within a continuation.
        targets: the target ids of all reads, one read after the other.
        target_counts: the number of targets of each read.
        parts: for each token of each label in turn, its position in ``targets``.
        lengths: the number of tokens of each label.
        disjoint: the labels that do not begin with another label; their probabilities may be summed.
        depth: the number of tokens of the longest continuation.
    """

    continuations: tuple[tuple[int, ...], ...]
    read_sequences: Int32
    read_depths: Int32
    targets: Int32
    target_counts: Int64
    parts: Int64
    lengths: Int64
    disjoint: Sequence[int]
    depth: int = 0


def of_tokens(labels: Sequence[int]) -> Layout:
    """Lay out labels of one token each."""
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


class _Node:
    """A node in the tree of labels: the context made of a label's tokens so far.

    Attributes:
        after: the next contexts of the labels by next token, in the labels' order.
        ends: whether a label ends here.
        places: the positions of the next tokens in ``Layout.targets``.
    """

    __slots__ = ("after", "ends", "places")

    def __init__(self) -> None:
        self.after: dict[int, _Node] = {}
        self.ends = False
        self.places: dict[int, int] = {}


def of_words(labels: Sequence[tuple[int, ...]]) -> Layout:
    """Lay out labels of one or more tokens each, no two of them equal. It takes time linear in their tokens."""
    root = _Node()
    paths: list[list[_Node]] = []
    """The contexts of each label's tokens."""
    for label in labels:
        node, path = root, list[_Node]()
        for token in label:
            path.append(node)
            node = node.after.setdefault(token, _Node())
        node.ends = True
        paths.append(path)
    # Contexts are visited in the order of their tokens, so each is read in the first continuation that contains it.
    continuations: list[tuple[int, ...]] = []
    reads: list[tuple[int, int, _Node]] = []
    targets: list[int] = []
    waiting: list[tuple[_Node, int, int]] = [(root, 0, -1)]
    stem: list[int] = []
    while waiting:
        node, depth, token = waiting.pop()
        del stem[max(depth - 1, 0) :]
        if depth:
            stem.append(token)
        node.places = {token: len(targets) + place for place, token in enumerate(node.after)}
        targets += node.after
        reads.append((len(continuations), depth, node))
        deeper = sorted(((token, child) for token, child in node.after.items() if child.after), key=itemgetter(0))
        waiting += [(child, depth + 1, token) for token, child in reversed(deeper)]
        if not deeper:
            continuations.append(tuple(stem))
    return Layout(
        continuations=tuple(continuations),
        read_sequences=np.array([number for number, _, _ in reads], np.int32),
        read_depths=np.array([depth for _, depth, _ in reads], np.int32),
        targets=np.array(targets, np.int32),
        target_counts=np.array([len(node.after) for _, _, node in reads], np.int64),
        parts=np.fromiter(
            (
                node.places[token]
                for label, path in zip(labels, paths, strict=True)
                for token, node in zip(label, path, strict=True)
            ),
            np.int64,
        ),
        lengths=np.fromiter(map(len, labels), np.int64),
        disjoint=[number for number, path in enumerate(paths) if not any(node.ends for node in path)],
        depth=max(map(len, continuations)),
    )


def added_tokens(prompt: list[int], labelled: list[int]) -> tuple[int, ...]:
    """The tokens that a word adds after a prompt; empty if it adds none or changes the prompt's own.

    Args:
        labelled: the tokens of the prompt followed by the word.
    """
    return tuple(labelled[len(prompt) :]) if labelled[: len(prompt)] == prompt else ()


class Words:
    """Words as labels, laid out by the tokens that they add to a prompt.

    Args:
        pieces: a function that spells ids as the vocabulary does.
        vocab_size: the model's ids are those below it.
    """

    def __init__(self, pieces: Callable[[Sequence[int]], list[str]], vocab_size: int) -> None:
        self._pieces = pieces
        self._vocab_size = vocab_size
        self._known: dict[tuple[tuple[int, ...], ...], tuple[Layout, list[list[str]]]] = {}
        """The layouts made so far: most items of a request have the same labels, which add the same tokens."""

    def layout(
        self, index: int, words: Sequence[str], added: tuple[tuple[int, ...], ...]
    ) -> tuple[Layout, list[list[str]]]:
        """Lay out the labels, and spell each label's tokens as the vocabulary does.

        Args:
            index: the item's index, for errors.
            added: the tokens that each word adds to the item's prompt.

        Raises:
            InvalidRequestError: two words add the same tokens.
        """
        if added in self._known:
            return self._known[added]
        if len(set(added)) < len(added):
            first, second = next((a, b) for b, tokens in enumerate(added) for a in [added.index(tokens)] if a < b)
            raise InvalidRequestError(
                f"labels: {quoted(words[first])} and {quoted(words[second])} add the same tokens after "
                f"items[{index}]; send one of them",
                param="labels",
                index=index,
            )
        self._known[added] = of_words(added), [self._pieces(tokens) for tokens in added]
        return self._known[added]

    def added(
        self, index: int, prompt: list[int], word: str, labelled: list[int], ending: Ending | None = None
    ) -> tuple[int, ...]:
        """The tokens that a word adds after the prompt.

        Args:
            index: the item's index, for errors.
            labelled: the tokens of the prompt followed by the word.
            ending: the prompt's end, with which the error can say what would work.

        Raises:
            InvalidRequestError: the word changes the prompt's tokens, or adds none.
        """
        if own := added_tokens(prompt, labelled):
            # The tokenizer may have more tokens than the model.
            check_ids(own, self._vocab_size, "labels", index, of_text=True)
            return own
        same = next((at for at, (a, b) in enumerate(zip(prompt, labelled, strict=False)) if a != b), len(labelled))
        alone, together = (" ".join(self._pieces(ids[same : same + _PIECES])) for ids in (prompt, labelled))
        raise InvalidRequestError(
            f"labels: {quoted(word)} changes the last tokens of the prompt of items[{index}]: alone it ends in "
            f"{quoted(alone)}, with the label in {quoted(together)}; {_remedy(prompt, word, ending)}",
            param="labels",
            index=index,
        )


def check(labels: Sequence[int | str], where: str, index: int | None, *, most: int, vocab_size: int) -> None:
    """Check one list of labels.

    Args:
        where: the list's field, and its place there if it is one of several; ``index`` is then its item's.
        most: the most labels that a list may have.

    Raises:
        InvalidRequestError: the list is empty or too long, repeats a label, or has an invalid label.
    """
    param = where.partition("[")[0]
    if not labels:
        raise InvalidRequestError(f"{where} is empty; name at least one label", param=param, index=index)
    if len(labels) > most:
        raise InvalidRequestError(
            f"{where} has {len(labels)} labels; this service takes at most {most}; send fewer, or use several requests",
            param=param,
            index=index,
        )
    if isinstance(labels[0], int):
        check_ids(cast(list[int], labels), vocab_size, where, index)
    if len(set(labels)) < len(labels):
        twice = next(label for position, label in enumerate(labels) if label in labels[:position])
        shown = twice if isinstance(twice, int) else quoted(twice)
        raise InvalidRequestError(f"{where} names {shown} more than once; name it once", param=param, index=index)
    if "" in labels:
        raise InvalidRequestError(f'{where} has "", which adds no token; leave it out', param=param, index=index)


def wrong_lists(
    lists: Sequence[Sequence[int | str]], name: str, *, most: int, vocab_size: int
) -> Iterator[InvalidRequestError]:
    """The error of each wrong list of labels, where every item has its own list, see ``check``."""
    for index, own in enumerate(lists):
        try:
            check(own, f"{name}[{index}]", index, most=most, vocab_size=vocab_size)
        except InvalidRequestError as error:
            yield error


def quoted(text: str) -> str:
    """The text as a JSON string, shortened for a message; a newline is visible as an escape."""
    text = original(text)
    return json.dumps(text if len(text) <= _SHOWN else text[:_SHOWN] + "...", ensure_ascii=False)


def _remedy(prompt: list[int], word: str, ending: Ending | None) -> str:
    """Suggest labels that would work: part of the prompt's end moved into the label, or a space before the label."""
    found: list[str] = []
    if ending is not None:
        if (cut := ending.last_cut(word)) is not None:
            moved = ending.text[cut:]
            found.append(f"take {quoted(moved)} from it, and send the label {quoted(moved + word)}")
        apart = " " + word
        if ending.text[-1:].isalnum() and word[0].isalnum() and added_tokens(prompt, next(ending.followed_by([apart]))):
            found.append(f"send {quoted(apart)} if the label is a word of its own")
        if found:
            return f"the prompt ends in {_end(ending.text)}: {', or '.join(found)}"
    return "let the prompt end where a token ends, and begin the label there"


_SPACES = {" ": "space", "\n": "newline", "\t": "tab"}


def _end(text: str) -> str:
    """The end of a text, in words."""
    if white := text[len(text.rstrip()) :]:
        name = _SPACES.get(white[0]) if len(set(white)) == 1 else None
        if name is None:
            return f"white space, {quoted(white)}"
        return f"a {name}" if len(white) == 1 else f"{len(white)} {name}s"
    last = re.search(r"\w+$|.$", text)
    assert last
    return f"the word {quoted(last[0])}" if last[0].isalnum() else quoted(last[0])
