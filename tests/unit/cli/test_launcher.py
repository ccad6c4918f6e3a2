"""The launcher's parts that need no Ray, and the command line's messages about user errors."""

from __future__ import annotations

import logging
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from ray import serve
from ray.serve.schema import ApplicationStatus
from typer.testing import CliRunner

from model.cpu import build
from serve_app import __version__, local_ray, model_source
from serve_app.cli import launcher, main
from serve_app.cli.launcher import LaunchError
from serve_app.errors import SelfTestError
from serve_app.frontend import auth
from serve_app.schemas import parse
from serve_app.scorer import engines
from serve_app.settings import ModelSettings, ServiceSettings
from serve_app.tasks.checkpoint_files import CheckpointFiles
from serve_app.tasks.profile_choice import choose_profile
from serve_app.tasks.score import SCORE
from serve_app.tasks.tokenizer import TextTokenizer
from tests.tiny import make_llama
from tests.tiny_encoders import make_encoder
from tests.tiny_heads import make_decision2

SERVE_MESSAGE = """The deployment failed to start 1 times in a row. Error:
\x1b[36mray::ServeReplica:score:Scorer.initialize()\x1b[39m (pid=1)
  File "replica.py", line 1, in initialize
    raise ValueError("inner")
ValueError: inner

The above exception was the direct cause of the following exception:

Traceback (most recent call last):
  File "checkpoint.py", line 9, in load
model.checkpoint.CheckpointError: 2 tensors do not fit the model:
  missing: lm_head.weight
  unexpected: extra.weight"""


def test_the_reason_is_the_last_error_whole_and_without_a_traceback():
    assert local_ray.reason(SERVE_MESSAGE) == (
        "CheckpointError: 2 tensors do not fit the model:\n  missing: lm_head.weight\n  unexpected: extra.weight"
    )
    assert local_ray.reason("no error is named here ") == "no error is named here"


@pytest.mark.parametrize("address", ["127.0.0.1:{port}", "ray://127.0.0.1:{port}", "no-such-host.invalid:6379"])
def test_a_ray_address_where_nothing_answers_is_an_error_that_names_it(address: str, monkeypatch: pytest.MonkeyPatch):
    address = address.format(port=local_ray.free_port())
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(ConnectionError, match=f"nothing answers at RAY_ADDRESS={address}"):
        local_ray.join_ray()


def test_the_command_line_asks_for_longer_prompts_and_more_pages(monkeypatch: pytest.MonkeyPatch):
    got: list[ServiceSettings] = []
    monkeypatch.setattr(launcher, "run", lambda settings, **_: got.append(settings))
    asked = ["serve", "--max-prompt-tokens", "32768", "--prefix-cache-gb", "1.5"]
    for words in (["serve"], asked):
        assert CliRunner().invoke(main.app, words).exit_code == 0
    models = [service.models[0] for service in got]
    assert [(each.limits.max_prompt_tokens, each.prefix_cache_gb) for each in models] == [(None, None), (32_768, 1.5)]


def test_a_taken_port_is_named_with_the_remedy():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(LaunchError, match=rf"127\.0\.0\.1:{port} .*--port"):
            launcher.check_port("127.0.0.1", port)
    launcher.check_port("127.0.0.1", port)


def test_an_address_of_another_machine_is_named_with_the_remedy():
    for host in ("192.0.2.1", "no-such-host.invalid"):
        with pytest.raises(launcher.LaunchError, match=f"cannot listen on {host}:.*choose a --host"):
            launcher.check_port(host, 8000)


def test_the_version_and_the_short_help():
    assert CliRunner().invoke(main.app, ["--version"]).stdout == f"score-serve {__version__}\n"
    for words in (["-h"], ["serve", "-h"], ["score", "-h"]):
        assert "Usage:" in CliRunner().invoke(main.app, words).stdout


def test_a_full_disk_is_named_with_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    launcher.check_disk(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=2**29))
    with pytest.raises(LaunchError, match=r"0\.5 GiB free and Ray needs 2.*TMPDIR"):
        launcher.check_disk(tmp_path)


