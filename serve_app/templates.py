"""Prompts by which a causal model judges a query and a document: ``/v1/rerank``.

A name stands for its text for good, since scores depend on every byte: a better text gets a name of its own.
"""

from __future__ import annotations

import re
from typing import Self

from pydantic import BaseModel, ConfigDict, model_validator

_FIELD = re.compile(r"\{(instruct|query|document)\}")


class RerankTemplate(BaseModel):
    """A question that the model answers with one of two words.

    Attributes:
        prompt: text with ``{query}``, ``{document}`` and, if wanted, ``{instruct}`` in the places of those texts. What
            stands behind ``{document}`` is tokenised by itself and is never cut.
        instruct: in the place of ``{instruct}`` where a request has none.
        yes: the word for a relevant document, as it would follow the prompt; one token there.
        no: the word for any other, in the same way.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    prompt: str
    instruct: str = ""
    yes: str = "yes"
    no: str = "no"

    @model_validator(mode="after")
    def _checked(self) -> Self:
        fields = _FIELD.findall(self.prompt)
        if fields.count("document") != 1 or "query" not in fields:
            raise ValueError("prompt must have {query} and, once, {document}")
        if self.prompt.endswith("}") and _FIELD.search(self.prompt[self.prompt.rfind("{") :]):
            raise ValueError("prompt must end in words of its own, which ask for the answer")
        return self

    def around(self, query: str, instruct: str | None) -> tuple[str, str]:
        """The prompt's text before the document, and behind it."""
        texts = {"query": query, "instruct": self.instruct if instruct is None else instruct}
        before, behind = self.prompt.split("{document}")
        return _filled(before, texts), _filled(behind, texts)


def _filled(text: str, texts: dict[str, str]) -> str:
    """In one pass: braces in a query are text."""
    return _FIELD.sub(lambda field: texts[field[1]], text)


QWEN3_RERANKER = "qwen3-reranker-v1"
PLAIN_V1 = "plain-v1"
PLAIN = "plain-v2"

TEMPLATES: dict[str, RerankTemplate] = {
    # Byte for byte what the model card of Qwen/Qwen3-Reranker-0.6B, -4B and -8B puts together in its transformers
    # example: prefix, "<Instruct>: ...\n<Query>: ...\n<Document>: ...", suffix. The tests of sentence-transformers
    # (test_qwen3_reranker_formatted_pairs) and vLLM's examples (qwen3_reranker.jinja) have the same.
    QWEN3_RERANKER: RerankTemplate(
        prompt=(
            "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the Instruct "
            'provided. Note that the answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n'
            "<Instruct>: {instruct}\n<Query>: {query}\n<Document>: {document}<|im_end|>\n<|im_start|>assistant\n"
            "<think>\n\n</think>\n\n"
        ),
        instruct="Given a web search query, retrieve relevant passages that answer the query",
    ),
    # For models that were not trained to rerank: words alone, no chat markup.
    PLAIN_V1: RerankTemplate(
        prompt=(
            "Instruction: {instruct}\nQuery: {query}\nDocument: {document}\n"
            "Does the document answer the query? Answer yes or no.\nAnswer:"
        ),
        instruct="Given a search query, find passages that answer it",
        yes=" yes",
        no=" no",
    ),
    # The best of two dozen wordings with the demo model: the right document came first for 50 of 60 queries, with
    # plain-v1 for 39 (docs/clients.md). Query first, so that the documents share it.
    PLAIN: RerankTemplate(
        prompt=(
            "{instruct}\n\nQuery: {query}\n\nDocument: {document}\n\n"
            "Question: Does the document answer the query?\nAnswer:"
        ),
        instruct="Given a search query, find passages that answer it",
        yes=" Yes",
        no=" No",
    ),
}


def default_template(model: str) -> str:
    """The name of the template that the model named so was trained on, or the plain one."""
    return QWEN3_RERANKER if "qwen3-reranker" in model.lower() else PLAIN
