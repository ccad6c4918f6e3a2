"""``score-serve dataset``: the job that the options make."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from serve_app import model_source
from serve_app.cli import launcher, main
from serve_app.jobs import batch_job
from serve_app.jobs.folder import Done
from serve_app.jobs.job import AnyJob, DecisionJob, Job, LogprobsJob
from serve_app.jobs.targets import App, Engines, Service, Target
from serve_app.profiles.calibration import Calibration
from serve_app.schemas import ScoreRequest
from serve_app.settings import ModelSettings
from serve_app.tasks.logprobs import LogprobsRequest
from serve_app.tasks.systemone import SystemOneRequest


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


def test_a_model_has_the_settings_that_serve_gives_it(
    jobs: list[tuple[Job, Target, int]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    asked: list[tuple[Any, ...]] = []
    monkeypatch.setattr(model_source, "resolve", lambda *which, **_: asked.append(which))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lora").mkdir()
    (tmp_path / "calm.toml").write_text(Calibration(name="calm", model="m", profile="p").as_toml())
    options = ["--revision", "v1", "--base", "org/base", "--trust-config", "a", "--trust-config", "b"]
    result = dataset("--model", "./lora", *options, "--calibration", "calm.toml", "--dtype", "bfloat16", "--int8")
    assert result.exit_code == 0, result.output
    ((_, target, _),) = jobs
    assert isinstance(target, Engines)
    settings = target.settings
    assert asked == [("./lora", "v1", "org/base")]
    assert (settings.model, settings.revision, settings.base) == (str(tmp_path / "lora"), "v1", "org/base")
    assert (settings.trust_config, settings.dtype, settings.quantization) == (("a", "b"), "bfloat16", "int8")
    assert settings.calibration is not None
    assert settings.calibration.name == "calm"
    # A job whose scores a skipped key may change is another one.
    assert target.identity("default")["trust_config"] == ("a", "b")
    assert "trust_config" not in Engines(ModelSettings()).identity("default")

    missing = dataset("--model", "./lora", "--calibration", "none.toml")
    assert (missing.exit_code, "none.toml" in missing.stderr) == (1, True), missing.output


@pytest.mark.parametrize(
    "option", ["--revision=v1", "--base=b", "--trust-config=a", "--dtype=float32", "--int8", "--calibration=c.toml"]
)
def test_a_running_service_has_its_own_settings(jobs: list[tuple[Job, Target, int]], option: str):
    result = dataset(option, COLUMNS="300")
    assert (result.exit_code, f"{option.split('=')[0]} goes with --model" in result.stderr) == (2, True), result.output
    named = dataset("--model", "demo", "--served-model", "judge", COLUMNS="300")
    assert (named.exit_code, "leave it out with --model" in named.stderr) == (2, True), named.output
    assert not jobs


QUESTIONS = {"urgent": {"type": "noul", "instructions": "Is it urgent?"}}


def decisions(folder: Path, *options: str, questions: Any = QUESTIONS) -> Any:
    (folder / "questions.json").write_text(json.dumps(questions))
    arguments = ["dataset", "a.csv", "-o", "/out", "--questions", str(folder / "questions.json"), *options]
    return CliRunner(env={"COLUMNS": "300"}).invoke(main.app, arguments)


def test_a_questions_file_makes_a_job_of_decisions(jobs: list[tuple[AnyJob, Target, int]], tmp_path: Path):
    result = decisions(
        tmp_path, "--state", "{text}", "--permutations", "2", "--served-model", "judge", "--block-rows", "7"
    )
    assert result.exit_code == 0, result.output
    fields = {"state": "", "questions": QUESTIONS, "permutations": 2, "model": "judge"}
    wanted = DecisionJob(
        (Path("a.csv"),), Path("/out"), "{text}", SystemOneRequest.model_validate(fields), block_rows=7
    )
    assert [job for job, _, _ in jobs] == [wanted]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ([], "--questions needs --state"),
        (["--state", "{text}", "--item", "{text}"], "none of the options for scores of labels"),
        (["--state", "{text}", "-l", " yes"], "none of the options for scores of labels"),
        (["--state", "{text}", "--query", "x"], "none of the options for scores of labels"),
    ],
)
def test_options_of_scores_and_of_decisions_do_not_go_together(
    jobs: list[tuple[AnyJob, Target, int]], tmp_path: Path, options: list[str], said: str
):
    result = decisions(tmp_path, *options)
    assert (result.exit_code, said in result.stderr) == (2, True), result.output
    for without_questions in (["--state", "{text}"], ["--item", "{a}", "--permutations", "2"], []):
        result = CliRunner(env={"COLUMNS": "300"}).invoke(
            main.app, ["dataset", "a.csv", "-o", "/out", *without_questions]
        )
        assert (result.exit_code, "name --item for scores" in result.stderr) == (2, True), result.output
    assert not jobs


def test_a_wrong_question_is_named_with_its_file(jobs: list[tuple[AnyJob, Target, int]], tmp_path: Path):
    result = decisions(tmp_path, "--state", "{text}", questions={"team": {"type": "choice", "criteria": {"a": None}}})
    assert result.exit_code == 2
    assert "questions.json: questions.team.criteria has 1 entries" in result.stderr
    assert not jobs


def test_logprobs_make_a_job_of_a_teacher(jobs: list[tuple[AnyJob, Target, int]]):
    assert dataset("--logprobs", "top-64", "--temperature", "0.5", "--no-special-tokens").exit_code == 0
    assert dataset("--logprobs", "own", "--served-model", "judge").exit_code == 0
    paths = (Path("a.csv"), Path("b.csv"))
    request = LogprobsRequest(input="", top=64, temperature=0.5, add_special_tokens=False)
    own = LogprobsRequest(input="", model="judge")
    assert [job for job, _, _ in jobs] == [LogprobsJob(paths, Path("/out"), "{a}", each) for each in (request, own)]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--logprobs", "64"], "'top-64' for the 64"),
        (["--logprobs", "top-"], "'top-64' for the 64"),
        (["--logprobs", "top-2000"], "1024"),
        (["--logprobs", "own", "-l", " yes"], "alone"),
        (["--logprobs", "own", "--query", "x"], "alone"),
        (["--logprobs", "own", "--temperature", "0.0001"], "0.001"),
    ],
)
def test_logprobs_that_do_not_exist(jobs: list[tuple[AnyJob, Target, int]], options: list[str], said: str):
    result = dataset(*options)
    assert (result.exit_code, said in result.stderr) == (2, True), result.output
    assert not jobs
