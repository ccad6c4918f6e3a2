"""Rank documents by their relevance to a query: ``/v1/rerank``, in Cohere's and Jina's shape.

A template (``templates.py``) asks a causal model a question, and the score is ``p_yes / (p_yes + p_no)``. A model with
a classification head reads the same prompt, and its score comes from its classes, see ``relevance``. The prompt up to
the document's end is joined, then tokenised, unless the template has it in parts. The template's end is tokenised by
itself, as in the model card of Qwen3-Reranker, so that a long document can be cut before it. Nothing in a request's
texts becomes a control token (``plain_text.py``).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import chain
from typing import Annotated, Literal

import numpy as np
from pydantic import AliasChoices, ConfigDict, Field

from serve_app import compat
from serve_app.batches import common_prefix
from serve_app.contract import BatchResult
from serve_app.errors import InvalidRequestError
from serve_app.field_texts import Described
from serve_app.schemas import LOWEST, RequestBody, ResponseBody, Text, Usage
from serve_app.tasks import labels
from serve_app.tasks.labels import Layout
from serve_app.tasks.model_facts import MOST_CLASSES, ModelFacts
from serve_app.tasks.pairs import Pairs, shortened
from serve_app.tasks.plain_text import original
from serve_app.tasks.prompts import PreparedItems, Prompt, packed
from serve_app.tasks.rewards.head import trained_activation
from serve_app.tasks.scores import class_logits, label_scores, usage
from serve_app.tasks.steps import Steps
from serve_app.tasks.task import Prepare, PreparedRequest, Task
from serve_app.tasks.tokenizer import Joined
from serve_app.tasks.validation import (
    check_characters,
    check_count,
    check_ids,
    check_scores,
    check_work,
    of_field,
    too_many_tokens,
)

_SHOWN = 10
"""The most documents that a warning names."""


class RerankDocument(Described):
    """A document with metadata; only its text is read."""

    model_config = ConfigDict(strict=True, extra="ignore")

    text: Text


class RerankRequest(RequestBody):
    """Request to rank documents by how well they answer a query: ``POST /v1/rerank``.

    Attributes:
        query: the query that the documents are judged for.
        documents: texts, or objects with a ``text``.
        top_n: return only this number of the best results. None: return all.
        return_documents: put each document's text into its result.
        instruct: the task in words, for templates that have a place for it; None: the template's own. An encoder takes
            none. vLLM's name for it is ``instruction``.
        max_tokens_per_doc: cut longer documents. Documents that do not fit the model's context are always cut. Of an
            encoder's pair that does not fit, the longer text is cut.
        truncate_prompt_tokens: cut documents so that no prompt is longer. -1 or None: the longest that the model reads.
        truncate: False: a document that would be cut is an error.
        raw_scores: return scores from before the logistic function: ``log(p_yes / p_no)`` for a causal model.
    """

    foreign = compat.RERANK

    model: Text = "default"
    query: Text
    documents: Annotated[list[Text | RerankDocument], Field(fail_fast=True)]
    top_n: Annotated[int, Field(ge=1)] | None = None
    return_documents: bool | None = None
    instruct: Annotated[Text | None, Field(validation_alias=AliasChoices("instruct", "instruction"))] = None
    max_tokens_per_doc: Annotated[int, Field(ge=1)] | None = None
    truncate_prompt_tokens: Annotated[int, Field(ge=-1)] | None = None
    truncate: bool | None = None
    raw_scores: bool = False


class RankedDocument(ResponseBody):
    """A document's text, as it was sent."""

    text: str


class RerankResult(ResponseBody):
    """The result of one document.

    Attributes:
        index: the document's place in the request.
        relevance_score: 0 to 1; with ``raw_scores`` any number, and from an encoder whose sentence-transformers files
            name the activation Identity.
        document: with ``return_documents``, the document's text.
    """

    index: int
    relevance_score: float
    document: RankedDocument | None = None


class RerankTokens(ResponseBody):
    """Token counts under Cohere's names. Nothing is ever generated."""

    input_tokens: int
    output_tokens: int = 0


class RerankMeta(ResponseBody):
    """Token counts and warnings, under Cohere's names.

    Attributes:
        warnings: which documents were cut; None if none was.
        tokens: the numbers of tokens.
    """

    tokens: RerankTokens
    warnings: list[str] | None = None


