"""LoRA adapters beside the weights of their base: each row of a call takes one of several, or none.

A linear adds ``(x A) B`` of the row's adapter, as peft does; the scaling is in B. The factors of all adapters lie in
slots on the device. A call sees ``CALL_ADAPTERS`` of them: it multiplies every row by their factors side by side, and
puts zeros for what other adapters made of a row. So rows of all adapters go through one matmul, with 64 more columns at
rank 16, and a row's numbers depend on no other row's adapter.

Source: LoRA (arXiv 2106.09685); many adapters in one batch as in S-LoRA (arXiv 2311.03285) and Punica (2310.18547),
which have kernels of their own for it.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, Int

from model.config import Lora
from model.cpu import linear

CALL_ADAPTERS = 4
"""Adapters that the rows of one call take at most."""

RANKS = 16
"""Every slot's rank is a multiple: what ``CALL_ADAPTERS`` have together fills whole panels of ``cpu.linear``."""


class Rows(NamedTuple):
    """Which adapter each of M rows takes.

    Attributes:
        slots: of the call's adapters; any where there are fewer.
        numbers: which of these; -1: none.
    """

    slots: Int[Array, " adapters"]
    numbers: Int[Array, " M"]

    def at(self, reads: Int[Array, " R"]) -> "Rows":
        """Those of some rows."""
        return Rows(self.slots, self.numbers[reads])


class LowRank(nnx.Module):
    """The factors A and B of all slots for one linear.

    Args:
        axes: names of the linear's axes, see ``sharding.Rules``. Where the first is split over devices, each makes its
            part of the sum.
        packed: they are stored so that ``CALL_ADAPTERS`` of them become kernels of ``cpu.linear`` by copies alone.
    """

    def __init__(
        self, features_in: int, features_out: int, lora: Lora, *, dtype: jnp.dtype, axes: tuple[str, str], packed: bool
    ) -> None:
        self.rank, self.features_out, self.dtype, self.packed = lora.rank, features_out, dtype, packed
        a: tuple[int, ...] = (lora.slots, features_in, lora.rank)
        b: tuple[int, ...] = (lora.slots, lora.rank, features_out)
        if packed:
            a = (lora.slots, *_packed_a(features_in, lora.rank, dtype))
            b = (lora.slots, *linear.packed_shape(lora.rank, features_out, dtype))
        self.a = nnx.Param(jnp.zeros(a, dtype), axes=(None, axes[0], None, None)[: len(a)])
        self.b = nnx.Param(jnp.zeros(b, dtype), axes=(None, None, axes[1], None)[: len(b)])

    def __call__(self, x: Float[Array, "M features_in"], rows: Rows) -> Float[Array, "M features_out"]:
        """What the rows' adapters add to the linear's product, float32; zeros for rows without one."""
        x, a, b = x.astype(self.dtype), self.a[...][rows.slots], self.b[...][rows.slots]
        columns = jnp.arange(len(rows.slots) * self.rank) // self.rank
        if self.packed:
            [inner] = linear.products(x, [_kernel_a(a)], [len(columns)])
        else:
            inner = lax.dot(x, a.swapaxes(0, 1).reshape(x.shape[1], -1), preferred_element_type=jnp.float32)
        inner = jnp.where(rows.numbers[:, None] == columns[None], inner, 0).astype(self.dtype)
        if self.packed:
            return linear.products(inner, [_kernel_b(b)], [self.features_out])[0]
        return lax.dot(inner, b.reshape(-1, self.features_out), preferred_element_type=jnp.float32)


def packed_a(a: npt.NDArray[np.generic]) -> npt.NDArray[np.generic]:
    """A factor A [in, rank] as a packed ``LowRank`` stores it."""
    features_in, rank = a.shape
    parts, steps, numbers = _packed_a(features_in, rank, a.dtype)
    units = np.ascontiguousarray(a.T).view(np.uint32).reshape(parts, RANKS, steps)
    return np.ascontiguousarray(units.transpose(0, 2, 1)).view(a.dtype).reshape(parts, steps, numbers)


def _packed_a(features_in: int, rank: int, dtype: jnp.dtype) -> tuple[int, int, int]:
    """Shape of a packed A: as a kernel's, in panels of ``RANKS`` columns."""
    _, steps, numbers = linear.packed_shape(features_in, rank, dtype)
    return rank // RANKS, steps, numbers * RANKS // linear.PANEL


def _kernel_a(a: Float[Array, "adapters parts steps numbers"]) -> Float[Array, "panels steps packed"]:
    """Several adapters' A, side by side."""
    beside = linear.PANEL // RANKS
    parts = a.reshape(-1, beside, *a.shape[2:])
    return parts.swapaxes(1, 2).reshape(len(parts), a.shape[2], -1)


def _kernel_b(b: Float[Array, "adapters panels steps packed"]) -> Float[Array, "panels all_steps packed"]:
    """Several adapters' B, one below the other."""
    return b.swapaxes(0, 1).reshape(b.shape[1], -1, b.shape[3])
