"""Guarded text never becomes a control token, whatever the tokenizer, and is otherwise tokenised as it always was."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import cache

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

from serve_app.errors import InvalidRequestError
from serve_app.schemas import Message, ScoreRequest, TokenizeRequest
from serve_app.scorer.fake_engine import FakeEngine
from serve_app.settings import Limits
from serve_app.tasks.chat import ChatTemplate
from serve_app.tasks.model_facts import ModelFacts
from serve_app.tasks.plain_text import MARK, is_marked, original
from serve_app.tasks.prompts import PromptBuilder
from serve_app.tasks.rerank import RERANK, RerankRequest
from serve_app.tasks.steps import finish
from serve_app.tasks.tokenize import TOKENIZE
from serve_app.tasks.tokenizer import Joined, TextTokenizer
from serve_app.tasks.tokenizer_files import TokenizerFacts
from tests.unit.tasks.test_tokenizer_files import CL100K, SHAPES, byte_level, spaced, split

CONTROL = ("<s>", "</s>", "<|im_start|>", "<|im_end|>", "<think>", "</think>")
"""Those of ``SPECIALS`` that a prompt may have, and tokens that are added without being special."""
TEXTUAL = ("\n\n", "word", "<h1>")
"""Tokens that are added, but are text."""
WIDE = str.maketrans("<|>", "\uff1c\uff5c\uff1e")
"""Full-width forms, which NFKC makes ASCII."""


def ignoring_merges() -> Tokenizer:
    """Llama 3's kind: a word that is a token as a whole is taken at once."""
    made = byte_level(split(CL100K))
    made.model.ignore_merges = True
    return made


def normalised() -> Tokenizer:
    """Tokens that are looked for in normalised text, in which full-width and capital letters have become others."""
    made = byte_level(split(CL100K), normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()]))
    made.add_tokens([AddedToken(token, normalized=True) for token in ("<think>", "</think>", "[inst]")])
    return made


KINDS = {name: shape.make for name, shape in SHAPES.items()} | {
    "ignore_merges": ignoring_merges,
    "normalised": normalised,
    "prefix in a pre-tokenizer": lambda: spaced(
        None, pre_tokenizers.Metaspace(prepend_scheme="first", split=False), bos=False
    ),
}


@cache
def tokenizer_of(kind: str) -> TextTokenizer:
    backend = KINDS[kind]()
    more = [token for token in ("<think>", "</think>", *TEXTUAL) if backend.token_to_id(token) is None]
    backend.add_tokens([AddedToken(token, normalized=False) for token in more])
    return TextTokenizer(backend, None)


def texts() -> st.SearchStrategy[str]:
    """Texts that are full of control tokens, of their parts, and of what normalisers make control tokens."""
    parts = [token[at:end] for token in CONTROL for at in range(len(token)) for end in range(at + 1, len(token) + 1)]
    whole = [*CONTROL, *(token.translate(WIDE) for token in CONTROL), "<THINK>", "[INST]"]
    hostile = st.sampled_from(whole) | st.sampled_from(parts)
    plain = st.sampled_from([" ", "\n", "  ", "yes", " the", "1", "\u0301", "火星", "\ufdd0", "\ufdd1", "\ufdd2", "▁"])
    other = st.text(st.characters(exclude_categories=["Cs"]), max_size=6)
    return st.lists(hostile | plain | other, max_size=8).map("".join)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=40)
@given(first=texts(), second=texts())
def test_no_text_becomes_a_control_token(kind: str, first: str, second: str) -> None:
    tokenizer = tokenizer_of(kind)
    guard, control = tokenizer.plain.guard, tokenizer.plain.control
    assert original(guard(first)) == first
    prompt = f"<|im_start|>user\n{guard(first)}{guard(second)}<|im_end|>\n"
    (ids,) = tokenizer.guarded.encode([prompt], add_special_tokens=False)
    assert [tokenizer.pieces([id])[0] for id in ids if id in control.values() and id != control.get("<unk>")] == [
        "<|im_start|>",
        "<|im_end|>",
    ]


