"""``score-serve calibrate``: fits a calibration to labelled questions, asked of a running service."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer
from pydantic import ValidationError
from rich.console import Console
from rich.progress import track
from rich.table import Table

from serve_app.cli import questions
from serve_app.cli.client import REFUSED, Json, Url, asking, complain, warn
from serve_app.client import ScoreClient
from serve_app.errors import ScoringError
from serve_app.tasks.decisions import bodies
from serve_app.tasks.decisions.questions import as_text
from serve_app.tasks.systemone import (
    AnyAnswer,
    AnyQuestion,
    ChoiceQuestion,
    ErrorAnswer,
    NoulAnswer,
    NoulQuestion,
    SystemOneRequest,
)

if TYPE_CHECKING:
    from serve_app.jobs.calibration import Labelled, Measured

AT_ONCE = 16
"""States that are asked about at once: the service computes them together."""
SHOWN = 3
"""States without an answer whose reasons are printed."""


class _Row(NamedTuple):
    """A line of the file.

    Attributes:
        where: file and line, for errors.
        right: the number of the right option of each question that the line answers, by name.
    """

    where: str
    state: Any
    asked: Mapping[str, AnyQuestion]
    right: Mapping[str, int]


def calibrate(
    file: Annotated[
        Path,
        typer.Argument(
            metavar="LABELLED.jsonl",
            help='A JSON object a line: {"state": ..., "answers": {"late": true, "team": "billing", "anger": 2}}. '
            "A yes or no is true or false, a choice its option, and a score the number of its level, counted from 0. "
            'A line may have "questions" of its own.',
        ),
    ],
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            help="File to write, NAME.toml: answers will say NAME. NAME.png and NAME.svg are drawn beside it.",
        ),
    ],
    questions_file: Annotated[
        Path | None,
        typer.Option(
            "--questions", "-q", help="JSON file of questions by name, as 'score-serve decide --help' describes it."
        ),
    ] = None,
    permutations: Annotated[
        int, typer.Option(min=1, help="Ask with the options in this many orders; later requests should do the same.")
    ] = 1,
    model: Annotated[str, typer.Option(help="Served name of the model.")] = "default",
    url: Url = "http://127.0.0.1:8000",
    as_json: Json = False,
) -> None:
    """Fit how sure a model may be to questions whose answers you know, and write it for the setting "calibration".

    For example:
    score-serve calibrate labelled.jsonl --questions questions.json -o support-v1.toml

    A temperature is fitted for each type of question, and for each range of numbers of options with 50 labels or more;
    a yes or no gets a bias, too. The table compares probabilities before and after, on states that the fit has not seen
    (five-fold cross-validation). A type whose loss does not fall there is left as it is.
    Then serve with --calibration support-v1.toml.
    Exit codes: 0 written; 1 refused or failed; 2 wrong command;
    3 unreachable, overloaded or timed out, retry later.
    """
    drawings = [output.with_suffix(suffix) for suffix in (".png", ".svg")]
    if output.suffix != ".toml":
        raise typer.BadParameter(f"--output {output} must end in .toml")
    if taken := [each for each in (output, *drawings) if each.exists()]:
        raise typer.BadParameter(f"{taken[0]} exists, and answers may name it; choose a new name, such as NAME-v2.toml")
    if not output.absolute().parent.is_dir():
        raise typer.BadParameter(f"--output: there is no folder {output.absolute().parent}")
    if importlib.util.find_spec("matplotlib") is None:
        complain("this command draws with matplotlib; in a checkout run: pip install '.[calibrate]'")
        raise typer.Exit(REFUSED)
    # These take a second to import: --help and wrong commands come first.
    from serve_app.jobs import calibration, calibration_plot

    rows = list(_rows(file, {} if questions_file is None else questions.of_file(questions_file)))
    with asking(url, model) as client:
        info = client.info()
        labelled = list(_labelled(client, rows, permutations))
    try:
        measured = calibration.measure(labelled)
        fitted = calibration.fit(
            labelled, output.stem, info.model, info.decision_profile or "", permutations=permutations
        )
    except (ValueError, ValidationError) as error:
        complain(str(error))
        raise typer.Exit(REFUSED) from None
    useful = calibration.kept(fitted, measured)
    for type in [type for type, own in measured.items() if not own.helps]:
        warn(f"{type}: the loss on unseen states does not fall, so these answers stay as they are; label more")
    output.write_text(useful.as_toml(), "utf-8")
    calibration_plot.draw(measured, f"{info.model}, {useful.profile}: {file.name}", drawings)
    if as_json:
        both = {type: {"raw": asdict(own.raw), "calibrated": asdict(own.calibrated)} for type, own in measured.items()}
        typer.echo(json.dumps({"calibration": useful.model_dump(), "unseen": both}))
        return
    Console().print(_table(measured))
    typer.echo(f"written   {', '.join(map(str, (output, *drawings)))}")
    typer.echo(f"use it    score-serve serve --calibration {output}")


def _rows(file: Path, common: Mapping[str, Any]) -> Iterator[_Row]:
    """The lines of the file.

    Raises:
        typer.BadParameter: it cannot be read, or a line is wrong.
    """
    try:
        lines = file.read_bytes().split(b"\n")
    except OSError as error:
        raise typer.BadParameter(f"{file} cannot be read: {error.strerror}") from error
    for number, line in enumerate(lines, 1):
        if line.strip():
            yield _row(questions.json_of(line, f"{file}:{number}"), f"{file}:{number}", common)


def _row(line: Any, where: str, common: Mapping[str, Any]) -> _Row:
    if not isinstance(line, dict) or not isinstance(line.get("answers"), dict) or "state" not in line:
        raise typer.BadParameter(f'{where}: must be an object with "state" and "answers"')
    fields = {"state": line["state"], "questions": line.get("questions", common)}
    try:
        asked = SystemOneRequest.model_validate(fields).questions
    except ValidationError as error:
        raise typer.BadParameter(f"{where}: {bodies.invalid(error, fields).message}") from None
    right: dict[str, int] = {}
    for name, answer in line["answers"].items():
        if name not in asked:
            raise typer.BadParameter(f"{where}: there is no question {name!r}; give it in --questions or in the line")
        right[name] = _number(asked[name], answer, f"{where}: answers.{name}")
    if not right:
        raise typer.BadParameter(f"{where}: answers is empty; leave the line out")
    return _Row(where, line["state"], {name: asked[name] for name in right}, right)


def _number(question: AnyQuestion, answer: Any, where: str) -> int:
    """The number of the option that a label names."""
    if isinstance(question, NoulQuestion):
        options: Sequence[Any] = (False, True)
    elif isinstance(question, ChoiceQuestion):
        options = list(question.criteria)
    else:
        options = range(len(question.criteria))
    found = [number for number, option in enumerate(options) if option == answer and type(option) is type(answer)]
    if not found:
        expected = ", ".join(json.dumps(option, ensure_ascii=False) for option in options)
        raise typer.BadParameter(f"{where} is {json.dumps(answer, ensure_ascii=False)}; it must be one of {expected}")
    return found[0]


def _labelled(client: ScoreClient, rows: Sequence[_Row], permutations: int) -> Iterator[Labelled]:
    """Ask the questions of all rows. States without an answer are named on standard error.

    Raises:
        ScoringError: no row can be answered.
    """
    from serve_app.jobs.calibration import Labelled

    failed: list[tuple[_Row, ScoringError | str]] = []
    with ThreadPoolExecutor(AT_ONCE) as pool:
        answers = pool.map(partial(_asked, client, permutations), rows)
        shown = track(answers, "asking", total=len(rows), console=Console(stderr=True))
        for row, answered in zip(rows, shown, strict=True):
            if isinstance(answered, ScoringError):
                failed.append((row, answered))
                continue
            text = as_text(row.state)
            for name, answer in answered.items():
                if isinstance(answer, ErrorAnswer):
                    failed.append((row, f"{name}: {answer.x_error.message}"))
                else:
                    yield Labelled(answer.type, text, _raw(answer), row.right[name])
    for row, why in failed[:SHOWN]:
        warn(f"{row.where} has no answer: {why}")
    if len(failed) > SHOWN:
        warn(f"{len(failed) - SHOWN} more have none")
    if failed and isinstance(failed[0][1], ScoringError) and len(failed) == len(rows):
        raise failed[0][1]


def _asked(client: ScoreClient, permutations: int, row: _Row) -> Mapping[str, AnyAnswer] | ScoringError:
    try:
        return client.decide(row.state, row.asked, permutations=permutations, on_error="item").answers
    except ScoringError as error:
        return error


def _raw(answer: Any) -> Sequence[float]:
    """The probabilities of an answer's options before any calibration."""
    if answer.x_raw is not None:
        return answer.x_raw
    return (1 - answer.noul, answer.noul) if isinstance(answer, NoulAnswer) else list(answer.probabilities.values())


def _table(measured: Mapping[Any, Measured]) -> Table:
    table = Table(caption="calibrated: on states that the fit has not seen")
    for name in ("type", "labels", "", "accuracy", "ECE", "Brier", "log loss"):
        table.add_column(name, justify="right" if name else "left", no_wrap=True)
    for type, own in measured.items():
        for said, label, quality in ((type, f"{own.rows:,}", own.raw), ("", "", own.calibrated)):
            which = "raw" if said else "calibrated"
            table.add_row(said, label, which, *(f"{value:.3f}" for value in asdict(quality).values()))
    return table
