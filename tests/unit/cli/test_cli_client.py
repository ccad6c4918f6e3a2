"""``score-serve score`` and ``models``, against the fake engine's service on a real HTTP server."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from rich.cells import cell_len
from typer.testing import CliRunner

from serve_app.cli import main
from serve_app.frontend import auth
from tests.served import KEY, Served

runner = CliRunner(env={"COLUMNS": "100", auth.VARIABLE: None})


def run(served: Served, *arguments: str, **options: Any) -> Any:
    return runner.invoke(main.app, [*arguments, "--url", served.url], **options)


def one_token_words(served: Served) -> list[str]:
    answer = httpx.post(f"{served.url}/tokenize", json={"prompt": [" yes", " no"], "add_special_tokens": False}).json()
    assert [len(ids) for ids in answer["tokens"]] == [1, 1]
    return [ids[0] for ids in answer["tokens"]]


def test_words_and_ids_give_the_services_own_answer(served: Served):
    ids = one_token_words(served)
    body = {"query": "q ", "items": ["the fox", "the dog"], "label_token_ids": ids, "apply_softmax": True}
    wanted = httpx.post(f"{served.url}/v1/score", json=body).json()["scores"]
    words = ["--label", " yes", "-l", " no"]
    numbers = [part for i in ids for part in ("--label-id", str(i))]
    for labels in (words, numbers):
        result = run(served, "score", "q ", "the fox", "the dog", *labels, "--softmax", "--json")
        assert result.exit_code == 0, result.output
        assert json.loads(result.stdout)["scores"] == wanted
    first = run(served, "score", "q ", "the fox", *words, "--item-first", "--json")
    assert json.loads(first.stdout)["scores"] != wanted


def test_the_table_shows_items_labels_and_scores(served: Served):
    result = run(served, "score", "q ", "the [b]fox[/b]\x1b[31m\n", "a dog", "-l", " yes", "-l", " no", "--softmax")
    assert result.exit_code == 0, result.output
    (header,) = [line for line in result.stdout.splitlines() if "item" in line]
    assert [word in header for word in ("yes", "no")] == [True, True]
    (fox,) = [line for line in result.stdout.splitlines() if "fox" in line]
    assert "the [b]fox[/b]\N{REPLACEMENT CHARACTER}[31m\N{REPLACEMENT CHARACTER}" in fox
    assert "\x1b" not in result.stdout
    (dog,) = [line for line in result.stdout.splitlines() if "a dog" in line]
    numbers = [float(part) for part in dog.replace("\u2502", " ").split() if part[0].isdigit()]
    assert sum(numbers) == pytest.approx(1, abs=1e-3)
    assert "prompt tokens" in result.stdout
    several = run(served, "score", "q ", "a dog", "-l", " by no means")
    assert (several.exit_code, "by no means" in several.stdout) == (0, True)


@pytest.mark.parametrize("width", [40, 80, 100])
@pytest.mark.parametrize("count", [1, 2, 12])
def test_no_score_is_hidden_whatever_the_width_and_the_items(served: Served, width: int, count: int):
    items = ["the quick brown fox jumps over the lazy dog " * 4, "short", "电影" * 30]
    labels = [part for i in range(10, 10 + count) for part in ("--label-id", str(i))]
    narrow = CliRunner(env={"COLUMNS": str(width), auth.VARIABLE: None})
    asked = ["score", "q ", *items, *labels, "--url", served.url]
    scores = json.loads(narrow.invoke(main.app, [*asked, "--json"]).stdout)["scores"]
    table = narrow.invoke(main.app, asked).stdout
    assert all(f"{value:.4g}" in table.split() for row in scores for value in row), table
    assert "short" in table
    assert max(map(cell_len, table.splitlines())) <= width


def labels_with(served: Served, wanted: Callable[[float], bool]) -> list[str]:
    """Arguments for a label that has the wanted probability after "q the fox"."""
    ask = {"query": "q ", "items": ["the fox"], "label_token_ids": [*range(300)]}
    (row,) = httpx.post(f"{served.url}/v1/score", json=ask).json()["scores"]
    return ["--label-id", str(next(label for label, value in enumerate(row) if wanted(value)))]


@pytest.mark.parametrize("softmax", [[], ["--softmax"]])
def test_a_warning_follows_the_answer_when_all_labels_are_unlikely(served: Served, softmax: list[str]):
    low = labels_with(served, lambda value: value < 0.005)
    result = run(served, "score", "q ", "the fox", *low, *softmax, "--json")
    assert result.exit_code == 0
    ids = [int(low[1])]
    body = {"query": "q ", "items": ["the fox"], "label_token_ids": ids, "apply_softmax": bool(softmax)}
    answer = httpx.post(f"{served.url}/v1/score", json=body).json()
    assert json.loads(result.stdout) == answer  # as without the warning
    assert result.stderr.startswith("warning: the labels together hold only 0.")
    assert "(1 of the first 1 items are under 1%)" in result.stderr
    for advice in ("query", "chat template", "other labels", "space"):
        assert advice in result.stderr
    assert run(served, "score", "q ", "the fox", *low).stderr == result.stderr
    high = labels_with(served, lambda value: value > 0.011)
    assert run(served, "score", "q ", "the fox", *high, *softmax).stderr == ""


@pytest.mark.parametrize("how", ["stdin", "dash", "file"])
def test_items_of_a_file_are_one_a_line_and_keep_their_places(served: Served, how: str, tmp_path: Path):
    text = "the fox\r\n\n\u72d0\u72f8\nlast without an end"
    path = tmp_path / "items"
    path.write_bytes(text.encode())
    source = {"stdin": [], "dash": ["--items", "-"], "file": ["--items", str(path)]}[how]
    result = run(
        served, "score", "q ", "--label-id", "5", "--json", *source, input=None if how == "file" else text.encode()
    )
    assert result.exit_code == 0, result.output
    items = ["the fox", "", "\u72d0\u72f8", "last without an end"]
    body = {"query": "q ", "items": items, "label_token_ids": [5]}
    assert json.loads(result.stdout)["scores"] == httpx.post(f"{served.url}/v1/score", json=body).json()["scores"]


def test_documents_are_ranked_best_first(served: Served, tmp_path: Path):
    documents = ["the fox", "the lazy [b]dog[/b]", "yes"]
    body = {"query": "q", "documents": documents, "top_n": 2}
    wanted = httpx.post(f"{served.url}/v1/rerank", json=body).json()["results"]
    (tmp_path / "documents").write_text("\n".join(documents) + "\n")
    asked = ["rerank", "q", "--documents", str(tmp_path / "documents"), "--top-n", "2"]
    as_json = run(served, *asked, "--json")
    assert as_json.exit_code == 0, as_json.output
    assert json.loads(as_json.stdout)["results"] == wanted
    table = run(served, "rerank", "q", *documents, "--top-n", "2").stdout
    rows = [line.replace("\u2502", " ").split(maxsplit=2) for line in table.splitlines() if "\u2502" in line]
    assert [(float(score), int(line), text.strip()) for score, line, text in rows] == [
        (round(each["relevance_score"], 4), each["index"] + 1, documents[each["index"]]) for each in wanted
    ]
    assert run(served, "rerank", "q", "a", "--documents", str(tmp_path / "documents")).exit_code == 2


def test_models_are_listed(served: Served):
    result = run(served, "models")
    assert result.exit_code == 0
    assert "fake-judge" in result.stdout
    assert "256" in result.stdout
    listed = json.loads(run(served, "models", "--json").stdout)
    assert listed == httpx.get(f"{served.url}/v1/models").json()


def test_the_api_key_is_the_environments(locked: Served):
    refused = run(locked, "models")
    assert (refused.exit_code, refused.stdout) == (1, "")
    assert "error: this service needs an API key" in refused.stderr
    assert run(locked, "models", env={auth.VARIABLE: KEY}).exit_code == 0
    assert run(locked, "models", env={auth.VARIABLE: f"{KEY}, another"}).exit_code == 0


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["score", "q", "a", "-l", " yes", "-l", " yes"], 1, 'labels names " yes" more than once'),
        (["score", "q", "a", "--label-id", "999999"], 1, "Token ID 999999 is out of vocabulary"),
        (["score", "q", "a", "-l", " yes", "--model", "other"], 1, "model 'other' is not served here"),
        (["score", "q", "a"], 2, "name labels either by --label or by --label-id"),
        (["score", "q", "a", "-l", " yes", "--label-id", "5"], 2, "name labels either"),
        (["score", "q", "a", "-l", " yes", "--items", __file__], 2, "not both"),
        (["score", "q", "-l", " yes", "--items", "/nothing"], 2, "No such file"),
        (["score", "-l", " yes"], 2, "Missing argument"),
    ],
)
def test_a_wrong_command_is_a_line_and_an_exit_code(served: Served, arguments: list[str], code: int, said: str):
    result = run(served, *arguments, env={"COLUMNS": "300"})
    assert result.exit_code == code, result.output
    assert said in result.stderr
    assert result.stdout == ""
    assert "Traceback" not in result.stderr


def test_an_unreachable_service_may_be_asked_again():
    result = runner.invoke(main.app, ["models", "--url", "http://127.0.0.1:9"])
    assert result.exit_code == 3
    assert "cannot be reached" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "ftp://host", "http://", "http://a:port"])
def test_an_invalid_address_is_a_wrong_command(url: str):
    result = runner.invoke(main.app, ["models", "--url", url])
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.stderr


def test_another_server_is_named(served: Served):
    # The service's own page at / stands for another server's.
    result = runner.invoke(main.app, ["models", "--url", f"{served.url}/docs?"], env={"COLUMNS": "300"})
    assert result.exit_code == 1
    assert "Traceback" not in result.stderr


def test_items_that_are_not_text_are_a_wrong_command(served: Served, tmp_path: Path):
    path = tmp_path / "items"
    path.write_bytes(b"\xff\xfe\n")
    result = run(served, "score", "q", "--label-id", "5", "--items", str(path))
    assert result.exit_code == 2, result.output
    assert "not UTF-8" in result.stderr
