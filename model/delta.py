"""Gated DeltaNet: a recurrent layer's memory, read and changed by each token, over packed segments and their prefixes.

A head's memory is a matrix from keys to values. A token lets it fade, corrects what it has under the token's key by the
token's value, and reads it with the token's query (Gated Delta Networks, arXiv 2412.06464). Queries, keys and values
come through a short convolution over the sequence.

What a prefix leaves behind is a *snapshot*: its last inputs of the convolution, and the memories. Segments begin with
their prefix's and leave none. Snapshots lie in slots of one array; slot 0 is what is before the first token, zeros.

Sources: transformers' ``torch_chunk_gated_delta_rule``, which the parity tests compare with, and the paper.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from model.config import Recurrence
from model.cpu.delta import mix_native

CHUNK = 64
"""Tokens whose changes of a memory are found together, by matmuls."""
LEAST = 1e-6
"""Added to the squared length of a query or key."""


class Snapshots(NamedTuple):
    """What prefixes leave behind in every layer, by slot, float32.

    Attributes:
        inputs: [slots, L, parts, before, C] of the convolution, those of the last tokens.
        memories: [slots, L, parts, V, H, W] from keys to values.
    """

    inputs: Any
    memories: Any


class Packed(NamedTuple):
    """The segments of one call, and the snapshots that they begin with.

    Attributes:
        segments: see ``attention.AttentionContext``.
        positions: each token's place in its sequence.
        prefixes: which prefix each token sees.
        lengths: tokens of each prefix.
        slots: of each prefix: where its snapshot is, and where the one goes that its segment leaves; 0: nowhere.
    """

    segments: Int[Array, "B T"]
    positions: Int[Array, " M"]
    prefixes: Int[Array, " M"]
    lengths: Int[Array, " P"]
    slots: Int[Array, "P 2"]
    snapshots: Snapshots


def mix(
    mixed: Float[Array, "M C"],
    decays: Float[Array, "M V"],
    rates: Float[Array, "M V"],
    taps: Float[Array, "T C"],
    packed: Packed,
    layer: int | Int[Array, ""],
    part: int,
    *,
    sizes: Recurrence,
    native: bool,
    keep: bool,
) -> tuple[Float[Array, "M V W"], Snapshots | None]:
    """What each token reads from the memories, and the snapshots with those that the segments leave.

    Args:
        mixed: queries and keys of all key heads, and values, before the convolution.
        decays: logarithms of what is left of a memory at each token.
        rates: how much of what was missing from a memory is put into it.
        taps: of the convolution; the last one is of the token itself.
        layer, part: whose snapshots these are.
        native: by the CPU's kernel; else a call sees one prefix.
        keep: there is one segment for each prefix, and its snapshot is kept; else there are no snapshots to return.
    """
    if native:
        of_tokens = packed.segments.reshape(-1), packed.prefixes, packed.slots
        out, kept = mix_native(mixed, decays, rates, taps, *of_tokens, *packed.snapshots, layer, part, keep=keep)
        return out, kept and Snapshots(*kept)
    begin, end = packed.slots[0, 0], packed.slots[0, 1]
    inputs, memory = (_at(array, begin, layer, part) for array in packed.snapshots)
    real = packed.segments.reshape(-1) >= 0
    offsets = packed.positions - packed.lengths[0]
    convolved = jax.nn.silu(_convolved(mixed, taps, inputs, offsets))
    finite = ~_reached(mixed, inputs, offsets) & jnp.isfinite(decays).all(axis=1) & jnp.isfinite(rates).all(axis=1)
    used = (real & finite)[:, None]
    # What is masked is multiplied by 0, and 0 * NaN is NaN: a token that broke is left out, and reads NaN.
    out, left = _in_chunks(
        *_heads(jnp.where(used, convolved, 0), sizes),
        jnp.where(used, decays, 0),
        jnp.where(used, rates, 0),
        packed.segments,
        memory,
    )
    out = jnp.where((real & ~finite)[:, None, None], jnp.nan, jnp.where(real[:, None, None], out, 0))
    if not keep:
        return out, None
    count = real.sum()
    last = lax.dynamic_slice_in_dim(jnp.concatenate([inputs, mixed]), count, len(inputs))
    kept = zip(packed.snapshots, (last, left[0]), strict=True)
    return out, Snapshots(*(_put(array, new, end, layer, part) for array, new in kept))


def _at(array: Array, slot: Int[Array, ""], layer: int | Int[Array, ""], part: int) -> Array:
    """One snapshot's part."""
    begin = (slot, layer, part, *[0] * (array.ndim - 3))
    return lax.dynamic_slice(array, begin, (1, 1, 1, *array.shape[3:]))[0, 0, 0]


