"""What is read of a checkpoint's files."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from model.tensors.files import Files


@contextmanager
def bytes_read() -> Iterator[list[int]]:
    """Bytes of every part that is read of a checkpoint's tensors."""
    read: list[int] = []
    original = Files.part

    def counted(self: Any, *what: Any) -> Any:
        values = original(self, *what)
        read.append(values.nbytes)
        return values

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Files, "part", counted)
        yield read
