"""System limits that would end Ray with a native stack trace are reported before Ray starts."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from serve_app import control_groups
from serve_app.cli import process_limits
from serve_app.cli.process_limits import LimitError

NOBODY = 65_534


def start(limit: str) -> subprocess.CompletedProcess[str]:
    """Run ``score-serve serve`` under a limit, with a missing model: it ends before it starts anything."""
    command = [sys.executable, "-c", "from serve_app.cli.main import main; main()", "serve", "--engine", "fake"]
    return subprocess.run(
        ["prlimit", limit, *command, "--port", "18123", "--model", "/no/such/model"],
        capture_output=True,
        text=True,
    )


def test_too_few_open_files_are_named_with_the_need_and_the_remedy():
    ended = start("--nofile=120:120")
    assert ended.returncode == 1
    assert "error: a process may have 120 open files here (ulimit -Hn), and the service needs" in ended.stderr
    assert "LimitNOFILE" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_a_low_soft_limit_of_open_files_is_raised():
    ended = start("--nofile=120:9000")
    assert "no/such/model" in ended.stderr  # the check of the model comes later


def test_the_limit_that_ray_gets_is_the_hard_one():
    code = "import resource; from serve_app.cli import process_limits; process_limits.check(2, 2)"
    code += "; print(resource.getrlimit(resource.RLIMIT_NOFILE))"
    ended = subprocess.run(
        ["prlimit", "--nofile=120:9000", sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert ended.stdout.strip() == "(9000, 9000)"


def checked_as_nobody(soft: int, hard: int) -> subprocess.CompletedProcess[str]:
    """Run the check under a limit of processes. It does not apply to root, who first becomes another user."""
    code = f"""
import os, resource
from serve_app.cli import process_limits
resource.setrlimit(resource.RLIMIT_NPROC, ({soft}, {hard}))
process_limits.check(2, 2) if os.geteuid() == 0 else None
os.setuid({NOBODY}) if os.geteuid() == 0 else None
process_limits.check(2, 2)
print(resource.getrlimit(resource.RLIMIT_NPROC))
"""
    # No coverage: the other user cannot write its file.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("COVERAGE_")}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)


def test_too_few_processes_are_named_with_the_need_and_the_remedy():
    said = checked_as_nobody(300, 300).stderr.splitlines()[-1]
    assert "LimitError: 300 processes and threads are allowed here" in said
    assert f"needs about {process_limits.needed_tasks(2, 2)}" in said
    assert "`ulimit -u`" in said
    assert checked_as_nobody(300, 90_000).stdout.strip() == "(90000, 90000)"


def test_a_control_groups_limit_is_found_at_any_level(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(control_groups, "GROUPS", tmp_path)
    process_limits.check(2, 2)
    (tmp_path / "pids.max").write_text("max\n")
    (tmp_path / "pids.current").write_text("10\n")
    process_limits.check(2, 2)
    (tmp_path / "pids.max").write_text("100\n")
    with pytest.raises(LimitError, match=r"^100 processes .* 90 more than there are, .*podPidsLimit"):
        process_limits.check(2, 2)


def test_the_need_grows_with_replicas_and_cpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(control_groups, "GROUPS", tmp_path)
    (tmp_path / "pids.current").write_text("0\n")
    (tmp_path / "pids.max").write_text(f"{process_limits.needed_tasks(2, 2)}\n")
    process_limits.check(2, 2)
    for replicas, cpus in ((3, 2), (2, 3)):
        with pytest.raises(LimitError):
            process_limits.check(replicas, cpus)
