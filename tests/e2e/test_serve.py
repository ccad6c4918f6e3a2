"""The application of ``build`` through a real Ray Serve, on the fake engine."""

from __future__ import annotations

import dataclasses
import json
import random
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from serve_app.app import build
from serve_app.jobs.batch_job import run
from serve_app.jobs.files import JobError
from serve_app.jobs.job import DecisionJob, Job
from serve_app.jobs.targets import App, Engines, Service
from serve_app.local_ray import APP_NAME
from serve_app.schemas import ScoreRequest, ScoreResponse
from serve_app.scorer.fake_engine import FakeEngine
from serve_app.settings import ModelSettings, ServiceSettings
from serve_app.tasks.systemone import SystemOneRequest, SystemOneResponse
from tests.batches import label_batch
from tests.local import save_tokenizer, service_of
from tests.processes import mapped_files, replica_process

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def client(deploy: Callable[[Any], httpx.Client], settings: ModelSettings) -> httpx.Client:
    return deploy(build(service_of(settings.model_copy(update={"scorer_replicas": 2, "max_batch_tokens": 256}))))


def expected(query: list[int], items: list[list[int]], labels: list[int]) -> list[list[float]]:
    batch = label_batch([query + item for item in items], [labels] * len(items))
    return np.exp(FakeEngine().score(batch).values.astype(np.float64)).reshape(-1, len(labels)).tolist()


def random_request(rng: random.Random, *, most_items: int = 60) -> dict[str, Any]:
    query = [rng.randrange(49_152) for _ in range(rng.randrange(1, 40))]
    items = [[rng.randrange(49_152) for _ in range(rng.randrange(1, 30))] for _ in range(rng.randrange(1, most_items))]
    return {"query": query, "items": items, "label_token_ids": rng.sample(range(49_152), rng.randrange(1, 6))}


def test_scores_are_the_engines(client: httpx.Client):
    answer = client.post("/v1/score", json={"query": [5, 6], "items": [[7], [8, 9]], "label_token_ids": [1, 49_151]})
    assert answer.status_code == 200, answer.text
    np.testing.assert_allclose(answer.json()["scores"], expected([5, 6], [[7], [8, 9]], [1, 49_151]), rtol=1e-6)


def test_it_is_ready(client: httpx.Client):
    assert client.get("/ready").status_code == 200


def test_a_request_that_spans_batches_and_replicas_comes_back_in_order(client: httpx.Client):
    items = [[i, i + 1, i + 2] for i in range(2_000)]
    answer = client.post("/v1/score", json={"query": [3], "items": items, "label_token_ids": [1, 2]})
    np.testing.assert_allclose(answer.json()["scores"], expected([3], items, [1, 2]), rtol=1e-6)


def test_rows_are_streamed_through_serve_as_they_finish(client: httpx.Client):
    request = {"query": [3], "items": [[i, i + 1, i + 2] for i in range(2_000)], "label_token_ids": [1, 2]}
    with client.stream("POST", "/v1/score", json={**request, "stream": True}) as answer:
        assert answer.headers["content-type"] == "application/x-ndjson"
        chunks = list(answer.iter_raw())
    assert len(chunks) > 10
    *rows, end = map(json.loads, b"".join(chunks).splitlines())
    scores = [row["scores"] for row in sorted(rows, key=lambda row: row["index"])]
    np.testing.assert_allclose(scores, expected([3], request["items"], [1, 2]), rtol=1e-6)
    assert end["usage"]["prompt_tokens"] == 8_000


def test_concurrent_requests_get_what_they_would_get_alone(client: httpx.Client):
    rng = random.Random(0)
    requests = [random_request(rng) for _ in range(60)]
    with ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(lambda request: client.post("/v1/score", json=request), requests))
    for request, answer in zip(requests, answers, strict=True):
        assert answer.status_code == 200, answer.text
        wanted = expected(request["query"], request["items"], request["label_token_ids"])
        np.testing.assert_allclose(answer.json()["scores"], wanted, rtol=1e-6)


