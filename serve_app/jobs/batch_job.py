"""Runs a job on Ray Data, block by block, and resumes where it was stopped.

The job cuts its input into blocks, always the same for the same input. Ray Data distributes only the blocks' positions:
a worker reads the rows of a block, asks about them and writes them, and so never holds more than one block in memory.
"""

from __future__ import annotations

import logging
import math
import os
import tempfile
import time
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any, cast

from serve_app.errors import ScoringError
from serve_app.jobs.files import (
    Block,
    Format,
    JobError,
    Reader,
    Results,
    Rows,
    Source,
    inferred,
    plan,
    write,
    write_lines,
)
from serve_app.jobs.folder import Done, JobFolder, appearing
from serve_app.jobs.job import AnyJob, Values
from serve_app.jobs.progress import Progress, RowCount
from serve_app.jobs.row_template import RowTemplate
from serve_app.jobs.targets import App, Target
from serve_app.local_ray import join_ray, reason, start_ray

Tell = Callable[[int, int], object]
"""Called with a block's number and how many of its rows are done."""

_CAUSED = "\n\nThe above exception"
"""Ray Data writes this after the error, and its own comments after this."""


@dataclass(frozen=True)
class Summary:
    """A job's figures.

    Attributes:
        total: rows and tokens of all runs of the job.
        blocks: blocks of all runs.
        here: rows and tokens of this run.
        blocks_here: blocks of this run.
        seconds: duration of this run.
    """

    total: Done
    blocks: int
    here: Done
    blocks_here: int
    seconds: float

    def as_json(self) -> dict[str, Any]:
        """The contents of ``summary.json``; its rates are those of this run."""
        seconds = max(self.seconds, 1e-9)
        return {
            **asdict(self.total),
            "blocks": self.blocks,
            "seconds": round(self.seconds, 3),
            "rows_per_s": round((self.here.rows + self.here.bad) / seconds, 1),
            "tokens_per_s": round(self.here.prompt_tokens / seconds, 1),
        }


def run(job: AnyJob, target: Target, *, workers: int = 2, progress: Progress | None = None) -> Summary:
    """Do what is left of the job.

    Uses the Ray that this process is connected to. Without one it starts its own; a Serve application must be in the
    Ray of ``RAY_ADDRESS`` or of this machine.

    Raises:
        JobError: the input, the templates or the output cannot be used, or the service refuses every row.
        ScoringError: the service cannot be reached.
    """
    # Ray's workers have folders of their own.
    job = replace(job, inputs=tuple(path.absolute() for path in job.inputs), output=job.output.absolute())
    for path in job.inputs:
        if job.output.resolve().is_relative_to(path.resolve()):
            raise JobError(
                f"the output {job.output} is inside the input {path} and would be read as input; name another folder"
            )
    source = plan(job.inputs, job.block_rows)
    templates = _templates(job)
    format_ = job.output_format or source.format
    _check_columns(source.columns, source.format, templates, _added(job))
    schema = inferred(source) if format_ == "parquet" != source.format else None
    progress = progress or Progress()
    folder = JobFolder(job.output)
    with ExitStack() as stack:
        if isinstance(target, App):
            stack.enter_context(_ray(target, workers))
        done = stack.enter_context(folder.opened(_manifest(job, source, target)))
        left = [block for block in source.blocks if block.index not in done]
        before = sum(done.values(), Done())
        here, started = Done(), time.monotonic()
        if left:
            stack.enter_context(_ray(target, workers))
            reader = Reader(source.format, source.columns, fixed=format_ in ("csv", "parquet"), schema=schema)
            rows = SharedCount.started()
            total = sum(block.rows for block in source.blocks)
            with progress.of(total, before.rows + before.bad, rows.total):
                for one in _computed(left, (job, target, reader, format_, rows.tell), workers):
                    here += one
        seconds = time.monotonic() - started
        summary = Summary(before + here, len(source.blocks), here, len(left), seconds)
        folder.finish(summary.as_json())
    return summary


@dataclass(frozen=True)
class SharedCount:
    """The rows that are done, in an actor; pickled to the workers."""

    actor: Any

    @staticmethod
    def started() -> SharedCount:
        import ray

        return SharedCount(ray.remote(num_cpus=0)(RowCount).remote())

    def tell(self, block: int, rows: int) -> None:
        """Set the block's rows that are done, without waiting."""
        self.actor.set.remote(block, rows)

    def total(self) -> int:
        """The rows of all blocks."""
        import ray

        return ray.get(self.actor.total.remote())


def _computed(left: list[Block], worker: tuple[AnyJob, Target, Reader, Format, Tell], workers: int) -> Generator[Done]:
    """Yield each block's figures as it is finished."""
    import ray.data
    from ray.exceptions import RayError

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # the exception says what failed
    places = ray.data.from_items([asdict(block) for block in left], override_num_blocks=len(left))
    pool = ray.data.ActorPoolStrategy(size=min(workers, len(left)))
    scored = places.map(cast(Any, Worker), fn_constructor_args=worker, compute=pool, **worker[1].resources)
    try:
        for row in scored.iter_rows():
            if stop := row.pop("stop"):
                raise JobError(stop)
            yield Done(**row)
    except RayError as error:
        raise JobError(f"a worker failed: {reason(str(error).split(_CAUSED)[0])}") from error


