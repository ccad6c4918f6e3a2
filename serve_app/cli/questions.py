"""Questions as commands take them: a file of JSON, or single questions in options."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import typer

from serve_app.errors import InvalidRequestError
from serve_app.tasks.decisions import bodies


def of_file(path: Path) -> Mapping[str, Any]:
    """The questions of a file by name.

    Raises:
        typer.BadParameter: the file cannot be read, or it is not a JSON object.
    """
    try:
        found = json_of(path.read_bytes(), str(path))
    except OSError as error:
        raise typer.BadParameter(f"{path} cannot be read: {error.strerror}") from error
    if not isinstance(found, dict):
        raise typer.BadParameter(f"{path} must hold a JSON object of questions by name")
    return cast(Mapping[str, Any], found)


def json_of(content: bytes, where: str) -> Any:
    """The JSON value of what was read from ``where``.

    Raises:
        typer.BadParameter: it is not JSON, or an object in it has a name twice.
    """
    try:
        return bodies.loaded(content)
    except InvalidRequestError as error:
        raise typer.BadParameter(f"{where}: {error.message.replace('the body', 'it', 1)}") from error


def of_options(
    yes_no: Sequence[str], choice: str | None, options: Sequence[str], score: str | None, levels: Sequence[str]
) -> Mapping[str, Any]:
    """Questions whose names are their texts: a name never reaches the model.

    Raises:
        typer.BadParameter: options without a question, a question without options, or something is given twice.
    """
    if (choice is None) != (not options):
        raise typer.BadParameter("--choice needs an --option for each possible answer, and --option needs --choice")
    if (score is None) != (not levels):
        raise typer.BadParameter("--score needs a --level for each level, lowest first, and --level needs --score")
    texts = [*yes_no, *(text for text in (choice, score) if text is not None)]
    for given, kind in ((texts, "question"), (options, "option")):
        if twice := [each for each, count in Counter(given).items() if count > 1]:
            raise typer.BadParameter(f"the {kind} {twice[0]!r} is given twice")
    questions: dict[str, Any] = {text: {"type": "noul", "instructions": text} for text in yes_no}
    if choice is not None:
        questions[choice] = {"type": "choice", "instructions": choice, "criteria": dict.fromkeys(options)}
    if score is not None:
        questions[score] = {"type": "score", "instructions": score, "criteria": list(levels)}
    return questions
