"""The benchmark's inputs, and the least arithmetic that each of them needs."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

FOLDER = Path(__file__).parent / "workloads" / "smollm2-135m"
NAMES = ("W1", "W2", "W3", "W4", "W5", "W6", "W7")


@dataclass(frozen=True)
class Request:
    """One scoring request, as ids and as text."""

    query_ids: list[int]
    items_ids: list[list[int]]
    query_text: str
    items_text: list[str]
    label_ids: list[int]

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
    content = json.loads((FOLDER / f"{name}.json").read_text())
    reference = json.loads((FOLDER / "ref_fp32.json").read_text())[name]
    variants: list[Variant] = []
    for inputs, rows in zip(content["variants"][:most], reference[:most], strict=False):
        clients = inputs.get("clients", [inputs])
        keys = ("query_ids", "items_ids", "query_text", "items_text")
        requests = [Request(*(client[key] for key in keys), content["label_ids"]) for client in clients]
        variants.append(Variant(requests, rows if "clients" in inputs else [rows]))
    return variants


def _text_ids() -> list[list[int]]:
    """W2's items: the longest pieces of running text that the workloads have, 200 tokens each."""
    content = json.loads((FOLDER / "W2.json").read_text())
    return [ids for variant in content["variants"] for ids in variant["items_ids"]]


def _cut(rng: np.random.Generator, lengths: Sequence[int]) -> list[list[int]]:
    """Runs of the given lengths from random places of the text."""
    pieces = _text_ids()
    stream = list(itertools.chain.from_iterable(pieces[i] for i in rng.permutation(len(pieces))))
    starts = rng.integers(0, len(stream) - max(lengths), len(lengths))
    return [stream[start : start + length] for start, length in zip(starts.tolist(), lengths, strict=True)]


def _lognormal(seed: int) -> Variant:
    """W6: a 128-token query and 200 items of log-normal length, 4 to 300 tokens."""
    rng = np.random.default_rng([6, seed])
    lengths = np.clip(np.exp(rng.normal(np.log(32), 0.9, 200)), 4, 300).astype(int).tolist()
    query, *items = _cut(rng, [128, *lengths])
    return Variant([Request(query, items, "", [], [9230, 2838])], None)


def _ranking(seed: int) -> Variant:
    """W7: the canonical ranking shape, a 2,000-token query and 500 items of 20 tokens."""
    rng = np.random.default_rng([7, seed])
    query, *items = _cut(rng, [2000, *([20] * 500)])
    return Variant([Request(query, items, "", [], [9230, 2838])], None)


@dataclass(frozen=True)
class Sizes:
    """Of the model; letters as in ``model``."""

    width: int
    layers: int
    heads: int
    kv_heads: int
    head_width: int
    ff_width: int
    vocab: int


def floor_flops(variant: Variant, sizes: Sizes) -> float:
    """The least floating-point operations that answer a variant's requests with full-vocabulary log-probabilities.

    Each request's query is computed once, each item token once; the last layer past its keys and values, and the
    head, at the read positions alone. Norms, softmax and the like are not counted.
    """
    attention = sizes.heads * sizes.head_width
    key_value = 2 * 2 * sizes.width * sizes.kv_heads * sizes.head_width
    rest = 2 * (2 * sizes.width * attention + 3 * sizes.width * sizes.ff_width)
    total = 0.0
    for request in variant.requests:
        query = len(request.query_ids)
        lengths = np.array([len(item) for item in request.items_ids], np.float64)
        tokens = query + lengths.sum()
        # Causal: a token sees all before it and itself.
        keys = query * (query + 1) / 2 + (lengths * query + lengths * (lengths + 1) / 2).sum()
        reads = len(lengths)
        total += tokens * key_value * sizes.layers
        total += (tokens * (sizes.layers - 1) + reads) * rest
        total += 4 * attention * (keys * (sizes.layers - 1) + (query + lengths).sum())
        total += reads * 2 * sizes.width * sizes.vocab
    return total
