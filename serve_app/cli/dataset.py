"""``score-serve dataset``: scores all rows of a data set, or decides questions about them, into files."""

import importlib.util
import json
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

import typer
from pydantic import ValidationError
from rich.console import Console

from serve_app.cli import questions
from serve_app.cli.client import REFUSED, TRY_AGAIN, api_key, checked_url, complain, faults
from serve_app.errors import DeadlineExceededError, OverloadedError, ScoringError
from serve_app.schemas import ScoreRequest, invalid
from serve_app.settings import ModelSettings
from serve_app.tasks.decisions import bodies
from serve_app.tasks.logprobs import LogprobsRequest
from serve_app.tasks.systemone import SystemOneRequest

if TYPE_CHECKING:
    from serve_app.jobs.batch_job import Summary
    from serve_app.jobs.job import AnyJob
    from serve_app.jobs.targets import Target

Dtype = Literal["float32", "bfloat16"]
BY_DEVICE = "float32 on a CPU, bfloat16 on a TPU or GPU"
"""The default dtype, in words."""
Engine = Literal["jax", "fake"]

_URL = "http://127.0.0.1:8000"
_SCORES: dict[str, Any] = {"rich_help_panel": "Scores of labels for each row"}
_DECISIONS: dict[str, Any] = {"rich_help_panel": "Or answers to questions for each row"}
_LOGPROBS: dict[str, Any] = {"rich_help_panel": "Or a teacher's logprobs for each row"}
_SCORER: dict[str, Any] = {"rich_help_panel": "What scores (one of --url, --app and --model)"}
_MODEL: dict[str, Any] = {"rich_help_panel": "With --model"}


