"""``score-serve bench`` and ``plan``; and every wrong command gets one line and an exit code."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
from typer.testing import CliRunner

from serve_app.cli import main, tools

runner = CliRunner(env={"COLUMNS": "200"})


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in tools._QUIET_TPU:
        monkeypatch.setenv(name, "cpu" if name == "JAX_PLATFORMS" else "localhost")


@pytest.mark.heavy
@pytest.mark.parametrize(("command", "option"), [("plan", "--topology"), ("bench", "--workloads")])
def test_the_tools_options_are_the_commands(command: str, option: str):
    result = runner.invoke(main.app, [command, "--help"])
    assert result.exit_code == 0, result.output
    assert f"score-serve {command}" in result.stdout
    assert option in result.stdout


@pytest.mark.heavy
def test_the_benchmarks_own_commands_are_reached():
    result = runner.invoke(main.app, ["bench", "load", "--help"])
    assert result.exit_code == 0, result.output
    assert "Poisson" in result.stdout


@pytest.mark.heavy
@pytest.mark.demo
def test_the_planner_knows_the_demo_model():
    from scripts.planning.plan import read

    assert read("demo").vocab_size == 49_152


@pytest.mark.parametrize(
    "arguments",
    [
        ["nothing"],
        ["--nothing"],
        pytest.param(["plan"], marks=pytest.mark.heavy),
        pytest.param(["plan", "model", "--chip", "v9"], marks=pytest.mark.heavy),
        pytest.param(["bench", "--nothing"], marks=pytest.mark.heavy),
        pytest.param(["bench", "--systems", "nothing"], marks=pytest.mark.heavy),
        ["dataset"],
        ["dataset", "in.csv", "-o", "out"],
        ["dataset", "in.csv", "-o", "out", "--item", "{a}", "--format", "xml"],
        ["dataset", "in.csv", "-o", "out", "--item", "{a}", "-l", " yes", "--label-id", "5"],
        ["dataset", "in.csv", "-o", "out", "--item", "{a}", "--url", "http://a", "--model", "demo"],
        ["dataset", "in.csv", "-o", "out", "--item", "{a}", "--temperature", "-1"],
        ["dataset", "in.csv", "-o", "out", "--item", "{a}", "--workers", "0"],
    ],
)
def test_a_wrong_command_is_usage_and_code_2(arguments: list[str]):
    result = runner.invoke(main.app, arguments)
    assert result.exit_code == 2, result.output
    assert "Error" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--item", "{b}"], "'{b}' names 'b', which is not a column; the columns are a"),
        (["--item", "{a"], "lone '{'"),
        (["--item", "all the same"], "neither template names a column"),
        (["--item", "{a}", "-o", "."], "is inside the input"),
        (["--item", "{a}", "--model", "/no/model"], "/no/model is not a folder"),
        (["--item", "{a}", "--url", "http://127.0.0.1:9"], "cannot be reached"),
        (["--item", "{a}", "--url", "127.0.0.1"], "is not an address"),
    ],
)
def test_a_job_that_cannot_be_done_says_why(
    options: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("serve_app.cli.launcher.interrupt_on_signals", lambda: None)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.csv").write_text("a\n1\n")
    monkeypatch.chdir(tmp_path / "in")
    result = runner.invoke(main.app, ["dataset", "../in", "-o", "../out", *options])
    assert result.exit_code == {"cannot be reached": 3, "is not an address": 2}.get(said, 1), result.output
    assert said in result.stderr
    assert "Traceback" not in result.stderr


def test_an_installed_package_says_where_the_tools_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tools, "CHECKOUT", tmp_path)
    for command in ("bench", "plan"):
        result = runner.invoke(main.app, [command, "--help"])
        assert result.exit_code == 1
        assert "clone the repository" in result.stderr


def test_a_package_that_is_missing_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch):
    def missing(_: str) -> None:
        raise ModuleNotFoundError("No module named 'libtpu'", name="libtpu")

    monkeypatch.setattr(importlib, "import_module", missing)
    result = runner.invoke(main.app, ["plan", "model"])
    assert result.exit_code == 1
    assert "plan needs libtpu, of the extra 'tpu-compile'" in result.stderr
