"""``score-serve doctor`` finds what stops a service here, and names the remedy."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
from typer.testing import CliRunner

from serve_app.cli import doctor, main, process_limits
from serve_app.frontend import auth
from serve_app.local_ray import free_port

runner = CliRunner(env={"COLUMNS": "200", auth.VARIABLE: None})


def test_on_a_sound_machine_every_line_says_right(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SCORE_SERVE_CACHE", str(tmp_path))
    monkeypatch.setattr(doctor, "DEVICES", tmp_path)
    result = runner.invoke(main.app, ["doctor", "--port", str(free_port())])
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["right"] * 8
    named = [line.split("right", 1)[1].strip() for line in lines]
    for what, line in zip(
        ("limits", "compiler", "memory", "disk", "cache", "port", "devices", "API"), named, strict=True
    ):
        assert line.startswith(what)


def test_a_taken_port_is_wrong_and_an_open_address_is_warned_of():
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        result = runner.invoke(main.app, ["doctor", "--host", "0.0.0.0", "--port", port])
    assert result.exit_code == 1
    assert "choose another --port" in result.stdout
    assert "warning  API keys  none, and 0.0.0.0 is open to the network" in result.stdout


def test_keys_that_cannot_be_read_are_wrong(tmp_path: Path):
    assert doctor.keys(tmp_path / "none", "127.0.0.1").state == "wrong"
    (tmp_path / "keys").write_text("a-key\nanother\n")
    assert doctor.keys(tmp_path / "keys", "0.0.0.0") == doctor.Finding("API keys", "right", "2")


@pytest.mark.parametrize(
    ("program", "said"),
    [("/no/such/c++", "cannot be run (No such file or directory)"), ("false", "does not know C++20")],
)
def test_without_a_compiler_a_processor_is_slow(program: str, said: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CXX", program)
    found = doctor.compiler()
    assert found.state == "warning"
    assert said in found.said
    assert "install g++" in found.said


def test_limits_and_memory_that_are_too_low(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(process_limits, "_group_room", lambda: iter([(10, 100, "TasksMax of a systemd unit")]))
    assert doctor.limits(1).state == "wrong"
    assert "TasksMax" in doctor.limits(1).said
    monkeypatch.setattr(doctor.host_memory, "free_bytes", lambda: 2**30)
    assert (doctor.memory().state, "1.0 GiB are free" in doctor.memory().said) == ("wrong", True)


def test_a_cache_that_others_may_write_to_is_warned_of(tmp_path: Path):
    assert doctor.cache(tmp_path / "new" / "one").state == "right"
    tmp_path.chmod(0o777)
    assert doctor.cache(tmp_path).state == "warning"
    assert f"chmod go-w {tmp_path}" in doctor.cache(tmp_path).said


def test_a_device_that_jax_cannot_use_is_named_with_its_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(doctor, "DEVICES", tmp_path)
    (tmp_path / "nvidia0").touch()
    monkeypatch.setattr(doctor, "find_spec", lambda _: None)
    assert doctor.devices().state == "warning"
    assert "NVIDIA card" in doctor.devices().said
    assert "pip install '.[cuda]'" in doctor.devices().said
    monkeypatch.setattr(doctor, "find_spec", lambda name: name == "jax_cuda12_plugin")
    assert doctor.devices().state == "right"
