"""Suggestions for a label that changes its prompt's tokens: the labels that would work, by a real tokenizer."""

from __future__ import annotations

import json
import re

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from serve_app import model_source
from serve_app.errors import InvalidRequestError
from serve_app.tasks.labels import Words
from serve_app.tasks.tokenizer import Ending, TextTokenizer

PIECES = [
    " ",
    "\n",
    "\t",
    "\r\n",
    ".",
    "!",
    "...",
    "yes",
    "qui",
    "ck",
    "é",
    "狐",
    "1",
    "_",
    '"',
    "<|im_end|>",
    "\u00a0",
]


@pytest.fixture(scope="module")
def demo() -> TextTokenizer:
    return TextTokenizer.load(model_source.resolve("demo"))


def refusal(tokenizer: TextTokenizer, prompt: str, word: str) -> str | None:
    """The error of a word as the label after a prompt; None if the label is valid."""
    ending = Ending(tokenizer, [], prompt, [], special=True)
    (ids,), labelled = tokenizer.encode([prompt]), next(ending.followed_by([word]))
    try:
        Words(tokenizer.pieces, tokenizer.backend.get_vocab_size()).added(0, ids, word, labelled, ending)
    except InvalidRequestError as error:
        return error.message
    return None


class TestAdvice:
    """The error of a label that changes the prompt's tokens suggests labels that do not."""

    @pytest.mark.parametrize(
        ("prompt", "word", "said"),
        [
            ("is it?: ", "yes", 'the prompt ends in a space: take " " from it, and send the label " yes"'),
            ("is it?:  ", "yes", 'ends in 2 spaces: take " " from it, and send the label " yes"'),
            ("is it?:\n\n", "yes", 'ends in 2 newlines: take "\\n" from it, and send the label "\\nyes"'),
            ("is it?:\n", "\n", 'ends in a newline: take "\\n" from it, and send the label "\\n\\n"'),
            ("is it?:\t\t", "yes", 'ends in 2 tabs: take "\\t" from it, and send the label "\\tyes"'),
            ("is it?: \n ", "yes", 'ends in white space, " \\n ": take " " from it, and send the label " yes"'),
            ("good.", ".", 'ends in ".": take "." from it, and send the label ".."'),
            (
                "the qui",
                "ck",
                'ends in the word "qui": take " qui" from it, and send the label " quick", or send " ck" if the label',
            ),
            ("qui", "ck", 'ends in the word "qui": send " ck" if the label is a word of its own'),
        ],
    )
    def test_fits_the_prompts_end(self, demo: TextTokenizer, prompt: str, word: str, said: str):
        assert said in (refusal(demo, prompt, word) or "")

    @given(
        prompt=st.lists(st.sampled_from(PIECES), min_size=1, max_size=8).map("".join),
        word=st.lists(st.sampled_from(PIECES), min_size=1, max_size=3).map("".join),
    )
    @example(prompt="is it \na", word="a")  # the prompt before "a" has other tokens alone than before "aa"
    @example(prompt="is it \n'", word="s")
    def test_works(self, demo: TextTokenizer, prompt: str, word: str):
        if (message := refusal(demo, prompt, word)) is None:
            return
        taken = re.search(r"take (\".*\") from it, and send the label (\".*?\")(, or|$)", message, re.DOTALL)
        other = re.search(r"send (\".*?\") if the label is a word of its own$", message)
        assert taken or other or "where a token ends" in message
        if taken:
            moved, label = json.loads(taken[1]), json.loads(taken[2])
            assert prompt.endswith(moved)
            assert label == moved + word
            assert refusal(demo, prompt.removesuffix(moved), label) is None
        if other:
            assert refusal(demo, prompt, json.loads(other[1])) is None

    def test_long_ends_are_not_tried(self, demo: TextTokenizer):
        assert "where a token ends" in (refusal(demo, "." * 70_000, ".") or "")
