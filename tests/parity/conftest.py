"""The CPU's kernels, built for this processor and for older ones."""

import platform
from collections.abc import Iterator
from pathlib import Path

import pytest

from model.cpu import build
from model.cpu.build import Kernels

OTHERS = [pytest.param("x86-64-v3", marks=pytest.mark.slow), "x86-64-v2"]
PROCESSORS = ["native", *(OTHERS if platform.machine() == "x86_64" else [])]
"""Kinds of processors: v3 has AVX2, as most that run these tests; v2 has SSE; neither has bfloat16."""

FLAGS = Path("/proc/cpuinfo").read_text().split() if Path("/proc/cpuinfo").exists() else []


def runs_here(processor: str) -> bool:
    return processor == "native" or {"x86-64-v3": "avx2", "x86-64-v2": "sse4_2"}[processor] in FLAGS


@pytest.fixture(scope="module", params=PROCESSORS)
def kernels(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kernels]:
    """The CPU's kernels, built for one kind of processor, under names of their own."""
    if not runs_here(request.param):
        pytest.skip(f"this processor does not have the instructions of {request.param}")
    with pytest.MonkeyPatch.context() as patch:
        # The compiler is done sooner, and the sources say what is rounded when.
        less = "" if request.param == "native" else "-O1"
        patch.setenv("CXXFLAGS", f"-march={request.param} {less}")
        patch.setattr(build, "PREFIX", f"for_{request.param}_{request.module.__name__}")
        # One folder for all test files and all xdist workers: they need the same builds.
        built = build.register(tmp_path_factory.getbasetemp().parent / "kernels")
        assert built is not None
        yield built
