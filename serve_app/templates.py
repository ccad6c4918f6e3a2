"""Prompt templates with which a causal model judges a document for a query: ``/v1/rerank``.

Template names are permanent, since scores depend on every byte: a better text gets a new name.
"""

from __future__ import annotations

import re
from typing import NamedTuple, Self

from pydantic import BaseModel, ConfigDict, model_validator

_FIELD = re.compile(r"\{(instruct|query|document)\}")


class Around(NamedTuple):
    """A prompt's texts around its document. Each is tokenised by itself, except ``joined``.

    Attributes:
        apart: the texts before ``joined``.
        joined: the text right before the document, tokenised together with it.
        behind: the texts after the document, at least one.
    """

    apart: tuple[str, ...]
    joined: str
    behind: tuple[str, ...]


class RerankTemplate(BaseModel):
    """A question that the model answers with one of two words.

    Attributes:
        prompt: text with ``{query}``, ``{document}`` and optionally ``{instruct}`` in the places of those texts. The
            text after ``{document}`` is tokenised by itself and is never cut. A prompt may also be several such texts.
            Each of them is tokenised by itself, and no special tokens are added.
        instruct: the instruction where a request has none.
        instruct_form: the form in which an instruction takes the place of ``{instruct}``; an empty instruction is left
            out.
        yes: the answer for a relevant document, as it would follow the prompt; one token there.
        no: the answer for any other document, also one token after the prompt.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    prompt: str | tuple[str, ...]
    instruct: str = ""
    instruct_form: str = "{instruct}"
    yes: str = "yes"
    no: str = "no"

    @model_validator(mode="after")
    def _checked(self) -> Self:
        prompt = "".join(self.parts)
        fields = _FIELD.findall(prompt)
        if fields.count("document") != 1 or "query" not in fields:
            raise ValueError("prompt must have {query} at least once and {document} exactly once")
        if prompt.endswith("}") and _FIELD.search(prompt[prompt.rfind("{") :]):
            raise ValueError(
                "prompt must not end in {query}, {document} or {instruct}; end it with text that asks for the answer"
            )
        if _FIELD.findall(self.instruct_form) != ["instruct"]:
            raise ValueError("instruct_form must have {instruct} exactly once, and no other field")
        return self

    @property
    def parts(self) -> tuple[str, ...]:
        """The texts of the prompt that are tokenised apart: one, if it is a single text."""
        return (self.prompt,) if isinstance(self.prompt, str) else self.prompt

    def around(self, query: str, instruct: str | None) -> Around:
        """Fill in the prompt's texts around its document. ``instruct`` None: the template's own instruction."""
        instruct = self.instruct if instruct is None else instruct
        texts = {"query": query, "instruct": _filled(self.instruct_form, {"instruct": instruct}) if instruct else ""}
        at = next(number for number, part in enumerate(self.parts) if "{document}" in part)
        joined, rest = self.parts[at].split("{document}")
        apart, behind = self.parts[:at], ((rest,) if rest else ()) + self.parts[at + 1 :]
        return Around(
            tuple(_filled(part, texts) for part in apart),
            _filled(joined, texts),
            tuple(_filled(part, texts) for part in behind),
        )


def _filled(text: str, texts: dict[str, str]) -> str:
    """Fill in the fields of ``text`` in one pass, so that braces in a query are text."""
    return _FIELD.sub(lambda field: texts[field[1]], text)


QWEN3_RERANKER = "qwen3-reranker-v1"
MXBAI_RERANK = "mxbai-rerank-v2"
PLAIN_V1 = "plain-v1"
PLAIN = "plain-v2"

_QWEN_SYSTEM = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
_MXBAI_TASK = (
    "You are a search relevance expert who evaluates how well documents match search queries. For each "
    "query-document pair, carefully analyze the semantic relationship between them, then provide your binary relevance "
    "judgment (0 for not relevant, 1 for relevant)."
)

TEMPLATES: dict[str, RerankTemplate] = {
    # The prompt of the transformers example in the model cards of Qwen/Qwen3-Reranker-0.6B, -4B and -8B, byte for byte:
    # prefix, "<Instruct>: ...\n<Query>: ...\n<Document>: ...", suffix. sentence-transformers' tests
    # (test_qwen3_reranker_formatted_pairs) and vLLM's examples (qwen3_reranker.jinja) have the same prompt.
    QWEN3_RERANKER: RerankTemplate(
        prompt=(
            "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the Instruct "
            'provided. Note that the answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n'
            "<Instruct>: {instruct}\n<Query>: {query}\n<Document>: {document}<|im_end|>\n<|im_start|>assistant\n"
            "<think>\n\n</think>\n\n"
        ),
        instruct="Given a web search query, retrieve relevant passages that answer the query",
    ),
    # The prompt of mxbai-rerank-base-v2 and -large-v2, as their library builds it (mxbai-rerank 0.1.6 on PyPI). It
    # tokenises each part by itself: a query that ends in "." has other tokens together with the line break after it.
    MXBAI_RERANK: RerankTemplate(
        prompt=(
            f"<|im_start|>system\n{_QWEN_SYSTEM}<|im_end|>\n<|im_start|>user\n",
            "{instruct}query: {query}",
            "\n",
            "document: {document}",
            "\n",
            f"{_MXBAI_TASK}\nRelevance:",
            "<|im_end|>\n<|im_start|>assistant\n",
        ),
        instruct_form="instruction: {instruct}\n",
        yes="1",
        no="0",
    ),
    # For models that were not trained to rerank: plain words without chat markup.
    PLAIN_V1: RerankTemplate(
        prompt=(
            "Instruction: {instruct}\nQuery: {query}\nDocument: {document}\n"
            "Does the document answer the query? Answer yes or no.\nAnswer:"
        ),
        instruct="Given a search query, find passages that answer it",
        yes=" yes",
        no=" no",
    ),
    # The best of two dozen wordings with the demo model: the right document came first for 50 of 60 queries, and for 39
    # with plain-v1 (docs/measurements.md). The query comes first, so that all documents share it as a prefix.
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
