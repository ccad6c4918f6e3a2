"""A job's output folder: parts, what is done, and the settings that it was begun with.

Every file appears whole, by a rename. A block is done when its record in ``done/`` is there, which comes last; so a job
that is killed at any point goes on where it stopped, and no row is lost or doubled.
"""

from __future__ import annotations

import json
import os
from collections.abc import Generator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

from filelock import FileLock, Timeout

from serve_app.jobs.files import JobError

_JOB = "job.json"
_SUMMARY = "summary.json"
_SHOWN = 200
"""Characters of a setting that a message repeats."""


@dataclass(frozen=True, slots=True)
class Done:
    """A block's record, and, added up, a job's.

    Attributes:
        rows: scored.
        bad: set aside.
        prompt_tokens: of the rows that were scored.
        cached_tokens: of these, those that did not have to be computed.
    """

    rows: int = 0
    bad: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0

    def __add__(self, other: Done) -> Done:
        return Done(
            self.rows + other.rows,
            self.bad + other.bad,
            self.prompt_tokens + other.prompt_tokens,
            self.cached_tokens + other.cached_tokens,
        )


class JobFolder:
    """Reads and writes one job's output."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._done = path / "done"

    @contextmanager
    def opened(self, job: Mapping[str, Any]) -> Generator[dict[int, Done]]:
        """Yield what is done already, by block, while no other process can use the folder.

        Args:
            job: all that the output depends on, as JSON has it.

        Raises:
            JobError: the folder is in use, is another job's, or cannot be written.
        """
        with ExitStack() as stack:
            try:
                self._done.mkdir(parents=True, exist_ok=True)
                (self.path / "bad").mkdir(exist_ok=True)
                stack.enter_context(FileLock(self.path / ".lock", timeout=0))
                self._begin(json.loads(json.dumps(job, default=str)))
                done = {int(path.stem): Done(**json.loads(path.read_text())) for path in self._done.glob("*.json")}
            except Timeout:
                raise JobError(f"another process writes to {self.path}; wait for it, or name another folder") from None
            except OSError as error:
                raise JobError(f"{error}; see that {self.path} is a folder that can be written to") from error
            yield done

    def part(self, index: int, suffix: str) -> Path:
        """The file of a block's rows that were scored."""
        return self.path / f"part-{index:06d}.{suffix}"

    def bad(self, index: int) -> Path:
        """The file of a block's rows that were set aside, in JSON lines."""
        return self.path / "bad" / f"part-{index:06d}.jsonl"

    def finish_block(self, index: int, done: Done) -> None:
        """Record the block, whose files are there."""
        with appearing(self._done / f"{index:06d}.json") as path:
            path.write_text(json.dumps(asdict(done)))

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Write the job's figures."""
        with appearing(self.path / _SUMMARY) as path:
            path.write_text(json.dumps(summary, indent=1) + "\n")

    def _begin(self, job: dict[str, Any]) -> None:
        path = self.path / _JOB
        if path.exists():
            _refuse_another(job, json.loads(path.read_text()), path)
        elif others := [each.name for each in self.path.iterdir() if each.name not in (".lock", "done", "bad")]:
            raise JobError(f"{self.path} has other files ({', '.join(sorted(others)[:3])}); name a new folder")
        else:
            with appearing(path) as new:
                new.write_text(json.dumps(job, indent=1) + "\n")
        for left in (*self.path.glob("*.tmp"), *self.path.glob("*/*.tmp")):  # by a process that was killed
            left.unlink(missing_ok=True)


@contextmanager
def appearing(path: Path) -> Generator[Path]:
    """A path to write to; the file then appears under its name, whole."""
    work = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    yield work
    work.replace(path)


def _refuse_another(job: dict[str, Any], begun: dict[str, Any], path: Path, within: str = "") -> None:
    for name in dict.fromkeys((*begun, *job)):
        old, new = begun.get(name), job.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            _refuse_another(cast(dict[str, Any], new), cast(dict[str, Any], old), path, f"{within}{name}.")
        elif old != new:
            raise JobError(
                f"{path.parent} was begun with another {within}{name}: {_shown(old)}, and now it is {_shown(new)}; "
                "repeat the command as it was to go on, or name another folder"
            )


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= _SHOWN else text[:_SHOWN] + "..."
