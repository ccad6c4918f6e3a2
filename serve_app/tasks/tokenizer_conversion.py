"""Make a tokenizer from the older files that a model may have in place of ``tokenizer.json``.

Each file is read for what it says itself. transformers 5 would build some of these tokenizers from a class instead, and
lose the space in front of a text, or the begin-of-sequence token.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from serve_app.model_source import ModelSourceError
from serve_app.tasks.token_texts import BYTES

SPACE = "▁"
"""The space in SentencePiece's vocabularies."""


class Converted(NamedTuple):
    """A tokenizer made from older files, without what is added before and after each text.

    Attributes:
        named: its special tokens, such as ``bos_token``, where the files beside it name none.
        adds_bos: whether a BOS begins each text, where the files beside it do not say so.
        hint: what the user should know of the conversion, or None.
        words: tokens that text is split at although they are none of ``backend``'s added ones.
    """

    backend: Tokenizer
    named: dict[str, str]
    adds_bos: bool
    hint: str | None = None
    words: Collection[str] = ()


Declared = Mapping[str, Any]
"""Fields of ``tokenizer_config.json`` and ``special_tokens_map.json``, and ``model_type`` of ``config.json``."""


def convert(folder: Path, declared: Declared) -> Converted | None:
    """Convert the first of the older files that the folder has; None if it has none of them.

    Raises:
        ModelSourceError: the file is damaged, or of a kind that is not converted.
    """
    for name, read in READERS.items():
        if (path := folder / name).is_file():
            try:
                return read(path, declared)
            except ModelSourceError:
                raise
            except KeyError as error:
                raise ModelSourceError(f"{path} has no {error}; copy or download it again") from error
            except Exception as error:  # of JSON and of the tokenizers library, which raises nothing precise
                raise ModelSourceError(f"{path} cannot be read ({error}); copy or download it again") from error
    return None


# Mistral's tekken.json


OLD_SPECIAL_TOKENS = (
    "<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]",
    "[/TOOL_RESULTS]", "[TOOL_CALLS]", "[IMG]", "<pad>", "[IMG_BREAK]", "[IMG_END]", "[PREFIX]", "[MIDDLE]", "[SUFFIX]",
    "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[TOOL_CONTENT]",
)  # fmt: skip
"""Special tokens of files that list none, as mistral-common has them (``Tekkenizer.DEPRECATED_SPECIAL_TOKENS``)."""


def _tekken(path: Path, _declared: Declared) -> Converted:
    content = json.loads(path.read_text(encoding="utf-8"))
    config = content["config"]
    listed: list[dict[str, Any]] = content.get("special_tokens") or [
        {"rank": rank, "token_str": token} for rank, token in enumerate(OLD_SPECIAL_TOKENS)
    ]
    by_rank = {int(token["rank"]): str(token["token_str"]) for token in listed}
    count = config.get("default_num_special_tokens") or len(by_rank)
    special = [by_rank.get(rank, f"<SPECIAL_{rank}>") for rank in range(count)]
    # The file may list more tokens than the model has rows.
    size = config.get("default_vocab_size") or count + len(content["vocab"])
    spelt = {byte: character for character, byte in BYTES.items()}
    words = [
        "".join(map(spelt.__getitem__, base64.b64decode(token["token_bytes"], validate=True)))
        for token in content["vocab"][: size - count]
    ]
    ids = {word: count + rank for rank, word in enumerate(words)}
    vocabulary = {token: rank for rank, token in enumerate(special)} | ids
    if len(vocabulary) < count + len(words):
        raise ModelSourceError(f"{path} has a token twice; copy or download it again")
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=list(_merges(words, ids)), ignore_merges=True))
    backend.pre_tokenizer = _cut(config["pattern"])
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, normalized=False) for token in special])
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    return Converted(backend, {name: token for name, token in names.items() if token in special}, adds_bos=True)


# SentencePiece's tokenizer.model


SENTENCEPIECE_CLASSES = (
    "LlamaTokenizer",
    "CodeLlamaTokenizer",
    "GemmaTokenizer",
    "PreTrainedTokenizer",
    "TokenizersBackend",
    "",
)
"""Classes that read ``tokenizer.model`` as it is. Others renumber its tokens, or add their own."""

_UNIGRAM, _BPE = 1, 2
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED = range(1, 6)

_TIKTOKEN = re.compile(rb"[A-Za-z0-9+/]+={0,2} \d+\r?\n")


