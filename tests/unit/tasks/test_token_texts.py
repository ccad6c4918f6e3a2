"""Tokens as parts of a text, with all kinds of decoders."""

from __future__ import annotations

from ast import literal_eval
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from serve_app.contract import BatchResult
from serve_app.scorer.fake_engine import FakeEngine
from serve_app.settings import Limits
from serve_app.tasks.completions import Completer, CompletionChoice, CompletionRequest
from serve_app.tasks.model_facts import ModelFacts
from serve_app.tasks.steps import finish
from serve_app.tasks.token_texts import TokenReader
from serve_app.tasks.tokenizer import TextTokenizer
from tests.local import CONTEXT, save_tokenizer

WORDS = ["▁", "▁t", "▁th", "▁the", "he", "th", "▁f", "ox", "▁fox", "▁▁", *"abcdefghijklmnopqrstuvwxyzABC.,é"]
MERGES = [
    ("▁", "t"),
    ("▁t", "h"),
    ("▁th", "e"),
    ("h", "e"),
    ("t", "h"),
    ("▁", "f"),
    ("o", "x"),
    ("▁f", "ox"),
    ("▁", "▁"),
]


def pieces_tokenizer(decoder: decoders.Decoder, *, prepend: bool, bos: bool = False) -> TextTokenizer:
    """A BPE with byte fallback, as SentencePiece makes them."""
    spelt = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *WORDS]
    vocabulary = {piece: number for number, piece in enumerate(spelt)}
    backend = Tokenizer(models.BPE(vocabulary, MERGES, byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    replaced = normalizers.Replace(" ", "▁")
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), replaced]) if prepend else replaced
    backend.decoder = decoder
    backend.add_special_tokens(["<s>", "</s>"])
    if bos:
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return TextTokenizer(backend, 1)


def made(kind: str, folder: Path) -> TextTokenizer:
    plain = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    match kind:
        case "byte-level" | "byte-level with BOS":
            return TextTokenizer.load(save_tokenizer(folder, adds_bos="BOS" in kind))
        case "gemma":
            return pieces_tokenizer(decoders.Sequence(plain), prepend=False, bos=True)
        case "llama":
            return pieces_tokenizer(decoders.Sequence([*plain, decoders.Strip(" ", 1, 0)]), prepend=True)
        case "llama with BOS":
            return pieces_tokenizer(decoders.Sequence([*plain, decoders.Strip(" ", 1, 0)]), prepend=True, bos=True)
        case _:
            metaspace = [decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="always")]
            return pieces_tokenizer(decoders.Sequence(metaspace), prepend=True)


KINDS = ["byte-level", "byte-level with BOS", "gemma", "llama", "llama with BOS", "metaspace"]


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TextTokenizer:
    return made(request.param, tmp_path_factory.mktemp("tokenizer"))


class Alternating(FakeEngine):
    """An engine with a different top-1 token at each position."""

    def score(self, batch):  # type: ignore[no-untyped-def]
        result = super().score(batch)
        best = (np.arange(len(result.argmax)) * 7 + batch.tokens.sum()) % self.info.vocab_size
        return BatchResult(result.values, result.computed_tokens, best.astype(np.int32), result.argmax_values)


def choice(
    tokenizer: TextTokenizer, prompt: str | Sequence[int], max_tokens: int, *, echo: bool = True
) -> CompletionChoice:
    engine = Alternating(tokenizer.backend.get_vocab_size() + 8, CONTEXT)
    completer = Completer(ModelFacts("m", tokenizer, engine.info, Limits()))
    request = CompletionRequest(prompt=prompt, max_tokens=max_tokens, echo=echo, logprobs=1)  # type: ignore[arg-type]
    question = finish(completer.prepare(request, "r"))
    return question.answer(engine.score(question.batch)).choices[0]


def raw(name: str) -> bytes:
    """The bytes of a token's name."""
    if not name.startswith("bytes:"):
        return name.encode()
    own = name.removeprefix("bytes:")
    return literal_eval(f"b'{own}'" if "'" not in own or "\\'" in own else f'b"{own}"')


