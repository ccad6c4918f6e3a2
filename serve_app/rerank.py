"""Documents by their relevance to a query: ``/v1/rerank``, in Cohere's and Jina's shape.

A causal model is asked a question by a template (``templates.py``), and the score is ``p_yes / (p_yes + p_no)``. The
prompt up to the document's end is joined, then tokenised; the template's end is tokenised by itself, as in the model
card of Qwen3-Reranker, so that a long document can be cut before it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
from pydantic import ConfigDict, Field

from serve_app.batches import common_prefix
from serve_app.checks import check_ids
from serve_app.contract import BatchResult, Int32, ModelInfo, TokenBatch
from serve_app.errors import InternalError, InvalidRequestError, TooLargeError
from serve_app.prompts import TextTokenizer
from serve_app.schemas import PromptTokensDetails, RequestBody, ResponseBody, Text, Usage
from serve_app.settings import Settings
from serve_app.templates import TEMPLATES, RerankTemplate, default_template

_CHUNK_CHARACTERS = 2**20
"""Joined and tokenised at a time: the query is repeated in every prompt, which must not cost memory without end."""

_SHOWN = 10
"""Documents that a warning names."""


class RerankDocument(RequestBody):
    """A document with metadata, of which only the text is read."""

    model_config = ConfigDict(extra="ignore")

    text: Text


class RerankRequest(RequestBody):
    """Which documents answer a query best: ``POST /v1/rerank``.

    Attributes:
        query: what the documents are judged by.
        documents: texts, or objects with a ``text``.
        top_n: so many of the best only.
        return_documents: put each document's text into its result.
        instruct: the task in words, for templates that have a place for it; None: the template's own.
        max_tokens_per_doc: longer documents are cut, as are those that do not fit the model's context.
    """

    model: Text = "default"
    query: Text
    documents: Annotated[list[Text | RerankDocument], Field(fail_fast=True)]
    top_n: Annotated[int, Field(ge=1)] | None = None
    return_documents: bool | None = None
    instruct: Text | None = None
    max_tokens_per_doc: Annotated[int, Field(ge=1)] | None = None


class RankedDocument(ResponseBody):
    """A document's text, as it came."""

    text: str


class RerankResult(ResponseBody):
    """One document: ``index`` is its place in the request, ``relevance_score`` 0 to 1."""

    index: int
    relevance_score: float
    document: RankedDocument | None = None


class RerankTokens(ResponseBody):
    """As Cohere counts. Nothing is ever generated."""

    input_tokens: int
    output_tokens: int = 0


class RerankMeta(ResponseBody):
    """``warnings`` tell which documents were cut."""

    tokens: RerankTokens
    warnings: list[str] | None = None


class RerankResponse(ResponseBody):
    """Results, best first; equal scores in the order of the request."""

    id: str
    object: Literal["list"] = "list"
    model: str
    results: list[RerankResult]
    meta: RerankMeta
    usage: Usage


class Reranker:
    """Builds the prompts of rerank requests.

    Args:
        settings: name the template.

    Raises:
        ValueError: the template that the settings name has answers that are not one token each.
    """

    def __init__(self, settings: Settings, tokenizer: TextTokenizer, info: ModelInfo, max_prompt_tokens: int) -> None:
        self._name = settings.name
        self._limits = settings.limits
        self._tokenizer = tokenizer
        self._vocab_size = info.vocab_size
        self._max_prompt_tokens = max_prompt_tokens
        chosen = settings.rerank_template
        self._template = (
            chosen if isinstance(chosen, RerankTemplate) else TEMPLATES[chosen or default_template(settings.model)]
        )
        if chosen is not None:
            try:
                self._answers(self._template.around("", None)[1])
            except InvalidRequestError as error:
                raise ValueError(f"rerank_template: {error.message}") from error

    def prepare(self, request: RerankRequest, request_id: str) -> RerankQuestion:
        """One sequence a document, read at its last token for the two answers.

        Raises:
            InvalidRequestError: the query leaves no room for a document, or the model's tokenizer cuts the answers.
            TooLargeError: more documents or tokens than the limits allow.
        """
        documents = [document if isinstance(document, str) else document.text for document in request.documents]
        if len(documents) > self._limits.max_items:
            raise TooLargeError(
                f"documents has {len(documents)} entries; this service takes at most {self._limits.max_items}; "
                "split the request",
                param="documents",
            )
        before, behind = self._template.around(request.query, request.instruct)
        end, answers = self._answers(behind)
        (front,) = self._tokenizer.encode([before])
        room = self._max_prompt_tokens - len(front) - len(end)
        if room < 1:
            raise InvalidRequestError(
                f"the query takes {len(front) + len(end)} tokens with the instruction and the template; this model "
                f"reads at most {self._max_prompt_tokens}, a document included; shorten it",
                param="query",
            )
        longest = self._max_prompt_tokens - len(end)
        sequences: list[Int32] = []
        cut: list[int] = []
        total = 0
        for index, ids in enumerate(self._joined(before, documents)):
            check_ids(ids, self._vocab_size, "documents", index)  # the tokenizer may have more tokens than the model
            tokens = np.asarray(ids[:longest], np.int32)
            if request.max_tokens_per_doc:
                # The front's last token, such as a space, may have become a part of the document's first one.
                start = common_prefix(tokens, np.asarray(front, np.int32))
                tokens = tokens[: start + request.max_tokens_per_doc]
            if len(tokens) < len(ids):
                cut.append(index)
            sequences.append(np.append(tokens, np.asarray(end, np.int32)))
            total += len(sequences[-1])
            if total > self._limits.max_request_tokens:
                raise TooLargeError(
                    f"the prompts up to documents[{index}] have {total} tokens; a request may have at most "
                    f"{self._limits.max_request_tokens}, the query counted once a document; split the request",
                    param="documents",
                )
        return RerankQuestion(
            batch=_batch(sequences, answers),
            model=self._name,
            request_id=request_id,
            documents=documents if request.return_documents else None,
            top_n=request.top_n,
            cut=cut,
        )

    def _answers(self, behind: str) -> tuple[list[int], list[int]]:
        """Ids of the prompt's end, and of the words for yes and no behind it."""
        template = self._template
        end, *answered = self._tokenizer.encode(
            [behind, behind + template.yes, behind + template.no], add_special_tokens=False
        )
        for word, ids in zip((template.yes, template.no), answered, strict=True):
            if ids[:-1] != end:
                pieces = self._tokenizer.pieces(ids[-4:])
                raise InvalidRequestError(
                    f"the answer {word!r} is not one token of this model behind {behind[-20:]!r} "
                    f"(it ends in {pieces}); serve it with a rerank_template that has other words"
                )
        yes, no = (ids[-1] for ids in answered)
        check_ids([yes, no], self._vocab_size, "model")
        return end, [yes, no]

    def _joined(self, before: str, documents: Sequence[str]) -> Iterator[list[int]]:
        """Ids of ``before`` + document, special tokens included, for each document."""
        start = 0
        while start < len(documents):
            characters, stop = 0, start
            while stop < len(documents) and characters < _CHUNK_CHARACTERS:
                characters += len(before) + len(documents[stop])
                stop += 1
            yield from self._tokenizer.encode_joined(before, documents[start:stop])
            start = stop


