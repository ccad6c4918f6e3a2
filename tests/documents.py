"""The examples of the documentation: they are run, and the answers that follow them are compared.

A ``python`` block is run, and a ``sh`` block with one of ``COMMANDS``: as a user runs them, in a process of their own
and in a folder that is not the checkout and has a copy of ``examples/``. A ``json`` or ``text`` block that follows is
the output.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
FILES = [
    "README.md",
    *(
        f"docs/{name}.md"
        for name in (
            "quickstart",
            "api",
            "recipes",
            "decisions",
            "logprobs",
            "migration",
            "clients",
            "jobs",
            "security",
        )
    ),
    "clients/python/README.md",
]
ADDRESS = "http://127.0.0.1:8000"
COMMANDS = ("curl", "score-serve", "scripts/score_dataset", "cut", "key=")
"""What a block begins with, after lines that install."""
INSTALLED = {"scripts/score_dataset": "score-serve dataset", ".venv/bin/": ""}
"""What the tests have installed, and run by its name."""
CHANGING = {
    "free_bytes",
    "workspace_bytes",
    "id",
    "created",
    "release_date",
    "cached_tokens",
    "x_cached_tokens",
    "version",
    "buckets",
    "max_queued_tokens",
}
"""Fields that have other values each time, or on each machine."""
TOLERANCE = 1e-3
"""Relative difference of a number in JSON: logprobs differ by at most 1e-4 between machines."""
LAST_DIGIT = 1.1e-4
"""Difference of a number with four decimals in a line of text."""

_FENCED = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Example:
    """A block to run, and the answer that the document shows, if any."""

    name: str
    language: str
    code: str
    shown: str | None

    @property
    def starts_ray(self) -> bool:
        """Whether it is a data set job as a command."""
        return self.language == "sh" and "dataset" in self.code


def examples() -> Iterator[Example]:
    """All examples that can be run, in the documents' order."""
    for file in FILES:
        text = (ROOT / file).read_text()
        blocks = list(_FENCED.finditer(text))
        for block, following in zip(blocks, [*blocks[1:], None], strict=True):
            language, code = block.groups()
            code = re.sub(r"^pip install .*\n", "", code)
            if not (language == "python" or (language == "sh" and code.startswith(COMMANDS))):
                continue
            line = text.count("\n", 0, block.start()) + 1
            shown = following[2] if following and following[1] in ("json", "text") else None
            yield Example(f"{file}:{line}", language, code, shown)


def run(example: Example, url: str, folder: Path, **environment: str) -> str:
    """Run the example against the service at ``url``, in ``folder``. Returns its output."""
    code = example.code.replace(ADDRESS, url)
    if not (folder / "examples").exists():
        shutil.copytree(ROOT / "examples", folder / "examples")
    if example.language == "python":
        command = [sys.executable, "-c", code]
    else:
        for own, installed in INSTALLED.items():
            code = code.replace(own, installed)
        if "score-serve" in code and url not in code:
            code = f"{code.rstrip()} --url {url}"  # in place of the default
        command = ["bash", "-euo", "pipefail", "-c", code.replace("curl ", "curl -sS ", 1)]
    environment |= {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    found = [os.environ.get("PYTHONPATH"), str(ROOT / "clients" / "python")]
    environment |= {"PYTHONPATH": os.pathsep.join(filter(None, found))}
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env=os.environ | environment, cwd=folder
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def check(printed: str, shown: str) -> None:
    """Check that the output is what the document shows, except for the last digits of numbers."""
    try:
        same(json.loads(printed), json.loads(shown))
    except json.JSONDecodeError:  # lines of text, or of JSON
        printed_lines, shown_lines = printed.strip().splitlines(), shown.strip().splitlines()
        assert len(printed_lines) == len(shown_lines), printed
        for one, other in zip(printed_lines, shown_lines, strict=True):
            with contextlib.suppress(json.JSONDecodeError):
                same(json.loads(one), json.loads(other))
                continue
            same(_parts(one), _parts(other), absolute=LAST_DIGIT)


def _parts(line: str) -> list[Any]:
    """The words and numbers of a line."""
    found = re.findall(r"-?\d+\.\d+|[^\s\d]+|\d+", line)
    return [float(part) if re.fullmatch(r"-?\d+\.\d+", part) else part for part in found]


def same(printed: Any, shown: Any, where: str = "", absolute: float = 0.0) -> None:
    """Raise AssertionError if two answers differ, except in ``CHANGING`` fields."""
    if isinstance(shown, float) and isinstance(printed, int | float):
        near = math.isclose(printed, shown, rel_tol=TOLERANCE, abs_tol=absolute)
        assert near, f"{where}: {printed}, and the document shows {shown}"
    elif isinstance(shown, dict):
        assert isinstance(printed, dict), where
        assert printed.keys() == shown.keys(), where
        for key in shown.keys() - CHANGING:
            same(printed[key], shown[key], f"{where}.{key}", absolute)
    elif isinstance(shown, list):
        assert isinstance(printed, list), where
        assert len(printed) == len(shown), where
        for index, (one, other) in enumerate(zip(printed, shown, strict=True)):
            same(one, other, f"{where}[{index}]", absolute)
    else:
        assert printed == shown, where
