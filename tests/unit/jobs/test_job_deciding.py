"""Questions about rows: each row has the answers that it has alone, and what the job writes of them."""

from __future__ import annotations

import asyncio
import csv
import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from threading import Lock
from typing import Any

import pyarrow.parquet as pq
import pytest

from serve_app.contract import Engine
from serve_app.errors import InternalError, InvalidRequestError, OverloadedError
from serve_app.frontend.models import Models
from serve_app.frontend.routes import create_app
from serve_app.frontend.service import ModelService
from serve_app.jobs.batch_job import Worker
from serve_app.jobs.columns import Column, of_decisions
from serve_app.jobs.deciding import decide
from serve_app.jobs.files import JobError, Reader, plan
from serve_app.jobs.folder import JobFolder
from serve_app.jobs.job import DecisionJob
from serve_app.jobs.targets import Engines, Service
from serve_app.profiles.calibration import Calibration
from serve_app.scorer.fake_engine import FakeEngine
from serve_app.settings import ModelSettings
from serve_app.tasks.systemone import SYSTEMONE, SystemOneRequest, SystemOneResponse
from serve_app.tasks.task import Task
from serve_app.tasks.tokenizer import TextTokenizer
from tests.local import CONTEXT, VOCAB_SIZE, DirectReplicas, save_tokenizer
from tests.served import serving

QUESTIONS: dict[str, Any] = {
    "urgent": {"type": "noul", "instructions": "Is it urgent?"},
    "team": {"type": "choice", "instructions": "Which team?", "criteria": {"billing": None, "shipping": "parcels"}},
    "anger": {"type": "score", "criteria": ["calm", "cross", "furious"]},
}
REQUEST = SystemOneRequest.model_validate({"state": "", "questions": QUESTIONS})
STATES = ["the fox", "the lazy dog", "is it quick", "", "no"]


class Asked:
    """The service in this process, which remembers the states that it was asked about."""

    def __init__(self, tokenizer: TextTokenizer, engine: Engine | None = None) -> None:
        self._engine = engine or FakeEngine(VOCAB_SIZE, CONTEXT)
        self._service = ModelService(
            ModelSettings(engine="fake"), tokenizer, self._engine.info, DirectReplicas(self._engine)
        )
        self._lock = Lock()
        self.states: list[Any] = []

    def __call__(self, request: SystemOneRequest) -> SystemOneResponse:
        with self._lock:
            self.states.append(request.state)
            return asyncio.run(self._service.answer(SYSTEMONE, request, request_id="r"))


class Here:
    """The service in this process as a job's target."""

    resources: dict[str, Any] = {}  # noqa: RUF012

    def __init__(self, ask: Asked) -> None:
        self._ask = ask

    def identity(self, model: str, *more: str) -> dict[str, Any]:
        return dict.fromkeys(more, model)

    def connect(self, task: Task[Any, Any]) -> Callable[[Any], Any]:
        assert task is SYSTEMONE
        return self._ask


def test_each_row_has_the_answers_that_it_has_alone(tokenizer: TextTokenizer):
    ask, alone = Asked(tokenizer), Asked(tokenizer)
    found, cost = decide(REQUEST, [(3 * at, state) for at, state in enumerate(STATES)], ask)
    assert sorted(map(str, ask.states)) == sorted(STATES)
    tokens = 0
    for at, state in enumerate(STATES):
        answer = alone(REQUEST.model_copy(update={"state": state}))
        urgent, team, anger = answer.answers.values()
        assert (urgent.type, team.type, anger.type) == ("noul", "choice", "score")
        assert found[3 * at] == {
            "urgent": urgent.noul,
            "urgent.label_mass": urgent.x_label_mass,
            "team": team.choice,
            "team.probabilities": [team.probabilities["billing"], team.probabilities["shipping"]],
            "team.confidence": team.confidence,
            "team.label_mass": team.x_label_mass,
            "anger": anger.score,
            "anger.probabilities": [anger.probabilities[level] for level in "012"],
            "anger.confidence": anger.confidence,
            "anger.label_mass": anger.x_label_mass,
        }
        tokens += answer.usage.input_tokens
    assert cost.prompt_tokens == tokens


def test_a_bad_row_harms_no_other(tokenizer: TextTokenizer):
    found, cost = decide(REQUEST, [(0, "the fox"), (1, "x" * 1_000), (2, "no")], Asked(tokenizer))
    assert [type(found[at]) for at in range(3)] == [dict, str, dict]
    assert "this model reads at most 256" in str(found[1])
    assert "urgent" in str(found[1])
    assert cost.prompt_tokens > 0


def failing(ask: Asked, error: Exception) -> Callable[[SystemOneRequest], SystemOneResponse]:
    def asked(request: SystemOneRequest) -> SystemOneResponse:
        if request.state == "no":
            raise error
        return ask(request)

    return asked


def test_an_error_that_is_the_rows_own_is_its_reason_and_any_other_ends_the_job(tokenizer: TextTokenizer):
    asked = list(enumerate(STATES))
    for error in (InternalError("broken"), InvalidRequestError("broken", param="state")):
        found, _ = decide(REQUEST, asked, failing(Asked(tokenizer), error))
        assert [at for at, one in found.items() if one == "broken"] == [4]
    for error in (OverloadedError("gone"), InvalidRequestError("gone", param="questions")):
        with pytest.raises(type(error), match="gone"):
            decide(REQUEST, asked, failing(Asked(tokenizer), error))