@dataclass(frozen=True, kw_only=True)
class Options:
    """The command's arguments and options, in the order of its help."""

    inputs: Annotated[
        list[Path],
        typer.Argument(
            metavar="INPUTS", help="Files of one format (.parquet, .jsonl, .ndjson, .csv), or folders of them."
        ),
    ]
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder for the output: a new one, or this job's own, to resume it.")
    ]
    item: Annotated[
        str | None,
        typer.Option(
            help="Template of each row's item: {column} is the column's value, {{ and }} are braces.", **_SCORES
        ),
    ] = None
    query: Annotated[
        str, typer.Option(help="Template of each row's query. A query that rows share is computed once.", **_SCORES)
    ] = ""
    state: Annotated[
        str | None, typer.Option(help="Template of each row's state, like --item: '{text}'.", **_DECISIONS)
    ] = None
    questions: Annotated[
        Path | None,
        typer.Option(help="JSON file of questions by name, as 'score-serve decide --help' describes it.", **_DECISIONS),
    ] = None
    permutations: Annotated[
        int, typer.Option(min=1, help="Ask with the options in this many orders, and average.", **_DECISIONS)
    ] = 1
    logprobs: Annotated[
        str | None,
        typer.Option(
            metavar="own|top-K",
            help="Write the logprob of every token of the row's --item, and with top-64 those of the 64 most probable "
            "tokens in its place.",
            **_LOGPROBS,
        ),
    ] = None
    workers: Annotated[
        int | None,
        typer.Option(min=1, help="Blocks scored at once; with --model, engines.", show_default="2; with --model 1"),
    ] = None
    format: Annotated[
        Literal["parquet", "jsonl", "csv"] | None,
        typer.Option(help="Format of the output.", show_default="the input's"),
    ] = None
    block_rows: Annotated[int, typer.Option(min=1, help="Rows scored and written together.")] = 1_000

    labels: Annotated[
        list[str] | None,
        typer.Option("--label", "-l", help="A label, with the space before it: ' yes'. Repeatable.", **_SCORES),
    ] = None
    label_token_ids: Annotated[
        list[int] | None,
        typer.Option("--label-id", help="A label as a token id, instead of --label. Repeatable.", **_SCORES),
    ] = None
    apply_softmax: Annotated[
        bool, typer.Option("--softmax", help="Compare the labels only with each other.", **_SCORES)
    ] = False
    temperature: Annotated[float, typer.Option(help="Temperature of the softmax.", **_SCORES)] = 1.0
    item_first: Annotated[
        bool, typer.Option("--item-first", help="Item + query instead of query + item.", **_SCORES)
    ] = False
    length_normalize: Annotated[
        bool,
        typer.Option(
            "--length-normalize",
            help="For labels of several tokens: the mean of their logprobs, not the sum.",
            **_SCORES,
        ),
    ] = False
    no_special_tokens: Annotated[
        bool, typer.Option("--no-special-tokens", help="Add no special tokens, such as BOS.", **_SCORES)
    ] = False
    return_token_logprobs: Annotated[
        bool, typer.Option("--token-logprobs", help="Also write the labels' logprobs.", **_SCORES)
    ] = False
    return_label_mass: Annotated[
        bool, typer.Option("--label-mass", help="Also write the labels' total probability.", **_SCORES)
    ] = False
    truncate: Annotated[
        Literal["error", "item"],
        typer.Option(help="'item': shorten items that are too long, and write how many tokens they lost.", **_SCORES),
    ] = "error"

    url: Annotated[str | None, typer.Option(help="A running service.", show_default=_URL, **_SCORER)] = None
    app: Annotated[
        str | None,
        typer.Option(
            help="A Serve application in the Ray cluster of RAY_ADDRESS or of this machine, called by its handle.",
            **_SCORER,
        ),
    ] = None
    model: Annotated[
        str | None,
        typer.Option(
            help="No service: each worker loads this model. 'demo', a folder, a hub id or a .gguf file.", **_SCORER
        ),
    ] = None
    served_model: Annotated[str, typer.Option(help="With --url or --app: the served name of the model.", **_SCORER)] = (
        "default"
    )
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub id.", **_MODEL)] = None
    base: Annotated[
        str | None,
        typer.Option(
            help="The model that a LoRA adapter is merged onto.", show_default="the one that it names", **_MODEL
        ),
    ] = None
    trust_config: Annotated[
        list[str] | None,
        typer.Option(
            help="Key of config.json to skip although it is unknown; if it matters, all scores are wrong. Repeatable.",
            show_default="none",
            **_MODEL,
        ),
    ] = None
    dtype: Annotated[Dtype | None, typer.Option(help="Type of the weights.", show_default=BY_DEVICE, **_MODEL)] = None
    int8: Annotated[bool, typer.Option("--int8", help="Keep the layers' weights as int8.", **_MODEL)] = False
    calibration: Annotated[
        Path | None,
        typer.Option(help="File that 'score-serve calibrate' wrote, for the answers to --questions.", **_MODEL),
    ] = None
    engine: Annotated[Engine, typer.Option(help="'fake' is for tests.", hidden=True, **_MODEL)] = "jax"

    def request(self) -> ScoreRequest | SystemOneRequest | LogprobsRequest:
        """The request for each row.

        Raises:
            typer.BadParameter: two options contradict each other, or a value is out of range.
        """
        if sum(scorer is not None for scorer in (self.url, self.app, self.model)) > 1:
            raise typer.BadParameter("name one of --url, --app and --model")
        of_model = ("revision", "base", "trust_config", "dtype", "int8", "calibration")
        if self.model is None and (given := [name for name in of_model if getattr(self, name)]):
            option = given[0].replace("_", "-")
            raise typer.BadParameter(f"--{option} goes with --model; a running service has its own settings")
        if self.model is not None and self.served_model != "default":
            raise typer.BadParameter("--served-model goes with --url or --app; leave it out with --model")
        if self.logprobs is not None:
            return self._teaching(self.logprobs)
        scores, decisions = self._scores(), self._decisions()
        if decisions is None:
            if self.item is None or self.state is not None or self.permutations != 1:
                raise typer.BadParameter(
                    "name --item for scores of labels or for --logprobs, or --state and --questions for decisions"
                )
            return scores
        if self.state is None:
            raise typer.BadParameter("--questions needs --state, such as --state '{text}'")
        if self.item is not None or self.query or scores != ScoreRequest(items=[], model=scores.model):
            raise typer.BadParameter("--questions goes with none of the options for scores of labels")
        return decisions

    def _scores(self) -> ScoreRequest:
        if self.labels and self.label_token_ids:
            raise typer.BadParameter("name labels either by --label or by --label-id")
        try:
            return ScoreRequest(
                items=[],
                labels=self.labels or None,
                label_token_ids=self.label_token_ids or None,
                apply_softmax=self.apply_softmax,
                temperature=self.temperature,
                item_first=self.item_first,
                length_normalize=self.length_normalize,
                add_special_tokens=not self.no_special_tokens,
                return_token_logprobs=self.return_token_logprobs,
                return_label_mass=self.return_label_mass,
                truncate=self.truncate,
                model=self._served,
            )
        except ValidationError as error:
            raise typer.BadParameter(invalid(error, ScoreRequest).message) from None

    def _teaching(self, asked: str) -> LogprobsRequest:
        kind, _, count = asked.partition("-")
        if not (asked == "own" or (kind == "top" and count.isdecimal())):
            raise typer.BadParameter(
                f"--logprobs is {asked!r}; name 'own', or 'top-64' for the 64 most probable tokens"
            )
        if self.item is None:
            raise typer.BadParameter("--logprobs needs --item, such as --item '{text}'")
        known = ScoreRequest(
            items=[],
            temperature=self.temperature,
            add_special_tokens=not self.no_special_tokens,
            model=self._served,
        )
        if self.state is not None or self.questions is not None or self.query or self._scores() != known:
            raise typer.BadParameter("--logprobs goes with --item, --temperature and --no-special-tokens alone")
        try:
            return LogprobsRequest(
                input="",
                top=int(count or 0),
                temperature=self.temperature,
                add_special_tokens=not self.no_special_tokens,
                model=self._served,
            )
        except ValidationError as error:
            raise typer.BadParameter(invalid(error, LogprobsRequest).message) from None

    def _decisions(self) -> SystemOneRequest | None:
        if self.questions is None:
            return None
        fields = {
            "state": "",
            "questions": questions.of_file(self.questions),
            "permutations": self.permutations,
            "model": self._served,
        }
        try:
            return SystemOneRequest.model_validate(fields)
        except ValidationError as error:
            raise typer.BadParameter(f"{self.questions}: {bodies.invalid(error, fields).message}") from None

    @property
    def _served(self) -> str:
        return "default" if self.model else self.served_model

    def job(self, request: ScoreRequest | SystemOneRequest | LogprobsRequest) -> "AnyJob":
        """What is to be done."""
        from serve_app.jobs.job import DecisionJob, Job, LogprobsJob

        inputs, output = tuple(self.inputs), self.output
        more: dict[str, Any] = {"output_format": self.format, "block_rows": self.block_rows}
        if isinstance(request, SystemOneRequest):
            return DecisionJob(inputs, output, cast(str, self.state), request, **more)
        if isinstance(request, LogprobsRequest):
            return LogprobsJob(inputs, output, cast(str, self.item), request, **more)
        return Job(inputs, output, cast(str, self.item), request, self.query, **more)

    def target(self) -> "Target":
        """What scores. Fetches the model of ``--model``, once for all workers."""
        from serve_app.jobs import targets
        from serve_app.model_source import absolute, resolve

        if self.app is not None:
            return targets.App(self.app)
        if self.model is None:
            return targets.Service(checked_url(self.url or _URL), api_key())
        base = self.base and absolute(self.base)
        resolve(self.model, self.revision, base, say=lambda line: Console(stderr=True).print(line))
        settings = {
            "model": absolute(self.model),
            "revision": self.revision,
            "base": base,
            "trust_config": self.trust_config or (),
            "dtype": self.dtype,
            "quantization": "int8" if self.int8 else None,
            "calibration": None if self.calibration is None else str(self.calibration),
            "engine": self.engine,
        }
        return targets.Engines(ModelSettings.model_validate(settings))


