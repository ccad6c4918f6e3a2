"""Reads the finished programs of XLA's operations, which libtpu writes into a folder while it compiles."""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

from model.cost import Schedule
from scripts.planning.bundles import DUMP_FLAGS

_FLAGS = "LIBTPU_INIT_ARGS"
_NAME = re.compile(r"\d+-(.+)-\d+-final_bundles\.txt")
_ARRAY = re.compile(r"\[shape: (\w+\[[\d,]*\]), index: \d+, kind: (input|output)")
_ENTRY = re.compile(r"entry bundle: %?([\w.\-]+) = [\w\-]+\((.*?)\) \*/")
_BUNDLE = re.compile(r"\s*0x[0-9a-f]+\s+(?:[A-Z]{2})?\s*:\s*(>*)")
_BRANCH = re.compile(r"sbr\.rel \(.*?\) target = \$region(\d+)")
_TARGET = re.compile(r"Start/End empty region (\d+)\b")
_DELAY = 5
"""Bundles from a branch on that run whether it is taken or not."""


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
        self._files: dict[tuple[str, ...], list[Path]] = defaultdict(list)

    def forget(self) -> None:
        """Remove all, before others are compiled whose operations may have the same names."""
        for file in self._folder.iterdir():
            file.unlink()

    def read(self) -> None:
        """Find out which program is which operation's. Nothing may be compiled meanwhile."""
        self._files.clear()
        for file in sorted(self._folder.glob("*final_bundles.txt")):
            if (name := _NAME.fullmatch(file.name)) and (key := _key(file)) and key[0] == name[1]:
                self._files[key].append(file)

    def of(self, name: str, operands: Sequence[str], shapes: Sequence[str]) -> Schedule | None:
        """The bundles of an operation's program; None: there is none, or several that differ, or one with a loop in
        its loop.

        Args:
            name: of the operation; operations of several programs may have the same.
            operands: their names.
            shapes: of these and then of the results, as the text of a program has them.
        """
        found = {_schedule(file) for file in self._files[name, *operands, *shapes]}
        return found.pop() if len(found) == 1 else None


def _key(file: Path) -> tuple[str, ...] | None:
    with file.open(encoding="utf-8") as text:
        head = next((line for line in text if "entry bundle" in line), "")
    if (entry := _ENTRY.search(head)) is None:
        return None
    operands = re.findall(r"%([\w.\-]+)", re.sub(r"/\*.*?\*/", "", entry[2]))
    arrays = _ARRAY.findall(head)
    shapes = [shape for kind in ("input", "output") for shape, of in arrays if of == kind]
    return (entry[1], *operands, *shapes)


@cache
def _schedule(file: Path) -> Schedule | None:
    """A file's bundles, see ``Schedule``: in the loop there is a branch around its trip's work, and a branch in that
    around what only the last step of a part of the result needs."""
    once, loop, branches, targets = 0, 0, list[tuple[int, str]](), dict[str, int]()
    for line in file.read_text(encoding="utf-8").splitlines():
        if not (bundle := _BUNDLE.match(line)):
            continue
        if len(bundle[1]) > 1:
            return None
        if not bundle[1]:
            once += 1
            continue
        targets |= dict.fromkeys(_TARGET.findall(line), loop)
        branches += [(loop + _DELAY, target) for target in _BRANCH.findall(line)]
        loop += 1
    spans = [(start, targets[target]) for start, target in branches if targets.get(target, 0) > start]
    inner = {
        bundle
        for start, end in spans
        if any(first < start and end <= last for first, last in spans)
        for bundle in range(start, end)
    }
    return Schedule(once, loop - len(inner), len(inner))
