"""The checks of a device, run on this machine's processors in place of one; and their commands without one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from typer.testing import CliRunner

from model import device_check
from serve_app.cli import main
from serve_app.scorer import device_report
from serve_app.scorer.device_report import NoDeviceError, report
from serve_app.settings import Limits, ModelSettings
from tests.tiny import make_llama

runner = CliRunner(env={"COLUMNS": "200"})


@pytest.fixture(autouse=True)
def _platform(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")  # which a check sets


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> ModelSettings:
    folder = make_llama(tmp_path_factory.mktemp("model"), layers=1)
    return ModelSettings(model=str(folder), limits=Limits(max_prompt_tokens=64))


@pytest.mark.heavy
@pytest.mark.slow
def test_the_report_compares_attention_and_times_every_program(
    settings: ModelSettings, monkeypatch: pytest.MonkeyPatch
):
    said: list[str] = []
    found = report("cpu", settings, said.append)
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert found["right"] is True
    assert {tuple(each["prefix_tokens"]) for each in found["attention"]} == set(device_check.PREFIXES)
    assert all(each["difference"] < each["allowed"] for each in found["attention"])
    names = [each["program"] for each in found["programs"]]
    assert len(names) == len(set(names)) > 10
    assert all(each["ms"] > 0 and each["expected_ms"] is None for each in found["programs"])
    assert (found["platform"], found["dtype"], found["versions"]["jax"]) == ("cpu", "float32", jax.__version__)
    assert said[-1].startswith(f"{len(names)} of {len(names)} programs: ")

    monkeypatch.setattr(device_report, "report", lambda *_: {**found, "right": False})
    result = runner.invoke(main.app, ["tpu-check", "--model", settings.model, "--max-prompt-tokens", "64"])
    assert result.exit_code == 1
    assert json.loads(result.stdout) == {**found, "right": False}
    assert "attention computes wrong values on this device" in result.stderr


@pytest.mark.parametrize(("command", "device"), [("tpu-check", "TPU"), ("gpu-check", "GPU")])
def test_without_such_a_device_a_check_says_so(command: str, device: str):
    env = {name: value for name, value in os.environ.items() if name != "JAX_PLATFORMS"}
    script = f"import sys; sys.argv = ['score-serve', '{command}']; from serve_app.cli.main import main; main()"
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=env, check=False)
    assert found.returncode == 1
    assert found.stdout == ""
    told = " ".join(found.stderr.split())
    assert "jax cannot use a TPU here: " in told if device == "TPU" else "jax found only cpu here, no GPU" in told
    assert f"it takes a machine with one, {'libtpu' if device == 'TPU' else 'CUDA'}" in told


def test_jax_that_found_another_device_is_named(settings: ModelSettings):
    with pytest.raises(NoDeviceError, match="jax found only cpu here, no GPU"):
        report("gpu", settings, print)


@pytest.mark.parametrize("command", ["tpu-check", "gpu-check"])
def test_the_checks_help_says_what_they_print(command: str):
    result = runner.invoke(main.app, [command, "--help"])
    assert result.exit_code == 0
    assert "--max-prompt-tokens" in result.stdout
    assert "For example" in result.stdout
    assert device_report.ASKED.keys() == {"tpu", "gpu", "cpu"}


def test_a_model_that_is_not_there_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(device_report, "report", lambda _, *given: report("cpu", *given))
    result = runner.invoke(main.app, ["gpu-check", "--model", str(tmp_path / "nothing")])
    assert result.exit_code == 1
    assert result.stdout == ""
    assert "nothing" in result.stderr
