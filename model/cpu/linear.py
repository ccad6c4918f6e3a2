"""Matmuls on a CPU with kernels packed once, as they are read: ``linear.cc``, called by XLA (its FFI).

XLA packs a kernel again for every call, which takes a good part of a call with few rows. A row has the same bits
whatever is beside it, and rows of zeros take no time.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from jaxtyping import Array, Float, Int

from model.config import Activation
from model.cpu import build

STRIP = 16
"""Columns of a kernel that lie beside each other; an adapter's rank is a multiple."""

PANEL = 64
"""Columns that a thread takes at once: a kernel's are filled up to a multiple."""


def packed_shape(features_in: int, features_out: int, dtype: jnp.dtype) -> tuple[int, int, int]:
    """Shape of a kernel that ``pack`` stored: strips, steps of the inner axis, and a step's numbers of a strip."""
    return packed_a_shape(features_in, -(-features_out // PANEL) * PANEL, dtype)


def _together(dtype: jnp.dtype) -> int:
    """Numbers of the inner axis that one instruction multiplies: they lie beside each other."""
    return 4 // jnp.dtype(dtype).itemsize


def pack(kernel: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Pack a kernel [in, out], in the dtype that it is multiplied in, for ``products``.

    The last panel is filled up with zeros. In bfloat16 an even number of features in is needed.
    """
    features_in, features_out = kernel.shape
    shape = packed_shape(features_in, features_out, kernel.dtype)
    filled = np.zeros((shape[0] * STRIP, features_in), kernel.dtype)
    filled[:features_out] = kernel.T
    return _strips(filled, shape)


def packed_a_shape(features_in: int, rank: int, dtype: jnp.dtype) -> tuple[int, int, int]:
    """Shape of an adapter's A that ``pack_a`` stored: as a kernel's, without filling."""
    together = _together(dtype)
    return rank // STRIP, features_in // together, STRIP * together


def pack_a(a: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Pack an adapter's A [in, rank], in the dtype that it is multiplied in, for ``reduced``."""
    features_in, rank = a.shape
    return _strips(np.ascontiguousarray(a.T), packed_a_shape(features_in, rank, a.dtype))


def _strips(columns: npt.NDArray[Any], shape: tuple[int, int, int]) -> npt.NDArray[Any]:
    # What one instruction multiplies moves as one number.
    units = columns.view(np.uint32).reshape(shape[0], STRIP, shape[1])
    return np.ascontiguousarray(units.transpose(0, 2, 1)).view(columns.dtype).reshape(shape)


class Added(NamedTuple):
    """What adapters add to products of M rows: (x A) B, of each row's own slot.

    Attributes:
        slots: of the rows; below 0: a row has none.
        inner: x A for each product, from ``reduced``.
        factors: B of all slots for each product, each as ``pack`` stores it.
    """

    slots: Int[Array, " M"]
    inner: Sequence[Float[Array, "M rank"]]
    factors: Sequence[Float[Array, "slots strips steps packed"]]


def reduced(
    x: Float[Array, "M features_in"],
    slots: Int[Array, " M"],
    factors: Sequence[Float[Array, "slots strips steps packed"]],
    rank: int,
) -> Sequence[Float[Array, "M rank"]]:
    """x times A of each row's slot, in x's dtype, for several products in one call; zeros where a row has none.

    Args:
        factors: A of all slots, each as ``pack_a`` stores it.
    """
    results = [jax.ShapeDtypeStruct((x.shape[0], rank), x.dtype)] * len(factors)
    return jax.ffi.ffi_call(build.target("reduced"), results)(x, slots, *factors)


def products(
    x: Float[Array, "M features_in"],
    kernels: Sequence[Float[Array, "_ steps packed"]],
    widths: Sequence[int],
    added: Added | None = None,
    biases: Sequence[Float[Array, " _"] | None] | None = None,
) -> Sequence[Float[Array, "M _"]]:
    """x times each kernel, float32, in one call, with what adapters add and with biases.

    Args:
        kernels: as ``pack`` stores them, in x's dtype; call ``build.load`` first.
        widths: features out of each.
        biases: float32, of each that has one.
    """
    results = [jax.ShapeDtypeStruct((x.shape[0], width), jnp.float32) for width in widths]
    return jax.ffi.ffi_call(build.target("products"), results)(x, *_operands(kernels, added, biases))


def gated(
    x: Float[Array, "M features_in"],
    gate: Float[Array, "strips steps packed"],
    up: Float[Array, "strips steps packed"],
    width: int,
    activation: Activation,
    added: Added | None = None,
    biases: Sequence[Float[Array, " _"] | None] | None = None,
) -> Float[Array, "M features_out"]:
    """``activation(x @ gate) * (x @ up)``, in x's dtype; see ``products``."""
    kernel = jax.ffi.ffi_call(build.target("gated"), jax.ShapeDtypeStruct((x.shape[0], width), x.dtype))
    return kernel(x, *_operands((gate, up), added, biases), activation=activation)


def _operands(
    kernels: Sequence[jax.Array], added: Added | None, biases: Sequence[jax.Array | None] | None
) -> Sequence[jax.Array]:
    given = [jnp.zeros(0, jnp.float32) if bias is None else bias for bias in biases or [None] * len(kernels)]
    if added is None:
        return jnp.zeros(0, jnp.int32), *kernels, *given
    return added.slots, *kernels, *given, *added.inner, *added.factors


def activated(
    x: Float[Array, "M features_in"],
    kernel: Float[Array, "strips steps packed"],
    bias: Float[Array, " features_out"],
    activation: Activation,
) -> Float[Array, "M features_out"]:
    """``activation(x @ kernel + bias)``, in x's dtype, by a GELU; the bias is float32; see ``products``."""
    call = jax.ffi.ffi_call(build.target("activated"), jax.ShapeDtypeStruct((x.shape[0], *bias.shape), x.dtype))
    return call(x, kernel, bias, activation=activation)


def layer_norms(
    x: Float[Array, "M D"],
    scale: Float[Array, " D"],
    bias: Float[Array, " D"],
    eps: float,
    more: Float[Array, "M D"] | None = None,
) -> Float[Array, "M D"]:
    """Each row less its mean, over its standard deviation, times ``scale``, plus ``bias``: all float32.

    Args:
        more: is added to x before.
    """
    call = jax.ffi.ffi_call(build.target("layer_norms"), jax.ShapeDtypeStruct(x.shape, jnp.float32))
    return call(x, jnp.zeros((0, 0), jnp.float32) if more is None else more, scale, bias, eps=np.float32(eps))


def dots(a: Float[Array, "M D"], b: Float[Array, "M D"]) -> Float[Array, " M"]:
    """The sum of each row of a * b, float32."""
    return jax.ffi.ffi_call(build.target("dots"), jax.ShapeDtypeStruct(a.shape[:1], jnp.float32))(a, b)


def argmax(
    x: Float[Array, "R D"], head: Float[Array, "V D"], softcap: float | None
) -> tuple[Float[Array, " R"], Int[Array, " R"], Float[Array, " R"]]:
    """The same as ``logprobs.argmax``, with x in the head's dtype; the head is not packed; see ``products``."""
    results = [jax.ShapeDtypeStruct(x.shape[:1], dtype) for dtype in (jnp.float32, jnp.int32, jnp.float32)]
    normalizers, ids, highest = jax.ffi.ffi_call(build.target("normalizers"), results)(
        x, head, softcap=np.float32(softcap or 0)
    )
    return normalizers, ids, highest


def top(
    x: Float[Array, "R D"],
    head: Float[Array, "V D"],
    wanted: Int[Array, "2"],
    scale: Float[Array, ""],
    count: int,
    softcap: float | None,
) -> tuple[Float[Array, " R"], Int[Array, "R K"], Float[Array, "R K"]]:
    """The same as ``logprobs.top``, with x in the head's dtype; see ``argmax``.

    Args:
        wanted: how many ids are wanted of each row, and of how many rows; nothing else is written.
    """
    rows = x.shape[0]
    shapes = ((rows,), jnp.float32), ((rows, count), jnp.int32), ((rows, count), jnp.float32)
    results = [jax.ShapeDtypeStruct(*each) for each in shapes]
    kernel = jax.ffi.ffi_call(build.target("tops"), results)
    normalizers, ids, highest = kernel(x, head, wanted, scale, softcap=np.float32(softcap or 0))
    return normalizers, ids, highest