@wraps(Options, assigned=(), updated=())  # Typer reads the dataclass's fields as the command's parameters
def dataset(**given: Any) -> None:
    """Score every row of a data set, or decide questions about it; a job that was stopped resumes.

    For example:
    score-serve dataset reviews.parquet -o scored --item 'Review: {text}' --query 'Sentiment:' --item-first
    -l ' positive' -l ' negative' --softmax

    score-serve dataset tickets.parquet -o decided --state '{text}' --questions questions.json

    score-serve dataset rollouts.parquet -o teacher --item '{text}' --logprobs top-64

    The output has the input's columns, and after them "scores", the answers or the logprobs. Rows without an answer
    are in OUTPUT/bad, with the reason.
    After a kill the same command does what is left. An API key is read from SCORE_SERVE_API_KEY.
    Exit codes: 0 done; 1 failed, or no row could be scored; 2 wrong command;
    3 unreachable, overloaded or timed out, retry later to resume; 130 stopped by Ctrl-C.
    """
    options = Options(**given)
    request = options.request()
    if importlib.util.find_spec("pyarrow") is None:
        complain("this command needs Ray Data and pyarrow; in a checkout run: pip install '.[data]'")
        raise typer.Exit(REFUSED)
    # Ray takes seconds to import: --help and wrong commands come first.
    from serve_app.cli import launcher
    from serve_app.jobs import batch_job

    launcher.interrupt_on_signals()
    with _errors_as_exit_codes(options.output):
        workers = options.workers or (1 if options.model else 2)
        summary = batch_job.run(options.job(request), options.target(), workers=workers)
    _report(summary, options.output)


@contextmanager
def _errors_as_exit_codes(output: Path) -> Generator[None]:
    """Turn what ends a job into a line on standard error and an exit code."""
    from serve_app.jobs.files import JobError
    from serve_app.model_source import ModelSourceError

    try:
        yield
    except KeyboardInterrupt:
        complain(f"stopped; run the same command again to resume with what is left in {output}")
        raise typer.Exit(130) from None
    except (OverloadedError, DeadlineExceededError) as error:
        complain(error.message)
        raise typer.Exit(TRY_AGAIN) from None
    except ValidationError as error:  # of the model's settings
        complain(faults(error))
        raise typer.Exit(REFUSED) from None
    except (JobError, ModelSourceError, ScoringError) as error:
        complain(str(error))
        raise typer.Exit(REFUSED) from None


def _report(summary: "Summary", output: Path) -> None:
    """Print the job's figures on standard output."""
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
