"""A job's output folder: the parts, a record of each finished block, and the settings that the job began with.

Every file is written under a temporary name and then renamed, so it is complete when it appears. A block's record in
``done/`` is written last. A job that is killed at any point therefore resumes where it stopped, and no row is lost or
doubled.
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
"""Most characters of a setting in an error message."""


@dataclass(frozen=True, slots=True)
class Done:
    """What was done in a block, or the sum over blocks.

    Attributes:
        rows: rows that were scored.
        bad: rows that were set aside.
        prompt_tokens: tokens of the scored rows' prompts.
        cached_tokens: prompt tokens that came from the prefix cache.
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
        """Lock the folder, and yield what is already done, by block.

        Args:
            job: everything that the output depends on, as JSON values.

        Raises:
            JobError: the folder is in use, belongs to another job, or cannot be written.
        """
        with ExitStack() as stack:
            try:
                self._done.mkdir(parents=True, exist_ok=True)
                (self.path / "bad").mkdir(exist_ok=True)
                stack.enter_context(FileLock(self.path / ".lock", timeout=0))
                self._begin(json.loads(json.dumps(job, default=str)))
                done = {int(path.stem): Done(**json.loads(path.read_text())) for path in self._done.glob("*.json")}
            except Timeout:
                raise JobError(
                    f"another process is writing to {self.path}; wait for it, or name another folder"
                ) from None
            except OSError as error:
                raise JobError(f"{error}; make sure that {self.path} is a folder that can be written to") from error
            yield done

    def part(self, index: int, suffix: str) -> Path:
        """The path of a block's scored rows."""
        return self.path / f"part-{index:06d}.{suffix}"

    def bad(self, index: int) -> Path:
        """The path of a block's rows that were set aside, in JSON lines."""
        return self.path / "bad" / f"part-{index:06d}.jsonl"

    def finish_block(self, index: int, done: Done) -> None:
        """Record that the block is done; its other files must exist."""
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
            raise JobError(f"{self.path} contains other files ({', '.join(sorted(others)[:3])}); name a new folder")
        else:
            with appearing(path) as new:
                new.write_text(json.dumps(job, indent=1) + "\n")
        for left in (*self.path.glob("*.tmp"), *self.path.glob("*/*.tmp")):  # left by a process that was killed
            left.unlink(missing_ok=True)


@contextmanager
def appearing(path: Path) -> Generator[Path]:
    """Yield a temporary path to write to, and rename it to ``path`` afterwards."""
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
                f"{path.parent} was started with {within}{name} = {_shown(old)}, and this job has {_shown(new)}; "
                "repeat the original command to resume, or name another folder"
            )


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= _SHOWN else text[:_SHOWN] + "..."