@dataclass(frozen=True, slots=True)
class RerankQuestion:
    """A rerank request once its prompts are built.

    Attributes:
        documents: the texts, if they are to be returned.
        cut: numbers of the documents of which only the beginning is read.
    """

    batch: TokenBatch
    model: str
    request_id: str
    documents: Sequence[str] | None
    top_n: int | None
    cut: Sequence[int]

    def answer(self, result: BatchResult) -> RerankResponse:
        """The ranking by the engine's values.

        Raises:
            InternalError: the model's output for a document is not finite.
        """
        rows = result.values.reshape(-1, 2).tolist()
        scores = [relevance(row, index) for index, row in enumerate(rows)]
        ranking = sorted(range(len(scores)), key=lambda index: -scores[index])  # stable: ties keep their order
        texts = self.documents
        prompt_tokens = len(self.batch.tokens)
        return RerankResponse(
            id=self.request_id,
            model=self.model,
            results=[
                RerankResult(
                    index=index,
                    relevance_score=scores[index],
                    document=None if texts is None else RankedDocument(text=texts[index]),
                )
                for index in ranking[: self.top_n]
            ],
            meta=RerankMeta(tokens=RerankTokens(input_tokens=prompt_tokens), warnings=self._warnings()),
            usage=Usage(
                prompt_tokens=prompt_tokens,
                total_tokens=prompt_tokens,
                prompt_tokens_details=PromptTokensDetails(
                    cached_tokens=prompt_tokens - int(result.computed_tokens.sum())
                ),
            ),
        )

    def _warnings(self) -> list[str] | None:
        if not self.cut:
            return None
        shown = ", ".join(f"documents[{index}]" for index in self.cut[:_SHOWN])
        more = f" and {len(self.cut) - _SHOWN} more" if len(self.cut) > _SHOWN else ""
        return [f"too long, so that only the beginning was read: {shown}{more}"]


def relevance(values: Sequence[float], index: int) -> float:
    """A document's score from its read: ``p_yes / (p_yes + p_no)``.

    The one place where a model with a score of its own (a sequence classifier) would differ, with the targets that
    ``Reranker.prepare`` asks for.

    Args:
        values: of yes and no, in nats, up to a constant of both.
        index: the document, for the error.

    Raises:
        InternalError: they are not finite.
    """
    yes, no = values
    peak = max(yes, no)
    if math.isnan(yes) or math.isnan(no) or math.isinf(peak):
        raise InternalError(
            f"documents[{index}]: the model's output is not finite, so there is no score; leave this document out",
            param="documents",
            index=index,
        )
    return math.exp(yes - peak) / (math.exp(yes - peak) + math.exp(no - peak))


def _batch(sequences: Sequence[Int32], targets: Sequence[int]) -> TokenBatch:
    """One read a sequence, at its last token, of the same targets."""
    offsets = np.cumsum([0, *map(len, sequences)], dtype=np.int64)
    count = len(sequences)
    return TokenBatch(
        tokens=np.concatenate([np.zeros(0, np.int32), *sequences]),
        offsets=offsets,
        read_sequences=np.arange(count, dtype=np.int32),
        read_positions=(np.diff(offsets) - 1).astype(np.int32),
        targets=np.tile(np.asarray(targets, np.int32), count),
        target_offsets=np.arange(count + 1, dtype=np.int64) * len(targets),
        vocab_logprobs=False,  # the two answers alone: no vocabulary matmul
    )