class Worker:
    """Does one block after another, in an actor of Ray Data.

    Args:
        format_: the output's format.
        tell: hears of a block's rows that are done.
    """

    def __init__(
        self, job: AnyJob, target: Target, reader: Reader, format_: Format, tell: Tell = lambda *_: None
    ) -> None:
        self._job = job
        self._templates = _templates(job)
        self._reader = reader
        self._format: Format = format_
        self._folder = JobFolder(job.output)
        self._tell = tell
        self._ask = job.connect(target)

    def __call__(self, place: dict[str, Any]) -> dict[str, Any]:
        """Read, ask about and write a block. In the result ``stop`` says why the whole job must end, if it must."""
        block = Block(**place)
        try:
            return {**asdict(self._do(block)), "stop": ""}
        except (ScoringError, OSError) as error:
            return {**asdict(Done()), "stop": str(error)}

    def _do(self, block: Block) -> Done:
        rows = self._reader.read(block)
        asked: list[tuple[int, list[str]]] = []
        for at, values in enumerate(rows.values):
            if at not in rows.problems:
                try:
                    asked.append((at, [template.fill(values) for template in self._templates]))
                except ValueError as error:
                    rows.problems[at] = str(error)
        told = len(rows.problems)

        def tell(more: int) -> None:
            nonlocal told
            told += more
            self._tell(block.index, told)

        tell(0)
        found, cost = self._ask(asked, tell)
        rows.problems |= {at: one for at, one in found.items() if isinstance(one, str)}
        kept = [at for at in range(len(rows.values)) if at not in rows.problems]
        self._write(block, rows, kept, [cast(Values, found[at]) for at in kept])
        done = Done(len(kept), len(rows.problems), cost.prompt_tokens, cost.cached_tokens)
        self._folder.finish_block(block.index, done)
        return done

    def _write(self, block: Block, rows: Rows, kept: list[int], answers: list[Values]) -> None:
        bad = [
            {
                "file": block.path,
                "row": rows.numbers[at],
                "reason": reason,
                **({"text": rows.texts[at]} if at in rows.texts else {"values": rows.values[at]}),
            }
            for at, reason in sorted(rows.problems.items())
        ]
        if bad:
            with appearing(self._folder.bad(block.index)) as path:
                write_lines(path, bad)
        else:
            self._folder.bad(block.index).unlink(missing_ok=True)
        columns = self._job.columns(answers)
        results: Results = {name: [answer[name] for answer in answers] for name in columns}
        with appearing(self._folder.part(block.index, self._format)) as path:
            write(path, self._format, rows, kept, results, columns)


def _templates(job: AnyJob) -> list[RowTemplate]:
    try:
        return [RowTemplate(text) for text in job.templates.values()]
    except ValueError as error:
        raise JobError(str(error)) from None


def _added(job: AnyJob) -> Iterable[str]:
    try:
        return job.columns()
    except ValueError as error:
        raise JobError(str(error)) from None


def _check_columns(
    columns: Sequence[str], source: Format, templates: Sequence[RowTemplate], added: Iterable[str]
) -> None:
    for template in templates:
        for name in template.columns:
            if name not in columns:
                among = " of the first rows" if source == "jsonl" else ""
                raise JobError(
                    f"{template.text!r} names {name!r}, which is not a column; the columns{among} are "
                    f"{', '.join(columns)}"
                )
    if not any(template.columns for template in templates):
        raise JobError(
            f"{'neither template names' if len(templates) > 1 else 'the template does not name'} a column, so all rows "
            "would have the same prompt; write {column} for its value"
        )
    for name in added:
        if name in columns:
            raise JobError(f"the input has a column {name!r}, which is the name of an output column; rename it")


def _manifest(job: AnyJob, source: Source, target: Target) -> dict[str, Any]:
    """Everything that the output depends on, for ``job.json``."""
    return {
        "files": [[str(path), path.stat().st_size, path.stat().st_mtime_ns] for path in source.files],
        **job.templates,
        **job.settings(),
        "output_format": job.output_format,
        "block_rows": job.block_rows,
        "model": target.identity(job.model, *job.facts),
    }


@contextmanager
def _ray(target: Target, workers: int) -> Generator[None]:
    """Have Ray running inside the ``with`` block."""
    # Ray Data's own way of making workers is an "error" in Ray's log on standard error.
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    import ray

    if ray.is_initialized():
        yield
        return
    with _without_notice():
        if isinstance(target, App):
            logging.getLogger("ray.serve").setLevel(logging.WARNING)
            try:
                join_ray(log_to_driver=False, logging_level=logging.ERROR)
            except ConnectionError as error:
                raise JobError(
                    f"cannot connect to a Ray cluster: {error}; set RAY_ADDRESS, start 'score-serve serve' on this "
                    "machine, or use --url"
                ) from error
        else:
            needed = workers * target.resources.get("num_cpus", 1)
            start_ray(max(os.cpu_count() or 1, math.ceil(needed)))
    try:
        yield
    finally:
        ray.shutdown()  # pyright: ignore[reportUnknownMemberType]


@contextmanager
def _without_notice() -> Generator[None]:
    """Leave out of standard error the line with which Ray says that it has read its log level."""
    with tempfile.TemporaryFile() as said:
        own = os.dup(2)
        os.dup2(said.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(own, 2)
            os.close(own)
            said.seek(0)
            os.write(2, b"".join(line for line in said if b"RAY_BACKEND_LOG_LEVEL" not in line))