def test_log_lines_follow_several_scorers_and_wait_for_whole_lines(tmp_path: Path):
    first, second = tmp_path / "replica_score_Scorer_a.log", tmp_path / "replica_score_Scorer_b.log"
    (tmp_path / "replica_score_Ingress_c.log").write_text("INFO -- not this one\n")
    lines = launcher.log_lines(tmp_path)
    assert next(lines) is None
    first.write_text("INFO 2026 score -- warming up, 1 of 2: 4x256\na traceback's line\nINFO 2026 score -- half a")
    second.write_text("INFO 2026 score -- loading\n")
    assert [next(lines), next(lines), next(lines)] == ["warming up, 1 of 2: 4x256", "loading", None]
    with first.open("a") as file:
        file.write(" line\n")
    assert [next(lines), next(lines)] == ["half a line", None]


def test_log_lines_of_several_models_name_theirs(tmp_path: Path):
    (tmp_path / "replica_score_Scorer-my_judge.v1_x7f3k2.log").write_text("INFO 2026 score -- loading\n")
    assert next(launcher.log_lines(tmp_path)) == "my_judge.v1: loading"


def test_what_the_model_package_warns_of_is_a_line_that_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Such as that there is no C++ compiler. Serve's replicas write the logger ray.serve to their log."""
    log = tmp_path / "replica_score_Scorer_a.log"
    handler = logging.FileHandler(log)
    handler.setFormatter(logging.Formatter("%(levelname)s %(asctime)s score -- %(message)s"))
    serve_logger = logging.getLogger("ray.serve")
    serve_logger.addHandler(handler)
    monkeypatch.setenv("CXX", "/no/such/compiler")
    try:
        assert engines.logger is serve_logger
        assert build.register(None) is None
    finally:
        serve_logger.removeHandler(handler)
        handler.close()
    (line,) = [line for line in log.read_text().splitlines() if "kernels" in line]
    assert line.startswith("WARNING")
    said = next(launcher.log_lines(tmp_path))
    assert said
    assert said.startswith("warning: layers run as XLA's matmuls alone")
    assert "Install a C++20 compiler" in said
    assert any(word in said for word in launcher.KEPT)


def application(status: ApplicationStatus, message: str = "", deployment: str = "") -> Any:
    deployments = {"Scorer": SimpleNamespace(message=deployment)}
    app = SimpleNamespace(status=status, message=message, deployments=deployments)
    return lambda: SimpleNamespace(applications={local_ray.APP_NAME: app})


def test_waiting_ends_when_the_service_can_score(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "replica_score_Scorer_a.log").write_text("INFO -- loading\n")
    monkeypatch.setattr(serve, "status", application(ApplicationStatus.RUNNING))
    answers = [httpx.ConnectError("not yet"), httpx.Response(503), httpx.Response(200)]

    def get(_url: str, **_: Any) -> httpx.Response:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(httpx, "get", get)
    said: list[str] = []
    launcher.wait_until_ready("http://service", tmp_path, said.append)
    assert (said, answers) == (["loading"], [])


