"""Reads the finished programs of XLA's operations, which libtpu writes into a folder while it compiles."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from model.cost import Schedule
from scripts.planning.bundles import DUMP_FLAGS, depths

_FLAGS = "LIBTPU_INIT_ARGS"
_OPERAND = re.compile(r"\[shape: (\w+\[[\d,]*\]), index: \d+, kind: input")
_ENTRY = re.compile(r"entry bundle: %?([\w.\-]+) = [\w\-]+\((.*?)\) \*/")


@contextmanager
def finished_programs() -> Iterator[Schedules]:
    """Those of all that this process compiles in this context, which takes some 100 MB of temporary files.

    libtpu reads its flags when it is loaded, by the first call of ``chips.devices``: after that nothing is found.
    """
    before = os.environ.get(_FLAGS)
    with TemporaryDirectory(prefix="schedules-") as folder:
        os.environ[_FLAGS] = " ".join((before or "", f"--xla_jf_dump_to={folder}", *DUMP_FLAGS)).strip()
        try:
            yield Schedules(Path(folder))
        finally:
            del os.environ[_FLAGS]
            if before is not None:
                os.environ[_FLAGS] = before


class Schedules:
    """The finished programs in a folder that libtpu writes them into."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._found: dict[Path, Schedule | None] = {}

    def of(self, name: str, operands: Sequence[str], shapes: Sequence[str]) -> Schedule | None:
        """The bundles of an operation's program, or None: there is no such program, or it has a loop in its loop.

        Args:
            operands: names of the operation's.
            shapes: of these, as the text of a program has them. Several programs have operations of one name.
        """
        for file in sorted(self._folder.glob(f"*-{name}-*final_bundles.txt")):
            with file.open(encoding="utf-8") as text:
                head = next((line for line in text if "entry bundle" in line), "")
            entry = _ENTRY.search(head)
            if entry is None or entry[1] != name:
                continue
            same = re.findall(r"%([\w.\-]+)", re.sub(r"/\*.*?\*/", "", entry[2])) == list(operands)
            if same and _OPERAND.findall(head) == list(shapes):
                if file not in self._found:
                    self._found[file] = _schedule(file)
                return self._found[file]
        return None


def _schedule(file: Path) -> Schedule | None:
    counts = depths(file.read_text(encoding="utf-8"))
    return Schedule(counts[0], counts[1]) if max(counts) <= 1 else None
