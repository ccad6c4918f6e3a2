"""The programs that an engine needs."""

from pathlib import Path

import pytest

from model import loading
from model.computations import Kind, definition
from tests.tiny import make_llama


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llama(tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize(("by_layer", "count"), [(True, 74), (False, 42)])
def test_a_warm_up_compiles_each_program_once(folder: Path, by_layer: bool, count: int) -> None:
    """On a CPU with its kernels. Each further program costs every start compile time and 2 MiB of memory."""
    scorer = loading.load(folder, implementation="native", by_layer=by_layer, prefix_cache_bytes=0)
    wanted = scorer._programs.wanted()  # pyright: ignore[reportPrivateUsage]
    assert len(wanted) == len(set(wanted)) == count


def test_every_kind_of_program_is_needed_by_one_of_the_ways_to_run(folder: Path) -> None:
    needed: set[Kind] = set()
    for by_layer in (True, False):
        programs = loading.load(folder, by_layer=by_layer, prefix_cache_bytes=0)._programs  # pyright: ignore[reportPrivateUsage]
        for kind, size in programs.wanted():
            one = definition(programs.model, programs.weights, kind, size)
            assert all(number < len(one.arguments) for number in one.donated)
            needed.add(kind)
    assert needed == set(Kind)
