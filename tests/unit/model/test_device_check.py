"""A start finds a kernel that computes wrong values: planted here in the TPU's kernel, interpreted."""

from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from model import attention, attention_tpu, device_check, loading, sharding
from model.contract import PAGE_TOKENS
from model.device_check import PREFIXES, DeviceError
from model.engine import Engine
from model.programs import Programs
from tests.tiny import make_llama
from tests.tiny_families import make_family

KERNEL = attention.fused
SMALL: dict[str, Any] = {
    "implementation": "fused-interpreted",
    "by_layer": False,
    "large_calls": True,
    "call_tokens": 128,
    "max_segment_tokens": 128,
    "chunks": (128,),
    "head_sizes": (8,),
    "argmax_sizes": (8,),
    "target_sizes": (8,),
    "prefix_cache_bytes": 0,
}
"""One shape of call, as on a TPU."""

Fault = Callable[..., jax.Array]


def loaded(folder: Path, **options: Any) -> Engine:
    return loading.load(folder, **{**SMALL, **options})


def programs(engine: Engine) -> Programs:
    return engine._programs  # pyright: ignore[reportPrivateUsage]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llama(tmp_path_factory.mktemp("model"), layers=1, context=400)


def last_page_missing(*arguments: Any, **options: Any) -> jax.Array:
    before, steps, after = arguments[:7], arguments[7], arguments[8:]
    walk = steps.walk._replace(lengths=steps.walk.lengths // PAGE_TOKENS * PAGE_TOKENS)
    return KERNEL(*before, steps._replace(walk=walk), *after, **options)


def one_prefix_for_all(*arguments: Any, **options: Any) -> jax.Array:
    before, steps, after = arguments[:7], arguments[7], arguments[8:]
    walk = steps.walk._replace(mixed=jnp.zeros_like(steps.walk.mixed))
    return KERNEL(*before, steps._replace(walk=walk), *after, **options)


def scores_far_above_kept(*arguments: Any, **options: Any) -> jax.Array:
    with patch.object(attention_tpu, "MOST_ABOVE", np.inf):
        return KERNEL(*arguments, **options)


def one_value_not_a_number(*arguments: Any, **options: Any) -> jax.Array:
    return KERNEL(*arguments, **options).at[5, 0, 0].set(jnp.nan)


@pytest.mark.parametrize(
    ("fault", "dtype"),
    [
        (last_page_missing, "bfloat16"),
        (one_prefix_for_all, "bfloat16"),
        (scores_far_above_kept, "bfloat16"),
        (one_value_not_a_number, "float32"),
    ],
)
def test_a_wrong_kernel_is_found(folder: Path, fault: Fault, dtype: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = loaded(folder, dtype=dtype)
    monkeypatch.setattr(attention, "fused", fault)
    with pytest.raises(DeviceError, match=r"attention 'fused-interpreted' computes wrong values on this device"):
        device_check.prove(programs(engine))


@pytest.mark.slow
def test_a_start_with_a_wrong_kernel_fails_and_says_why(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "fused", last_page_missing)
    with pytest.raises(DeviceError) as caught:
        loaded(folder).warmup()
    for part in (f"jax {jax.__version__}", "calls of 1x128, prefixes of 637 tokens", "score-serve tpu-check"):
        assert part in str(caught.value)


def test_a_start_runs_a_batch_and_compiles_nothing_later(folder: Path) -> None:
    engine = loaded(folder)
    engine.warmup()
    computed, compiled = engine.stats.computed_tokens, engine.compilations
    assert computed > 0
    assert compiled == len(programs(engine).wanted())
    engine.score(device_check.first_batch(programs(engine)))
    assert engine.compilations == compiled
    assert engine.stats.computed_tokens > computed


@pytest.mark.slow
def test_the_kernel_is_tried_on_every_device(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong_on_the_second(*arguments: Any, **options: Any) -> jax.Array:
        return KERNEL(*arguments, **options) * (1 + lax.axis_index(sharding.DATA).astype(jnp.float32))

    engine = loaded(folder, mesh=sharding.mesh(2, 1, jax.devices()[:2]))
    device_check.prove(programs(engine))
    monkeypatch.setattr(attention, "fused", wrong_on_the_second)
    with pytest.raises(DeviceError):
        device_check.prove(programs(engine))


@pytest.mark.slow
def test_every_window_and_prefix_is_compared(tmp_path: Path) -> None:
    engine = loaded(make_family(tmp_path, "gemma2"))
    found = list(device_check.compare(programs(engine), programs(engine).model.layout.ladder))
    assert all(each.right for each in found)
    assert len({each.window for each in found}) == 2
    assert {tuple(each.prefix_tokens) for each in found} == set(PREFIXES)
    assert np.isfinite([each.difference for each in found]).all()
