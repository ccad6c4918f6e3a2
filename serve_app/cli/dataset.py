"""``score-serve dataset``: all rows of a data set, scored into files."""

from __future__ import annotations

import importlib.util
import json
import os
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from pydantic import ValidationError
from rich.console import Console

from serve_app.cli.client import REFUSED, TRY_AGAIN, checked_url, complain
from serve_app.errors import DeadlineExceededError, InvalidRequestError, OverloadedError, ScoringError
from serve_app.frontend import auth
from serve_app.schemas import ScoreRequest, invalid
from serve_app.settings import ModelSettings

if TYPE_CHECKING:
    from serve_app.jobs.batch_job import Summary


class Format(StrEnum):
    parquet = "parquet"
    jsonl = "jsonl"
    csv = "csv"


class Truncate(StrEnum):
    error = "error"
    item = "item"


class Dtype(StrEnum):
    float32 = "float32"
    bfloat16 = "bfloat16"


class Engine(StrEnum):
    jax = "jax"
    fake = "fake"


_WHERE = "What scores (one of these)"
_ASKED = "What is asked of each row"


def dataset(
    inputs: Annotated[
        list[Path], typer.Argument(help="Files of one format (.parquet, .jsonl, .ndjson, .csv), or folders of them.")
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder for the parts: new, or that of this job's earlier run.")
    ],
    item: Annotated[
        str,
        typer.Option(help="Text of each row's item, with {column} for the column's value; {{ and }} are braces."),
    ],
    query: Annotated[str, typer.Option(help="Text of each row's query, likewise. Rows that share it are cheap.")] = "",
    label: Annotated[
        list[str] | None,
        typer.Option(
            "--label", "-l", help="A label, and the space before it: ' yes'. Repeatable.", rich_help_panel=_ASKED
        ),
    ] = None,
    label_id: Annotated[
        list[int] | None, typer.Option(help="A label as a token id. Repeatable.", rich_help_panel=_ASKED)
    ] = None,
    softmax: Annotated[
        bool, typer.Option("--softmax", help="Compare the labels with each other only.", rich_help_panel=_ASKED)
    ] = False,
    temperature: Annotated[
        float, typer.Option(help="Of the softmax.", rich_help_panel=_ASKED, show_default=False)
    ] = 1.0,
    item_first: Annotated[
        bool, typer.Option("--item-first", help="Item + query instead of query + item.", rich_help_panel=_ASKED)
    ] = False,
    length_normalize: Annotated[
        bool,
        typer.Option("--length-normalize", help="Labels of several tokens: the mean.", rich_help_panel=_ASKED),
    ] = False,
    no_special_tokens: Annotated[
        bool, typer.Option("--no-special-tokens", help="Add no BOS and the like.", rich_help_panel=_ASKED)
    ] = False,
    token_logprobs: Annotated[
        bool, typer.Option("--token-logprobs", help="Also write the labels' logprobs.", rich_help_panel=_ASKED)
    ] = False,
    label_mass: Annotated[
        bool, typer.Option("--label-mass", help="Also write how likely any label is.", rich_help_panel=_ASKED)
    ] = False,
    truncate: Annotated[
        Truncate,
        typer.Option(help="'item': shorten items that are too long, and write by how much.", rich_help_panel=_ASKED),
    ] = Truncate.error,
    url: Annotated[
        str | None,
        typer.Option(help="A running service.", show_default="http://127.0.0.1:8000", rich_help_panel=_WHERE),
    ] = None,
    app: Annotated[
        str | None,
        typer.Option(
            help="A Serve application, by handle, in the Ray cluster of RAY_ADDRESS or of this machine.",
            rich_help_panel=_WHERE,
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="Without a service: an engine of this model in each worker; 'demo', a folder, a hub id, a .gguf file.",
            rich_help_panel=_WHERE,
        ),
    ] = None,
    served_model: Annotated[
        str, typer.Option(help="With --url or --app: the served name.", rich_help_panel=_WHERE)
    ] = "default",
    dtype: Annotated[Dtype, typer.Option(help="With --model: of the weights.", rich_help_panel=_WHERE)] = Dtype.float32,
    int8: Annotated[
        bool, typer.Option("--int8", help="With --model: the layers' weights as int8.", rich_help_panel=_WHERE)
    ] = False,
    engine: Annotated[
        Engine, typer.Option(help="With --model: 'fake' is for tests.", rich_help_panel=_WHERE, hidden=True)
    ] = Engine.jax,
    workers: Annotated[
        int | None,
        typer.Option(min=1, help="Blocks at a time; with --model, engines.", show_default="2; with --model 1"),
    ] = None,
    output_format: Annotated[
        Format | None, typer.Option("--format", help="Of the output.", show_default="the input's")
    ] = None,
    block_rows: Annotated[int, typer.Option(min=1, help="Rows that are scored and written together.")] = 1_000,
) -> None:
    """Score every row of a data set, and go on where it was stopped.

    For example:
    score-serve dataset reviews.parquet -o scored --item 'Review: {text}' --query 'Sentiment:' --item-first
    -l ' positive' -l ' negative' --softmax

    The output has the input's columns and "scores"; rows that cannot be scored are in OUTPUT/bad, with the reason.
    Run the same command again after a kill, and it does what is left. An API key is taken from SCORE_SERVE_API_KEY.
    Exit codes: 0 done; 1 it cannot be done, or no row could be scored; 2 the command is wrong;
    3 the service is not there, full or too slow: a later try goes on; 130 stopped by Ctrl-C.
    """
    if label and label_id:
        raise typer.BadParameter("name labels either by --label or by --label-id")
    if sum(where is not None for where in (url, app, model)) > 1:
        raise typer.BadParameter("name one of --url, --app and --model")
    if importlib.util.find_spec("pyarrow") is None:
        complain("this needs Ray Data and pyarrow; run: pip install 'score-serve[data]'")
        raise typer.Exit(REFUSED)
    try:
        request = ScoreRequest(
            items=[],
            labels=label or None,
            label_token_ids=label_id or None,
            apply_softmax=softmax,
            temperature=temperature,
            item_first=item_first,
            length_normalize=length_normalize,
            add_special_tokens=not no_special_tokens,
            return_token_logprobs=token_logprobs,
            return_label_mass=label_mass,
            truncate=truncate.value,
            model="default" if model else served_model,
        )
    except ValidationError as error:
        raise typer.BadParameter(invalid(error, ScoreRequest).message) from None
    # Ray takes seconds to import: --help and wrong commands come before it.
    from serve_app.cli import launcher
    from serve_app.jobs import batch_job, targets
    from serve_app.jobs.files import JobError
    from serve_app.model_source import ModelSourceError, resolve

    launcher.interrupt_on_signals()
    job = batch_job.Job(
        inputs=tuple(inputs),
        output=output.absolute(),
        item=item,
        request=request,
        query=query,
        output_format=None if output_format is None else output_format.value,
        block_rows=block_rows,
    )
    try:
        if model is not None:
            resolve(model, say=lambda line: Console(stderr=True).print(line))  # once, before the workers ask for it
            settings = ModelSettings(
                model=model, dtype=dtype.value, quantization="int8" if int8 else None, engine=engine.value
            )
            target: targets.Target = targets.Engines(settings)
        elif app is not None:
            target = targets.App(app)
        else:
            key = os.environ.get(auth.VARIABLE, "").split(",")[0].strip()
            target = targets.Service(checked_url(url or "http://127.0.0.1:8000"), key or None)
        summary = batch_job.run(job, target, workers=workers or (1 if model else 2))
    except KeyboardInterrupt:
        complain(f"stopped; the same command goes on with what is left in {output}")
        raise typer.Exit(130) from None
    except (OverloadedError, DeadlineExceededError) as error:
        complain(error.message)
        raise typer.Exit(TRY_AGAIN) from None
    except (JobError, ModelSourceError, InvalidRequestError, ScoringError) as error:
        complain(str(error))
        raise typer.Exit(REFUSED) from None
    _report(summary, output)


def _report(summary: Summary, output: Path) -> None:
    """The figures, on standard output."""
    total, figures = summary.total, summary.as_json()
    share = total.cached_tokens / total.prompt_tokens if total.prompt_tokens else 0.0
    lines = [
        f"rows      {total.rows:,} scored, {total.bad:,} set aside",
        f"tokens    {total.prompt_tokens:,}, of which {total.cached_tokens:,} ({share:.0%}) were cached",
    ]
    if summary.blocks_here:
        now = f"{summary.seconds:,.1f} s"
        lines.append(f"this run  {now}: {figures['rows_per_s']:,.0f} rows/s, {figures['tokens_per_s']:,.0f} tokens/s")
    else:
        lines.append("this run  nothing was left to do")
    lines.append(f"output    {output}" + (f"; why rows were set aside: {output / 'bad'}" if total.bad else ""))
    typer.echo("\n".join(lines))
    if total.bad and not total.rows:
        first = json.loads(next(iter(sorted((output / "bad").iterdir()))).read_text().splitlines()[0])
        complain(f"no row could be scored; the first: {first['reason']}")
        raise typer.Exit(REFUSED)
