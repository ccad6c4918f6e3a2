"""Norm, linear, rotary position embedding, MLP: the pieces that the architectures share.

Activations between layers (the residual stream) are float32 whatever the weights' dtype; matmul operands take the
weights' dtype and their results are float32.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from flax import nnx
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from model import overlap
from model.config import Activation, Lora, Rope
from model.cpu import linear
from model.lora import LowRank, Rows, added
from model.sharding import RULES


class Linear(nnx.Module):
    """``x @ kernel + bias`` with a float32 result. The kernel is stored as [in, out].

    Args:
        dtype: of the operands.
        axes: names of the kernel's axes, see ``sharding.Rules``.
        shards: devices that these are split over; where that is the first, the devices' products are summed.
        by_tokens: x is a share of all tokens, or the result is, see ``model.overlap``.
        int8: the kernel is stored so, see ``quantized``.
        packed: the kernel is stored so, see ``cpu.linear``; not one that is int8.
        lora: room for adapters of it.
    """

    def __init__(
        self,
        features_in: int,
        features_out: int,
        *,
        bias: bool = False,
        dtype: jnp.dtype,
        axes: tuple[str, str],
        shards: int = 1,
        by_tokens: bool = False,
        int8: bool = False,
        packed: bool = False,
        lora: Lora | None = None,
    ) -> None:
        self.dtype = dtype
        self.by_tokens = by_tokens
        self.features_out = features_out
        self.packed = packed
        shape = linear.packed_shape(features_in, features_out, dtype) if packed else (features_in, features_out)
        self.kernel = nnx.Param(jnp.zeros(shape, jnp.int8 if int8 else dtype), axes=axes, packed=packed)
        self.scales = nnx.Param(jnp.zeros((1, features_out), jnp.float32), axes=axes) if int8 else None
        self.bias = nnx.Param(jnp.zeros((features_out,), dtype), axes=axes[1:]) if bias else None
        self.over = getattr(RULES, axes[0]) if shards > 1 else None
        self.low_rank = (
            LowRank(features_in, features_out, lora, dtype=dtype, axes=axes, packed=packed) if lora else None
        )

    def __call__(self, x: Float[Array, "M features_in"], rows: Rows | None = None) -> Float[Array, "rows features_out"]:
        if self.by_tokens and self.over:
            return self.of_shares(overlap.leaving(x.astype(self.dtype)))
        if self.packed or self.by_tokens:
            return each([self], x, rows)[0]
        y = self.product(x.astype(self.dtype))
        if self.low_rank is not None and rows is not None:
            y = y + self.low_rank(x, rows)
        if self.over:
            y = summed(y, self.over, self.dtype)
        return self.biased(y)

    def product(self, x: Float[Array, "rows features_in"]) -> Float[Array, "rows features_out"]:
        """Operands times the kernel, on this device."""
        y = lax.dot(x, self.kernel[...].astype(self.dtype), preferred_element_type=jnp.float32)
        return y if self.scales is None else y * self.scales[...]

    def of_shares(self, shares: Sequence[Float[Array, "share features_in"]]) -> Float[Array, "share features_out"]:
        """This device's share of the result, from operands in the order of ``overlap.arriving``."""
        return self.biased(overlap.summed(shares, self.product, self.dtype))

    def biased(self, y: Float[Array, "M features_out"]) -> Float[Array, "M features_out"]:
        bias = self.float_bias()
        return y if bias is None else y + bias[None, :]

    def float_bias(self) -> Float[Array, " features_out"] | None:
        """The bias in float32, in which it is added."""
        return None if self.bias is None else self.bias[...].astype(jnp.float32)


@dataclass(frozen=True, slots=True)
class OfStack:
    """One layer's parameter that is not cut out of the stack of all layers', for what can read it there.

    Attributes:
        number: the layer's.
    """

    stack: Float[Array, "layers ..."]
    number: Int[Array, ""] | int