class RerankResponse(ResponseBody):
    """Results, best first; equal scores are in the order of the request.

    Attributes:
        results: the documents, best first.
        meta: tokens and warnings, as Cohere's clients read them.
    """

    id: str
    object: Literal["list"] = "list"
    model: str
    results: list[RerankResult]
    meta: RerankMeta
    usage: Usage


def prepare(model: ModelFacts, request: RerankRequest, request_id: str) -> Steps[PreparedRequest[RerankResponse]]:
    """Build one prompt for each document, read at its last token for the two answers, or the classes.

    Raises:
        InvalidRequestError: the query leaves no room for a document, an answer is more than one token of this model,
            or the model has more than two classes or a decision head.
        TooLargeError: the request has more documents or tokens than the limits allow.
    """
    documents = [document if isinstance(document, str) else document.text for document in request.documents]
    check_scores(model.info)
    check_count(documents, model.limits.max_items, "documents")
    if model.info.encoder:
        return (yield from _of_pairs(model, request, documents, request_id))
    template = model.rerank.template
    guard, tokenizer = model.tokenizer.plain.guard, model.tokenizer.guarded
    instruct = None if request.instruct is None else guard(request.instruct)
    apart, before, behind = template.around(guard(request.query), instruct)
    most = model.max_text_characters
    check_characters(sum(map(len, (*apart, before, *behind))), most, "query")
    for index, document in enumerate(documents):
        check_characters(len(before) + len(document), most, "documents", index)
    characters = len(documents) * len(before) + sum(map(len, documents))
    check_work(characters, model.max_request_characters, "documents")
    end, layout = _answers(model, behind)
    whole = isinstance(template.prompt, str)
    opening = _each_apart(model, apart)
    with of_field("query"):
        (front,) = tokenizer.encode([before], add_special_tokens=whole)
    front = opening + front
    most, limited = _most_tokens(model, request)
    if most - len(front) - len(end) < 1:
        raise InvalidRequestError(
            f"the query, the instruction and the template take {len(front) + len(end)} tokens; {limited}, "
            "including at least one of a document; shorten the query",
            param="query",
        )
    longest = most - len(end)
    joined = Joined(tokenizer, before, add_special_tokens=whole, many=len(documents) > 1)
    prompts: list[Prompt] = []
    total = 0
    for index, own in enumerate(chain.from_iterable(joined.checked(map(guard, documents)))):
        yield
        if isinstance(own, InvalidRequestError):
            with of_field("documents", index):
                raise own
        ids = opening + own
        # The tokenizer may have more tokens than the model.
        check_ids(ids, model.info.vocab_size, f"documents[{index}]", index, of_text=True)
        kept = np.asarray(ids[:longest], np.int32)
        if request.max_tokens_per_doc:
            # The front's last token, such as a space, may have become a part of the document's first one.
            start = common_prefix(kept, np.asarray(front, np.int32))
            kept = kept[: start + request.max_tokens_per_doc]
        prompt = Prompt(index, np.append(kept, np.asarray(end, np.int32)), layout, dropped=len(ids) - len(kept))
        prompts.append(prompt)
        total += len(prompt.ids)
        _check_prompt(model, request, prompt, total)
    # No vocabulary matmul: the answers' logits are enough.
    made = packed(
        prompts,
        (),
        len(opening) + joined.query_tokens,
        vocab_logprobs=False,
        classes=model.info.classes > 0,
        pad=model.info.pad_token_id,
    )
    answer = partial(_answer, request, documents, made, model, request_id)
    return PreparedRequest(made.batch, made.query_tokens, len(prompts), len(made.parts), answer)


