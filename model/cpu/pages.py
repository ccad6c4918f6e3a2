"""Keys and values into their pages on a CPU: ``pages.cc``, called by XLA (its FFI)."""

from collections.abc import Sequence

import jax
from jaxtyping import Array, Int, Shaped

from model.cpu import build


def write(
    pool: Shaped[Array, "pages L 2 K page H"],
    keys_values: Sequence[Shaped[Array, "2 M K H"]],
    spans: Int[Array, "spans 4"],
    count: Int[Array, ""],
) -> Shaped[Array, "pages L 2 K page H"]:
    """The same as ``computations.write``, of each layer's keys and values; call ``build.load`` first.

    The pool is written where it lies if the program may overwrite it; else XLA copies it first.
    """
    kernel = jax.ffi.ffi_call(
        build.target("pages"), jax.ShapeDtypeStruct(pool.shape, pool.dtype), input_output_aliases={0: 0}
    )
    return kernel(pool, spans, count, *keys_values)
