"""Rerank in text-embeddings-inference's shape: the request has ``texts``, and the answer is a bare list."""

from __future__ import annotations

import re
from functools import partial

from serve_app import compat
from serve_app.schemas import RequestBody, ResponseBody, Text, Texts
from serve_app.tasks import rerank
from serve_app.tasks.model_facts import ModelFacts
from serve_app.tasks.rerank import RERANK, RerankRequest, RerankResponse
from serve_app.tasks.steps import Steps
from serve_app.tasks.task import PreparedRequest, Task


class TeiRerankRequest(RequestBody):
    """Request to rank texts by how well they answer a query.

    Attributes:
        raw_scores: return scores from before the logistic function, see ``RerankRequest``.
        return_text: put each text into its result.
        truncate: False: a text that would be cut is an error.
    """

    foreign = compat.RERANK

    model: Text = "default"
    query: Text
    texts: Texts
    raw_scores: bool = False
    return_text: bool = False
    truncate: bool | None = None


class TeiRank(ResponseBody):
    """The rank of one text; ``index`` is its place in the request."""

    index: int
    score: float
    text: str | None = None


def is_meant(body: bytes) -> bool:
    """Whether a body has this shape. A search is enough: inside JSON strings, quotation marks are escaped."""
    return bool(re.search(rb'"texts"\s*:', body)) and not re.search(rb'"documents"\s*:', body)


def as_rerank_request(request: TeiRerankRequest) -> RerankRequest:
    """The same request for ``/v1/rerank``."""
    return RerankRequest.model_construct(
        model=request.model,
        query=request.query,
        documents=request.texts,
        raw_scores=request.raw_scores,
        return_documents=request.return_text,
        truncate=request.truncate,
    )


def as_ranks(answer: RerankResponse) -> list[TeiRank]:
    """The answer in TEI's shape, best first."""
    return [
        TeiRank(
            index=result.index, score=result.relevance_score, text=result.document.text if result.document else None
        )
        for result in answer.results
    ]


def prepare(model: ModelFacts, request: TeiRerankRequest, request_id: str) -> Steps[PreparedRequest[list[TeiRank]]]:
    """Build one prompt for each text, see ``rerank.prepare``."""
    prepared = yield from rerank.prepare(model, as_rerank_request(request), request_id)
    return prepared.converted(as_ranks)


TEI_RERANK = Task[TeiRerankRequest, list[TeiRank]](
    name="rerank_texts",
    paths=RERANK.paths,
    description="The texts by their relevance to the query, best first.",
    example={
        "query": "How do I reset my password?",
        "texts": ["Open the settings and choose Reset.", "Our office is closed on Sundays."],
    },
    request=TeiRerankRequest,
    response=TeiRank,
    builder=lambda model: partial(prepare, model),
    matches=is_meant,
)
