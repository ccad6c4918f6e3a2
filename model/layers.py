"""Norm, linear, rotary position embedding, MLP: the pieces that the architectures share.

Activations between layers (the residual stream) are float32 whatever the weights' dtype; matmul operands take the
weights' dtype and their results are float32.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, Int

from model.config import Rope


class Linear(nnx.Module):
    """``x @ kernel + bias`` with a float32 result. The kernel is stored as [in, out]."""

    def __init__(self, features_in: int, features_out: int, *, bias: bool = False, dtype: jnp.dtype) -> None:
        self.kernel = nnx.Param(jnp.zeros((features_in, features_out), dtype))
        self.bias = nnx.Param(jnp.zeros((features_out,), dtype)) if bias else None

    def __call__(self, x: Float[Array, "M features_in"]) -> Float[Array, "M features_out"]:
        kernel = self.kernel[...]
        y = lax.dot(x.astype(kernel.dtype), kernel, preferred_element_type=jnp.float32)
        return y if self.bias is None else y + self.bias[...].astype(jnp.float32)[None, :]


class RMSNorm(nnx.Module):
    """Root-mean-square norm in float32.

    Written out, since ``nnx.RMSNorm`` in bfloat16 promotes dtypes implicitly, which the strict mode of the tests
    refuses.
    """

    def __init__(self, width: int, *, eps: float, dtype: jnp.dtype) -> None:
        self.scale = nnx.Param(jnp.zeros((width,), dtype))
        self.eps = eps

    def __call__(self, x: Float[Array, "M D"]) -> Float[Array, "M D"]:
        mean_square = jnp.mean(jnp.square(x), axis=-1, keepdims=True)
        return x * lax.rsqrt(mean_square + self.eps) * self.scale[...].astype(jnp.float32)[None, :]


class GatedMLP(nnx.Module):
    """``down(silu(gate(x)) * up(x))``."""

    def __init__(self, width: int, ff_width: int, *, bias: bool, dtype: jnp.dtype) -> None:
        self.gate = Linear(width, ff_width, bias=bias, dtype=dtype)
        self.up = Linear(width, ff_width, bias=bias, dtype=dtype)
        self.down = Linear(ff_width, width, bias=bias, dtype=dtype)

    def __call__(self, x: Float[Array, "M D"]) -> Float[Array, "M D"]:
        return self.down(jax.nn.silu(self.gate(x)) * self.up(x))


def rope_frequencies(rope: Rope, head_width: int) -> Float[Array, " half"]:
    """Angle per position, in radians, of each pair of channels: float32 [H / 2].

    Raises:
        ValueError: at trace time, a kind of scaling that is not implemented.

    Source: RoFormer (arXiv 2104.09864); scalings as in transformers' ``modeling_rope_utils``, which the parity tests
    check against.
    """
    exponents = jnp.arange(0, head_width, 2, dtype=jnp.float32) / head_width
    frequencies = 1.0 / (rope.theta**exponents)
    if rope.kind == "default":
        return frequencies
    if rope.kind == "linear":
        return frequencies / rope.factor
    if rope.kind == "llama3":
        wavelengths = 2 * jnp.pi / frequencies
        low = rope.original_context_length / rope.low_freq_factor
        high = rope.original_context_length / rope.high_freq_factor
        smooth = (rope.original_context_length / wavelengths - rope.low_freq_factor) / (
            rope.high_freq_factor - rope.low_freq_factor
        )
        blended = (1 - smooth) * frequencies / rope.factor + smooth * frequencies
        scaled = jnp.where(wavelengths > low, frequencies / rope.factor, blended)
        return jnp.where(wavelengths < high, frequencies, scaled)
    raise ValueError(f"rope kind {rope.kind!r} is not implemented; known: default, linear, llama3")


def rope_angles(
    rope: Rope, head_width: int, positions: Int[Array, " M"]
) -> tuple[Float[Array, "M half"], Float[Array, "M half"]]:
    """Cosine and sine of every position's angles, computed once for all layers."""
    angles = positions.astype(jnp.float32)[:, None] * rope_frequencies(rope, head_width)[None, :]
    return jnp.cos(angles), jnp.sin(angles)


def rotate(
    x: Float[Array, "M heads H"], angles: tuple[Float[Array, "M half"], Float[Array, "M half"]]
) -> Float[Array, "M heads H"]:
    """Turn each head's (first half, second half) channel pairs by their position's angles."""
    cos, sin = (a[:, None, :] for a in angles)
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