def each(
    linears: Sequence[Linear], x: Float[Array, "M features_in"], rows: Rows | None = None
) -> Sequence[Float[Array, "rows features_out"]]:
    """Apply every linear to x; those with packed kernels in one call. Where x is a share of all tokens, to all."""
    if linears[0].by_tokens:
        shares = overlap.arriving(x.astype(linears[0].dtype))
        return [linear.biased(overlap.in_order([linear.product(share) for share in shares])) for linear in linears]
    if not all(linear.packed for linear in linears):
        return [linear(x, rows) for linear in linears]
    kernels, widths = [linear.kernel[...] for linear in linears], [linear.features_out for linear in linears]
    x = x.astype(linears[0].dtype)
    of_rows = added([linear.low_rank for linear in linears], x, rows)
    return linear.products(x, kernels, widths, of_rows, [linear.float_bias() for linear in linears])


def summed(y: Float[Array, "M D"], over: str, dtype: jnp.dtype) -> Float[Array, "M D"]:
    """The sum of all devices' parts, float32. They travel in the operands' ``dtype``, since the way between TPU chips
    takes longer than the matmul before it."""
    return lax.psum(y.astype(dtype), over).astype(jnp.float32)


def quantized(
    kernel: Float[Array, "features_in features_out"],
) -> tuple[Int[Array, "features_in features_out"], Float[Array, "1 features_out"]]:
    """A kernel as int8, and what each output channel's integers are to be multiplied by: symmetric, the channel's
    largest value becomes 127. Where a kernel's input is split over devices, each has scales for its own part.
    """
    scales = jnp.maximum(jnp.max(jnp.abs(kernel), axis=0, keepdims=True).astype(jnp.float32) / 127, 1e-30)
    return jnp.round(kernel.astype(jnp.float32) / scales).astype(jnp.int8), scales


def row_dots(a: Float[Array, "M D"], b: Float[Array, "M D"], *, native: bool) -> Float[Array, " M"]:
    """The sum of each row of a * b, float32.

    Args:
        native: in the same order in calls of all sizes, which XLA's sums on a CPU are not.
    """
    return linear.dots(a, b) if native else jnp.sum(a * b, axis=-1)


def standardized(x: Float[Array, "M D"], eps: float, *, native: bool) -> Float[Array, "M D"]:
    """Each row less its mean, over its standard deviation.

    Args:
        native: see ``row_dots``.
    """
    mean = row_dots(x, jnp.ones_like(x), native=native)[:, None] / x.shape[1]
    centred = x - mean
    variance = row_dots(centred, centred, native=native)[:, None] / x.shape[1]
    return centred / jnp.sqrt(variance + eps)


class RMSNorm(nnx.Module):
    """Root-mean-square norm in float32.

    Written out, since ``nnx.RMSNorm`` in bfloat16 promotes dtypes implicitly, which the strict mode of the tests
    refuses.

    Args:
        offset: added to the stored scale, in float32: a scale of 1.003 stored less 1 keeps its digits in bfloat16.
        axis: name of the normed axis, see ``sharding.Rules``.
        shards: devices that it is split over, if it is one that is.
        native: the sums are ``cpu.linear``'s.
    """

    def __init__(
        self,
        width: int,
        *,
        eps: float,
        dtype: jnp.dtype,
        offset: float = 0.0,
        axis: str = "embed",
        shards: int = 1,
        native: bool = False,
    ) -> None:
        self.scale = nnx.Param(jnp.zeros((width,), dtype), axes=(axis,))
        self.over = getattr(RULES, axis) if shards > 1 else None
        self.eps = eps
        self.offset = offset
        self.native = native

    def __call__(self, x: Float[Array, "M D"]) -> Float[Array, "M D"]:
        mean_square = row_dots(x, x, native=self.native)[:, None] / x.shape[-1]
        if self.over:
            mean_square = lax.pmean(mean_square, self.over)
        return x * lax.rsqrt(mean_square + self.eps) * self.scales()[None, :]

    def scales(self) -> Float[Array, " D"]:
        """What normed channels are multiplied by."""
        scale = self.scale[...].astype(jnp.float32)
        return scale + self.offset if self.offset else scale


