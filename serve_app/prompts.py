"""From a checked request to packed tokens: joining, tokenising, and every rule that needs the model or the limits."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, cast

import numpy as np
from tokenizers import Tokenizer

from serve_app import joining
from serve_app.batches import common_prefix, shared_prefix
from serve_app.contract import Int32, Int64, ModelInfo, TokenBatch
from serve_app.errors import InvalidRequestError, TooLargeError
from serve_app.schemas import ScoreRequest
from serve_app.settings import Limits

_CHUNK_CHARACTERS = 2**20
"""Joined and tokenised at a time: the query is repeated in every prompt, which must not cost memory without end."""


class TextTokenizer:
    """A Hugging Face fast tokenizer. Encoding releases the GIL; safe to share between threads.

    Args:
        backend: the Rust tokenizer; truncation and padding are switched off.
        bos_id: id of the begin-of-sequence token, if there is one.
    """

    def __init__(self, backend: Tokenizer, bos_id: int | None) -> None:
        backend.no_truncation()
        backend.no_padding()
        self.backend = backend
        self._local = joining.is_local(backend)
        # Only a BOS that the tokenizer adds by itself can come to stand before one in the text.
        self._added_bos = bos_id if backend.encode("").ids[:1] == [bos_id] else None

    @classmethod
    def load(cls, folder: Path) -> TextTokenizer:
        """The tokenizer of a local folder in Hugging Face layout.

        Raises:
            ValueError: at start-up: the folder holds no fast tokenizer.
        """
        # Loading takes seconds, and only here: encoding needs the Rust tokenizer alone.
        from transformers import AutoTokenizer

        auto: Any = AutoTokenizer  # untyped upstream
        try:
            loaded: Any = auto.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        except (OSError, ValueError, KeyError) as error:
            raise ValueError(f"no tokenizer can be loaded from {folder}: {error}") from error
        backend: object = getattr(loaded, "backend_tokenizer", None)
        if not isinstance(backend, Tokenizer):
            raise ValueError(f"{folder} has no fast tokenizer: save one there as tokenizer.json")
        return cls(backend, loaded.bos_token_id)

    def encode(self, texts: Sequence[str], *, add_special_tokens: bool = True) -> list[list[int]]:
        """Ids of each text. BOS stands at most once at the front, even if the text begins with it too."""
        encodings = self.backend.encode_batch_fast(list(texts), add_special_tokens=add_special_tokens)
        sequences = [encoding.ids for encoding in encodings]
        if add_special_tokens and self._added_bos is not None:
            for ids in sequences:
                while ids[1:2] == [self._added_bos]:
                    del ids[0]
        return sequences

    def encode_joined(self, query: str, items: Sequence[str]) -> list[list[int]]:
        """Ids of ``query + item`` for each item: those of ``encode``, but a long query is read about once."""
        cut = joining.safe_cut(self.backend, query) if self._local and len(items) > 1 else 0
        if not cut:
            return self.encode([query + item for item in items])
        # What is special stands before and behind the text's own tokens.
        head, rest = query[:cut], query[cut:]
        (whole,) = self.encode([head])
        (bare,) = self.encode([head], add_special_tokens=False)
        front = next((at for at in range(len(whole) - len(bare) + 1) if whole[at : at + len(bare)] == bare), None)
        if front is None:  # the text itself begins with several BOS, of which one is kept
            return self.encode([query + item for item in items])
        before, behind = whole[: front + len(bare)], whole[front + len(bare) :]
        tails = self.encode([rest + item for item in items], add_special_tokens=False)
        return [before + tail + behind for tail in tails]

    def decode(self, ids: Sequence[int]) -> str:
        """The text, special tokens included; an id that the vocabulary has no token for gives nothing."""
        return self.backend.decode(ids, skip_special_tokens=False)

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """The vocabulary's own spelling of each id."""
        return [self.backend.id_to_token(i) or "" for i in ids]


