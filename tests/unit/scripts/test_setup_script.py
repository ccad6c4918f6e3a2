"""``scripts/_setup.sh``, which makes ``.venv``, with programs in place of Python that note what they are asked."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Generator
from pathlib import Path

import pytest

from tests.documents import ROOT

PYTHON = """#!/bin/bash
case "$*" in
"-c import os"*) echo {name} ;;
"--version") echo "Python 3.12, {name}" ;;
"-m venv --clear "*) mkdir -p "$4/bin" && cp "$0" "$4/bin/python" ;;
"-m pip --version") ;;
"-m pip install"*) echo {name} >>"{installed}" ;;
esac
"""
NOBODY = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups")


@pytest.fixture
def folder() -> Generator[Path]:
    """A folder that every user may enter; pytest's own is for its user alone."""
    with tempfile.TemporaryDirectory() as made:
        Path(made).chmod(0o755)
        yield Path(made)


@pytest.fixture
def checkout(folder: Path) -> Path:
    """A checkout with the script alone, and two Pythons beside it."""
    made = folder / "checkout"
    (made / "scripts").mkdir(parents=True)
    shutil.copy(ROOT / "scripts" / "_setup.sh", made / "scripts")
    (made / "pyproject.toml").write_text("[project]\n")
    for name in ("one", "two"):
        (folder / name).write_text(PYTHON.format(name=name, installed=folder / "installed"))
        (folder / name).chmod(0o755)
    return made


def set_up(checkout: Path, python: str, *user: str) -> subprocess.CompletedProcess[str]:
    """Set up with this Python, or "" for whichever is found."""
    environment = os.environ | {"PYTHON": str(checkout.parent / python) if python else ""}
    command = [*user, "bash", "-euo", "pipefail", "-c", "source scripts/_setup.sh; set_up"]
    return subprocess.run(command, cwd=checkout, capture_output=True, text=True, env=environment)


def test_another_python_gets_another_environment_and_the_same_none(checkout: Path):
    installed: list[str] = []
    for python, wanted in (("one", ["one"]), ("", []), ("one", []), ("two", ["two"]), ("", []), ("two", [])):
        done = set_up(checkout, python)
        assert done.returncode == 0, done.stderr
        installed += wanted
        assert (checkout.parent / "installed").read_text().split() == installed, f"after {python!r}"


def test_a_checkout_that_cannot_be_written_to_says_so(checkout: Path):
    checkout.chmod(0o555)
    done = set_up(checkout, "one", *(NOBODY if os.geteuid() == 0 else ()))
    assert done.returncode == 1
    assert f"{checkout} cannot be written to by " in done.stderr
    assert "change its rights, or clone" in done.stderr
    assert "python3-venv" not in done.stderr