def test_columns_are_named_after_the_questions_and_no_name_may_come_twice():
    assert of_decisions(REQUEST.questions) == {
        "urgent": Column(float),
        "urgent.label_mass": Column(float),
        "team": Column(str),
        "team.probabilities": Column(float, ["billing", "shipping"]),
        "team.confidence": Column(float),
        "team.label_mass": Column(float),
        "anger": Column(float),
        "anger.probabilities": Column(float, ["0", "1", "2"]),
        "anger.confidence": Column(float),
        "anger.label_mass": Column(float),
    }
    twice = {"a": QUESTIONS["team"], "a.confidence": QUESTIONS["urgent"]}
    with pytest.raises(ValueError, match=r"2 output columns would be called 'a.confidence'; rename one"):
        of_decisions(SystemOneRequest.model_validate({"state": "", "questions": twice}).questions)


@pytest.mark.parametrize("format_", ["parquet", "jsonl", "csv"])
def test_a_block_is_written_with_its_answers_in_columns(tokenizer: TextTokenizer, tmp_path: Path, format_: Any):
    rows = [{"id": at, "text": state} for at, state in enumerate(STATES[:3])] + [{"id": 3, "text": None}]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    ask = Asked(tokenizer)
    job = DecisionJob((tmp_path / "in.jsonl",), tmp_path / "out", "Mail: {text}", REQUEST)
    source = plan(job.inputs, 100)
    with JobFolder(job.output).opened({}):
        done = Worker(job, Here(ask), Reader("jsonl", source.columns), format_)(asdict(source.blocks[0]))
    assert (done["rows"], done["bad"], done["stop"]) == (3, 1, "")
    (bad,) = map(json.loads, (job.output / "bad" / "part-000000.jsonl").read_text().splitlines())
    assert (bad["row"], bad["reason"]) == (4, "text is null")
    states = [f"Mail: {row['text']}" for row in rows[:3]]
    answers, _ = decide(REQUEST, list(enumerate(states)), Asked(tokenizer))
    wanted = [rows[at] | dict(answers[at]) for at in range(3)]  # type: ignore[arg-type]
    part = job.output / f"part-000000.{format_}"
    if format_ == "csv":
        with part.open(newline="") as file:
            found = list(csv.DictReader(file))
        assert [row["team"] for row in found] == [row["team"] for row in wanted]
        spread = [[row["team.probabilities[billing]"], row["team.probabilities[shipping]"]] for row in found]
        assert spread == [[str(p) for p in row["team.probabilities"]] for row in wanted]
        assert list(found[0])[2:] == ["urgent", "urgent.label_mass", "team", "team.probabilities[billing]",
            "team.probabilities[shipping]", "team.confidence", "team.label_mass", "anger", "anger.probabilities[0]",
            "anger.probabilities[1]", "anger.probabilities[2]", "anger.confidence", "anger.label_mass"]  # fmt: skip
    else:
        found = (
            pq.read_table(part).to_pylist() if format_ == "parquet" else map(json.loads, part.read_text().splitlines())
        )
        assert list(found) == wanted


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"team": {**QUESTIONS["team"], "criteria": {"shipping": "parcels", "billing": None}}}, "questions.team = "),
        ({"urgent": {**QUESTIONS["urgent"], "instructions": "Urgent?"}}, "questions.urgent = "),
        ({"more": QUESTIONS["urgent"]}, "questions.more = null"),
    ],
)
def test_a_job_resumes_only_with_the_same_questions(tmp_path: Path, changed: dict[str, Any], said: str):
    job = DecisionJob((tmp_path,), tmp_path / "out", "{text}", REQUEST)
    other = REQUEST.model_validate({"state": "", "questions": QUESTIONS | changed})
    with JobFolder(tmp_path / "out").opened(job.settings()):
        pass
    for again, wrong in (
        (replace(job, request=other), said),
        (replace(job, request=REQUEST.model_copy(update={"permutations": 2})), "permutations = 1"),
        (replace(job, request=REQUEST.model_copy(update={"questions": dict(reversed(REQUEST.questions.items()))})),
         "columns = "),
    ):  # fmt: skip
        with pytest.raises(JobError, match=wrong), JobFolder(tmp_path / "out").opened(again.settings()):
            pass
    with JobFolder(tmp_path / "out").opened(job.settings()):
        pass


def test_a_worker_s_own_engine_asks_as_the_service_does_by_the_models_files(tmp_path: Path):
    folder = save_tokenizer(tmp_path, adds_bos=False)
    (folder / "config.json").write_text("{}")
    for name in ("model.safetensors", "head.pt"):
        (folder / name).touch()

    async def asked() -> SystemOneResponse:
        service = await Engines(ModelSettings(model=str(folder), engine="fake"))._service()
        try:
            return await service.answer(SYSTEMONE, REQUEST, request_id="r")
        finally:
            service.close()

    with pytest.raises(InvalidRequestError, match="a head of its own"):
        asyncio.run(asked())


def test_with_another_calibration_it_is_another_job(tokenizer: TextTokenizer):
    engine = FakeEngine(VOCAB_SIZE, CONTEXT)
    made = Calibration(name="fox-v1", model="fake", profile="plain-v1")
    settings = ModelSettings(model="fake", engine="fake", calibration=made)
    service = ModelService(settings, tokenizer, engine.info, DirectReplicas(engine))
    models = Models(service)
    with serving(create_app(lambda: models)) as served:
        identity = Service(served.url).identity("default", *DecisionJob.facts)
    service.close()
    assert (identity["decision_profile"], identity["calibration"]) == ("plain-v1", "fox-v1")
