"""Logprobs of rows: what a job writes of them, and that it resumes only as it began."""

from __future__ import annotations

import asyncio
import csv
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from serve_app.frontend.service import ModelService
from serve_app.jobs.batch_job import Worker
from serve_app.jobs.files import JobError, Reader, plan
from serve_app.jobs.folder import JobFolder
from serve_app.jobs.job import LogprobsJob
from serve_app.scorer.fake_engine import FakeEngine
from serve_app.settings import ModelSettings
from serve_app.tasks.logprobs import LOGPROBS, LogprobsRequest, LogprobsResponse
from serve_app.tasks.task import Task
from serve_app.tasks.tokenizer import TextTokenizer
from tests.local import CONTEXT, VOCAB_SIZE, DirectReplicas

REQUEST = LogprobsRequest(input="", top=3)
TEXTS = ["the quick fox", "the lazy dog", "is it quick"]


@dataclass
class Here:
    """A target in this process."""

    tokenizer: TextTokenizer

    def connect(self, task: Task[Any, Any]) -> Any:
        assert task is LOGPROBS
        return self.ask

    def ask(self, request: LogprobsRequest) -> Any:
        engine = FakeEngine(VOCAB_SIZE, CONTEXT)
        service = ModelService(ModelSettings(engine="fake"), self.tokenizer, engine.info, DirectReplicas(engine))
        return asyncio.run(service.answer(LOGPROBS, request, request_id="r"))


@pytest.mark.parametrize("format_", ["parquet", "jsonl", "csv"])
def test_a_block_is_written_with_its_logprobs(tokenizer: TextTokenizer, tmp_path: Path, format_: Any):
    rows = [{"id": at, "text": text} for at, text in enumerate([*TEXTS, "t", "the " * 400])]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    job = LogprobsJob((tmp_path / "in.jsonl",), tmp_path / "out", "{text}", REQUEST)
    source, here = plan(job.inputs, 100), Here(tokenizer)
    with JobFolder(job.output).opened({}):
        target: Any = here
        done = Worker(job, target, Reader("jsonl", source.columns), format_)(asdict(source.blocks[0]))
    assert (done["rows"], done["bad"], done["stop"]) == (3, 2, "")
    bad = [json.loads(line) for line in (job.output / "bad" / "part-000000.jsonl").read_text().splitlines()]
    assert ["longer sequence" in bad[0]["reason"], "this model reads 1 to 256" in bad[1]["reason"]] == [True, True]
    part = job.output / f"part-000000.{format_}"
    if format_ == "parquet":
        table = pq.read_table(part)
        assert table.schema.field("token_ids").type == pa.list_(pa.int64())
        assert table.schema.field("top_logprobs").type == pa.list_(pa.list_(pa.float64()))
        found = table.to_pylist()
    elif format_ == "jsonl":
        found = list(map(json.loads, part.read_text().splitlines()))
    else:
        with part.open(newline="") as file:
            found = [{name: value if name == "text" else json.loads(value) for name, value in row.items()}
                     for row in csv.DictReader(file)]  # fmt: skip
    for row, text in zip(found, TEXTS, strict=True):
        answer: LogprobsResponse = here.ask(REQUEST.model_copy(update={"input": text}))
        wanted = answer.data[0].model_dump(include={"token_ids", "logprobs", "top_ids", "top_logprobs"})
        assert {name: row[name] for name in wanted} == wanted
        assert row["text"] == text


def test_a_job_resumes_only_with_the_same_request(tmp_path: Path):
    job = LogprobsJob((tmp_path,), tmp_path / "out", "{text}", REQUEST)
    with JobFolder(tmp_path / "out").opened(job.settings()):
        pass
    for change in ({"top": 4}, {"temperature": 0.5}, {"add_special_tokens": False}):
        again = replace(job, request=REQUEST.model_copy(update=change))
        with pytest.raises(JobError, match=next(iter(change))), JobFolder(tmp_path / "out").opened(again.settings()):
            pass
    with JobFolder(tmp_path / "out").opened(job.settings()):
        pass