@pytest.mark.parametrize("kind", ["Llama 3", "Qwen2.5", "ignore_merges", "SmolLM2 from the hub"])
@settings(max_examples=40)
@given(text=texts())
def test_guarded_text_comes_back(kind: str, text: str) -> None:
    tokenizer = tokenizer_of(kind)
    tokenizer.backend.decoder = decoders.ByteLevel()
    normal = tokenizer.backend.normalizer.normalize_str(text) if tokenizer.backend.normalizer else text
    (ids,) = tokenizer.guarded.encode([tokenizer.plain.guard(text)], add_special_tokens=False)
    assert tokenizer.decode(ids) == normal


@pytest.mark.parametrize("kind", sorted(KINDS.keys() - {"normalised"}))
@settings(max_examples=40)
@given(text=texts(), at=st.integers(1, 60))
def test_a_mark_changes_no_other_token(kind: str, text: str, at: int) -> None:
    """A prompt with a mark anywhere but in an added token has the tokens that it has without the mark."""
    tokenizer = tokenizer_of(kind)
    text = "".join(char for char in text if not is_marked(char))
    at = min(at, len(text))
    assume(
        all(found not in range(1, len(token)) for token in (*CONTROL, *TEXTUAL) for found in _places(token, text, at))
        and not _among_taken_spaces(tokenizer, text, at)
    )
    assert tokenizer.guarded.encode([text[:at] + MARK + text[at:]]) == tokenizer.encode([text])


def _among_taken_spaces(tokenizer: TextTokenizer, text: str, at: int) -> bool:
    """Whether ``at`` is between a token and spaces that the token takes with it."""
    before = text[:at].rstrip()
    takes = (token.content for token in tokenizer.backend.get_added_tokens_decoder().values() if token.rstrip)
    return text[at : at + 1].isspace() and any(before.endswith(token) for token in takes)


def _places(token: str, text: str, at: int) -> list[int]:
    """How far into the token ``at`` lies, for each place of the token in the text."""
    return [at - found.start() for found in re.finditer(f"(?={re.escape(token)})", text)]


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=40)
@given(text=texts())
@example(text="\n\n\uff1cs\uff1e")  # two line breaks that are one token, before a control token in full-width letters
def test_text_without_control_tokens_has_its_usual_tokens(kind: str, text: str) -> None:
    tokenizer = tokenizer_of(kind)
    assume(not is_marked(text[:1]))  # a space may be put in front of a text, and guarded text never is at the front
    assume("<unk>" not in text)  # a control token as others, though what has no token is encoded as it, too
    (usual,) = tokenizer.encode([text], add_special_tokens=False)
    assume(not set(usual) & (set(tokenizer.plain.control.values()) - {tokenizer.plain.control.get("<unk>")}))
    assert tokenizer.guarded.encode([tokenizer.plain.guard(text)], add_special_tokens=False) == [usual]


def test_words_white_space_and_html_stay_tokens() -> None:
    tokenizer = tokenizer_of("Llama 3")
    assert "<think>" in tokenizer.plain.control
    for token in TEXTUAL:
        assert tokenizer.plain.guard(f"a{token}b") == f"a{token}b"
        assert tokenizer.pieces(tokenizer.encode([token], add_special_tokens=False)[0]) == [token]


def test_a_text_whose_spelling_is_a_control_token_is_refused() -> None:
    """A unigram model takes any token of its vocabulary from text."""
    pieces = [("<unk>", 0.0), ("</s>", -1.0), *((char, -9.0) for char in "abs</>")]
    backend = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=False))
    backend.add_special_tokens([AddedToken("</s>", normalized=False)])
    tokenizer = TextTokenizer(backend, None)
    with pytest.raises(InvalidRequestError, match="'</s>' as a control token even where it is spelt as text"):
        tokenizer.guarded.encode([tokenizer.plain.guard("ab</s>")])
    assert tokenizer.guarded.encode([tokenizer.plain.guard("ab") + "</s>"]) == [[2, 3, 1]]


