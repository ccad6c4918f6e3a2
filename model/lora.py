"""LoRA adapters beside the weights of their base: each row of a call takes one of several, or none.

A linear adds ``(x A) B`` of the row's adapter, as peft does; the scaling is in B. The factors of all adapters lie in
slots on the device. A row's numbers depend on no other row's adapter.

``cpu.linear`` multiplies each row by its own adapter's factors, and rows without one by none. XLA's matmuls multiply
all rows by the factors of the call's adapters side by side, and put zeros for what other adapters made of a row: for
``CALL_ADAPTERS`` of rank 16 that is 64 more columns.

Source: LoRA (arXiv 2106.09685); many adapters in one batch as in S-LoRA (arXiv 2311.03285) and Punica (2310.18547).
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, Int

from model.config import Lora
from model.cpu import linear

CALL_ADAPTERS = 4
"""Adapters that the rows of one call take at most, where XLA multiplies."""


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
        packed: they are stored for ``cpu.linear``.
    """

    def __init__(
        self, features_in: int, features_out: int, lora: Lora, *, dtype: jnp.dtype, axes: tuple[str, str], packed: bool
    ) -> None:
        self.rank, self.features_out, self.dtype = lora.rank, features_out, dtype
        a: tuple[int, ...] = (lora.slots, features_in, lora.rank)
        b: tuple[int, ...] = (lora.slots, lora.rank, features_out)
        if packed:
            a = (lora.slots, *linear.packed_a_shape(features_in, lora.rank, dtype))
            b = (lora.slots, *linear.packed_shape(lora.rank, features_out, dtype))
        self.a = nnx.Param(jnp.zeros(a, dtype), axes=(None, axes[0], None, None)[: len(a)])
        self.b = nnx.Param(jnp.zeros(b, dtype), axes=(None, None, axes[1], None)[: len(b)])

    def __call__(self, x: Float[Array, "M features_in"], rows: Rows) -> Float[Array, "M features_out"]:
        """What the rows' adapters add to the linear's product, float32; zeros for rows without one. Not of packed
        factors: for those see ``added``."""
        x, a, b = x.astype(self.dtype), self.a[...][rows.slots], self.b[...][rows.slots]
        columns = jnp.arange(len(rows.slots) * self.rank) // self.rank
        inner = lax.dot(x, a.swapaxes(0, 1).reshape(x.shape[1], -1), preferred_element_type=jnp.float32)
        inner = jnp.where(rows.numbers[:, None] == columns[None], inner, 0).astype(self.dtype)
        return lax.dot(inner, b.reshape(-1, self.features_out), preferred_element_type=jnp.float32)


def added(
    low_ranks: Sequence[LowRank | None], x: Float[Array, "M features_in"], rows: Rows | None
) -> linear.Added | None:
    """What the rows' adapters add to the products of x and several packed linears, which all have room for adapters or
    none; None: nothing.

    Args:
        x: in the linears' dtype.
    """
    of_each = [each for each in low_ranks if each is not None]
    if rows is None or not of_each:
        return None
    slots = jnp.where(rows.numbers < 0, -1, rows.slots[rows.numbers])
    inner = linear.reduced(x, slots, [each.a[...] for each in of_each], of_each[0].rank)
    return linear.Added(slots, inner, [each.b[...] for each in of_each])
