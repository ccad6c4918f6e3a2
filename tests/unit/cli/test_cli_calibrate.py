"""``score-serve calibrate``, against the service on the fake engine behind a real HTTP server."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
import pytest
from typer.testing import CliRunner

from serve_app.cli import main
from serve_app.frontend import auth
from serve_app.profiles.calibration import Calibration
from tests.served import Served

runner = CliRunner(env={"COLUMNS": "100", auth.VARIABLE: None})

QUESTIONS: dict[str, Any] = {
    "late": {"type": "noul", "instructions": "Is it late?"},
    "team": {"type": "choice", "criteria": {"billing": None, "shipping": "parcels"}},
    "anger": {"type": "score", "instructions": "How angry?", "criteria": ["calm", "cross", "furious"]},
}


def labelled(served: Served, count: int) -> list[dict[str, Any]]:
    """States whose right choice is mostly the fake engine's, of the others any."""
    lines: list[dict[str, Any]] = []
    for n in range(count):
        state = f"fox {n}"
        answer = httpx.post(f"{served.url}/v1/systemone", json={"state": state, "questions": QUESTIONS}).json()
        team = answer["answers"]["team"]["choice"]
        lines.append({"state": state, "answers": {"late": n % 3 == 0, "team": team, "anger": n % 2}})
    return lines


def write(folder: Path, lines: list[Any]) -> list[str]:
    """The command's arguments for these lines."""
    (folder / "labelled.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "questions.json").write_text(json.dumps(QUESTIONS))
    return [str(folder / "labelled.jsonl"), "-q", str(folder / "questions.json"), "-o", str(folder / "fox-v1.toml")]


def run(served: Served, *arguments: str) -> Any:
    return runner.invoke(main.app, ["calibrate", *arguments, "--url", served.url])


def test_the_file_the_drawings_and_the_table_are_made(served: Served, tmp_path: Path):
    arguments = write(tmp_path, labelled(served, 24))
    result = run(served, *arguments)
    assert result.exit_code == 0, result.output
    assert sorted(path.name for path in tmp_path.glob("fox-v1.*")) == ["fox-v1.png", "fox-v1.svg", "fox-v1.toml"]
    made = Calibration.of_file(tmp_path / "fox-v1.toml")
    info = httpx.get(f"{served.url}/v1/info").json()
    assert (made.name, made.model, made.profile, made.permutations) == (
        "fox-v1", info["model"], info["decision_profile"], 1
    )  # fmt: skip
    team = made.curve("choice", 2)
    assert team is not None
    assert team.rows == 24
    assert team.temperature < 1, "its choice is always right, so it may be surer"
    assert "choice" in result.stdout
    assert all(len(line) <= 100 for line in result.stdout.splitlines() if "\u2502" in line)
    again = run(served, *arguments)
    assert again.exit_code == 2
    assert "exists" in again.stderr


def test_json_has_the_figures(served: Served, tmp_path: Path):
    result = run(served, *write(tmp_path, labelled(served, 20)), "--json")
    assert result.exit_code == 0, result.output
    printed = json.loads(result.stdout)
    assert printed["calibration"]["name"] == "fox-v1"
    assert printed["unseen"]["choice"]["raw"]["accuracy"] == 1


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"answers": {"late": True}}, 'must be an object with "state" and "answers"'),
        ({"state": "a", "answers": {}}, "answers is empty"),
        ({"state": "a", "answers": {"urgent": True}}, "there is no question 'urgent'"),
        ({"state": "a", "answers": {"late": 1}}, "answers.late is 1; it must be one of false, true"),
        ({"state": "a", "answers": {"team": "sales"}}, 'must be one of "billing", "shipping"'),
        ({"state": "a", "answers": {"anger": 3}}, "answers.anger is 3; it must be one of 0, 1, 2"),
        ({"state": "a", "answers": {"anger": True}}, "answers.anger is true"),
        ({"state": "a", "answers": {"b": True}, "questions": {"b": {"type": "box"}}}, "box"),
    ],
)
def test_a_wrong_line_is_named(served: Served, line: Any, message: str, tmp_path: Path):
    result = run(served, *write(tmp_path, [{"state": "fox", "answers": {"late": True}}, line]))
    assert result.exit_code == 2
    said = " ".join(result.stderr.replace("\u2502", " ").split())
    assert "labelled.jsonl:2" in said.replace(" ", "")
    assert message in said
    assert not (tmp_path / "fox-v1.toml").exists()


def test_a_line_may_have_questions_of_its_own(served: Served, tmp_path: Path):
    lines = labelled(served, 20)
    asked = {"b": {"type": "noul", "instructions": "Is it?"}}
    lines.append({"state": "fox", "answers": {"b": True}, "questions": asked})
    result = run(served, *write(tmp_path, lines), "--json")
    assert result.exit_code == 0, result.output


def test_a_state_without_an_answer_is_set_aside(served: Served, tmp_path: Path):
    long = {"state": "fox " * 2_000, "answers": {"late": True, "team": "billing", "anger": 0}}
    result = run(served, *write(tmp_path, [*labelled(served, 20), long]), "--json")
    assert result.exit_code == 0, result.output
    assert "labelled.jsonl:21 has no answer" in result.stderr


def test_too_few_states_are_refused(served: Served, tmp_path: Path):
    result = run(served, *write(tmp_path, labelled(served, 19)))
    assert result.exit_code == 1
    assert "there are 19 different states; label at least 20" in result.stderr
    assert not (tmp_path / "fox-v1.toml").exists()


def test_only_a_new_toml_file_is_written(served: Served, tmp_path: Path):
    arguments = write(tmp_path, labelled(served, 1))
    for wrong, message in (("fox.json", "must end in .toml"), ("no/fox.toml", "there is no folder")):
        result = run(served, *arguments[:-1], str(tmp_path / wrong))
        assert result.exit_code == 2
        assert message in " ".join(result.stderr.replace("\u2502", " ").split())