def check(told: CompletionChoice, *, whole: bool) -> None:
    """Check that the text has each token at the token's offset.

    Args:
        whole: the text is valid, so that all its characters are found in the names.
    """
    logprobs, text = told.logprobs, told.text
    assert logprobs is not None
    starts = logprobs.text_offset
    assert len(starts) == len(logprobs.tokens)
    assert starts == sorted(starts)
    assert not starts or (starts[0] == 0 and starts[-1] <= len(text))
    found = b""
    for name, (start, stop) in zip(logprobs.tokens, pairwise([*starts, len(text)]), strict=True):
        assert "\ufffd" not in name
        if name.startswith("bytes:"):
            found += raw(name)
        elif stop > start:
            # Other tokens are before the text, such as a begin-of-sequence token.
            assert text[start:stop] == name or (not whole and text.startswith(name, start))
            found += name.encode()
    assert not whole or found.decode() == text
    assert all(top and len(top) <= 2 for top in (logprobs.top_logprobs or [])[1:])


texts = st.text(st.sampled_from("the fox  \n.,é狐狸🦊👨‍👩‍👧ก\u0301A'\"\\"), min_size=1, max_size=24)


@given(text=texts)
def test_offsets_and_names_of_a_text(tokenizer: TextTokenizer, text: str):
    told = choice(tokenizer, text, 0)
    assert told.text == text
    (ids,) = tokenizer.encode([text])
    check(told, whole=tokenizer.decode(ids).endswith(text))


@given(data=st.data(), max_tokens=st.integers(0, 1), echo=st.booleans())
def test_offsets_and_names_of_any_ids(tokenizer: TextTokenizer, data: st.DataObject, max_tokens: int, echo: bool):
    size = tokenizer.backend.get_vocab_size() + 8
    ids = data.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=16))
    told = choice(tokenizer, ids, max_tokens, echo=echo)
    if echo and not max_tokens:
        assert told.text == tokenizer.decode(ids)
    check(told, whole=False)


@given(data=st.data())
def test_different_tokens_in_a_place_have_different_names(tokenizer: TextTokenizer, data: st.DataObject):
    size = tokenizer.backend.get_vocab_size() + 8
    ids = data.draw(st.lists(st.integers(0, size - 1), min_size=2, max_size=16))
    told = choice(tokenizer, ids, 0)
    assert told.logprobs is not None
    engine_says = [(sum(ids) + 7 * place) % size for place in range(len(ids) - 1)]
    for name, top, own, best in zip(
        told.logprobs.tokens[1:], (told.logprobs.top_logprobs or [])[1:], ids[1:], engine_says, strict=True
    ):
        assert top is not None
        assert name in top
        assert len(top) == 1 + (own != best)


@given(text=texts)
def test_starts_are_those_of_decoding_every_prefix(bos_tokenizer: TextTokenizer, text: str):
    """A token starts after the characters of the decoded prefix that stay the same in the whole text."""
    tokenizer = bos_tokenizer
    (ids,) = tokenizer.encode([text])
    told = TokenReader(tokenizer.backend).read(ids)
    for at, start in enumerate(told.starts):
        front = tokenizer.decode(ids[:at])
        same = next((i for i, (a, b) in enumerate(zip(front, told.text, strict=False)) if a != b), len(front))
        assert start == same


def test_parts_of_characters_are_named_by_their_bytes(tmp_path: Path):
    told = choice(made("byte-level", tmp_path), "a 狐!", 0)
    assert told.logprobs is not None
    assert told.logprobs.tokens == ["a", " ", "bytes:\\xe7", "bytes:\\x8b", "bytes:\\x90", "!"]
    assert told.logprobs.text_offset == [0, 1, 2, 2, 2, 3]
    told = choice(made("llama with BOS", tmp_path), "a 狐!", 0)
    assert told.logprobs is not None
    assert told.logprobs.tokens == ["<s>", " ", "a", " ", "bytes:\\xe7", "bytes:\\x8b", "bytes:\\x90", "!"]
    assert told.logprobs.text_offset == [0, 0, 0, 1, 2, 2, 2, 3]


def test_a_tokenizer_that_changes_the_text():
    backend = Tokenizer(models.WordPiece({"[UNK]": 0, "the": 1, "fox": 2, "##es": 3, "cafe": 4}, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    told = choice(TextTokenizer(backend, None), "The  FOXES 狐 Café", 1)
    assert told.logprobs is not None
    assert told.text.startswith("The  FOXES 狐 Café")
    assert told.logprobs.text_offset == [0, 3, 8, 10, 12, 17]
    assert all(a <= b for a, b in pairwise(told.logprobs.text_offset))
