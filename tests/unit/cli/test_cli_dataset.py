"""``score-serve dataset``: the job that the options make."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from serve_app.cli import launcher, main
from serve_app.jobs import batch_job
from serve_app.jobs.batch_job import Job
from serve_app.jobs.folder import Done
from serve_app.jobs.targets import App, Service, Target
from serve_app.schemas import ScoreRequest


@pytest.fixture
def jobs(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Job, Target, int]]:
    """The jobs that the command would run; none is run."""
    got: list[tuple[Job, Target, int]] = []

    def run(job: Job, target: Target, *, workers: int) -> batch_job.Summary:
        got.append((job, target, workers))
        return batch_job.Summary(Done(rows=1), 1, Done(), 0, 1.0)

    monkeypatch.setattr(launcher, "interrupt_on_signals", lambda: None)
    monkeypatch.setattr(batch_job, "run", run)
    return got


def dataset(*options: str, **environment: str) -> Any:
    arguments = ["dataset", "a.csv", "b.csv", "-o", "/out", "--item", "{a}", *options]
    return CliRunner(env=environment).invoke(main.app, arguments)


@pytest.mark.parametrize(
    ("options", "fields"),
    [
        ([], {}),
        (["-l", " yes", "--label", " no", "--softmax", "--temperature", "2"],
         {"labels": [" yes", " no"], "apply_softmax": True, "temperature": 2.0}),
        (["--label-id", "5", "--label-id", "7"], {"label_token_ids": [5, 7]}),
        (["--item-first"], {"item_first": True}),
        (["--length-normalize"], {"length_normalize": True}),
        (["--no-special-tokens"], {"add_special_tokens": False}),
        (["--token-logprobs"], {"return_token_logprobs": True}),
        (["--label-mass"], {"return_label_mass": True}),
        (["--truncate", "item"], {"truncate": "item"}),
        (["--served-model", "judge"], {"model": "judge"}),
    ],
)  # fmt: skip
def test_each_option_sets_its_field_of_the_request(
    jobs: list[tuple[Job, Target, int]], options: list[str], fields: dict[str, Any]
):
    result = dataset(*options)
    assert result.exit_code == 0, result.output
    ((job, _, _),) = jobs
    assert job.request == ScoreRequest(items=[], **fields)


def test_the_options_make_the_job_and_its_target(jobs: list[tuple[Job, Target, int]]):
    assert dataset("--query", "{b}", "--format", "jsonl", "--block-rows", "7").exit_code == 0
    assert dataset("--app", "score", "--workers", "3").exit_code == 0
    assert dataset("--url", "http://judge:1", SCORE_SERVE_API_KEY="one,two").exit_code == 0
    (job, target, workers), (plain, app, three), (_, service, _) = jobs
    paths = (Path("a.csv"), Path("b.csv"))
    request = ScoreRequest(items=[])
    assert job == Job(paths, Path("/out"), "{a}", request, query="{b}", output_format="jsonl", block_rows=7)
    assert plain == Job(paths, Path("/out"), "{a}", request)
    assert (target, workers) == (Service("http://127.0.0.1:8000"), 2)
    assert (app, three) == (App("score"), 3)
    assert service == Service("http://judge:1", "one")