def test_a_bad_request_does_the_service_no_harm(client: httpx.Client):
    bad = client.post("/v1/score", json={"query": [1], "items": [[2]], "label_token_ids": [49_152]})
    assert (bad.status_code, bad.json()["type"]) == (400, "BadRequestError")
    assert "49152" in bad.json()["message"]
    good = client.post("/v1/score", json={"query": [1], "items": [[2]], "label_token_ids": [49_151]})
    assert good.status_code == 200


def test_a_ray_task_scores_through_the_handle_with_the_types_of_http(client: httpx.Client):
    import ray
    from ray import serve

    request = {"query": [5, 6], "items": [[7], [8, 9]], "label_token_ids": [1, 2]}

    @ray.remote(num_cpus=0.1)
    def job() -> ScoreResponse:
        handle = serve.get_app_handle(APP_NAME)
        return handle.score.remote(ScoreRequest(**request)).result(timeout_s=60)

    answer = ray.get(job.remote())
    assert isinstance(answer, ScoreResponse)
    assert answer.scores == client.post("/v1/score", json=request).json()["scores"]


def test_no_process_of_the_service_has_loaded_jax(client: httpx.Client):
    assert client.get("/ready").status_code == 200
    for deployment in ("Ingress", "Scorer"):
        loaded = mapped_files(replica_process(deployment))
        assert "numpy" in loaded  # the check itself finds loaded modules
        assert "jaxlib" not in loaded


