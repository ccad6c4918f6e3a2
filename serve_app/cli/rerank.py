"""``score-serve rerank``: documents by their relevance to a query, ranked by a running service."""

from __future__ import annotations

import sys
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from serve_app.cli.client import Json, Url, asking, given_items, printable, warn


def rerank(
    query: Annotated[str, typer.Argument(help="What the documents are judged for.")],
    documents: Annotated[
        list[str] | None,
        typer.Argument(help="Texts to rank. Without any, each line of standard input is a document."),
    ] = None,
    documents_file: Annotated[
        typer.FileText | None,
        typer.Option("--documents", encoding="utf-8", help="File with one document per line, instead of arguments."),
    ] = None,
    top_n: Annotated[int | None, typer.Option(min=1, help="Show only the best.", show_default="all")] = None,
    instruct: Annotated[
        str | None, typer.Option(help="The task in words, for models with a place for it.", show_default="the model's")
    ] = None,
    model: Annotated[str, typer.Option(help="Served name of the model.")] = "default",
    url: Url = "http://127.0.0.1:8000",
    as_json: Json = False,
) -> None:
    """Rank documents by their relevance to a query with a running service, the best first.

    For example:
    score-serve rerank 'Who painted the Mona Lisa?' 'The Louvre is in Paris.' 'Leonardo painted it.' --top-n 1

    An API key is read from SCORE_SERVE_API_KEY.
    The exit codes are those of "score".
    """
    texts = given_items(documents, documents_file, "documents")
    with asking(url, model) as client:
        answer = client.rerank(query, texts, top_n=top_n, instruct=instruct)
    if as_json:
        sys.stdout.write(answer.model_dump_json(exclude_none=True) + "\n")
    else:
        table = Table(caption=f"{answer.usage.prompt_tokens:,} prompt tokens")
        table.add_column("relevance", justify="right", no_wrap=True)
        table.add_column("line", justify="right", no_wrap=True)
        table.add_column("document", overflow="fold")
        for result in answer.results:
            table.add_row(f"{result.relevance_score:.4f}", str(result.index + 1), printable(texts[result.index]))
        Console().print(table)
    for warning in answer.meta.warnings or ():
        warn(warning)
