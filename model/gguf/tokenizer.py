"""The tokenizer in a GGUF file, as ``tokenizer.json`` has it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from gguf import TokenType
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors


class GgufError(ValueError):
    """The file is damaged, or of a kind that is not converted. The message names what, and what is known."""


@dataclass(frozen=True)
class Pre:
    """How text is cut before the merges, named by ``tokenizer.ggml.pre``.

    Attributes:
        steps: the pre-tokenizer of the model's own ``tokenizer.json``.
        ignore_merges: a piece that is a token as a whole is taken at once.
        add_bos: what holds when the file does not say.
    """

    steps: Callable[[], pre_tokenizers.PreTokenizer]
    ignore_merges: bool
    add_bos: bool


def _smollm() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )


def _llama3() -> pre_tokenizers.PreTokenizer:
    pieces = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pieces), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


PRES = {
    "smollm": Pre(_smollm, ignore_merges=False, add_bos=False),
    "llama-bpe": Pre(_llama3, ignore_merges=True, add_bos=True),
}


Ggml = Callable[[str], Any]
"""The value of a key ``tokenizer.ggml.*``, which must be there."""


def _byte_level(ggml: Ggml, tokens: Sequence[str]) -> tuple[Tokenizer, bool]:
    """A BPE over bytes like GPT-2's; and whether a BOS is added when the file does not say."""
    if ggml("pre") not in PRES:
        raise GgufError(f"pre-tokenizer {ggml('pre')!r} is not converted; known: {', '.join(PRES)}")
    pre = PRES[ggml("pre")]
    merges = [(left, right) for left, right in (merge.split(" ") for merge in ggml("merges"))]
    vocab = {token: id for id, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=pre.ignore_merges))
    tokenizer.pre_tokenizer = pre.steps()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer, pre.add_bos


def _sentencepiece(ggml: Ggml, tokens: Sequence[str]) -> tuple[Tokenizer, bool]:
    """A BPE like SentencePiece's: the neighbours with the highest-scored token are joined first.

    A character that is no token becomes its UTF-8 bytes.
    """
    if ggml("add_space_prefix"):
        raise GgufError(
            "tokenizer.ggml.add_space_prefix is true; only tokenizers without a space in front are converted"
        )
    vocab = {token: id for id, token in enumerate(tokens)}
    scores, kinds = ggml("scores"), ggml("token_type")
    joined = [id for id in range(len(tokens)) if kinds[id] == TokenType.NORMAL]
    merges: list[tuple[str, str]] = []
    for id in sorted(joined, key=lambda id: -scores[id]):
        token = tokens[id]
        pairs = ((token[:cut], token[cut:]) for cut in range(1, len(token)))
        merges += [(left, right) for left, right in pairs if left in vocab and right in vocab]
    unknown = tokens[ggml("unknown_token_id")]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return tokenizer, True


TOKENIZERS = {"gpt2": _byte_level, "llama": _sentencepiece}
"""The tokenizers by their ``tokenizer.ggml.model``."""


def tokenizer_of(fields: dict[str, Any]) -> tuple[Tokenizer, dict[str, Any]]:
    """The tokenizer and its ``tokenizer_config.json``."""

    def ggml(key: str) -> Any:
        if f"tokenizer.ggml.{key}" not in fields:
            raise GgufError(f"tokenizer.ggml.{key} is missing")
        return fields[f"tokenizer.ggml.{key}"]

    if ggml("model") not in TOKENIZERS:
        raise GgufError(f"tokenizer model {ggml('model')!r} is not converted; known: {', '.join(TOKENIZERS)}")
    tokens: list[str] = ggml("tokens")
    tokenizer, add_bos = TOKENIZERS[ggml("model")](ggml, tokens)
    added: list[AddedToken] = []
    for token, kind in zip(tokens, ggml("token_type"), strict=True):
        if kind in (TokenType.CONTROL, TokenType.USER_DEFINED):
            added.append(AddedToken(token, special=kind == TokenType.CONTROL, normalized=False))
    tokenizer.add_tokens(added)  # pyright: ignore[reportUnknownMemberType]

    named = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
    }
    for name, key in named.items():
        if (id := fields.get(f"tokenizer.ggml.{key}_token_id")) is not None:
            config[f"{name}_token"] = tokens[id]
    if "tokenizer.chat_template" in fields:
        config["chat_template"] = fields["tokenizer.chat_template"]
    # As llama.cpp: an end is added only where the file says so.
    bos = [ggml("bos_token_id")] if fields.get("tokenizer.ggml.add_bos_token", add_bos) else []
    eos = [ggml("eos_token_id")] if fields.get("tokenizer.ggml.add_eos_token", False) else []
    if bos or eos:
        single = [*(tokens[id] for id in bos), "$A", *(tokens[id] for id in eos)]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=single,
            pair=[*single, *("$B" if part == "$A" else part for part in single)],
            special_tokens=[(tokens[id], id) for id in {*bos, *eos}],
        )
    return tokenizer, config
