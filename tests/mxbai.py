"""The prompts of the library ``mxbai-rerank`` 0.1.6, made again with the ``tokenizers`` library alone."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer

PREFIX = (
    "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n"
    "<|im_start|>user\n"
)
TASK = (
    "You are a search relevance expert who evaluates how well documents match search queries. For each query-document "
    "pair, carefully analyze the semantic relationship between them, then provide your binary relevance judgment "
    "(0 for not relevant, 1 for relevant).\nRelevance:"
)
SUFFIX = "<|im_end|>\n<|im_start|>assistant\n"


def prompt(folder: Path, instruction: str | None, query: str, document: str, longest: int) -> list[int]:
    """The ids of a prompt of at most ``longest`` tokens, by the ``tokenizer.json`` in a folder."""
    backend = Tokenizer.from_file(str(folder / "tokenizer.json"))

    def ids(text: str) -> list[int]:
        return backend.encode(text, add_special_tokens=False).ids

    asked = f"instruction: {instruction}\nquery: {query}" if instruction else f"query: {query}"
    line, task = ids("\n"), [*ids("\n"), *ids(TASK), *ids(SUFFIX)]
    pair = ids(asked) + line + ids(f"document: {document}")
    return ids(PREFIX) + pair[: longest - len(ids(PREFIX)) - len(task)] + task
