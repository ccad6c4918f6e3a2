"""The gated delta rule on a CPU, ``delta.cc``, called by XLA (its FFI): the same as ``delta.mix``, token by token."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from model.cpu import build


def mix_native(
    mixed: Float[Array, "M C"],
    decays: Float[Array, "M V"],
    rates: Float[Array, "M V"],
    taps: Float[Array, "T C"],
    segments: Int[Array, " M"],
    prefixes: Int[Array, " M"],
    slots: Int[Array, "P 2"],
    inputs: Float[Array, "slots L parts before C"],
    memories: Float[Array, "slots L parts V H W"],
    layer: int | Int[Array, ""],
    part: int,
    *,
    keep: bool,
) -> tuple[Float[Array, "M V W"], Any]:
    """What each token reads, and the snapshots (inputs, memories) with those that the segments leave, or none.

    Call ``build.load`` first. With ``keep`` the snapshots are written where they lie: give them away.
    """
    read = jax.ShapeDtypeStruct((*rates.shape, memories.shape[-1]), jnp.float32)
    operands = mixed, decays, rates, taps, segments, prefixes, slots, inputs, memories, jnp.asarray(layer, jnp.int32)
    if not keep:
        return jax.ffi.ffi_call(build.target("delta"), read)(*operands, part=part), None
    kept = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (inputs, memories)]
    kernel = jax.ffi.ffi_call(build.target("delta_kept"), (read, *kept), input_output_aliases={7: 1, 8: 2})
    out, inputs, memories = kernel(*operands, part=part)
    return out, (inputs, memories)
