"""``score-serve decide``, against the service on the fake engine behind a real HTTP server."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
import pytest
from typer.testing import CliRunner

from serve_app.cli import decide as command
from serve_app.cli import main
from serve_app.frontend import auth
from tests.served import KEY, Served

runner = CliRunner(env={"COLUMNS": "200", auth.VARIABLE: None})

QUESTIONS: dict[str, Any] = {
    "urgent": {"type": "noul", "instructions": "Is it urgent?"},
    "team [b]": {"type": "choice", "criteria": {"billing": None, "shipping": "parcels"}},
    "anger": {"type": "score", "instructions": "How angry?", "criteria": ["calm", "cross", "furious"]},
}
OPTIONS = ["--yes-no", "Is it urgent?", "--yes-no", "Is it a fox?", "--choice", "Which team?", "-o", "billing",
           "-o", "shipping", "--score", "How angry?", "-l", "calm", "-l", "cross"]  # fmt: skip
AS_JSON: dict[str, Any] = {
    "Is it urgent?": {"type": "noul", "instructions": "Is it urgent?"},
    "Is it a fox?": {"type": "noul", "instructions": "Is it a fox?"},
    "Which team?": {"type": "choice", "instructions": "Which team?", "criteria": {"billing": None, "shipping": None}},
    "How angry?": {"type": "score", "instructions": "How angry?", "criteria": ["calm", "cross"]},
}


def run(served: Served, *arguments: str, **options: Any) -> Any:
    return runner.invoke(main.app, ["decide", *arguments, "--url", served.url], **options)


def answers(served: Served, state: Any, questions: dict[str, Any], **more: Any) -> dict[str, Any]:
    answer = httpx.post(f"{served.url}/v1/systemone", json={"state": state, "questions": questions, **more})
    assert answer.status_code == 200, answer.text
    return answer.json()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "questions.json"
    path.write_text(json.dumps(QUESTIONS))
    return path


def test_a_file_and_options_give_the_services_own_answer(served: Served, file: Path):
    result = run(served, "the fox", "--questions", str(file), *OPTIONS, "--permutations", "2", "--json")
    assert result.exit_code == 0, result.output
    wanted = answers(served, "the fox", QUESTIONS | AS_JSON, permutations=2)
    assert json.loads(result.stdout)["answers"] == wanted["answers"]
    assert json.loads(result.stdout)["usage"] == wanted["usage"]


@pytest.mark.parametrize("how", ["argument", "stdin", "dash", "file"])
def test_the_state_is_text_or_json_from_anywhere(served: Served, how: str, tmp_path: Path):
    text = json.dumps({"mail": "\u72d0\u72f8 fox", "n": None}, ensure_ascii=False)
    path = tmp_path / "state"
    path.write_text(text, encoding="utf-8")
    source = {"argument": [text], "stdin": [], "dash": ["--state", "-"], "file": ["--state", str(path)]}[how]
    for flag, state in (([], text), (["--json-state"], json.loads(text))):
        sent = text.encode() if how in ("stdin", "dash") else None
        result = run(served, *source, *flag, "--yes-no", "Is it urgent?", "--json", input=sent)
        assert result.exit_code == 0, result.output
        found = json.loads(result.stdout)["answers"]
        assert found == answers(served, state, {"Is it urgent?": AS_JSON["Is it urgent?"]})["answers"]


def test_the_table_shows_questions_answers_and_probabilities(served: Served, file: Path):
    result = run(served, "the fox", "-q", str(file))
    assert result.exit_code == 0, result.output
    wanted = answers(served, "the fox", QUESTIONS)["answers"]
    lines = {name: next(line for line in result.stdout.splitlines() if f" {name} " in line) for name in QUESTIONS}
    assert f"yes {wanted['urgent']['noul']:.4f}, no {1 - wanted['urgent']['noul']:.4f}" in lines["urgent"]
    team, anger = wanted["team [b]"], wanted["anger"]
    first, second = sorted(team["probabilities"].items(), key=lambda pair: -pair[1])
    assert f"{first[0]} {first[1]:.4f}, {second[0]} {second[1]:.4f}" in lines["team [b]"]
    assert f"{team['confidence']:.4f}" in lines["team [b]"]
    assert f"{anger['score']:.4f}" in lines["anger"]
    assert "prompt tokens" in result.stdout
    many = [part for i in range(8) for part in ("-o", f"option {i}")]
    assert "3 more" in run(served, "the fox", "--choice", "Which?", *many).stdout


def test_a_question_without_an_answer_harms_no_other(served: Served, file: Path):
    long = "x" * 1_000
    result = run(served, "the fox", "-q", str(file), "--yes-no", long, "--json", env={"COLUMNS": "5000"})
    assert result.exit_code == 1
    found = json.loads(result.stdout)["answers"]
    wanted = answers(served, "the fox", QUESTIONS)["answers"]
    assert {name: found[name] for name in QUESTIONS} == wanted
    assert f"error: {long}: " in result.stderr
    assert "this model reads at most 256" in result.stderr


def test_low_label_mass_is_warned_of_beside_the_answer(served: Served, file: Path, monkeypatch: pytest.MonkeyPatch):
    wanted = answers(served, "the fox", QUESTIONS)["answers"]
    low, middle, high = sorted(wanted, key=lambda name: wanted[name]["x_label_mass"])
    monkeypatch.setattr(command, "LOW_MASS", 0.0)
    assert run(served, "the fox", "-q", str(file)).stderr == ""
    monkeypatch.setattr(command, "LOW_MASS", wanted[middle]["x_label_mass"])
    result = run(served, "the fox", "-q", str(file), "--json")
    assert (result.exit_code, json.loads(result.stdout)["answers"]) == (0, wanted)
    assert result.stderr.startswith("warning: the possible answers together hold under ")
    assert f"{low} ({100 * wanted[low]['x_label_mass']:.2g}%)" in result.stderr
    assert high not in result.stderr


def test_the_api_key_is_the_environments(locked: Served):
    refused = run(locked, "the fox", "--yes-no", "Is it urgent?")
    assert (refused.exit_code, refused.stdout) == (1, "")
    assert "error: this service needs an API key" in refused.stderr
    assert run(locked, "the fox", "--yes-no", "Is it urgent?", env={auth.VARIABLE: KEY}).exit_code == 0


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["x"], 2, "there is no question"),
        (["x", "--choice", "Which?"], 2, "--choice needs an --option"),
        (["x", "-o", "a", "-o", "b"], 2, "--option needs --choice"),
        (["x", "--score", "How much?"], 2, "--score needs a --level"),
        (["x", "--choice", "Which?", "-o", "a", "-o", "a"], 2, "the option 'a' is given twice"),
        (["x", "--yes-no", "a?", "--yes-no", "a?"], 2, "the question 'a?' is given twice"),
        (["x", "--yes-no", "urgent", "-q", "FILE"], 2, "has a question called 'urgent', too"),
        (["x", "--yes-no", "a?", "--state", "FILE"], 2, "not both"),
        (["{", "--yes-no", "a?", "--json-state"], 2, "--json-state: it is not valid JSON"),
        (["x", "-q", "/nothing.json"], 2, "/nothing.json cannot be read: No such file"),
        (["x", "-q", __file__], 2, "it is not valid JSON"),
        (["x", "--choice", "Which?", "-o", "a"], 1, "Which?.criteria has 1 entries; it must have at least 2"),
        (["x", "--yes-no", "a?", "--model", "other"], 1, "model 'other' is not served here"),
        (["7", "--yes-no", "a?", "--json-state"], 1, "state must be text, an object or a list, not 7"),
    ],
)
def test_a_wrong_command_is_a_line_and_an_exit_code(
    served: Served, file: Path, arguments: list[str], code: int, said: str
):
    asked = [str(file) if part == "FILE" else part for part in arguments]
    result = run(served, *asked, env={"COLUMNS": "300"})
    assert result.exit_code == code, result.output
    assert said in result.stderr
    assert result.stdout == ""
    assert "Traceback" not in result.stderr


def test_a_questions_file_that_names_one_twice_or_holds_none_is_refused(served: Served, tmp_path: Path):
    for text, said in (('{"a": {}, "a": {}}', '"a" is given twice'), ("[]", "must hold a JSON object of questions")):
        path = tmp_path / "questions.json"
        path.write_text(text)
        result = run(served, "x", "-q", str(path), env={"COLUMNS": "300"})
        assert (result.exit_code, said in result.stderr) == (2, True), result.output
