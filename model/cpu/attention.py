"""Attention on a CPU in one kernel, ``attention.cc``, called by XLA (its FFI).

It takes half the time of ``attention``'s paged matmuls and, since it looks at every row by itself, does not care how
rows are packed.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Shaped

from model.cpu import build

UNLIMITED = 2**30
"""A window that nothing is beyond."""


def attend_native(
    q: Float[Array, "Q N H"],
    k: Float[Array, "M K H"],
    v: Float[Array, "M K H"],
    segments: Int[Array, "B T"],
    prefixes: Int[Array, " M"],
    pool: Shaped[Array, "pages L 2 K page H"],
    page_tables: Int[Array, "P slots"],
    prefix_lengths: Int[Array, " P"],
    layer: int | Int[Array, ""],
    window: Int[Array, ""] | None,
    softcap: float | None,
    causal: bool,
    reads: Int[Array, " Q"] | None,
) -> Float[Array, "Q N H"]:
    """The same as ``attention.attend``, in q's dtype; call ``build.load`` first."""
    queries = jnp.arange(len(q), dtype=jnp.int32) if reads is None else reads
    scalars = [jnp.asarray(x, jnp.int32) for x in (layer, UNLIMITED if window is None else window)]
    kernel = jax.ffi.ffi_call(build.target("attention"), jax.ShapeDtypeStruct(q.shape, q.dtype))
    operands = (q, k, v, segments.reshape(-1), prefixes, pool, page_tables, prefix_lengths, *scalars, queries)
    return kernel(*operands, softcap=np.float32(softcap or 0), causal=causal)
