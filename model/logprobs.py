"""Reading logits and log-normalisers at hidden states, without a [positions, vocabulary] array above a budget."""

from collections.abc import Iterator

import jax.numpy as jnp
from jax import lax
from jax.scipy.special import logsumexp
from jaxtyping import Array, Float, Int

LOGITS_BUDGET_BYTES = 32 * 2**20
"""The largest block of vocabulary logits that ever exists, on the device; none reaches the host."""


def softcapped(x: Float[Array, "*shape"], cap: float | None) -> Float[Array, "*shape"]:
    """``cap * tanh(x / cap)``, which never leaves -cap to cap; ``x`` itself without a cap."""
    return x if cap is None else cap * jnp.tanh(x / cap)


def target_logits(
    hidden: Float[Array, "R D"], targets: Int[Array, " R"], head: Float[Array, "V D"], softcap: float | None = None
) -> Float[Array, " R"]:
    """The logit of one target id per row: float32. Touches R rows of the head, never the vocabulary."""
    rows = head[targets].astype(jnp.float32)
    return softcapped(jnp.sum(hidden.astype(head.dtype).astype(jnp.float32) * rows, axis=-1), softcap)


def log_normalizer(
    hidden: Float[Array, "R D"], head: Float[Array, "V D"], softcap: float | None = None
) -> Float[Array, " R"]:
    """Log of the summed exponentials of all V logits, in nats: float32. Walks the vocabulary in blocks."""
    return _total([logsumexp(logits, axis=-1) for _, logits in _walk(hidden, head, softcap)])


def argmax(
    hidden: Float[Array, "R D"], head: Float[Array, "V D"], softcap: float | None = None
) -> tuple[Float[Array, " R"], Int[Array, " R"], Float[Array, " R"]]:
    """``log_normalizer``, and in the same walk the id of the highest logit, the lowest of equals, and that logit.

    Where logits are NaN the highest one is, too, and the id means nothing.
    """
    sums: list[Float[Array, " R"]] = []
    best, best_id = jnp.full(hidden.shape[0], -jnp.inf), jnp.zeros(hidden.shape[0], jnp.int32)
    for start, logits in _walk(hidden, head, softcap):
        sums.append(logsumexp(logits, axis=-1))
        highest, first = jnp.max(logits, axis=-1), jnp.argmax(logits, axis=-1).astype(jnp.int32)
        best_id = jnp.where(highest > best, start + first, best_id)
        best = jnp.maximum(best, highest)
    return _total(sums), best_id, best


def _walk(
    hidden: Float[Array, "R D"], head: Float[Array, "V D"], softcap: float | None
) -> Iterator[tuple[int, Float[Array, "R W"]]]:
    """Logits block by block: the first id of each, and the block."""
    operand = hidden.astype(head.dtype)
    block = max(1, LOGITS_BUDGET_BYTES // (4 * hidden.shape[0]))
    for start in range(0, head.shape[0], block):
        rows = head[start : start + block]
        logits = lax.dot_general(operand, rows, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
        yield start, softcapped(logits, softcap)


def _total(sums: list[Float[Array, " R"]]) -> Float[Array, " R"]:
    return logsumexp(jnp.stack(sums), axis=0) if len(sums) > 1 else sums[0]