def _of_pairs(
    model: ModelFacts, request: RerankRequest, documents: Sequence[str], request_id: str
) -> Steps[PreparedRequest[RerankResponse]]:
    """Put the query and each document together as a pair, for a model that is an encoder.

    A pair that is too long loses tokens as with sentence-transformers' CrossEncoder.

    Raises:
        InvalidRequestError: the request has an instruction, or the model more than two classes.
        TooLargeError: the request has more documents or tokens than the limits allow.
    """
    if request.instruct:
        raise InvalidRequestError(
            "instruct is for models with a prompt; this one reads the query and a document as a pair; leave it out",
            param="instruct",
        )
    guard, (_, layout) = model.tokenizer.plain.guard, _answers(model, ())
    pairs = Pairs(model.tokenizer.guarded, model.info, guard(request.query), "query", "documents")
    check_characters(len(request.query), model.max_text_characters, "query")
    for index, document in enumerate(documents):
        check_characters(len(document), model.max_text_characters, "documents", index)
    check_work(len(request.query) + sum(map(len, documents)), model.max_request_characters, "documents")
    query = pairs.shared
    most, limited = _most_tokens(model, request)
    if (room := most - pairs.added) < 2:
        raise InvalidRequestError(
            f"a pair has {pairs.added} special tokens beside those of its texts, and {limited}; allow more",
            param="truncate_prompt_tokens",
        )
    prompts: list[Prompt] = []
    total = 0
    for index, ids in enumerate(pairs.each(map(guard, documents))):
        yield
        of_query, of_document = shortened(len(query), min(len(ids), request.max_tokens_per_doc or len(ids)), room)
        dropped = len(query) - of_query + len(ids) - of_document
        prompts.append(Prompt(index, pairs.together(query[:of_query], ids[:of_document]), layout, dropped=dropped))
        total += len(prompts[-1].ids)
        _check_prompt(model, request, prompts[-1], total)
    made = packed(prompts, (), 0, vocab_logprobs=False, classes=True, pad=None)
    answer = partial(_answer, request, documents, made, model, request_id)
    return PreparedRequest(made.batch, 0, len(prompts), len(made.parts), answer)


def _most_tokens(model: ModelFacts, request: RerankRequest) -> tuple[int, str]:
    """The most tokens of a prompt, and what limits them, in words."""
    most, limited = model.max_prompt_tokens, f"this model reads at most {model.most_tokens}"
    trained = model.tokenizer.facts.model_max_length
    if model.info.encoder and trained is not None and trained < most:
        most, limited = trained, f"tokenizer_config.json allows at most {trained}"
    if request.truncate_prompt_tokens is not None and 0 <= request.truncate_prompt_tokens < most:
        most = request.truncate_prompt_tokens
        limited = f"truncate_prompt_tokens allows at most {most}"
    return most, limited


def _check_prompt(model: ModelFacts, request: RerankRequest, prompt: Prompt, total: int) -> None:
    """Check the last prompt of ``total`` tokens in all.

    Raises:
        InvalidRequestError: it has lost tokens, and the request does not allow that.
        TooLargeError: the request has more tokens than the limits allow.
    """
    if request.truncate is False and prompt.dropped:
        raise InvalidRequestError(
            f"documents[{prompt.index}] makes a prompt of {len(prompt.ids) + prompt.dropped} tokens and would lose "
            f"{prompt.dropped} of them; shorten it, or leave out truncate: false",
            param="documents",
            index=prompt.index,
        )
    if total > model.limits.max_request_tokens:
        counted = ", counting the query once per document"
        raise too_many_tokens(total, model.limits.max_request_tokens, "documents", prompt.index, counted)


def _builder(model: ModelFacts) -> Prepare[RerankRequest, RerankResponse]:
    """Build ``prepare`` for one model.

    Raises:
        ValueError: the settings have a template, and the model is an encoder; or it is causal, and an answer of the
            template is not one token.
    """
    if model.rerank.asked and model.info.encoder:
        raise ValueError("rerank_template: the model is an encoder, and reads two texts as a pair; leave it out")
    if model.rerank.asked and not model.info.classes:
        try:
            _answers(model, model.rerank.template.around("", None).behind)
        except InvalidRequestError as error:
            raise ValueError(f"rerank_template: {error.message}") from error
    return partial(prepare, model)


def _each_apart(model: ModelFacts, texts: Sequence[str]) -> list[int]:
    """Ids of the texts, each tokenised by itself, one after the other."""
    with of_field("query"):
        return [id for ids in model.tokenizer.guarded.encode(texts, add_special_tokens=False) for id in ids]


