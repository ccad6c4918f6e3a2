"""The benchmark's inputs, and the least arithmetic that each of them needs."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from model.config import Recurrence
from scripts.benchmarks import decisions
from serve_app import model_source

FOLDER = Path(__file__).parents[1] / "workloads" / "smollm2-135m"
NAMES = ("W1", "W2", "W3", "W4", "W5", "W6", "W7", *decisions.SHAPES)
LABELS = [9230, 2838]
"""`` Yes`` and `` No``."""


@dataclass(frozen=True)
class Request:
    """One scoring request, as ids and as text.

    Attributes:
        decision: the body for ``POST /v1/decisions``, if it is a decision request. Its items are the questions.
    """

    query_ids: list[int]
    items_ids: list[list[int]]
    query_text: str
    items_text: list[str]
    label_ids: list[int]
    decision: dict[str, Any] | None = None

    @property
    def prompts(self) -> list[list[int]]:
        return [self.query_ids + item for item in self.items_ids]


@dataclass(frozen=True)
class Variant:
    """Requests that arrive together, and float32 reference log-probabilities [request][item][label] where known."""

    requests: list[Request]
    reference: list[list[list[float]]] | None

    @property
    def items(self) -> int:
        return sum(len(request.items_ids) for request in self.requests)


def load(name: str, *, most: int) -> list[Variant]:
    """Up to ``most`` variants of a workload; the first is for warming up."""
    if name == "W6":
        return [_lognormal(seed) for seed in range(most)]
    if name == "W7":
        return [_ranking(seed) for seed in range(most)]
    if name in decisions.SHAPES:
        return [_deciding(name, seed) for seed in range(most)]
    content = json.loads((FOLDER / f"{name}.json").read_text())
    reference = json.loads((FOLDER / "ref_fp32.json").read_text())[name]
    variants: list[Variant] = []
    for inputs, rows in zip(content["variants"][:most], reference[:most], strict=False):
        clients = inputs.get("clients", [inputs])
        keys = ("query_ids", "items_ids", "query_text", "items_text")
        requests = [Request(*(client[key] for key in keys), content["label_ids"]) for client in clients]
        variants.append(Variant(requests, rows if "clients" in inputs else [rows]))
    return variants


@cache
def tokenizer() -> Tokenizer:
    """The demo model's tokenizer."""
    return Tokenizer.from_file(str(model_source.resolve("demo") / "tokenizer.json"))


@cache
def _texts() -> list[list[int]]:
    """W2's items: the longest pieces of running text that the workloads have, 200 tokens each."""
    content = json.loads((FOLDER / "W2.json").read_text())
    return [ids for variant in content["variants"] for ids in variant["items_ids"]]


def cut_request(rng: np.random.Generator, query_tokens: int, item_tokens: Sequence[int]) -> Request:
    """A request of the given lengths, cut from random places of the workloads' text.

    Each piece begins with a space and a word, and its text re-encodes to its ids, alone and joined: what is sent as
    text is computed as the same tokens.
    """
    texts, coder = _texts(), tokenizer()
    stream = list(itertools.chain.from_iterable(texts[i] for i in rng.permutation(len(texts))))
    names = [coder.id_to_token(token) for token in stream]
    starts = [
        i for i, name in enumerate(names) if name[0] == "\u0120" and name[1:2].isalpha()
    ]  # byte-level BPE's space
    lengths = [query_tokens, *item_tokens]
    starts = np.array([start for start in starts if start + max(lengths) <= len(stream)])

    def piece(length: int) -> tuple[list[int], str]:
        start = int(rng.choice(starts))
        ids = stream[start : start + length]
        return ids, coder.decode(ids, skip_special_tokens=False)

    (query_ids, query_text), *items = map(piece, lengths)
    return Request(query_ids, [ids for ids, _ in items], query_text, [text for _, text in items], LABELS)


def _lognormal(seed: int) -> Variant:
    """W6, realistic lengths: a 128-token query and 200 items of log-normal length, 4 to 300 tokens."""
    rng = np.random.default_rng([6, seed])
    lengths = np.clip(np.exp(rng.normal(np.log(32), 0.9, 200)), 4, 300).astype(int).tolist()
    return Variant([cut_request(rng, 128, lengths)], None)