@pytest.mark.parametrize(
    ("state", "why"),
    [
        (application(ApplicationStatus.DEPLOYING, deployment=SERVE_MESSAGE), "CheckpointError: 2 tensors"),
        (application(ApplicationStatus.DEPLOY_FAILED, message="no room"), "no room"),
        (application(ApplicationStatus.UNHEALTHY, message="it died"), "it died"),
    ],
)
def test_waiting_ends_with_the_reason_when_the_service_cannot_start(
    state: Any, why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(serve, "status", state)
    with pytest.raises(LaunchError, match=f"did not start: {why}"):
        launcher.wait_until_ready("http://service", tmp_path, print)


def test_waiting_ends_with_the_reason_when_a_model_fails_its_self_test(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(serve, "status", application(ApplicationStatus.RUNNING))
    error = SelfTestError("judge is not ready: 5 different prompts all scored [0]")
    monkeypatch.setattr(httpx, "get", lambda *_, **__: httpx.Response(error.status, json=error.body()))
    with pytest.raises(LaunchError, match="did not start: judge is not ready: 5 different prompts"):
        launcher.wait_until_ready("http://service", tmp_path, print)


@pytest.mark.parametrize(
    ("make", "path"),
    [
        (make_llama, "/v1/score"),
        (partial(make_encoder, kind="bert"), "/classify"),
        (make_decision2, "/v1/systemone"),
    ],
)
def test_the_example_is_a_request_that_the_model_answers(
    make: Callable[[Path], Any], path: str, tmp_path: Path, tokenizer: TextTokenizer
):
    make(tmp_path)
    settings = ModelSettings(model=str(tmp_path))
    profile = choose_profile(settings, tokenizer, None, tmp_path)
    task = launcher.example_task(CheckpointFiles(settings.model, tmp_path), profile)
    command = launcher.example(task, "http://127.0.0.1:8000")
    assert command.startswith(f"curl http://127.0.0.1:8000{path} ")
    body = command.split("-d '")[1].rstrip().rstrip("'")
    assert parse(task.request, body.encode())


def test_the_example_takes_the_key_from_the_shell_where_one_is_needed():
    header = '-H "Authorization: Bearer $SCORE_SERVE_API_KEY"'
    assert header in launcher.example(SCORE, "http://127.0.0.1:8000", needs_key=True)
    assert header not in launcher.example(SCORE, "http://127.0.0.1:8000")


@pytest.mark.parametrize(
    ("host", "loopback"),
    [("127.0.0.1", True), ("127.3.2.1", True), ("localhost", True), ("::1", True), ("0.0.0.0", False), ("::", False)],
)
def test_loopback(host: str, loopback: bool):
    assert launcher.is_loopback(host) is loopback


@pytest.mark.parametrize(
    ("host", "key", "warned"), [("0.0.0.0", "", True), ("0.0.0.0", "a-key", False), ("127.0.0.1", "", False)]
)
def test_a_service_open_to_the_network_without_a_key_gets_a_warning(
    host: str, key: str, warned: bool, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    def stop(_: Path) -> None:
        raise LaunchError("far enough")

    monkeypatch.setenv(auth.VARIABLE, key)
    monkeypatch.setattr(launcher, "check_port", lambda *_: None)
    monkeypatch.setattr(launcher, "check_disk", stop)
    monkeypatch.setattr(launcher, "interrupt_on_signals", lambda: None)
    with pytest.raises(LaunchError, match="far enough"):
        launcher.run(ServiceSettings(), host=host, port=8000)
    assert ("there is no API key" in capfd.readouterr().err) is warned


def test_unusable_api_keys_stop_the_start(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    result = run("--api-keys-file", str(tmp_path / "nothing"))
    assert result.exit_code == 1
    output = result.stderr + capfd.readouterr().err
    assert "the file of API keys" in output
    assert "Traceback" not in output


def test_sigterm_and_sighup_interrupt_as_ctrl_c_does():
    before, hook = [signal.getsignal(each) for each in launcher.STOPPING], sys.unraisablehook
    try:
        launcher.interrupt_on_signals()
        for each in launcher.STOPPING:
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(each)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as under nohup
        launcher.interrupt_on_signals()
        signal.raise_signal(signal.SIGHUP)
    finally:
        sys.unraisablehook = hook
        for each, handler in zip(launcher.STOPPING, before, strict=True):
            signal.signal(each, handler)


def test_an_interrupt_where_python_ignores_exceptions_is_not_lost():
    """It comes in a finalizer, or after a fork; Ray's start has many."""
    program = """
import os, signal, sys, time
from serve_app.cli import launcher

class Finalized:
    def __del__(self):
        signal.raise_signal(signal.SIGTERM)

launcher.interrupt_on_signals()
number = signal.SIGHUP
os.register_at_fork(after_in_parent=lambda: signal.raise_signal(number))

def interrupt(ignored):
    try:
        made = ignored()
        if made == 0:
            os._exit(0)
        del made
        time.sleep(60)
    except KeyboardInterrupt:
        print("interrupted")

interrupt(Finalized)
interrupt(os.fork)
number = signal.SIGTERM
interrupt(Finalized)
interrupt(os.fork)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "interrupted\n" * 4
    assert done.stderr == ""


def run(*arguments: str) -> Any:
    return CliRunner().invoke(main.app, ["serve", *arguments])


def test_options_become_settings(monkeypatch: pytest.MonkeyPatch):
    got: list[Any] = []
    monkeypatch.setattr(launcher, "run", lambda settings, **address: got.append((settings, address)))
    arguments = ["--model", "org/name", "--revision", "abc", "--served-name", "judge", "--dtype", "bfloat16"]
    arguments += ["--base", "org/base"]
    arguments += ["--engine", "fake", "--port", "9000", "--replicas", "2", "--api-keys-file", "/a", "--no-fast-front"]
    arguments += ["--access-log"]
    arguments += ["--trust-config", "a", "--trust-config", "b"]
    assert run(*arguments).exit_code == 0
    model = ModelSettings(
        model="org/name",
        revision="abc",
        base="org/base",
        served_name="judge",
        trust_config=("a", "b"),
        dtype="bfloat16",
        engine="fake",
        scorer_replicas=2,
    )
    settings = ServiceSettings(models=(model,), api_keys_file="/a")
    assert got == [(settings, {"host": "127.0.0.1", "port": 9000, "fast_front": False, "access_log": True})]


def test_without_options_the_settings_are_the_defaults(monkeypatch: pytest.MonkeyPatch):
    got: list[ServiceSettings] = []
    monkeypatch.setattr(launcher, "run", lambda settings, **_: got.append(settings))
    assert run().exit_code == 0
    assert got == [ServiceSettings()]


def test_several_models_share_the_options_and_have_names(monkeypatch: pytest.MonkeyPatch):
    got: list[ServiceSettings] = []
    monkeypatch.setattr(launcher, "run", lambda settings, **_: got.append(settings))
    arguments = ["--model", "org/name", "--model", "judge=/a/b=c", "--model", "/d=e/f", "--replicas", "2"]
    assert run(*arguments).exit_code == 0
    assert [(each.name, each.model, each.scorer_replicas) for each in got[0].models] == [
        ("name", "org/name", 2),
        ("judge", "/a/b=c", 2),
        ("f", "/d=e/f", 2),
    ]
    assert run("--model", "judge=demo").exit_code == 0
    assert [(each.name, each.model) for each in got[1].models] == [("judge", "demo")]


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--model", "a", "--model", "b", "--served-name", "c"], 2, "NAME=MODEL"),
        (["--model", "a", "--model", "b", "--revision", "c"], 2, "NAME=MODEL"),
        (["--model", "a", "--model", "b", "--base", "c"], 2, "NAME=MODEL"),
        (["--model", "a", "--model", "b", "--trust-config", "c"], 2, "NAME=MODEL"),
        (["--model", "a=b", "--served-name", "c"], 2, "has a name already"),
        (
            ["--model", "a/x", "--model", "b/x"],
            1,
            "'a/x' and 'b/x' are both named 'x'; give one of them another name: NAME=",
        ),
    ],
)
def test_models_with_equal_names_are_refused(arguments: list[str], code: int, said: str):
    result = CliRunner(env={"COLUMNS": "300"}).invoke(main.app, ["serve", *arguments])
    assert result.exit_code == code, result.output
    assert said in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("kind", ["none", "pointer", "small"])
def test_a_model_without_a_usable_tokenizer_is_a_line_before_anything_starts(
    kind: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    folder = make_llama(tmp_path / "m", layers=1, vocab=600 if kind == "small" else 271, tokenizer=True)
    if kind == "none":
        (folder / "tokenizer.json").unlink()
    if kind == "pointer":
        (folder / "tokenizer.json").write_text("version https://git-lfs.github.com/spec/v1\n")
    result = run("--model", str(folder), "--port", str(local_ray.free_port()))
    assert result.exit_code == 1
    output = result.stderr + capfd.readouterr().err
    said = {"none": "it has no tokenizer.json", "pointer": "git lfs pull", "small": "271 tokens"}
    assert said[kind] in output
    assert str(folder) in output
    assert "Traceback" not in output
    assert "starting Ray" not in output


@pytest.mark.parametrize(
    ("error", "code"),
    [(LaunchError("why [it] failed"), 1), (model_source.ModelSourceError("no model"), 1), (KeyboardInterrupt(), 130)],
)
def test_user_errors_are_a_line_and_an_exit_code(
    error: BaseException, code: int, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(launcher, "run", fail)
    result = run()
    assert result.exit_code == code
    output = result.stderr + capfd.readouterr().err
    assert "Traceback" not in output
    if code == 1:
        assert f"error: {error}" in output