def _answers(model: ModelFacts, behind: Sequence[str]) -> tuple[list[int], Layout]:
    """The ids of the prompt's end, and how it is read: for yes and no after it, or for the classes.

    Raises:
        InvalidRequestError: an answer is not one token of this model, or the model has more than two classes.
    """
    if model.info.classes:
        if model.info.classes > MOST_CLASSES:
            raise InvalidRequestError(
                f"this model is a classifier with {model.info.classes} classes, and no class means relevance; "
                "use /v1/score",
                param="model",
            )
        return _each_apart(model, behind), labels.of_tokens(range(model.info.classes))
    words, last = (model.rerank.template.yes, model.rerank.template.no), behind[-1]
    texts = [last, *(last + word for word in words)]
    with of_field("query"):
        end, *answered = model.tokenizer.guarded.encode(texts, add_special_tokens=False)
    found: list[int] = []
    for word, ids in zip(words, answered, strict=True):
        added = labels.added_tokens(end, ids)
        found += added
        if len(added) != 1:
            pieces = model.tokenizer.pieces(ids[-4:])
            raise InvalidRequestError(
                f"the answer {word!r} is not one token of this model after {original(last)[-20:]!r} (both together end "
                f"in {pieces}); serve the model with a rerank_template that has other words"
            )
    check_ids(found, model.info.vocab_size, "model", of_text=True)
    return _each_apart(model, behind[:-1]) + end, labels.of_tokens(found)


def _answer(
    request: RerankRequest,
    documents: Sequence[str],
    prepared: PreparedItems,
    model: ModelFacts,
    request_id: str,
    result: BatchResult,
) -> RerankResponse:
    """Make the ranking from the engine's values.

    Raises:
        InternalError: the model's output for a document is not finite.
    """
    answers = len(prepared.parts) // max(len(documents), 1)
    values = result.values[prepared.parts].reshape(len(documents), answers).tolist()
    # A cross-encoder may have been trained so that its scores are its logits.
    raw = request.raw_scores or (model.info.encoder and trained_activation(model.config) == "identity")
    scores = [relevance(own, index, classes=prepared.classes, raw=raw) for index, own in enumerate(values)]
    ranking = sorted(range(len(scores)), key=lambda index: -scores[index])  # stable: ties keep their order
    used = usage(prepared.prompt_tokens, int(result.computed_tokens.sum()))
    return RerankResponse(
        id=request_id,
        model=model.name,
        results=[
            RerankResult(
                index=index,
                relevance_score=scores[index],
                document=RankedDocument(text=documents[index]) if request.return_documents else None,
            )
            for index in ranking[: request.top_n]
        ],
        meta=RerankMeta(tokens=RerankTokens(input_tokens=used.prompt_tokens), warnings=_warnings(prepared.prompts)),
        usage=used,
    )


def _warnings(prompts: Sequence[Prompt]) -> list[str] | None:
    cut = [prompt.index for prompt in prompts if prompt.dropped]
    if not cut:
        return None
    shown = ", ".join(f"documents[{index}]" for index in cut[:_SHOWN])
    more = f" and {len(cut) - _SHOWN} more" if len(cut) > _SHOWN else ""
    return [f"too long, so only the beginning was read: {shown}{more}"]


def relevance(values: Sequence[float], index: int, *, classes: bool, raw: bool = False) -> float:
    """A document's score from its read, 0 to 1.

    The score is ``p_yes / (p_yes + p_no)`` for a causal model, and the probability of the last class for a model with
    two classes. For a model with one class it is the logistic function of the logit, as sentence-transformers'
    CrossEncoder computes it.

    Args:
        values: logprobs of yes and no, up to a constant added to both; or the class logits.
        index: the document's index, for the error.
        raw: return the score from before the logistic function: any number, in nats.

    Raises:
        InternalError: a value is not finite.
    """
    if classes:
        *other, yes = class_logits(values, index, field="documents")
        no = other[0] if other else 0.0
    else:
        yes, no = values
    (score, _) = label_scores([yes, no], index, softmax=True, field="documents")
    return min(max(yes - no, LOWEST), -LOWEST) if raw else score


RERANK = Task[RerankRequest, RerankResponse](
    name="rerank",
    paths=("/v1/rerank", "/v2/rerank", "/rerank"),
    description="""The documents by their relevance to the query, best first.

With ``texts`` in place of ``documents`` the answer is a list, as text-embeddings-inference returns it.""",
    example={
        "query": "How do I reset my password?",
        "documents": ["Open the settings and choose Reset.", "Our office is closed on Sundays."],
    },
    request=RerankRequest,
    response=RerankResponse,
    builder=_builder,
)
