"""Reading logits and log-normalisers at hidden states, without a [positions, vocabulary] array above a budget."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.scipy.special import logsumexp
from jaxtyping import Array, Float, Int

from model.layers import row_dots

LOGITS_BUDGET_BYTES = 32 * 2**20
"""The largest block of vocabulary logits that ever exists, on the device; none reaches the host."""


class Split(NamedTuple):
    """A head split over several devices, with as many rows on each; padding follows the vocabulary's last row.

    Attributes:
        axis: of the mesh, along which they do.
        vocab_size: V, of all devices.
    """

    axis: str
    vocab_size: int


def softcapped(x: Float[Array, "*shape"], cap: float | None) -> Float[Array, "*shape"]:
    """``cap * tanh(x / cap)``, which never leaves -cap to cap; ``x`` itself without a cap."""
    return x if cap is None else cap * jnp.tanh(x / cap)


def target_logits(
    hidden: Float[Array, "R D"],
    targets: Int[Array, " R"],
    head: Float[Array, "rows D"],
    softcap: float | None = None,
    split: Split | None = None,
    *,
    native: bool = False,
) -> Float[Array, " R"]:
    """The logit of one target id per row: float32. Touches R rows of the head, never the vocabulary.

    Args:
        native: the sums are ``cpu.linear``'s; of a head that is not split.
    """
    if split is None:
        return softcapped(_dots(hidden, head[targets], native=native), softcap)
    rows = targets - _first(head, split)
    local = (rows >= 0) & (rows < head.shape[0])
    logits = _dots(hidden, head[jnp.where(local, rows, 0)])
    return softcapped(lax.psum(jnp.where(local, logits, 0.0), split.axis), softcap)


def _dots(hidden: Float[Array, "R D"], rows: Float[Array, "R D"], *, native: bool = False) -> Float[Array, " R"]:
    return row_dots(hidden.astype(rows.dtype).astype(jnp.float32), rows.astype(jnp.float32), native=native)


def _first(head: Float[Array, "rows D"], split: Split) -> Int[Array, ""]:
    """The id of this device's first row."""
    return lax.axis_index(split.axis) * head.shape[0]


def log_normalizer(
    hidden: Float[Array, "R D"], head: Float[Array, "rows D"], softcap: float | None = None, split: Split | None = None
) -> Float[Array, " R"]:
    """Log of the summed exponentials of all V logits, in nats: float32. Walks the vocabulary in blocks."""
    return _total([logsumexp(logits, axis=-1) for _, logits in _walk(hidden, head, softcap, split)], split)


def argmax(
    hidden: Float[Array, "R D"], head: Float[Array, "rows D"], softcap: float | None = None, split: Split | None = None
) -> tuple[Float[Array, " R"], Int[Array, " R"], Float[Array, " R"]]:
    """``log_normalizer``, and in the same walk the id of the highest logit, the lowest of equals, and that logit.

    Where logits are NaN the highest one is, too, and the id means nothing.
    """
    sums: list[Float[Array, " R"]] = []
    best, best_id = jnp.full(hidden.shape[0], -jnp.inf), jnp.zeros(hidden.shape[0], jnp.int32)
    for start, logits in _walk(hidden, head, softcap, split):
        sums.append(logsumexp(logits, axis=-1))
        highest, first = jnp.max(logits, axis=-1), jnp.argmax(logits, axis=-1).astype(jnp.int32)
        best_id = jnp.where(highest > best, start + first, best_id)
        best = jnp.maximum(best, highest)
    if split is not None:
        local_best = best
        best = lax.pmax(local_best, split.axis)
        best_id = jnp.where(local_best == best, best_id + _first(head, split), split.vocab_size)
        best_id = lax.pmin(best_id, split.axis)
    return _total(sums, split), best_id, best


def top(
    hidden: Float[Array, "R D"],
    head: Float[Array, "rows D"],
    scale: Float[Array, ""],
    count: int,
    softcap: float | None = None,
    split: Split | None = None,
) -> tuple[Float[Array, " R"], Int[Array, "R K"], Float[Array, "R K"]]:
    """The log-normaliser of the scaled logits, and in the same walk the ids of the highest logits, of equals the lowest
    first, and these logits, scaled.

    Args:
        scale: of all logits, 1 / temperature.
        count: K, at most the vocabulary's size.
    """
    sums: list[Float[Array, " R"]] = []
    best = jnp.full((hidden.shape[0], 0), -jnp.inf), jnp.zeros((hidden.shape[0], 0), jnp.int32)
    for start, logits in _walk(hidden, head, softcap, split):
        scaled = logits * scale
        sums.append(logsumexp(scaled, axis=-1))
        values, ids = lax.top_k(scaled, min(count, scaled.shape[1]))
        best = _highest([best, (values, start + ids.astype(jnp.int32))], count)
    values, ids = best
    if split is not None:  # in the order of the devices, so of equals the lowest id comes first
        parts = lax.all_gather(values, split.axis), lax.all_gather(ids + _first(head, split), split.axis)
        values, ids = _highest(list(zip(*parts, strict=True)), count)
    return _total(sums, split), ids, values


def _highest(
    parts: Sequence[tuple[Float[Array, "R _"], Int[Array, "R _"]]], count: int
) -> tuple[Float[Array, "R K"], Int[Array, "R K"]]:
    """The highest values of all parts, and their ids; of equals those of earlier parts."""
    values, ids = (jnp.concatenate(columns, axis=1) for columns in zip(*parts, strict=True))
    highest, places = lax.top_k(values, min(count, values.shape[1]))
    return highest, jnp.take_along_axis(ids, places, axis=1)


def _walk(
    hidden: Float[Array, "R D"], head: Float[Array, "rows D"], softcap: float | None, split: Split | None
) -> Iterator[tuple[int, Float[Array, "R W"]]]:
    """Yield logits block by block: a block's first row, and the block; padding has minus infinity."""
    operand = hidden.astype(head.dtype)
    block = max(1, LOGITS_BUDGET_BYTES // (4 * hidden.shape[0]))
    # The last device's padding; there is none where the devices divide the vocabulary.
    end = None if split is None else jnp.minimum(split.vocab_size - _first(head, split), head.shape[0])
    for start in range(0, head.shape[0], block):
        rows = head[start : start + block]
        logits = lax.dot_general(operand, rows, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
        logits = softcapped(logits, softcap)
        if end is not None:
            logits = jnp.where((start + jnp.arange(rows.shape[0]) < end)[None, :], logits, -jnp.inf)
        yield start, logits


def _total(sums: list[Float[Array, " R"]], split: Split | None) -> Float[Array, " R"]:
    total = logsumexp(jnp.stack(sums), axis=0) if len(sums) > 1 else sums[0]
    if split is None:
        return total
    highest = lax.pmax(total, split.axis)
    return highest + jnp.log(lax.psum(jnp.exp(total - highest), split.axis))
