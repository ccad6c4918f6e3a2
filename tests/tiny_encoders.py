"""Tiny random encoders in Hugging Face layout with their kinds of tokenizers, made with numpy alone.

As in ``tests.tiny`` the constants are awkward: each differs from its default, from the others, and shows in the scores.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from tests.tiny import save, write_json

COMMON: Mapping[str, Any] = {
    "vocab_size": 307,
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 52,
}
ENCODERS: Mapping[str, Mapping[str, Any]] = {
    "bert": {
        "architectures": ["BertForSequenceClassification"],
        "model_type": "bert",
        "max_position_embeddings": 130,
        "type_vocab_size": 2,
        "layer_norm_eps": 3e-4,
        "pad_token_id": 0,
    },
    "xlm-roberta": {
        "architectures": ["XLMRobertaForSequenceClassification"],
        "model_type": "xlm-roberta",
        "max_position_embeddings": 132,
        "type_vocab_size": 1,
        "layer_norm_eps": 2e-4,
        "bos_token_id": 0,
        "eos_token_id": 2,
        "pad_token_id": 1,
    },
    "modernbert": {
        "architectures": ["ModernBertForSequenceClassification"],
        "model_type": "modernbert",
        "max_position_embeddings": 130,
        "norm_eps": 4e-4,
        "global_attn_every_n_layers": 2,
        "global_rope_theta": 4321.0,
        "local_rope_theta": 77.0,
        "local_attention": 21,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "cls_token_id": 1,
        "sep_token_id": 2,
        "pad_token_id": 0,
    },
    "modernbert-mean": {
        "architectures": ["ModernBertForSequenceClassification"],
        "model_type": "modernbert",
        "max_position_embeddings": 130,
        "norm_eps": 1e-3,
        "norm_bias": True,
        "mlp_bias": True,
        "attention_bias": True,
        "classifier_bias": True,
        "classifier_pooling": "mean",
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": 3210.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 55.0},
        },
        "local_attention": 40,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    },
}
WORDS = (
    "the", "a", "in", "of", "is", "was", "what", "who", "how", "many", "people", "live", "berlin", "paris", "city",
    "river", "lies", "on", "and", "capital", "germany", "france", "million", "has", "had", "population", "museum",
    "##s", "##ed", "##ing", "##n", "##e", ".", ",", "?", "'", "-",
)  # fmt: skip
"""Of the tiny vocabularies, besides single letters and digits."""
LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789äöüß"
TWO = [first + second for first in "aeiou" for second in "bcdfghjklmnpqrstvwxz"]


def make_encoder(folder: Path, kind: str, *, classes: int = 1, changes: Mapping[str, Any] | None = None) -> Path:
    """Write ``config.json``, random safetensors and a tokenizer into ``folder`` and return it.

    Args:
        changes: keys of ``config.json`` in place of the encoder's.
    """
    folder.mkdir(parents=True, exist_ok=True)
    names = {str(number): f"class {number}" for number in range(classes)}
    config = {**COMMON, **ENCODERS[kind], "id2label": names, **(changes or {})}
    write_json(folder / "config.json", config)
    rng = np.random.default_rng(17)
    save(folder, (_modernbert if config["model_type"] == "modernbert" else _bert)(rng, config, classes))
    _TOKENIZERS[config["model_type"]](folder)
    return folder


class _Tensors(dict[str, np.ndarray]):
    """Random tensors by name, scaled so that attention is far from uniform and logits spread by about 1."""

    def __init__(self, rng: np.random.Generator) -> None:
        super().__init__()
        self._rng = rng

    def linear(self, name: str, out: int, into: int, *, bias: bool = True, gain: float = 1.5) -> None:
        self[f"{name}.weight"] = self._rng.normal(0, gain * into**-0.5, (out, into))
        if bias:
            self[f"{name}.bias"] = self._rng.normal(0, 0.3, out)

    def norm(self, name: str, size: int, *, bias: bool = True) -> None:
        self[f"{name}.weight"] = self._rng.uniform(0.6, 1.4, size)
        if bias:
            self[f"{name}.bias"] = self._rng.normal(0, 0.3, size)


def _bert(rng: np.random.Generator, config: Mapping[str, Any], classes: int) -> dict[str, np.ndarray]:
    bert = config["model_type"] == "bert"
    tensors, base = _Tensors(rng), "bert" if bert else "roberta"
    width, ff = config["hidden_size"], config["intermediate_size"]
    for name, rows in (
        ("word", config["vocab_size"]),
        ("position", config["max_position_embeddings"]),
        ("token_type", config["type_vocab_size"]),
    ):
        tensors.linear(f"{base}.embeddings.{name}_embeddings", rows, width, bias=False, gain=7.0)
    tensors.norm(f"{base}.embeddings.LayerNorm", width)
    for layer in range(config["num_hidden_layers"]):
        block = f"{base}.encoder.layer.{layer}"
        for name in ("self.query", "self.key", "self.value", "output.dense"):
            tensors.linear(f"{block}.attention.{name}", width, width)
        tensors.norm(f"{block}.attention.output.LayerNorm", width)
        tensors.linear(f"{block}.intermediate.dense", ff, width)
        tensors.linear(f"{block}.output.dense", width, ff)
        tensors.norm(f"{block}.output.LayerNorm", width)
    tensors.linear("bert.pooler.dense" if bert else "classifier.dense", width, width)
    tensors.linear("classifier" if bert else "classifier.out_proj", classes, width, gain=3.0)
    return tensors


def _modernbert(rng: np.random.Generator, config: Mapping[str, Any], classes: int) -> dict[str, np.ndarray]:
    tensors, width, ff = _Tensors(rng), config["hidden_size"], config["intermediate_size"]
    norms, of_mlp, of_attention = (bool(config.get(f"{name}_bias")) for name in ("norm", "mlp", "attention"))
    tensors.linear("model.embeddings.tok_embeddings", config["vocab_size"], width, bias=False, gain=7.0)
    tensors.norm("model.embeddings.norm", width, bias=norms)
    for layer in range(config["num_hidden_layers"]):
        block = f"model.layers.{layer}"
        if layer:
            tensors.norm(f"{block}.attn_norm", width, bias=norms)
        tensors.linear(f"{block}.attn.Wqkv", 3 * width, width, bias=of_attention)
        tensors.linear(f"{block}.attn.Wo", width, width, bias=of_attention)
        tensors.norm(f"{block}.mlp_norm", width, bias=norms)
        tensors.linear(f"{block}.mlp.Wi", 2 * ff, width, bias=of_mlp)
        tensors.linear(f"{block}.mlp.Wo", width, ff, bias=of_mlp)
    tensors.norm("model.final_norm", width, bias=norms)
    tensors.linear("head.dense", width, width, bias=bool(config.get("classifier_bias")))
    tensors.norm("head.norm", width, bias=norms)
    tensors.linear("classifier", classes, width)
    return tensors


def _pieces(specials: tuple[str, ...], others: list[str]) -> dict[str, int]:
    return {piece: id for id, piece in enumerate(dict.fromkeys((*specials, *others)))}


def _word_piece(folder: Path) -> None:
    specials = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
    vocab = _pieces(specials, [*WORDS, *LETTERS, *(f"##{piece}" for piece in (*LETTERS, *TWO))])
    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.add_special_tokens(list(specials))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS]:0 $A:0 [SEP]:0",
        pair="[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1",
        special_tokens=[(name, vocab[name]) for name in ("[CLS]", "[SEP]")],
    )
    (folder / "vocab.txt").write_text("\n".join(vocab), encoding="utf-8")
    _write(folder, tokenizer, "BertTokenizer", {"do_lower_case": True, **_NAMES})


_NAMES = {
    "cls_token": "[CLS]",
    "sep_token": "[SEP]",
    "pad_token": "[PAD]",
    "unk_token": "[UNK]",
    "mask_token": "[MASK]",
}


def _unigram(folder: Path) -> None:
    specials = ("<s>", "<pad>", "</s>", "<unk>")
    starts = [f"▁{word}" for word in WORDS if not word.startswith("##")]
    pieces = list(_pieces(specials, [*starts, *(word.lstrip("#") for word in WORDS), *LETTERS, *TWO, "▁"]))
    scores = [(piece, 0.0 if piece in specials else -1.0 - 0.01 * at) for at, piece in enumerate(pieces)]
    tokenizer = Tokenizer(models.Unigram(scores, unk_id=3, byte_fallback=False))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.add_special_tokens([*specials, "<mask>"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    names = {"bos_token": "<s>", "cls_token": "<s>", "eos_token": "</s>", "sep_token": "</s>", "pad_token": "<pad>"}
    _write(folder, tokenizer, "XLMRobertaTokenizer", names | {"unk_token": "<unk>", "mask_token": "<mask>"})


def _byte_pairs(folder: Path) -> None:
    specials = ("[PAD]", "[CLS]", "[SEP]", "[UNK]", "[MASK]")
    merges = [("t", "h"), ("th", "e"), ("Ġ", "the"), ("i", "n"), ("e", "r"), ("o", "u"), ("Ġ", "a")]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = _pieces(specials, [*alphabet, *(left + right for left, right in merges)])
    tokenizer = Tokenizer(models.BPE(vocab, merges))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(specials))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS]:0 $A:0 [SEP]:0",
        pair="[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1",
        special_tokens=[(name, vocab[name]) for name in ("[CLS]", "[SEP]")],
    )
    inputs = {"model_input_names": ["input_ids", "attention_mask"]}
    _write(folder, tokenizer, "PreTrainedTokenizerFast", _NAMES | inputs)


def _write(folder: Path, tokenizer: Tokenizer, name: str, declared: Mapping[str, Any]) -> None:
    tokenizer.save(str(folder / "tokenizer.json"))
    longest = {"tokenizer_class": name, "model_max_length": 64}
    write_json(folder / "tokenizer_config.json", {**declared, **longest})


_TOKENIZERS = {"bert": _word_piece, "xlm-roberta": _unigram, "modernbert": _byte_pairs}
