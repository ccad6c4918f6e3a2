"""Commands that ask a running service: ``score-serve score`` and ``models``; other files have more."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from functools import partial
from typing import Annotated

import httpx
import typer
from pydantic import ValidationError
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from serve_app.client import ScoreClient
from serve_app.errors import DeadlineExceededError, OverloadedError, ScoringError
from serve_app.frontend import auth
from serve_app.schemas import ScoreResponse

REFUSED = 1
"""Exit code: the request is invalid, or the service failed on it."""
LOW_MASS = 0.01
"""A total probability of all labels below this causes a warning; the page uses the same number."""
LOOKED_AT = 3
"""Items checked for low mass, by a request of their own: a softmax over the labels alone does not compute it."""
MIN_ITEM = 12
"""Characters of an item that the table shows at least."""
SCORE = 10
"""Characters of a score at most, such as 1.234e-105."""
TRY_AGAIN = 3
"""Exit code: unreachable, overloaded or timed out; retry later. 2 is a wrong command."""


def checked_url(value: str) -> str:
    """Check the address of a service.

    Raises:
        typer.BadParameter: it is not an HTTP address.
    """
    try:
        url = httpx.URL(value)
    except httpx.InvalidURL as error:
        raise typer.BadParameter(f"{value!r} is not an address such as http://127.0.0.1:8000: {error}") from error
    if url.scheme not in ("http", "https") or not url.host:
        raise typer.BadParameter(f"{value!r} is not an address such as http://127.0.0.1:8000")
    return value


Url = Annotated[str, typer.Option(callback=checked_url, help="Address of the service.")]
Json = Annotated[bool, typer.Option("--json", help="Print the service's answer as JSON.")]


def score(
    query: Annotated[str, typer.Argument(help="Text that all items share.")],
    items: Annotated[
        list[str] | None, typer.Argument(help="Texts to score. Without any, each line of standard input is an item.")
    ] = None,
    items_file: Annotated[
        typer.FileText | None,
        typer.Option("--items", encoding="utf-8", help="File with one item per line, instead of arguments."),
    ] = None,
    label: Annotated[
        list[str] | None,
        typer.Option(
            "--label", "-l", help="A label, with the space before it, if any: ' yes' is not 'yes'. Repeatable."
        ),
    ] = None,
    label_id: Annotated[
        list[int] | None, typer.Option(help="A label as a token id, instead of --label. Repeatable.")
    ] = None,
    softmax: Annotated[bool, typer.Option("--softmax", help="Compare the labels only with each other.")] = False,
    item_first: Annotated[bool, typer.Option("--item-first", help="Item + query instead of query + item.")] = False,
    model: Annotated[str, typer.Option(help="Served name of the model.")] = "default",
    url: Url = "http://127.0.0.1:8000",
    as_json: Json = False,
) -> None:
    """Score items with a running service: the probability of each label as the next token.

    For example:
    score-serve score 'Review: ' 'I loved it. It was' 'A bore. It was' -l ' good' -l ' bad'

    A warning on standard error says if all labels together are improbable.
    An API key is read from SCORE_SERVE_API_KEY.
    Exit codes: 0 scored; 1 refused or failed; 2 wrong command;
    3 unreachable, overloaded or timed out, retry later.
    """
    if bool(label) == bool(label_id):
        raise typer.BadParameter("name labels either by --label or by --label-id")
    texts = given_items(items, items_file, "items")
    with asking(url, model) as client:
        ask = partial(
            client.score, query, labels=label or None, label_token_ids=label_id or None, item_first=item_first
        )
        answer = ask(texts, apply_softmax=softmax)
        if as_json:
            sys.stdout.write(answer.model_dump_json(exclude_none=True) + "\n")
        else:
            console = Console()
            console.print(_table(texts, label or [str(i) for i in label_id or []], answer, console.width))
        _warn_of_low_mass(ask, texts[:LOOKED_AT])


def models(url: Url = "http://127.0.0.1:8000", as_json: Json = False) -> None:
    """List the models of a running service.

    The exit codes are those of "score".
    """
    with asking(url, "default") as client:
        listed = client.models()
    if as_json:
        sys.stdout.write(listed.model_dump_json(exclude_none=True) + "\n")
        return
    table = Table("model", "longest prompt (tokens)")
    for card in listed.data:
        table.add_row(printable(card.id), f"{card.max_model_len:,}")
    Console().print(table)


def complain(message: str) -> None:
    """Print an error as one line on standard error."""
    Console(stderr=True, highlight=False).print(f"error: {message}", markup=False, soft_wrap=True)


def faults(error: ValidationError) -> str:
    """What is wrong with settings, on one line, each with its place."""
    found = [(".".join(map(str, each["loc"])), each["msg"].removeprefix("Value error, ")) for each in error.errors()]
    return "; ".join(f"{where}: {what}" if where else what for where, what in found)


def warn(message: str) -> None:
    """Print a warning as one line on standard error."""
    Console(stderr=True, highlight=False).print(f"warning: {message}", markup=False, soft_wrap=True)


def api_key() -> str | None:
    """The first API key in the environment."""
    return os.environ.get(auth.VARIABLE, "").split(",")[0].strip() or None


@contextmanager
def asking(url: str, model: str) -> Generator[ScoreClient]:
    """Yield a client; turn its errors into a line and an exit code. It does not retry: the user can."""
    try:
        with ScoreClient(url, model=model, api_key=api_key(), attempts=1) as client:
            yield client
    except ScoringError as error:
        complain(error.message)
        again = isinstance(error, OverloadedError | DeadlineExceededError)
        raise typer.Exit(TRY_AGAIN if again else REFUSED) from None
    except ValidationError:
        complain(f"{url} answers, but not as a score-serve service does; check --url")
        raise typer.Exit(REFUSED) from None


def given_items(arguments: list[str] | None, file: typer.FileText | None, what: str) -> list[str]:
    """The texts to ask about: arguments, or the lines of a file or of standard input.

    Args:
        what: what they are called, which is also the name of the file's option.

    Raises:
        typer.BadParameter: there are none, or they are not UTF-8.
    """
    if arguments and file:
        raise typer.BadParameter(f"give {what} as arguments or with --{what}, not both")
    if arguments:
        return arguments
    if file is None and sys.stdin.isatty():
        raise typer.BadParameter(
            f"there are no {what}; give them as arguments, as a file with --{what}, or on standard input, one per line"
        )
    lines: Iterable[str] = file or sys.stdin
    try:
        return [line.removesuffix("\n") for line in lines]
    except UnicodeDecodeError as error:
        raise typer.BadParameter(f"the {what} are not UTF-8: {error}; convert them to UTF-8") from error


def _warn_of_low_mass(ask: Callable[..., ScoreResponse], items: list[str]) -> None:
    """Warn on standard error if the labels together are so improbable that comparing them means little."""
    try:
        masses = ask(items, return_label_mass=True).label_mass or []
    except ScoringError:  # a classifier has no label mass; and a service that has since failed has already answered
        return
    low = [mass for mass in masses if mass is not None and mass < LOW_MASS]
    if low:
        warn(
            f"the labels together hold only {100 * min(low):.2g}% of the probability ({len(low)} of the first "
            f"{len(masses)} items are under {LOW_MASS:.0%}): the model would say something else, and these scores "
            "compare improbable words. Try a query that asks for the labels and ends where they begin, the model's own "
            "chat template around it, other labels, or labels with or without a space before them."
        )


def _table(items: list[str], labels: list[str], answer: ScoreResponse, width: int) -> Table:
    """A row for each item; where the labels leave it too little of the width, a row for each score.

    Items are shortened to the width that is left, never scores.
    """
    usage = answer.usage
    cached = usage.prompt_tokens_details.cached_tokens
    table = Table(caption=f"{usage.prompt_tokens:,} prompt tokens, {cached:,} cached")
    table.add_column("item", overflow="ellipsis", no_wrap=True)
    names = [printable(label.strip() or repr(label)) for label in labels]
    rows = [[f"{value:.4g}" for value in row or ()] for row in answer.scores]
    widths = [max(cell_len(name.plain), SCORE) for name in names]
    left = width - 4 - sum(each + 3 for each in widths)  # a column has a line and two spaces
    if left >= MIN_ITEM:
        for name, own in zip(names, widths, strict=True):
            table.add_column(name, justify="right", no_wrap=True, min_width=own)
        table.columns[0].max_width = left
        for item, row in zip(items, rows, strict=True):
            table.add_row(printable(item), *row)
        return table
    table.add_column("label", overflow="fold")
    table.add_column("score", justify="right", no_wrap=True, min_width=SCORE)
    table.columns[0].max_width = max(MIN_ITEM, width // 3)
    for item, row in zip(items, rows, strict=True):
        for number, (name, value) in enumerate(zip(names, row, strict=True)):
            table.add_row("" if number else printable(item), name, value)
    return table


def printable(text: str) -> Text:
    """Text on one line, without control characters for the terminal."""
    return Text("".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in text))