def activate(x: Float[Array, "M F"], activation: Activation) -> Float[Array, "M F"]:
    return jax.nn.silu(x) if activation == "silu" else jax.nn.gelu(x, approximate=activation == "gelu_tanh")


LARGE = 2**22
"""Numbers between an MLP's matmuls that are rounded as its operands are: in float32 so many leave a v6e no room on the
chip for their product with the others. Fewer take no longer in float32."""


class GatedMLP(nnx.Module):
    """``down(activation(gate(x)) * up(x))``."""

    def __init__(
        self,
        width: int,
        ff_width: int,
        *,
        bias: bool,
        dtype: jnp.dtype,
        activation: Activation = "silu",
        shards: int = 1,
        by_tokens: bool = False,
        int8: bool = False,
        packed: bool = False,
        lora: Lora | None = None,
    ) -> None:
        def linear(into: int, out: int, axes: tuple[str, str]) -> Linear:
            return Linear(
                into,
                out,
                bias=bias,
                dtype=dtype,
                axes=axes,
                shards=shards,
                by_tokens=by_tokens,
                int8=int8,
                packed=packed,
                lora=lora,
            )

        self.gate = linear(width, ff_width, ("embed", "mlp"))
        self.up = linear(width, ff_width, ("embed", "mlp"))
        self.down = linear(ff_width, width, ("mlp", "embed"))
        self.activation: Activation = activation

    def __call__(self, x: Float[Array, "M D"], rows: Rows | None = None) -> Float[Array, "M D"]:
        gate, up = self.gate, self.up
        if gate.packed:
            kernels, x = (gate.kernel[...], up.kernel[...]), x.astype(gate.dtype)
            of_rows, biases = added([gate.low_rank, up.low_rank], x, rows), (gate.float_bias(), up.float_bias())
            return self.down(linear.gated(x, *kernels, gate.features_out, self.activation, of_rows, biases), rows)
        if gate.by_tokens:
            shares = overlap.arriving(x.astype(gate.dtype))
            return self.down.of_shares(
                [self._inner(*(linear.biased(linear.product(share)) for linear in (gate, up))) for share in shares]
            )
        return self.down(self._inner(*each((gate, up), x, rows)), rows)

    def _inner(self, gated: Float[Array, "rows F"], ungated: Float[Array, "rows F"]) -> Float[Array, "rows F"]:
        """The operands of ``down``."""
        if ungated.size >= LARGE:
            ungated = lax.optimization_barrier(ungated.astype(self.up.dtype)).astype(jnp.float32)
        product = (activate(gated, self.activation) * ungated).astype(self.up.dtype)
        return lax.optimization_barrier(product)  # in one operation with ``down``, TPUs take longer


def rope_frequencies(rope: Rope, width: int, *, long: bool = False) -> npt.NDArray[np.float32]:
    """Angle per position, in radians, of each pair of channels: float32 [width / 2].

    Computed by the host, step by step in float32, with the reference's bits: a power that is one bit off turns the
    angle at position 8,000 by up to 5e-4. The exact power, rounded, equals torch's for all but one channel in a
    hundred; JAX's ``pow`` errs no more, but in a third of the channels.

    Args:
        width: channels that are rotated.
        long: ``longrope``: of a prompt beyond the original context.

    Source: RoFormer (arXiv 2104.09864); scalings as in transformers' ``modeling_rope_utils``, which the parity tests
    check against.
    """
    exponents = np.arange(0, width, 2, dtype=np.float32) / np.float32(width)
    powers = np.power(np.float64(np.float32(rope.theta)), exponents.astype(np.float64)).astype(np.float32)
    frequencies = np.float32(1) / powers
    match rope.kind:
        case "default" | "dynamic":
            return frequencies
        case "yarn":
            divided, kept = np.float32(1) / (np.float32(rope.factor) * powers), _yarn_kept(rope, width)
            return (divided * (1 - kept) + frequencies * kept).astype(np.float32)
        case "linear":
            return frequencies / np.float32(rope.factor)
        case "longrope":
            factors = np.array(rope.long_factors if long else rope.short_factors, np.float32)
            return np.float32(1) / (factors * powers)
        case "llama3":
            factor, original = np.float32(rope.factor), np.float32(rope.original_context_length)
            wavelengths = np.float32(2 * np.pi) / frequencies
            low = np.float32(rope.original_context_length / rope.low_freq_factor)
            high = np.float32(rope.original_context_length / rope.high_freq_factor)
            smooth = (original / wavelengths - np.float32(rope.low_freq_factor)) / np.float32(
                rope.high_freq_factor - rope.low_freq_factor
            )
            blended = (1 - smooth) * frequencies / factor + smooth * frequencies
            scaled = np.where(wavelengths > low, frequencies / factor, blended)
            return np.where(wavelengths < high, frequencies, scaled)