@pytest.fixture(scope="module")
def reviews(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows in two row groups; some share their query."""
    path = tmp_path_factory.mktemp("reviews") / "in.parquet"
    rows = [{"id": i, "film": f"film {i // 4}" if i < 40 else f"no. {i}", "text": f"review {i}"} for i in range(60)]
    pq.write_table(pa.Table.from_pylist([*rows, {"id": 60, "film": None, "text": "x"}]), path, row_group_size=35)
    return path


@pytest.mark.parametrize("engines", [False, True])
def test_a_dataset_is_scored_by_handle_or_by_its_own_engines_as_the_service_does(
    client: httpx.Client, settings: ModelSettings, reviews: Path, tmp_path: Path, *, engines: bool
):
    request = ScoreRequest(items=[], label_token_ids=[7, 8], apply_softmax=True, return_label_mass=True)
    job = Job((reviews,), tmp_path / "out", query="About {film}: ", item="{text}", request=request, block_rows=10)
    summary = run(job, Engines(settings) if engines else App(APP_NAME), workers=2)
    assert (summary.total.rows, summary.total.bad, summary.blocks, summary.blocks_here) == (60, 1, 7, 7)
    found = pq.read_table(sorted((tmp_path / "out").glob("part-*")))
    rows = pq.read_table(reviews).slice(0, 60)
    assert found.drop_columns(["scores", "label_mass"]) == rows
    asked = request.model_dump(exclude={"items", "query", "on_error"}, exclude_none=True)
    prompts = [f"About {row['film']}: {row['text']}" for row in rows.to_pylist()]
    answer = client.post("/v1/score", json=asked | {"items": prompts}).json()
    assert found["scores"].to_pylist() == answer["scores"]
    assert found["label_mass"].to_pylist() == answer["label_mass"]
    assert summary.total.prompt_tokens == answer["usage"]["prompt_tokens"]
    assert summary.total.cached_tokens > 0
    (bad,) = map(json.loads, (tmp_path / "out" / "bad" / "part-000006.jsonl").read_text().splitlines())
    assert (bad["row"], bad["reason"], bad["values"]["id"]) == (61, "film is null", 60)
    assert run(job, Engines(settings) if engines else App(APP_NAME)).blocks_here == 0
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["rows"] == 60


DECISIONS: dict[str, Any] = {
    "good": {"type": "noul", "instructions": "Is it good?"},
    "kind": {"type": "choice", "criteria": {"a": None, "b": None}},
}


def test_a_handle_decides_as_http_does(client: httpx.Client):
    from ray import serve

    body = {"state": "review 7", "questions": DECISIONS}
    answer = serve.get_app_handle(APP_NAME).decide.remote(SystemOneRequest.model_validate(body)).result(timeout_s=60)
    assert isinstance(answer, SystemOneResponse)
    assert answer.model_dump(exclude_none=True)["answers"] == client.post("/v1/systemone", json=body).json()["answers"]


@pytest.mark.parametrize("target", ["handle", "address"])
def test_questions_about_a_dataset_are_answered_as_the_service_does(
    client: httpx.Client, reviews: Path, tmp_path: Path, target: str
):
    request = SystemOneRequest.model_validate({"state": "", "questions": DECISIONS})
    job = DecisionJob((reviews,), tmp_path / "out", "{text}", request, block_rows=30)
    asked = App(APP_NAME) if target == "handle" else Service(str(client.base_url))
    summary = run(job, asked, workers=1)
    assert (summary.total.rows, summary.total.bad, summary.blocks) == (61, 0, 3)
    found = pq.read_table(sorted((tmp_path / "out").glob("part-*"))).to_pylist()
    assert [row["id"] for row in found] == [*range(61)]
    for row in found[::20]:
        body = {"state": row["text"], "questions": DECISIONS}
        good, kind = client.post("/v1/systemone", json=body).json()["answers"].values()
        assert (row["good"], row["kind"]) == (good["noul"], kind["choice"])
        assert row["kind.probabilities"] == [kind["probabilities"][name] for name in "ab"]
    assert run(job, asked).blocks_here == 0


def test_a_worker_that_cannot_start_ends_the_job_with_the_reason(
    client: httpx.Client, settings: ModelSettings, reviews: Path, tmp_path: Path
):
    assert client.get("/ready").status_code == 200
    job = Job((reviews,), tmp_path / "out", item="{text}", request=ScoreRequest(items=[], label_token_ids=[7]))
    with pytest.raises(JobError, match=r"^a worker failed: ModelSourceError: /no/model is not a folder"):
        run(job, Engines(settings.model_copy(update={"model": "/no/model"})))
    labels = job.request.model_copy(update={"label_token_ids": [7, 7]})
    with pytest.raises(JobError, match=r"^label_token_ids names 7 more than once"):
        run(dataclasses.replace(job, request=labels, output=tmp_path / "other"), App(APP_NAME))


def test_two_models_have_scorers_of_their_own(
    deploy: Callable[[Any], httpx.Client], settings: ModelSettings, model_folder: Path, tmp_path: Path
):
    from ray import serve

    other = save_tokenizer(shutil.copytree(model_folder, tmp_path / "other"), adds_bos=True)
    models = [{"model": str(model_folder), "served_name": "plain"}, {"model": str(other)}]
    both = settings.model_dump(exclude={"model"}, exclude_unset=True) | {"ingress_cpus": 0.1, "models": models}
    client = deploy(build(ServiceSettings.model_validate(both)))
    ask = {"query": "a fox", "items": [" or", " two"], "label_token_ids": [1], "return_prompt_token_ids": True}
    for model, bos in (("default", []), ("plain", []), ("other", [0])):
        answer = client.post("/v1/score", json={**ask, "model": model}).json()
        assert answer["model"] == ("plain" if model == "default" else model)
        rows = answer["prompt_token_ids"]
        assert [row[:1] == [0] for row in rows] == [bool(bos)] * 2
        np.testing.assert_allclose(answer["scores"], expected([], rows, [1]), rtol=1e-6)
    counted = [
        serve.get_deployment_handle(f"Scorer-{name}", APP_NAME).stats.remote().result(timeout_s=60).sequences
        for name in ("plain", "other")
    ]
    assert counted == [4, 2]
    assert client.get("/ready").status_code == 200
    handle = serve.get_app_handle(APP_NAME)
    request = ScoreRequest(**{**ask, "model": "other"})
    assert handle.score.remote(request).result(timeout_s=60).model == "other"
