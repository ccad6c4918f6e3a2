"""``score-serve decide``: typed questions about a state, asked of a running service."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from serve_app.cli import questions
from serve_app.cli.client import LOW_MASS, REFUSED, Json, Url, asking, complain, printable, warn
from serve_app.tasks.systemone import AnyAnswer, ErrorAnswer, NoulAnswer, SystemOneResponse

SHOWN = 5
"""Options shown in the table, the most probable first; --json has all."""

_QUESTIONS: dict[str, Any] = {"rich_help_panel": "Questions: a file, options, or both"}


def decide(
    state: Annotated[
        str | None, typer.Argument(help="What the questions are about. Without it, standard input is read.")
    ] = None,
    state_file: Annotated[
        typer.FileText | None, typer.Option("--state", encoding="utf-8", help="File with the state; - for stdin.")
    ] = None,
    json_state: Annotated[
        bool, typer.Option("--json-state", help="The state is a JSON object or list, not text.")
    ] = False,
    questions_file: Annotated[
        Path | None,
        typer.Option(
            "--questions",
            "-q",
            help='JSON file of questions by name: {"team": {"type": "choice", "instructions": "Which team?", '
            '"criteria": {"billing": null, "shipping": "parcels"}}}. The types are noul (yes or no), choice and score.',
            **_QUESTIONS,
        ),
    ] = None,
    yes_no: Annotated[
        list[str] | None, typer.Option(help="A question whose answer is yes or no. Repeatable.", **_QUESTIONS)
    ] = None,
    choice: Annotated[
        str | None, typer.Option(help="A question whose answer is one --option of several.", **_QUESTIONS)
    ] = None,
    option: Annotated[
        list[str] | None, typer.Option("--option", "-o", help="An answer to --choice. Repeatable.", **_QUESTIONS)
    ] = None,
    score: Annotated[
        str | None, typer.Option(help="A question whose answer is a --level of a scale.", **_QUESTIONS)
    ] = None,
    level: Annotated[
        list[str] | None,
        typer.Option("--level", "-l", help="What a level of --score means, lowest first. Repeatable.", **_QUESTIONS),
    ] = None,
    permutations: Annotated[
        int, typer.Option(min=1, help="Ask with the options in this many orders, and average.")
    ] = 1,
    model: Annotated[str, typer.Option(help="Served name of the model.")] = "default",
    url: Url = "http://127.0.0.1:8000",
    as_json: Json = False,
) -> None:
    """Decide typed questions about a state with a running service: a probability for each possible answer.

    For example:
    score-serve decide 'My parcel is lost!' --yes-no 'Is it urgent?' --choice 'Which team?' -o Billing -o Shipping

    A warning on standard error names the questions to which the model would rather give another answer.
    An API key is read from SCORE_SERVE_API_KEY.
    Exit codes: 0 decided; 1 refused or failed, or a question has no answer; 2 wrong command;
    3 unreachable, overloaded or timed out, retry later.
    """
    asked = {} if questions_file is None else dict(questions.of_file(questions_file))
    for name, question in questions.of_options(yes_no or [], choice, option or [], score, level or []).items():
        if name in asked:
            raise typer.BadParameter(f"{questions_file} has a question called {name!r}, too")
        asked[name] = question
    if not asked:
        raise typer.BadParameter("there is no question; use --questions, --yes-no, --choice or --score")
    about = _state(state, state_file, as_json=json_state)
    with asking(url, model) as client:
        answer = client.decide(about, asked, permutations=permutations, on_error="item")
    if as_json:
        sys.stdout.write(answer.model_dump_json(exclude_none=True) + "\n")
    else:
        Console().print(_table(asked, answer))
    _warn_of_low_mass(answer)
    failed = {name: each for name, each in answer.answers.items() if isinstance(each, ErrorAnswer)}
    for name, each in failed.items():
        complain(f"{name}: {each.x_error.message}")
    if failed:
        raise typer.Exit(REFUSED)


def _state(argument: str | None, file: typer.FileText | None, *, as_json: bool) -> Any:
    if argument is not None and file is not None:
        raise typer.BadParameter("give the state as an argument or with --state, not both")
    if argument is None and file is None and sys.stdin.isatty():
        raise typer.BadParameter(
            "there is no state; give it as an argument, as a file with --state, or on standard input"
        )
    try:
        text = argument if argument is not None else (file or sys.stdin).read()
    except UnicodeDecodeError as error:
        raise typer.BadParameter(f"the state is not UTF-8: {error}; convert it to UTF-8") from error
    return questions.json_of(text.encode(errors="replace"), "--json-state") if as_json else text


def _warn_of_low_mass(answer: SystemOneResponse) -> None:
    """Warn on standard error of questions whose possible answers are together improbable."""
    masses = {name: each.x_label_mass for name, each in answer.answers.items() if not isinstance(each, ErrorAnswer)}
    low = {name: mass for name, mass in masses.items() if mass is not None and mass < LOW_MASS}
    if low:
        named = ", ".join(f"{name} ({100 * mass:.2g}%)" for name, mass in low.items())
        warn(
            f"the possible answers together hold under {LOW_MASS:.0%} of the model's probability: {named}. The model "
            "would say something else, and these numbers compare improbable words. Try other words for the question or "
            "its options, or another model."
        )


def _table(asked: Mapping[str, Any], answer: SystemOneResponse) -> Table:
    table = Table(caption=f"{answer.usage.input_tokens:,} prompt tokens, {answer.x_cached_tokens:,} cached")
    table.add_column("question", overflow="fold")
    table.add_column("answer", overflow="fold")
    table.add_column("confidence", justify="right", no_wrap=True)
    table.add_column("probabilities", overflow="fold")
    for name in asked:
        own = answer.answers[name]
        table.add_row(printable(name), *map(printable, _cells(own)))
    return table


def _cells(answer: AnyAnswer) -> tuple[str, str, str]:
    """The answer, its confidence and its probabilities."""
    if isinstance(answer, ErrorAnswer):
        return "none", "", answer.x_error.message
    if isinstance(answer, NoulAnswer):
        return f"{answer.noul:.4f}", "", f"yes {answer.noul:.4f}, no {1 - answer.noul:.4f}"
    found = answer.choice if answer.type == "choice" else f"{answer.score:.4f}"
    likeliest = sorted(answer.probabilities.items(), key=lambda pair: -pair[1])
    more = len(likeliest) - SHOWN
    shown = [f"{option} {p:.4f}" for option, p in likeliest[:SHOWN]] + ([f"{more} more"] if more > 0 else [])
    return found, f"{answer.confidence:.4f}", ", ".join(shown)