def _sentencepiece(path: Path, declared: Declared) -> Converted:
    if (named := _class(declared)) not in SENTENCEPIECE_CLASSES:
        raise ModelSourceError(
            f"{path} is not converted for the tokenizer class {named}; known: "
            f"{', '.join(SENTENCEPIECE_CLASSES[:-1])}. {_MAKE_IT}"
        )
    proto = _parsed(path)
    spec, trainer = proto.normalizer_spec, proto.trainer_spec
    tokens = _renamed([piece.piece for piece in proto.pieces], declared)
    of_type = [piece.type for piece in proto.pieces]
    legacy = declared.get("legacy") is not False
    unknown = {
        "trainer_spec.model_type other than UNIGRAM and BPE": trainer.model_type not in (_UNIGRAM, _BPE),
        "pieces of type UNUSED": _UNUSED in of_type,
        "normalizer_spec.escape_whitespaces: false": not spec.escape_whitespaces,
        "trainer_spec.treat_whitespace_as_suffix": trainer.treat_whitespace_as_suffix,
        "normalizer_spec.remove_extra_whitespaces with legacy: false": spec.remove_extra_whitespaces and not legacy,
    }
    if any(unknown.values()):
        named = ", ".join(name for name, found in unknown.items() if found)
        raise ModelSourceError(f"{path} has what is not converted: {named}. {_MAKE_IT}")
    normal, own, special = (
        [token for token, type in zip(tokens, of_type, strict=True) if type in wanted]
        for wanted in ((_NORMAL,), (_USER_DEFINED,), (_CONTROL, _UNKNOWN))
    )
    prefix = spec.add_dummy_prefix and declared.get("add_prefix_space", True) is not False
    # A token that the text is split at begins a new text. This is the same where no space is put in front of a text.
    added = [] if prefix else [token for token in own if SPACE not in token]
    whole = set(own) - set(added)
    backend = Tokenizer(_pieces(proto, tokens, normal, apart=bool(whole)))
    backend.normalizer = _normalizer(spec)  # pyright: ignore[reportAttributeAccessIssue]
    steps = _space_in_front(always=legacy) if prefix else []
    if whole:
        steps.append(pre_tokenizers.Split(Regex(_any_of(whole)), "isolated"))
    if whole or trainer.model_type == _UNIGRAM:
        # Here the name of a token that is not for text, such as <0x0A> for a byte, would be looked up as a whole.
        names = set(tokens) - set(normal) - whole
        steps.append(pre_tokenizers.Split(Regex(_inside(names)), "merged_with_next"))
    if steps:
        backend.pre_tokenizer = pre_tokenizers.Sequence(steps)
    backend.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
        + ([decoders.Strip(" ", 1, 0)] if prefix else [])
    )
    flags = _flags(declared)
    backend.add_tokens(  # pyright: ignore[reportUnknownMemberType]
        [
            AddedToken(token, normalized=False, special=token in special, **flags.get(token, {}))
            for token in [*added, *special]
        ]
    )
    ids = {"bos_token": trainer.bos_id, "eos_token": trainer.eos_id, "unk_token": trainer.unk_id}
    named_by_id = {name: tokens[id] for name, id in ids.items() if 0 <= id < len(tokens)}
    return Converted(backend, named_by_id, adds_bos=True, words=whole)


def _parsed(path: Path) -> Any:
    # The import takes seconds, and only this function needs it.
    from transformers.convert_slow_tokenizer import import_protobuf

    content = path.read_bytes()
    if _TIKTOKEN.match(content):
        raise ModelSourceError(
            f"{path} is a list of tokens in tiktoken's format, as Llama 3's original files have it, without its "
            "special tokens; copy tokenizer.json from the same model in Hugging Face layout"
        )
    messages: Any = import_protobuf()  # untyped upstream
    proto = messages.ModelProto()
    try:
        proto.ParseFromString(content)
    except Exception as error:  # protobuf's own kind, which not every version of it has in one place
        raise ModelSourceError(f"{path} is not SentencePiece's ({error}); copy or download it again") from error
    if not proto.pieces:
        raise ModelSourceError(f"{path} has no tokens; copy or download it again")
    return proto


def _renamed(tokens: list[str], declared: Declared) -> list[str]:
    """The tokens with the names that ``added_tokens_decoder`` gives to some of them."""
    given = {int(id): token["content"] for id, token in (declared.get("added_tokens_decoder") or {}).items()}
    taken = set(tokens)
    return [given[id] if given.get(id, token) not in taken else token for id, token in enumerate(tokens)]


def _flags(declared: Declared) -> dict[str, dict[str, bool]]:
    """Which white space belongs to a token, where the files beside say so. Phi-3's take the space after them."""
    named = [*(declared.get("added_tokens_decoder") or {}).values(), *declared.values()]
    return {
        token["content"]: {flag: token[flag] for flag in ("lstrip", "rstrip", "single_word") if flag in token}
        for token in reversed(named)
        if isinstance(token, dict) and isinstance(token.get("content"), str)
    }