def _ranking(seed: int) -> Variant:
    """W7, the canonical ranking shape: a 2,000-token query and 500 items of 20 tokens."""
    return Variant([cut_request(np.random.default_rng([7, seed]), 2000, [20] * 500)], None)


def _deciding(name: str, seed: int) -> Variant:
    """D1 to D3: each client's state has its own text."""
    rng = np.random.default_rng([8, *name.encode(), seed])
    clients, _, _ = decisions.SHAPES[name]
    return Variant([decisions.as_decision(cut_request(rng, *decisions.lengths(name))) for _ in range(clients)], None)


@dataclass(frozen=True)
class Sizes:
    """Sizes of the model; ``model/__init__.py`` has the letters.

    Attributes:
        windows: for each layer, how many tokens back a token attends, including itself; empty for all.
        gated: attention's queries have gates of the same width.
        recurrence: of a hybrid, whose ``layers`` are those of attention; None: it is none.
    """

    width: int
    layers: int
    heads: int
    kv_heads: int
    head_width: int
    ff_width: int
    vocab: int
    windows: tuple[int, ...] = ()
    gated: bool = False
    recurrence: Recurrence | None = None

    @classmethod
    def of_demo(cls) -> Sizes:
        config = json.loads((model_source.resolve("demo") / "config.json").read_text())
        return cls(
            width=config["hidden_size"],
            layers=config["num_hidden_layers"],
            heads=config["num_attention_heads"],
            kv_heads=config["num_key_value_heads"],
            head_width=config["head_dim"],
            ff_width=config["intermediate_size"],
            vocab=config["vocab_size"],
        )


def floor_flops(variant: Variant, sizes: Sizes) -> float:
    """The least floating-point operations that answer a variant's requests with full-vocabulary log-probabilities.

    Counted: every matmul, with two operations for a multiply-add. Each request's query and each item's tokens are
    computed once. In the last layer a token that is not read needs only its key and value. The head sees only the read
    positions. Attention is exactly causal: each token against itself and those before it, within the layer's window.

    Not counted: norms, softmax, rope, activations, residual sums, looking up embeddings, padding, masked halves of
    attention blocks, and any memory traffic. Nor is it a saving here that items, or several requests' queries, may
    begin with the same few words: such tokens count each time.
    """
    attention = sizes.heads * sizes.head_width
    key_value = 2 * 2 * sizes.width * sizes.kv_heads * sizes.head_width
    rest = 2 * ((3 if sizes.gated else 2) * sizes.width * attention + 3 * sizes.width * sizes.ff_width)
    *windows, last_window = sizes.windows or (2**31,) * sizes.layers
    total = 0.0
    for request in variant.requests:
        query = len(request.query_ids)
        lengths = np.array([len(item) for item in request.items_ids], np.float64)
        tokens, reads = query + lengths.sum(), len(lengths)
        total += tokens * key_value * sizes.layers
        total += tokens * recurrent_flops(sizes) * sizes.layers
        total += (tokens * (sizes.layers - 1) + reads) * rest
        for window in windows:
            shared = _seen(query, window)
            total += 4 * attention * (shared + (_seen(query + lengths, window) - shared).sum())
        total += 4 * attention * np.minimum(query + lengths, last_window).sum()
        total += reads * 2 * sizes.width * sizes.vocab
    return total


def recurrent_flops(sizes: Sizes) -> float:
    """Operations that a token takes in the recurrent layers before one of attention: projections, MLP, and of each
    memory what it has under a key, its change, and what a query reads."""
    if (r := sizes.recurrence) is None:
        return 0.0
    projections = sizes.width * (r.channels + 2 * r.values + 2 * r.value_heads)
    memories = r.value_heads * 3 * r.key_width * r.value_width
    return 2.0 * r.parts * (projections + r.taps * r.channels + memories + 3 * sizes.width * sizes.ff_width)


def _seen(tokens: Any, window: int) -> Any:
    """The number of keys that the first ``tokens`` of a sequence attend to, each the last ``window`` up to itself."""
    short = np.minimum(tokens, window)
    return short * (short + 1) / 2 + (tokens - short) * window