def _yarn_kept(rope: Rope, width: int) -> npt.NDArray[np.float32]:
    """How much of each frequency ``yarn`` keeps, 0 to 1: a ramp over the channels between its two bounds."""

    def channel(turns: float) -> float:
        """The pair of channels that turns so often in the original context."""
        return width * math.log(rope.original_context_length / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = channel(rope.beta_fast), channel(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, width - 1)
    high += 0.001 if low == high else 0
    ramp = (np.arange(width // 2, dtype=np.float32) - np.float32(low)) / np.float32(high - low)
    return 1 - np.clip(ramp, 0, 1).astype(np.float32)


Angles = tuple[Float[Array, "M half"], Float[Array, "M half"]]
"""Cosine and sine of every position's angles."""


def rope_angles(rope: Rope, width: int, positions: Int[Array, " M"], long: Bool[Array, " M"] | None = None) -> Angles:
    """The angles of all positions, computed once for all layers.

    Args:
        width: channels that are rotated.
        long: for ``longrope``: tokens of prompts beyond the original context.
    """
    frequencies = rope_frequencies(rope, width)[None, :]
    if long is not None:
        frequencies = jnp.where(long[:, None], rope_frequencies(rope, width, long=True)[None, :], frequencies)
    angles = positions.astype(jnp.float32)[:, None] * frequencies
    if rope.magnitude == 1.0:
        return jnp.cos(angles), jnp.sin(angles)
    return jnp.cos(angles) * rope.magnitude, jnp.sin(angles) * rope.magnitude


def rotate(x: Float[Array, "M heads H"], angles: Angles) -> Float[Array, "M heads H"]:
    """Turn each head's (first half, second half) channel pairs by their position's angles.

    Where there are fewer angles than pairs, the head's last channels stay as they are.
    """
    cos, sin = (a[:, None, :] for a in angles)
    rotated = 2 * cos.shape[-1]
    first, second = jnp.split(x[..., :rotated], 2, axis=-1)
    turned = [first * cos - second * sin, second * cos + first * sin]
    return jnp.concatenate([*turned, x[..., rotated:]] if rotated < x.shape[-1] else turned, axis=-1)


class Heads(NamedTuple):
    """Queries or keys as their projection leaves them.

    Attributes:
        x: a token's heads side by side.
        number: how many heads.
        norm: over as many channels as it has scales: a head's, or all; None: there is none.
        factor: what they are multiplied by after the norm.
    """

    x: Float[Array, "M heads_times_H"]
    number: int
    norm: RMSNorm | None
    factor: float

    @property
    def head_width(self) -> int:
        return self.x.shape[1] // self.number


def rotated(heads: Heads, angles: Angles) -> Float[Array, "M heads H"]:
    """The heads normed, scaled and rotated."""
    x, number, norm, factor = heads
    if norm is not None:
        x = norm(x.reshape(-1, norm.scale.size))
    x = x.reshape(len(heads.x), number, -1)
    return rotate(x if factor == 1.0 else x * factor, angles)