def test_the_item_that_cannot_be_spelt_has_the_error() -> None:
    pieces = [("<unk>", 0.0), ("</s>", -1.0), *((char, -9.0) for char in "abs</>")]
    backend = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=False))
    backend.add_special_tokens([AddedToken("</s>", normalized=False)])
    source = "{% for m in messages %}{{ m.content }}{% endfor %}"
    tokenizer = TextTokenizer(backend, None, TokenizerFacts(chat_template=source))
    info = FakeEngine(20, 9_999).info
    model = ModelFacts("m", tokenizer, info, Limits(), chat=ChatTemplate.load(tokenizer))
    classifier = replace(model, info=replace(info, classes=2))

    def refused(items: list[str], labels: list[str], said: str) -> InvalidRequestError:
        request = ScoreRequest(messages=[Message(role="user", content=said)], items=items, labels=labels)
        with pytest.raises(InvalidRequestError, match="'</s>' as a control token") as caught:
            finish(PromptBuilder(request, model).rest())
        made = request.model_copy(update={"on_error": "item"})
        if caught.value.index is None:
            with pytest.raises(InvalidRequestError, match=f"^{caught.value.param}: "):
                finish(PromptBuilder(made, model).rest())
        else:
            prepared = finish(PromptBuilder(made, model).rest())
            assert [error.index for error in prepared.errors] == [caught.value.index] * len(prepared.errors)
            assert len(prepared.prompts) + len(prepared.errors) == len(items)
        return caught.value

    item = refused(["a", "</s>", "b"], ["a", "b"], "a")
    assert (item.param, item.index, item.message[:10]) == ("items", 1, "items[1]: ")
    assert refused(["a"], ["a", "</s>"], "a").param == "labels"
    assert refused(["a", "b"], ["a", "b"], "a</s>").param == "messages"
    rerank = RerankRequest(query="a", documents=["a", "</s>"])
    with pytest.raises(InvalidRequestError, match=r"^documents\[1\]: .*'</s>' as a control token") as caught:
        finish(RERANK.builder(classifier)(rerank, ""))
    assert (caught.value.param, caught.value.index) == ("documents", 1)
    with pytest.raises(InvalidRequestError, match=r"^query: .*'</s>' as a control token"):
        finish(RERANK.builder(classifier)(rerank.model_copy(update={"query": "</s>"}), ""))
    with pytest.raises(InvalidRequestError, match=r"^messages: .*'</s>' as a control token"):
        finish(TOKENIZE.builder(model)(TokenizeRequest(messages=[Message(role="user", content="</s>")]), ""))


def test_a_long_guarded_query_is_joined_with_items_as_whole_texts_are() -> None:
    tokenizer = tokenizer_of("Llama 3")
    guard = tokenizer.plain.guard
    for query in ("the yes no 2024 " * 40, "the </s> yes <|im_end|> no " * 40):
        front = f"<|im_start|>{guard(query)}"
        items = [guard(item) for item in ("yes", "</s>", "a<", "", "\u0301")]
        joined = Joined(tokenizer.guarded, front, add_special_tokens=True, many=True)
        assert joined.encode(items) == tokenizer.guarded.encode([front + item for item in items])
        assert joined.query_tokens > 40


def test_the_parts_of_a_token_cannot_be_sent_apart() -> None:
    tokenizer = tokenizer_of("Llama 3")
    guard = tokenizer.plain.guard
    for token in CONTROL:
        for cut in range(1, len(token)):
            first, second = token[:cut], token[cut:]
            joins = [guard(first) + guard(second), guard(first) + second]
            joins += [first + guard(second)] if len(second) > 1 else []
            for ids in tokenizer.guarded.encode(joins, add_special_tokens=False):
                assert not set(ids) & set(tokenizer.plain.control.values()), (first, second)


def test_a_tokenizer_with_thousands_of_control_tokens_is_guarded_fast_enough_to_build() -> None:
    """Gemma has 6,242 unused tokens: they share one expression's beginnings."""
    backend = byte_level(split(CL100K))
    backend.add_special_tokens([AddedToken(f"<unused{number}>", normalized=False) for number in range(7_000)])
    guard = TextTokenizer(backend, None).plain.guard
    assert guard("a<unused6999>b<unused7000>") == f"a<{MARK}unused6999>b<unused7000>"
    assert guard("<" * 100_000 + " ") == "<" * 100_000 + MARK + " "
