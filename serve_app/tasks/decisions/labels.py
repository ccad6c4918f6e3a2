"""Codes of options, and labels: the words after a prompt that stand for its answers."""

from __future__ import annotations

import string
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise, product

import numpy as np

from serve_app.contract import Int64
from serve_app.errors import InvalidRequestError
from serve_app.tasks.labels import Layout, added_tokens, of_words, quoted
from serve_app.tasks.steps import Steps
from serve_app.tasks.tokenizer import Ending

PAIRS = tuple(map("".join, product(string.ascii_uppercase, repeat=2)))
"""AA to ZZ."""


def codes(count: int, single: Sequence[str]) -> Sequence[str]:
    """One code for each option: A to Z; for more options, two letters each.

    Codes of one token are cheaper, and the demo model answers with them better (docs/measurements.md). Where there are
    too few of them, a code of two tokens is scored by the product of their probabilities. In either case the codes'
    probabilities form one distribution, since no code begins another.

    Args:
        single: the pairs of letters that are one token each.
    """
    if count <= len(string.ascii_uppercase):
        return string.ascii_uppercase[:count]
    return (single if count <= len(single) else PAIRS)[:count]


@dataclass(frozen=True, slots=True)
class Answers:
    """The labels of a question's answers, laid out after a prompt, in the order in which the prompt shows the answers.

    Attributes:
        layout: how the labels are read.
        groups: the numbers of each answer's labels in the layout.
        words: each answer's labels as text.
    """

    layout: Layout
    groups: tuple[tuple[int, ...], ...]
    words: tuple[tuple[str, ...], ...]


def at_ends(lengths: Sequence[int]) -> Answers:
    """How a decision head reads a prompt: an option at the end of each part, and the question at that of the last one.

    Args:
        lengths: the parts' tokens; the prompt ends with these parts.
    """
    ends = np.cumsum(lengths)
    return _read_by_head(ends - ends[-1], [1] * (len(lengths) - 1) + [0])


def at_starts(lengths: Sequence[int]) -> Answers:
    """How an encoder's decision head reads a prompt: an option at the beginning of each part but the last.

    Args:
        lengths: see ``at_ends``.
    """
    starts = np.cumsum([0, *lengths])
    return _read_by_head(starts[:-2] - starts[-1] + 1, [1] * (len(lengths) - 1))


def _read_by_head(depths: Int64, targets: Sequence[int]) -> Answers:
    """How options are read, a target for each.

    Args:
        depths: the places that are read, from the prompt's last token on.
        targets: how many each of them has.
    """
    count = sum(targets)
    layout = Layout(
        continuations=((),),
        read_sequences=np.zeros(len(depths), np.int32),
        read_depths=depths.astype(np.int32),
        targets=np.zeros(count, np.int32),
        target_counts=np.array(targets, np.int64),
        parts=np.arange(count, dtype=np.int64),
        lengths=np.ones(count, np.int64),
        disjoint=range(count),
    )
    return Answers(layout, tuple((number,) for number in range(count)), ((),) * count)


def lay_out(words: Sequence[Sequence[str]], ending: Ending, prompt: list[int], vocab_size: int) -> Steps[Answers]:
    """Lay out the labels of each answer after a prompt.

    Args:
        words: each answer's labels. The first counts in any case; the others where they are single tokens that no
            other answer has.
        ending: the end of the prompt.
        prompt: the prompt's tokens.

    Raises:
        InvalidRequestError: a first label adds no token, changes the prompt's tokens, or begins another answer's.
    """
    flat = [word for own in words for word in own]
    found: dict[str, tuple[int, ...]] = {}
    for word, ids in zip(flat, ending.followed_by(flat), strict=True):
        yield
        found[word] = added_tokens(prompt, ids)
    firsts = [found[own[0]] for own in words]
    for own, tokens in zip(words, firsts, strict=True):
        if not tokens or max(tokens) >= vocab_size:
            raise InvalidRequestError(
                f"this model's tokenizer has no tokens for the label {quoted(own[0])} after this profile's prompt; "
                "serve the model with another decision_profile"
            )
    if clash := next(_beginnings(firsts), None):
        one, other = (quoted(words[number][0]) for number in clash)
        raise InvalidRequestError(
            f"the labels {one} and {other} are not distinct for this model's tokenizer; "
            "serve the model with another decision_profile"
        )
    labels: list[tuple[int, ...]] = []
    groups: list[tuple[int, ...]] = []
    kept: list[tuple[str, ...]] = []
    begun = {tokens[0]: number for number, tokens in enumerate(firsts)}
    for number, own in enumerate(words):
        start, texts = len(labels), [own[0]]
        labels.append(firsts[number])
        for word in own[1:]:
            tokens = found[word]
            # A token that begins another label is a part of that label's probability.
            if len(tokens) == 1 and tokens[0] < vocab_size and tokens[0] not in begun:
                begun[tokens[0]] = number
                labels.append(tokens)
                texts.append(word)
        groups.append(tuple(range(start, len(labels))))
        kept.append(tuple(texts))
    return Answers(of_words(labels), tuple(groups), tuple(kept))


def _beginnings(labels: Sequence[tuple[int, ...]]) -> Iterator[tuple[int, int]]:
    """Each pair of labels of which the first begins the second, or equals it."""
    ordered = sorted(range(len(labels)), key=labels.__getitem__)
    for one, other in pairwise(ordered):
        if labels[other][: len(labels[one])] == labels[one]:
            yield one, other
