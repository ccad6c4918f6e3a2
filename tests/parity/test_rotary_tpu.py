"""The TPU kernel of norm and rotary positions, interpreted on this machine, against the arithmetic of the layers."""

import jax.numpy as jnp
import numpy as np
import pytest

from model import rotary_tpu
from model.attention_tpu import stored_width
from model.config import Rope
from model.layers import Heads, RMSNorm, rope_angles, rotated

PLAIN = Rope(theta=1e4)
YARN = Rope(theta=1e4, kind="yarn", factor=4.0, original_context_length=64, magnitude=1.1386)


FLOAT32, BFLOAT16 = jnp.dtype(jnp.float32), jnp.dtype(jnp.bfloat16)


@pytest.mark.parametrize(
    ("tokens", "head_width", "rotary_width", "normed", "offset", "rope", "dtype"),
    [
        pytest.param(640, 128, 128, "head", 0.0, PLAIN, FLOAT32, id="norms, and a tile that is not filled"),
        pytest.param(128, 64, 64, None, 0.0, PLAIN, BFLOAT16, id="no norms, narrow heads", marks=pytest.mark.slow),
        pytest.param(24, 64, 64, "head", 0.0, PLAIN, FLOAT32, id="norms of narrow heads"),
        pytest.param(128, 80, 80, "head", 0.0, PLAIN, BFLOAT16, id="norms of odd heads", marks=pytest.mark.slow),
        pytest.param(24, 80, 32, None, 0.0, PLAIN, FLOAT32, id="a part of a head, fewer tokens than a fold"),
        pytest.param(128, 128, 96, "head", 0.0, YARN, BFLOAT16, id="a part of a head, YaRN"),
        pytest.param(128, 256, 256, "head", 1.0, PLAIN, BFLOAT16, id="wide heads, scales stored less 1"),
        pytest.param(128, 64, 64, "all", 0.0, PLAIN, FLOAT32, id="a norm over all heads", marks=pytest.mark.slow),
    ],
)
def test_kernel_equals_the_layers(
    tokens: int,
    head_width: int,
    rotary_width: int,
    normed: str | None,
    offset: float,
    rope: Rope,
    dtype: jnp.dtype,
) -> None:
    rng = np.random.default_rng(0)

    def heads(count: int, factor: float) -> Heads:
        x = jnp.asarray(rng.normal(0, 2, (tokens, count * head_width)), jnp.float32)
        if normed is None:
            return Heads(x, count, None, factor)
        size = count * head_width if normed == "all" else head_width
        norm = RMSNorm(size, eps=1e-4, dtype=dtype, offset=offset)
        norm.scale[...] = jnp.asarray(rng.normal(1 - offset, 0.2, size), dtype)
        return Heads(x, count, norm, factor)

    parts = heads(3, head_width**-0.5), heads(1, 1.0)
    angles = rope_angles(rope, rotary_width, jnp.asarray(rng.integers(0, 8000, tokens), jnp.int32))
    got = rotary_tpu.rotated(parts, angles, dtype, interpret=True)
    for part, result in zip(parts, got, strict=True):
        assert result.shape == (tokens, part.number, stored_width(head_width))
        assert result.dtype == dtype
        assert not np.asarray(result[..., head_width:], np.float32).any()
        wanted = rotated(part, angles)
        here, there = (np.asarray(x.astype(dtype), np.float32) for x in (result[..., :head_width], wanted))
        # Products that are added in one instruction or in two round differently; in bfloat16 that shows now and then.
        last = 2.0**-7 if dtype == BFLOAT16 else 1e-6
        np.testing.assert_allclose(here, there, rtol=last, atol=1e-6)
        assert dtype == FLOAT32 or (here == there).mean() > 0.999
