"""The light client, against the fake engine's service on a real HTTP server, and alone in an environment of its own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
import venv
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import pandas as pd
import pytest
from pydantic import BaseModel
from score_serve_client import AsyncClient, Client, ScoreServeError, UnavailableError, answers, calls

from serve_app.schemas import ModelCard, ModelsResponse, ScoreResponse, ScoreRow, Usage
from serve_app.tasks.rerank import RerankResponse, RerankResult
from serve_app.tasks.systemone import (
    AnswerLine,
    ChoiceAnswer,
    ErrorAnswer,
    NoulAnswer,
    ScoreAnswer,
    SystemOneResponse,
)
from tests.documents import ROOT
from tests.served import KEY, Served

ITEMS = ["the fox", "the lazy dog", "yes\u2028no"]
LABELS = [" yes", " no"]
QUESTIONS: dict[str, Any] = {
    "urgent": {"type": "noul", "instructions": "Is it urgent?"},
    "team": {"type": "choice", "instructions": "Which team?", "criteria": {"billing": None, "shipping": None}},
}
FOLDER = ROOT / "clients" / "python"


@pytest.fixture
def client(served: Served) -> Iterator[Client]:
    with Client(served.url) as made:
        yield made


@pytest.fixture
async def waiting(served: Served) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(served.url) as made:
        yield made


def posted(served: Served, path: str, **body: Any) -> Any:
    return httpx.post(served.url + path, json=body).raise_for_status().json()


async def test_both_clients_have_the_services_own_answers(served: Served, client: Client, waiting: AsyncClient):
    wanted = posted(served, "/v1/score", query="q ", items=ITEMS, labels=LABELS, apply_softmax=True)["scores"]
    asked: dict[str, Any] = {"labels": LABELS, "apply_softmax": True}
    assert client.score("q ", ITEMS, **asked).scores == wanted
    assert (await waiting.score("q ", ITEMS, **asked)).scores == wanted
    assert {row.index: row.scores for row in client.stream("q ", ITEMS, **asked)} == dict(enumerate(wanted))
    assert {row.index: row.scores async for row in waiting.stream("q ", ITEMS, **asked)} == dict(enumerate(wanted))

    ranked = posted(served, "/v1/rerank", query="q", documents=ITEMS, top_n=2)["results"]
    for ranking in (client.rerank("q", ITEMS, top_n=2), await waiting.rerank("q", ITEMS, top_n=2)):
        assert [{"index": one.index, "relevance_score": one.relevance_score} for one in ranking.results] == ranked

    decided = posted(served, "/v1/systemone", state="the fox", questions=QUESTIONS)["answers"]
    for decisions in (client.decide("the fox", QUESTIONS), await waiting.decide("the fox", QUESTIONS)):
        assert decisions.answers["urgent"].noul == decided["urgent"]["noul"]
        assert decisions.answers["team"].probabilities == decided["team"]["probabilities"]
    lines = {line.id: line.answer.x_label_mass for line in client.decide_each("the fox", QUESTIONS)}
    assert lines == {name: own["x_label_mass"] for name, own in decided.items()}
    assert {line.id: line.answer.x_label_mass async for line in waiting.decide_each("the fox", QUESTIONS)} == lines
    assert [card.id for card in client.models().data] == [card.id for card in (await waiting.models()).data]


async def test_a_series_of_any_length_comes_back_with_its_index(
    client: Client, waiting: AsyncClient, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(calls, "ITEMS", 2)
    texts = pd.Series([*ITEMS, "yes", "x" * 2_000], index=[*"abcde"])
    options: dict[str, Any] = {"labels": LABELS, "apply_softmax": True, "on_error": "item"}
    found = client.score_series("q ", texts, **options)
    assert (list(found.index), list(found.columns)) == ([*"abcde"], LABELS)
    assert found.loc["e"].isna().all()  # longer than the model's context
    assert found.iloc[:4].to_numpy().tolist() == client.score("q ", texts.iloc[:4], **options).scores
    pd.testing.assert_frame_equal(found, await waiting.score_series("q ", texts, **options))


async def test_errors_have_the_services_words(locked: Served, client: Client, waiting: AsyncClient):
    for ask in (client.score, client.stream):
        with pytest.raises(ScoreServeError, match="temperature") as refused:
            list(ask("q", ["a"], labels=[" yes"], temperature=-1))
        assert (refused.value.status, refused.value.param) == (400, "temperature")
    with pytest.raises(ScoreServeError) as invalid:
        await waiting.decide("q", {"a": {"type": "nothing"}})
    assert invalid.value.status == 422
    with Client(locked.url) as without, pytest.raises(ScoreServeError) as closed:
        without.score("q", ["a"], labels=[" yes"])
    assert closed.value.status == 401
    with Client(locked.url, api_key=KEY) as right:
        assert right.score("q", ["a"], labels=[" yes"]).scores
    with (
        Client("http://127.0.0.1:9", attempts=1) as nowhere,
        pytest.raises(UnavailableError, match="cannot be reached"),
    ):
        nowhere.models()


async def test_an_overloaded_service_is_asked_again_and_a_cut_stream_is_an_error():
    row = b'{"index": 0, "scores": [0.5]}\n'

    def replies() -> Iterator[httpx.Response]:
        yield httpx.Response(503, json={"message": "full", "type": "", "param": None, "code": 503})
        yield httpx.Response(500, text="the proxy's own")
        yield httpx.Response(200, content=row)

    first, second = replies(), replies()
    transport = httpx.MockTransport(lambda _: next(first, None) or next(second))
    with Client("http://s", transport=transport) as client, pytest.raises(UnavailableError, match="too early"):
        list(client.stream("q", ["a"], labels=[" b"]))
    async with AsyncClient("http://s", transport=transport) as waiting:
        with pytest.raises(UnavailableError, match="too early"):
            [row async for row in waiting.stream("q", ["a"], labels=[" b"])]
    assert [*first, *second] == []


@pytest.mark.parametrize(
    ("light", "services"),
    [
        (answers.Usage, [Usage]),
        (answers.Scores, [ScoreResponse]),
        (answers.Row, [ScoreRow]),
        (answers.Result, [RerankResult]),
        (answers.Ranking, [RerankResponse]),
        (answers.Decision, [NoulAnswer, ChoiceAnswer, ScoreAnswer, ErrorAnswer]),
        (answers.Decisions, [SystemOneResponse]),
        (answers.DecisionLine, [AnswerLine]),
        (answers.ModelCard, [ModelCard]),
        (answers.Models, [ModelsResponse]),
    ],
)
def test_every_field_is_one_of_the_services(light: type[BaseModel], services: list[type[BaseModel]]):
    known = {name for each in services for name in each.model_fields}
    assert light.model_fields.keys() - known == set()
    needed = {name for name, field in light.model_fields.items() if field.is_required()}
    assert all(needed <= each.model_fields.keys() for each in services)


HEAVY = (
    "ray",
    "jax",
    "flax",
    "transformers",
    "tokenizers",
    "torch",
    "numpy",
    "pandas",
    "fastapi",
    "serve_app",
    "model",
)


def test_it_loads_nothing_heavy_and_asks_for_nothing_heavy():
    code = f"import sys, score_serve_client; print([name for name in {HEAVY} if name in sys.modules])"
    environment = os.environ | {"PYTHONPATH": str(FOLDER)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout == "[]\n"
    project = tomllib.loads((FOLDER / "pyproject.toml").read_text())["project"]
    assert {re.split(r"[<>=]", each)[0] for each in project["dependencies"]} == {"httpx", "pydantic", "tenacity"}


@pytest.mark.slow
def test_it_installs_alone_and_its_readme_holds(served: Served, tmp_path: Path):
    """In a fresh environment, with pip and what the registry has."""
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv" / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "--quiet", FOLDER], check=True)
    installed = subprocess.run([python, "-m", "pip", "list"], capture_output=True, text=True, check=True).stdout
    assert not {line.split()[0].lower() for line in installed.splitlines() if line} & {*HEAVY}
    size = sum(path.stat().st_size for path in (tmp_path / "venv").rglob("*") if path.is_file())
    assert size < 100 * 2**20
    (code,) = re.findall(r"```python\n(.*?)```", (FOLDER / "README.md").read_text(), re.DOTALL)
    code = code.replace("http://127.0.0.1:8000", served.url)
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=True)
    assert len(done.stdout.splitlines()) == 4