def _put(array: Array, new: Array, slot: Int[Array, ""], layer: int | Int[Array, ""], part: int) -> Array:
    """All snapshots with one part replaced."""
    return lax.dynamic_update_slice(array, new[None, None, None], (slot, layer, part, *[0] * (array.ndim - 3)))


def _convolved(
    x: Float[Array, "M C"], taps: Float[Array, "T C"], inputs: Float[Array, "before C"], offsets: Int[Array, " M"]
) -> Float[Array, "M C"]:
    """The convolution over each segment and its prefix's last inputs.

    Args:
        offsets: each token's place in its segment.
    """
    before = len(inputs)
    total = x * taps[before][None]
    for back in range(1, before + 1):
        source = jnp.roll(x, back, axis=0)
        for row in range(before - back, before):  # token 0 looks back at the last row
            source = jnp.where((offsets - back == row - before)[:, None], inputs[row][None], source)
        total += source * taps[before - back][None]
    return total


def _reached(x: Float[Array, "M C"], inputs: Float[Array, "before C"], offsets: Int[Array, " M"]) -> Bool[Array, " M"]:
    """Whether the convolution at each token takes in a number that is not finite.

    What it makes is not looked at: a TPU would compute it anew for that.
    """
    broken, broken_before = (~jnp.isfinite(part).all(axis=1, keepdims=True) for part in (x, inputs))
    ones = jnp.ones((len(inputs) + 1, 1))
    return _convolved(broken.astype(x.dtype), ones, broken_before.astype(x.dtype), offsets)[:, 0] > 0


