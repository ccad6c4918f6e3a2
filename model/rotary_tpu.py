"""Norm, scale, rotary positions and cast of queries and keys as one Pallas kernel for TPU.

XLA gives each step its own pass over all heads, in float32, and changes the layout between them. Here heads stay where
the projections leave them, side by side in a token's row, and come out as ``attention_tpu`` takes them.

The arithmetic is that of ``layers.rotated``, with which ``tests/parity`` compares.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from model.attention_tpu import stored_width
from model.layers import Angles, Heads

TILE_TOKENS = 256
"""Tokens of one step."""
FOLD_TOKENS = 128
"""Tokens whose heads are computed at once, in a loop over the step's. With half as many, each takes 1.2 times as many
instructions."""
ROW_TOKENS = 16
"""Rows of a vector register of bfloat16: a step has a multiple of it."""
NAME = "rotated_heads"


def rotated(
    parts: Sequence[Heads], angles: Angles, dtype: Any, *, interpret: bool
) -> list[Float[Array, "M heads stored"]]:
    """Each part's heads: normed, scaled and rotated, in ``dtype``, and widened by zeros to ``stored_width``.

    Args:
        parts: with heads of one width.
        interpret: run step by step on any platform, for tests.
    """
    tokens, half = angles[0].shape
    tile = min(TILE_TOKENS, -(-tokens // ROW_TOKENS) * ROW_TOKENS)
    fold = math.gcd(tile, FOLD_TOKENS)
    parts = [_normed_alike(part) for part in parts]
    head_width = parts[0].head_width
    width = stored_width(head_width)
    scales = [part.norm.scales()[None, :] for part in parts if part.norm is not None]

    def kernel(cos_ref: Any, sin_ref: Any, *refs: Any) -> None:
        x_refs, scale_refs, out_refs = refs[: len(parts)], iter(refs[len(parts) : -len(parts)]), refs[-len(parts) :]
        scale_of = [None if part.norm is None else next(scale_refs)[...] for part in parts]

        def one(number: Any, _: Any) -> None:
            """One fold."""
            rows = pl.ds(pl.multiple_of(number * fold, fold), fold)
            cos, sin = cos_ref[rows, :], sin_ref[rows, :]
            turns = _row([cos, cos], width, 1.0), _row([-sin, sin], width, 0.0)
            for part, scale, x_ref, out_ref in zip(parts, scale_of, x_refs, out_refs, strict=True):
                own, partners = _scaled(turns, part, scale, half)
                places = [pl.ds(head * head_width, head_width) for head in range(part.number)]
                heads = [_row([x_ref[rows, place]], width, 0.0) for place in places]
                if part.norm is not None:
                    inverses = _inverse_roots(heads, head_width * part.norm.eps, exact=dtype == jnp.float32)
                    heads = [x * inverse for x, inverse in zip(heads, inverses, strict=True)]
                for head, x in enumerate(heads):
                    turned = x * own + _partners(x, half) * partners
                    out_ref[rows, head * width : (head + 1) * width] = turned.astype(dtype)

        lax.fori_loop(0, tile // fold, one, None)

    def rows(columns: int) -> pl.BlockSpec:
        return pl.BlockSpec((tile, columns), lambda i: (i, 0))

    results = pl.pallas_call(
        kernel,
        grid=(pl.cdiv(tokens, tile),),
        in_specs=[
            *(rows(half) for _ in angles),
            *(rows(part.x.shape[1]) for part in parts),
            *(pl.BlockSpec((1, head_width), lambda _: (0, 0)) for _ in scales),
        ],
        out_specs=[rows(part.number * width) for part in parts],
        out_shape=[jax.ShapeDtypeStruct((tokens, part.number * width), dtype) for part in parts],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",), vmem_limit_bytes=64 * 2**20),
        interpret=interpret,
        name=NAME,
    )(*angles, *(part.x for part in parts), *scales)
    return [x.reshape(tokens, part.number, width) for x, part in zip(results, parts, strict=True)]


def _normed_alike(part: Heads) -> Heads:
    """The part with no norm but one of each head by itself: one over all heads, maybe of several devices, is taken."""
    norm = part.norm
    if norm is None or (norm.over is None and norm.scale.size == part.head_width):
        return part
    return part._replace(x=norm(part.x), norm=None)


def _scaled(
    turns: tuple[Float[Array, "M width"], Float[Array, "M width"]],
    part: Heads,
    scale: Float[Array, "1 H"] | None,
    half: int,
) -> tuple[Float[Array, "M width"], Float[Array, "M width"]]:
    """What a part's channels and their partners are multiplied by, after division by the root of the sum of squares.

    Args:
        turns: cosines and sines.
    """
    own, partners = turns
    factor = part.factor
    if part.norm is not None and scale is not None:
        factor *= math.sqrt(part.head_width)
        scale = _row([scale], own.shape[1], 0.0)
        own, partners = own * scale, partners * _partners(scale, half)
    return (own, partners) if factor == 1.0 else (own * factor, partners * factor)


def _inverse_roots(
    heads: Sequence[Float[Array, "M width"]], eps: float, *, exact: bool
) -> Sequence[Float[Array, "M width"]]:
    """One over the root of each row's sum of squares and ``eps``, in all columns.

    The matrix unit sums: across a register's lanes that takes as long as a rotation does, and the unit is idle. Squares
    are split into numbers of bfloat16, which it takes: two have 16 bits, three all of them.
    """
    rest = jnp.concatenate([x * x for x in heads], axis=0)
    pieces: list[Array] = []
    for _ in range(3 if exact else 2):
        pieces.append(rest.astype(jnp.bfloat16))
        rest -= pieces[-1].astype(jnp.float32)
    squares = jnp.concatenate(pieces, axis=1)
    ones = jnp.ones((squares.shape[1], rest.shape[1]), squares.dtype)
    # In float32 models the default is a precision that only takes float32; products with 1 are exact in any.
    sums = lax.dot(squares, ones, precision=lax.Precision.DEFAULT, preferred_element_type=jnp.float32)
    return jnp.split(lax.rsqrt(sums + eps), len(heads), axis=0)


def _row(pieces: Sequence[Float[Array, "M _"]], width: int, fill: float) -> Float[Array, "M width"]:
    """The pieces side by side, and ``fill`` after them."""
    rest = width - sum(piece.shape[1] for piece in pieces)
    if rest:
        pieces = [*pieces, jnp.full((pieces[0].shape[0], rest), fill, pieces[0].dtype)]
    return jnp.concatenate(pieces, axis=1) if len(pieces) > 1 else pieces[0]


def _partners(x: Float[Array, "M width"], half: int) -> Float[Array, "M width"]:
    """For each channel the one that it is turned with, ``half`` channels away."""
    width = x.shape[1]
    partner = pltpu.roll(x, half, 1)
    if 2 * half < width:
        first = lax.broadcasted_iota(jnp.int32, x.shape, 1) < half
        partner = jnp.where(first, pltpu.roll(x, width - half, 1), partner)
    return partner