def _pieces(proto: Any, tokens: list[str], normal: list[str], *, apart: bool) -> models.Model:
    """The vocabulary and how it is applied.

    Args:
        apart: whether there are tokens that the text is cut at, so that they need no merges.
    """
    trainer = proto.trainer_spec
    scores = {token: piece.score for token, piece in zip(tokens, proto.pieces, strict=True)}
    if trainer.model_type == _UNIGRAM:
        return models.Unigram(list(scores.items()), trainer.unk_id, trainer.byte_fallback)
    ids = {token: id for id, token in enumerate(tokens)}
    known = {token: ids[token] for token in normal}
    # SentencePiece has no list of merges: of all neighbours, it joins those that make the token of the highest score.
    merges = list(_merges(sorted(normal, key=lambda token: -scores[token]), known))
    return models.BPE(
        vocab=ids,
        merges=merges,
        unk_token=tokens[trainer.unk_id],
        fuse_unk=True,
        byte_fallback=trainer.byte_fallback,
        ignore_merges=apart,
    )


def _normalizer(spec: Any) -> normalizers.Normalizer:
    steps: list[normalizers.Normalizer] = []
    if spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        steps += [normalizers.Replace(Regex(r"\A +| +\z"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    return normalizers.Sequence([*steps, normalizers.Replace(" ", SPACE)])


def _space_in_front(*, always: bool) -> list[pre_tokenizers.PreTokenizer]:
    """Put a space in front of the text, and if ``always``, also behind each special token in it.

    One step alone would put none before a text that begins with one.
    """
    return [
        pre_tokenizers.Metaspace(" ", "always" if always else "first", split=False),
        pre_tokenizers.Metaspace(SPACE, "never", split=False),
    ]


# vocab.json and merges.txt of byte-level tokenizers


QWEN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"

_END = "<|endoftext|>"
_GPT2_HINT = (
    "text is cut as GPT-2's, since tokenizer_class is GPT2Tokenizer and there is no tokenizer.json. SmolLM2, OLMo 2, "
    "Granite and Phi-4 name this class and cut it otherwise: copy tokenizer.json from where the model came from"
)


def _byte_level(path: Path, declared: Declared) -> Converted:
    named = _class(declared) or ("Qwen2Tokenizer" if str(declared.get("model_type")).startswith("qwen") else "")
    if named not in ("GPT2Tokenizer", "Qwen2Tokenizer"):
        raise ModelSourceError(
            f"{path} does not say how text is cut before the merges, and it is not known of the tokenizer class "
            f"{named or '(none named)'}; known: GPT2Tokenizer, Qwen2Tokenizer. {_MAKE_IT}"
        )
    if not (merges := path.with_name("merges.txt")).is_file():
        raise ModelSourceError(
            f"{path.parent} has vocab.json but not merges.txt; copy it from where the model came from"
        )
    backend = Tokenizer(models.BPE.from_file(str(path), str(merges)))
    space = bool(declared.get("add_prefix_space"))
    if named == "GPT2Tokenizer":
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=space)
    else:
        backend.normalizer = normalizers.NFC()  # pyright: ignore[reportAttributeAccessIssue]
        backend.pre_tokenizer = _cut(QWEN, space=space)
    backend.decoder = decoders.ByteLevel()
    if named == "Qwen2Tokenizer":
        return Converted(backend, {}, adds_bos=False)
    has_end = backend.token_to_id(_END) is not None
    names = {name: _END for name in ("bos_token", "eos_token", "unk_token") if has_end}
    return Converted(backend, names, adds_bos=False, hint=_GPT2_HINT)


def _cut(pattern: str, *, space: bool = False) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=space, use_regex=False),
        ]
    )


_MAKE_IT = (
    "Copy tokenizer.json from where the model came from, or make it with the program that the model was trained with"
)

READERS: dict[str, Callable[[Path, Declared], Converted]] = {
    "tekken.json": _tekken,
    "tokenizer.model": _sentencepiece,
    "vocab.json": _byte_level,
}


def _class(declared: Declared) -> str:
    return str(declared.get("tokenizer_class") or "").removesuffix("Fast")


def _merges(ranked: Iterable[str], ids: Mapping[str, int]) -> Iterator[tuple[str, str]]:
    """All pairs of tokens that make another, by the rank of what they make."""
    for token in ranked:
        pairs = ((token[:cut], token[cut:]) for cut in range(1, len(token)))
        known = [(left, right) for left, right in pairs if left in ids and right in ids]
        yield from sorted(known, key=lambda pair: (ids[pair[0]], ids[pair[1]]))


def _any_of(tokens: Collection[str]) -> str:
    """A regular expression for the longest of these tokens."""
    return "|".join(re.escape(token) for token in sorted(tokens, key=len, reverse=True))


def _inside(tokens: Iterable[str]) -> str:
    """A regular expression for the second character of these tokens, where the whole token is in the text."""
    rests: dict[str, list[str]] = {}
    for token in tokens:
        rests.setdefault(token[:1], []).append(re.escape(token[1:]))
    return "|".join(rf"(?<={re.escape(first)})(?={'|'.join(rest)})[\s\S]" for first, rest in rests.items())
