"""The programs that an engine needs."""

from pathlib import Path

import pytest
from safetensors.numpy import save_file

from model import loading
from model.computations import Kind, definition
from tests.tiny import make_llama
from tests.tiny_heads import pointer_head


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llama(tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize(("by_layer", "count"), [(True, 74), (False, 42)])
def test_a_warm_up_compiles_each_program_once(folder: Path, by_layer: bool, count: int) -> None:
    """On a CPU with its kernels. Each further program costs every start compile time and 2 MiB of memory."""
    scorer = loading.load(folder, implementation="native", by_layer=by_layer, prefix_cache_bytes=0)
    wanted = scorer._programs.wanted()  # pyright: ignore[reportPrivateUsage]
    assert len(wanted) == len(set(wanted)) == count


def test_every_kind_of_program_is_needed_by_one_of_the_ways_to_run(folder: Path, tmp_path: Path) -> None:
    needed: set[Kind] = set()
    decides = make_llama(tmp_path / "decides")
    save_file(pointer_head(48), decides / "decision_head.safetensors")
    for own, by_layer in ((folder, True), (folder, False), (decides, True)):
        programs = loading.load(own, by_layer=by_layer, prefix_cache_bytes=0)._programs  # pyright: ignore[reportPrivateUsage]
        for kind, size in programs.wanted():
            one = definition(programs.model, programs.weights, kind, size)
            assert all(number < len(one.arguments) for number in one.donated)
            needed.add(kind)
    assert needed == set(Kind)
