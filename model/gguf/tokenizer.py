"""The tokenizer in a GGUF file, as ``tokenizer.json`` has it.

Source: llama.cpp's ``src/llama-vocab.cpp`` and ``conversion/base.py``; transformers' ``convert_slow_tokenizer`` for the
merges of SentencePiece's.
"""

from collections.abc import Sequence
from typing import Any

from gguf import TokenType
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from model.gguf.files import GgufError
from model.gguf.pre_tokenizers import PRES

Fields = dict[str, Any]

BYTE_LEVEL_SPACE = "Ġ"
"""The space in vocabularies over bytes."""
SPACE = "▁"
"""The space in SentencePiece's vocabularies."""

TURNS = ("<start_of_turn>", "<end_of_turn>")
"""Gemma's, which Google's own quantised files and others type as ordinary text (unslothai/unsloth issue 5070)."""

BY_ARCHITECTURE = {"qwen2": "qwen2", "qwen3": "qwen2", "qwen3moe": "qwen2", "olmo2": "dbrx"}
"""The pre-tokenizer of all models of an architecture, for files that do not name it."""


def tokenizer_of(fields: Fields) -> tuple[Tokenizer, dict[str, Any]]:
    """The tokenizer and its ``tokenizer_config.json``.

    Raises:
        GgufError: it is of a kind that is not converted, or a key is missing.
    """
    kind, tokens, types = ggml(fields, "model"), list[str](ggml(fields, "tokens")), ggml(fields, "token_type")
    if kind not in ("gpt2", "llama"):
        raise GgufError(f"tokenizer model {kind!r} is not converted; known: gpt2, llama")
    if len(set(tokens)) < len(tokens):
        raise GgufError(f"tokenizer.ggml.tokens has {len(tokens) - len(set(tokens))} tokens twice; use another file")
    if kind == "llama":
        # Other programs may write a user's token as SentencePiece has it; matched is the text as it was typed.
        tokens = [
            token.replace(SPACE, " ") if type == TokenType.USER_DEFINED else token
            for token, type in zip(tokens, types, strict=True)
        ]
        tokenizer, add_bos = _sentencepiece(fields, tokens, _merges(tokens, ggml(fields, "scores"), types)), True
    elif BYTE_LEVEL_SPACE not in tokens and SPACE in tokens:  # Gemma 3's, where only its tokenizer.json was there
        tokenizer, add_bos = _sentencepiece(fields, tokens, _stored_merges(fields)), True
    else:
        tokenizer, add_bos = _byte_level(fields, tokens)
    tokenizer.add_tokens(_added(fields, tokens, types))  # pyright: ignore[reportUnknownMemberType]

    ids: dict[str, int] = (
        {"bos": 1, "eos": 2, "unk": 0} if kind == "llama" else {}
    )  # llama.cpp's, where a file has none
    for name, key in {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}.items():
        if (id := fields.get(f"tokenizer.ggml.{key}_token_id")) is not None:
            ids[name] = id
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        **{f"{name}_token": tokens[id] for name, id in ids.items()},
    }
    if "tokenizer.chat_template" in fields:
        config["chat_template"] = fields["tokenizer.chat_template"]
    # As llama.cpp: an end is added only where the file says so.
    adds = {name: fields.get(f"tokenizer.ggml.add_{name}_token", add_bos and name == "bos") for name in ("bos", "eos")}
    if missing := [name for name, added in adds.items() if added and name not in ids]:
        raise GgufError(f"tokenizer.ggml.{missing[0]}_token_id is missing")
    bos, eos = ([ids[name]] if added else [] for name, added in adds.items())
    if bos or eos:
        single = [*(tokens[id] for id in bos), "$A", *(tokens[id] for id in eos)]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=single,
            pair=[*single, *("$B" if part == "$A" else part for part in single)],
            special_tokens=[(tokens[id], id) for id in {*bos, *eos}],
        )
    return tokenizer, config


def ggml(fields: Fields, key: str) -> Any:
    """The value of a key ``tokenizer.ggml.*``, which must be there."""
    if f"tokenizer.ggml.{key}" not in fields:
        raise GgufError(f"tokenizer.ggml.{key} is missing")
    return fields[f"tokenizer.ggml.{key}"]