def _heads(
    x: Float[Array, "M C"], sizes: Recurrence
) -> tuple[Float[Array, "M V H"], Float[Array, "M V H"], Float[Array, "M V W"]]:
    """Queries and keys, of length 1 and the queries scaled, for each value head, and values."""
    of_keys = sizes.key_heads * sizes.key_width
    q, k, v = jnp.split(x, [of_keys, 2 * of_keys], axis=1)

    def unit(x: Float[Array, "M KH"]) -> Float[Array, "M V H"]:
        heads = x.reshape(len(x), sizes.key_heads, sizes.key_width)
        heads = heads * lax.rsqrt(jnp.sum(heads * heads, axis=-1, keepdims=True) + LEAST)
        return jnp.repeat(heads, sizes.value_heads // sizes.key_heads, axis=1)

    return unit(q) * sizes.key_width**-0.5, unit(k), v.reshape(len(x), sizes.value_heads, sizes.value_width)


def _in_chunks(
    q: Float[Array, "M V H"],
    k: Float[Array, "M V H"],
    v: Float[Array, "M V W"],
    decays: Float[Array, "M V"],
    rates: Float[Array, "M V"],
    segments: Int[Array, "B T"],
    memory: Float[Array, "V H W"],
) -> tuple[Float[Array, "M V W"], Float[Array, "B V H W"]]:
    """What each token reads, and each bin's memory after its last token.

    A bin goes through its chunks one after the other. A token sees its own segment: what it has in the chunk itself,
    and before that the memory, which is the prefix's where the segment begins in this chunk, and else the one that the
    last chunk left. What it takes from the prefix's is a matmul with one matrix for all segments.
    """
    bins, width = segments.shape
    chunks = -(-width // CHUNK)
    filled = _filled(jnp.pad(segments, ((0, 0), (0, chunks * CHUNK - width)), constant_values=-1))
    of_chunks = filled.reshape(bins, chunks, CHUNK).transpose(1, 0, 2)  # n B C
    before = jnp.concatenate([jnp.full((1, bins), -2, jnp.int32), of_chunks[:-1, :, -1]])
    goes_on = (of_chunks == before[:, :, None])[:, :, None, :, None]  # n B 1 C 1
    same = (of_chunks[..., :, None] == of_chunks[..., None, :]) & jnp.tril(jnp.ones((CHUNK, CHUNK), bool))[None, None]

    def chunked(x: Float[Array, "M V *last"]) -> Float[Array, "n B V C *last"]:
        x = x.reshape(bins, width, *x.shape[1:])
        x = jnp.pad(x, ((0, 0), (0, chunks * CHUNK - width), *[(0, 0)] * (x.ndim - 2)))
        x = x.reshape(bins, chunks, CHUNK, *x.shape[2:])
        return jnp.moveaxis(x, (1, 0, 3, 2), (0, 1, 2, 3))

    q, k, v, decays, rates = (chunked(x) for x in (q, k, v, decays, rates))
    faded = jnp.einsum("nbij,nbvj->nbvi", same.astype(jnp.float32), decays, precision=HIGHEST)  # since what came before
    between = jnp.where(same[:, :, None], faded[..., :, None] - faded[..., None, :], -jnp.inf)
    weights = jnp.exp(between)  # n B V C C
    strict = jnp.tril(jnp.ones((CHUNK, CHUNK), bool), -1)[None, None, None]
    system = _product("nbvih,nbvjh->nbvij", k * rates[..., None], k) * jnp.where(strict, weights, 0)
    unit = jnp.broadcast_to(jnp.eye(CHUNK, dtype=jnp.float32), system.shape)
    solved = lax.linalg.triangular_solve(system, unit, left_side=True, lower=True, unit_diagonal=True)
    seen = _product("nbvih,nbvjh->nbvij", q, k) * weights
    fading = jnp.exp(faded)[..., None]
    keys, queries = k * rates[..., None] * fading, q * fading
    known, read = (_product("nbvih,vhw->nbviw", x, memory) for x in (keys, queries))  # from the prefix's memory

    def step(
        memories: Float[Array, "B V H W"], at: tuple[Array, ...]
    ) -> tuple[Float[Array, "B V H W"], Float[Array, "B V C W"]]:
        goes_on, same_as_last, k, v, faded, keys, queries, known, read, solved, seen = at
        known = jnp.where(goes_on, _product("bvih,bvhw->bviw", keys, memories), known)
        read = jnp.where(goes_on, _product("bvih,bvhw->bviw", queries, memories), read)
        change = _product("bvij,bvjw->bviw", solved, v - known)
        out = read + _product("bvij,bvjw->bviw", seen, change)
        last = faded[..., -1:]
        left = jnp.where(same_as_last[:, None, :], jnp.exp(last - faded), 0)[..., None] * k
        begun = jnp.where(goes_on[:, :, -1:], memories, memory[None])
        memories = jnp.exp(last)[..., None] * begun + _product("bvjh,bvjw->bvhw", left, change)
        return memories, out

    stacked = goes_on, same[:, :, -1], k, v * rates[..., None], faded, keys, queries, known, read, solved, seen
    memories, out = lax.scan(step, jnp.broadcast_to(memory, (bins, *memory.shape)), stacked)
    out = out.transpose(1, 0, 3, 2, 4).reshape(bins, chunks * CHUNK, *out.shape[2:3], out.shape[-1])
    return out[:, :width].reshape(bins * width, *out.shape[2:]), memories


HIGHEST = lax.Precision.HIGHEST
"""A memory lives through thousands of tokens, and is float32 whatever the weights are."""


def _product(axes: str, a: Array, b: Array) -> Array:
    return jnp.einsum(axes, a, b, precision=HIGHEST, preferred_element_type=jnp.float32)


def _filled(segments: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """Segments where padding belongs to what is before it: it changes no memory."""
    real: Bool[Array, "B T"] = segments >= 0
    last = lax.cummax(jnp.where(real, jnp.arange(segments.shape[1]), 0), axis=1)
    return jnp.take_along_axis(segments, last, axis=1)
