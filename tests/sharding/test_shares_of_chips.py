"""A replica's chips run as many calls at once as its memory allows, through its settings, on simulated devices."""

import os
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from model import memory, sharding
from model.fields import ConfigError
from model.memory import MemoryNeededError
from model.sharding import mesh, splits
from serve_app.scorer import engines
from serve_app.settings import Limits, ModelSettings
from serve_app.tpu import Tpu
from tests.invariance.rows import TOLERANCE, prompts, values, with_halved_head
from tests.tiny import make_llama


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "judge"
    make_llama(folder, layers=2, heads=8, head_width=6, ff=64, vocab=307, context=384, tokenizer=True)
    return with_halved_head(folder)


def settings(folder: Path, chips: int, data: int | None = None) -> ModelSettings:
    tpu = Tpu(chip="v6e", topology="2x2", chips=chips, data=data)
    return ModelSettings(model=str(folder), tpu=tpu, dtype="float32", limits=Limits(max_prompt_tokens=384))


@pytest.fixture(autouse=True)
def _on_simulated_chips(monkeypatch: pytest.MonkeyPatch) -> None:  # pyright: ignore[reportUnusedFunction]
    def meshes(chips: int, data: int | None = None) -> list[Mesh]:
        return [mesh(*sizes, jax.devices()[:chips]) for sizes in splits(chips, data)]

    monkeypatch.setattr(sharding, "tpu_meshes", meshes)
    for name, value in (("JAX_PLATFORMS", "cpu"), ("LIBTPU_INIT_ARGS", "")):  # which a scorer with chips sets
        monkeypatch.setenv(name, os.environ.get(name, value))


def test_a_model_that_fits_a_chip_runs_on_each_and_scores_as_on_one(folder: Path) -> None:
    one: Any = engines._load_model(settings(folder, 1))  # pyright: ignore[reportPrivateUsage]
    four: Any = engines._load_model(settings(folder, 4))  # pyright: ignore[reportPrivateUsage]
    split: Any = engines._load_model(settings(folder, 4, data=2))  # pyright: ignore[reportPrivateUsage]
    assert (one.info.mesh, four.info.mesh, split.info.mesh) == (None, (4, 1), (2, 2))
    said = engines.memory_line(four.info)
    assert said is not None
    assert "memory: 4 calls at once, each over 1 chips; on each chip weights" in said
    sequences = prompts(40, seed=1, query=0, longest=30)
    wanted = values(one, sequences)
    for scorer in (four, split):
        np.testing.assert_allclose(values(scorer, sequences), wanted, rtol=0, atol=TOLERANCE)


def test_a_model_is_split_over_as_few_chips_as_hold_it_with_its_whole_context() -> None:
    """The more room a chip has, the more calls run at once."""
    context = 4096

    def fitted(room: int) -> Mesh:
        def on(over: Mesh) -> tuple[Mesh, int]:
            left = room - 100 // over.shape["model"]
            if left < 0:
                raise MemoryNeededError("too large")
            return over, min(context, 100 * left)

        return memory.roomiest([mesh(*sizes) for sizes in splits(8)], on, lambda found: found[1])[0]

    chosen = {room: dict(fitted(room).shape) for room in (200, 101, 92, 67, 13)}
    assert chosen == {
        200: {"data": 8, "model": 1},
        101: {"data": 4, "model": 2},
        92: {"data": 4, "model": 2},
        67: {"data": 2, "model": 4},
        13: {"data": 1, "model": 8},
    }
    with pytest.raises(MemoryNeededError, match="too large"):
        fitted(11)


def test_where_it_fits_nowhere_the_lack_of_memory_is_told_before_heads_that_do_not_divide() -> None:
    def refused(over: Mesh) -> None:
        raise ConfigError("heads") if over.shape["model"] > 2 else MemoryNeededError("memory")

    with pytest.raises(MemoryNeededError, match="memory"):
        memory.roomiest([mesh(*sizes) for sizes in splits(8)], refused, lambda _: 0)
    with pytest.raises(ConfigError, match="heads"):
        memory.roomiest([mesh(1, 8)], refused, lambda _: 0)