def pre_of(fields: Fields, tokens: Sequence[str]) -> str:
    """The pre-tokenizer's name.

    Files of before May 2024 have none, or ``default``. Where the architecture or the vocabulary shows it, it is known
    all the same; any other text is cut as llama.cpp does then.
    """
    named = fields.get("tokenizer.ggml.pre", "default")
    if named != "default":
        return named
    architecture = fields.get("general.architecture")
    return "llama-bpe" if "<|begin_of_text|>" in tokens else BY_ARCHITECTURE.get(str(architecture), "default")


def _byte_level(fields: Fields, tokens: Sequence[str]) -> tuple[Tokenizer, bool]:
    """A BPE over bytes like GPT-2's; and whether a BOS is added when the file does not say."""
    name = pre_of(fields, tokens)
    if name not in PRES:
        raise GgufError(
            f"pre-tokenizer {name!r} is not converted; known: {', '.join(sorted(PRES))}. Use the model's safetensors "
            "checkpoint"
        )
    pre = PRES[name]
    vocab = {token: id for id, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=_stored_merges(fields), ignore_merges=pre.ignore_merges))
    if pre.composed:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre.steps()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer, pre.add_bos


def _stored_merges(fields: Fields) -> list[tuple[str, str]]:
    """Each is two tokens with a space between; the first may be one itself."""
    cuts = ((merge, merge.index(" ", 1)) for merge in ggml(fields, "merges"))
    return [(merge[:cut], merge[cut + 1 :]) for merge, cut in cuts]


def _merges(tokens: Sequence[str], scores: Sequence[float], types: Sequence[int]) -> list[tuple[str, str]]:
    """SentencePiece has no merges: the neighbours whose token has the highest score are joined first.

    Where two pairs make one token the order is that of transformers, by which tokenizer.json files are made.
    """
    ids = {token: id for id, token in enumerate(tokens)}
    found: list[tuple[float, int, int, str, str]] = []
    for id, token in enumerate(tokens):
        if types[id] == TokenType.NORMAL:
            cuts = [(token[:cut], token[cut:]) for cut in range(1, len(token))]
            pairs = sorted((ids[left], ids[right]) for left, right in cuts if left in ids and right in ids)
            for left, right in pairs:
                found.append((scores[id], len(tokens[left]), len(tokens[right]), tokens[left], tokens[right]))
    found.sort(key=lambda merge: merge[:3], reverse=True)
    return [merge[3:] for merge in found]


def _sentencepiece(fields: Fields, tokens: Sequence[str], merges: list[tuple[str, str]]) -> Tokenizer:
    """A BPE over characters. A character that is no token becomes its UTF-8 bytes."""
    for key in ("remove_extra_whitespaces", "precompiled_charsmap"):
        if fields.get(f"tokenizer.ggml.{key}"):
            raise GgufError(
                f"tokenizer.ggml.{key} is set, and such text normalisation is not converted; serve the original model, "
                "with its tokenizer.json"
            )
    vocab = {token: id for id, token in enumerate(tokens)}
    unknown = tokens[fields.get("tokenizer.ggml.unknown_token_id", 0)]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    # Gemma's have no space in front, also where an older file does not say so; all others have, as in llama.cpp.
    absent = not str(fields.get("general.architecture")).startswith("gemma")
    prefix = fields.get("tokenizer.ggml.add_space_prefix", absent)
    if prefix and "[INST]" in tokens:
        # Mistral's own of version 3: the text's beginning alone has it, not what follows each control token.
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    elif prefix:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
    else:
        tokenizer.normalizer = normalizers.Replace(" ", SPACE)
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix else steps)
    return tokenizer


def _added(fields: Fields, tokens: Sequence[str], types: Sequence[int]) -> list[AddedToken]:
    """The tokens that are found in the text before all else.

    A file does not say which of them take the white space after them. Phi-3's do, all but three: llama.cpp knows them
    by the model's name, and so does this.
    """
    name = str(fields.get("general.name", "")).lower()
    phi3 = "phi-3" in name or "phi3" in name
    added: list[AddedToken] = []
    for token, type in zip(tokens, types, strict=True):
        if type in (TokenType.CONTROL, TokenType.UNKNOWN, TokenType.USER_DEFINED) or token in TURNS:
            special = type != TokenType.USER_DEFINED
            rstrip = phi3 and token not in ("<unk>", "<s>", "<|endoftext|>")
            added.append(AddedToken(token, special=special, normalized=False, rstrip=rstrip))
    return added