class Prompts:
    """Builds the prompts of a request, or says what is wrong with it."""

    def __init__(self, tokenizer: TextTokenizer, info: ModelInfo, limits: Limits) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = info.vocab_size
        self._classes = info.classes
        self._limits = limits
        self.max_prompt_tokens = min(info.max_prompt_tokens, limits.max_prompt_tokens or info.max_prompt_tokens)

    def prepare(self, request: ScoreRequest) -> TokenBatch:
        """One sequence an item, each with one read at its last token, whose targets are the item's labels.

        Of a model with classes the targets are all classes, and labels are ignored.

        Raises:
            InvalidRequestError: labels, ids, lengths or the combination of fields is wrong.
            TooLargeError: more items or tokens than the limits allow.
        """
        items = [request.items] if isinstance(request.items, str) else request.items
        if len(items) > self._limits.max_items:
            raise TooLargeError(
                f"items has {len(items)} entries; this service takes at most {self._limits.max_items}; "
                "split the request",
                param="items",
            )
        if request.temperature != 1.0 and not request.apply_softmax:
            raise InvalidRequestError(
                f"temperature is {request.temperature}, which needs apply_softmax: true", param="temperature"
            )
        if request.return_token_logprobs and self._classes:
            raise InvalidRequestError(
                f"return_token_logprobs is for causal models; this one has {self._classes} classes; leave it out",
                param="return_token_logprobs",
            )
        labels = self._labels(request.label_token_ids, len(items))
        tokens, offsets = self._tokens(request.query, items, request.item_first)
        count = len(items)
        if labels and isinstance(labels[0], list):
            rows = cast(list[list[int]], labels)
            targets = np.fromiter(chain.from_iterable(rows), np.int32)
            target_offsets = _offsets([len(row) for row in rows])
        else:
            targets = np.tile(np.asarray(labels, np.int32), count)
            target_offsets = np.arange(count + 1, dtype=np.int64) * len(labels)
        return TokenBatch(
            tokens=tokens,
            offsets=offsets,
            read_sequences=np.arange(count, dtype=np.int32),
            read_positions=(np.diff(offsets) - 1).astype(np.int32),
            targets=targets,
            target_offsets=target_offsets,
            # A softmax over the labels needs no vocabulary matmul; a probability or a logprob does. Classes: logits.
            vocab_logprobs=not self._classes and (request.return_token_logprobs or not request.apply_softmax),
        )

    def prefix_tokens(self, request: ScoreRequest, batch: TokenBatch) -> int:
        """Tokens at the front of every prompt of ``batch`` that another request may have, too: the query's, if there is
        one and it comes first, else those that all prompts share.
        """
        if batch.num_sequences == 0 or request.item_first or not request.query:
            return shared_prefix(batch) if batch.num_sequences > 1 else 0
        if not isinstance(request.query, str):
            return len(request.query)
        # Its last tokens may come out otherwise at the join with an item.
        (alone,) = self._tokenizer.encode([request.query])
        return common_prefix(np.asarray(alone, np.int32), batch.tokens[: batch.offsets[1]])

    def tokenize(self, texts: Sequence[str], add_special_tokens: bool) -> list[tuple[list[int], list[str]]]:
        """Ids and pieces of each text.

        Raises:
            TooLargeError: more texts than a request may have items.
        """
        if len(texts) > self._limits.max_items:
            raise TooLargeError(
                f"prompt has {len(texts)} entries; this service takes at most {self._limits.max_items}", param="prompt"
            )
        encoded = self._tokenizer.encode(texts, add_special_tokens=add_special_tokens)
        return [(ids, self._tokenizer.pieces(ids)) for ids in encoded]

    def detokenize(self, ids: list[int]) -> str:
        """The text of the ids.

        Raises:
            InvalidRequestError: an id is out of the vocabulary.
        """
        self._check_ids(ids, "tokens")
        return self._tokenizer.decode(ids)

    def _labels(self, labels: list[int] | list[list[int]] | None, items: int) -> list[int] | list[list[int]]:
        """The labels, checked: one list for all items, or one list an item. All classes, where there are classes."""
        if self._classes:
            return [*range(self._classes)]
        name = "label_token_ids"
        if labels is None:
            raise InvalidRequestError(f"{name} is required", param=name)
        if not labels:
            raise InvalidRequestError(f"{name} is empty; name at least one label", param=name)
        if not isinstance(labels[0], list):
            self._check_labels(cast(list[int], labels), name, None)
            return labels
        rows = cast(list[list[int]], labels)
        if len(rows) != items:
            raise InvalidRequestError(
                f"{name} has {len(rows)} lists for {items} items; send one list for all items or one list an item",
                param=name,
            )
        for index, row in enumerate(rows):
            self._check_labels(row, f"{name}[{index}]", index)
        return rows

    def _check_labels(self, labels: list[int], where: str, index: int | None) -> None:
        param = "label_token_ids"
        if not labels:
            raise InvalidRequestError(f"{where} is empty; name at least one label", param=param, index=index)
        if len(labels) > self._limits.max_labels:
            raise InvalidRequestError(
                f"{where} has {len(labels)} labels; this service takes at most {self._limits.max_labels}",
                param=param,
                index=index,
            )
        self._check_ids(labels, param, index)
        if len(set(labels)) < len(labels):
            twice = next(label for position, label in enumerate(labels) if label in labels[:position])
            raise InvalidRequestError(f"{where} names {twice} more than once", param=param, index=index)

    def _check_ids(self, ids: list[int], param: str, index: int | None = None) -> None:
        # On Python's integers, before numpy: 10**30 must be an answer too, not an overflow.
        if ids and (min(ids) < 0 or max(ids) >= self._vocab_size):
            wrong = next(i for i in ids if not 0 <= i < self._vocab_size)
            raise InvalidRequestError(
                f"Token ID {_short(wrong)} is out of vocabulary (vocab size: {self._vocab_size})",
                param=param,
                index=index,
            )

    def _tokens(
        self, query: str | list[int] | None, items: list[str] | list[list[int]], item_first: bool
    ) -> tuple[Int32, Int64]:
        """The prompts' ids, packed."""
        if not items:
            return np.zeros(0, np.int32), np.zeros(1, np.int64)
        if isinstance(items[0], str) and not isinstance(query, list):
            sequences = self._from_text(query or "", cast(list[str], items), item_first)
        elif isinstance(items[0], list) and not isinstance(query, str):
            sequences = self._from_ids(query or [], cast(list[list[int]], items), item_first)
        else:
            raise InvalidRequestError("Invalid combination of query/items types for score_request.", param="query")
        parts: list[Int32] = []
        lengths: list[int] = []
        total = 0
        for sequence in sequences:
            total += len(sequence)
            self._check_length(len(sequence), len(lengths), total)
            lengths.append(len(sequence))
            parts.append(np.asarray(sequence, np.int32))
        return np.concatenate(parts), _offsets(lengths)

    def _from_text(self, query: str, items: list[str], item_first: bool) -> Iterator[list[int]]:
        """Joined as a string first, then tokenised once: tokens at the join come out as the model was trained."""
        start = 0
        while start < len(items):
            characters, stop = 0, start
            while stop < len(items) and characters < _CHUNK_CHARACTERS:
                characters += len(query) + len(items[stop])
                stop += 1
            if item_first:
                sequences = self._tokenizer.encode([item + query for item in items[start:stop]])
            else:
                sequences = self._tokenizer.encode_joined(query, items[start:stop])
            for index, sequence in enumerate(sequences, start):
                self._check_ids(sequence, "items", index)  # the tokenizer may have more tokens than the model
                yield sequence
            start = stop

    def _from_ids(self, query: list[int], items: list[list[int]], item_first: bool) -> Iterator[list[int]]:
        self._check_ids(query, "query")
        for index, item in enumerate(items):
            self._check_ids(item, "items", index)
            yield item + query if item_first else query + item

    def _check_length(self, length: int, index: int, total: int) -> None:
        if length == 0:
            raise InvalidRequestError(
                f"items[{index}] and the query are both empty: a prompt needs at least one token",
                param="items",
                index=index,
            )
        if length > self.max_prompt_tokens:
            raise InvalidRequestError(
                f"items[{index}]: the prompt has {length} tokens; this model reads at most {self.max_prompt_tokens}; "
                "shorten the item or the query",
                param="items",
                index=index,
            )
        if total > self._limits.max_request_tokens:
            raise TooLargeError(
                f"the prompts up to items[{index}] have {total} tokens; a request may have at most "
                f"{self._limits.max_request_tokens}, the query counted once an item; split the request",
                param="items",
            )


def _offsets(lengths: list[int]) -> Int64:
    return np.concatenate(([0], np.cumsum(lengths, dtype=np.int64)))


def _short(number: int) -> str:
    text = str(number)
    return text if len(text) <= 40 else f"{text[:20]}... ({len(text)} digits)"
