"""A layer's sums over devices, overlapped with its matmuls.

Between layers each of the S devices of the mesh's axis ``model`` holds an equal share of a call's tokens. A matmul of
all tokens multiplies each share as it arrives; one whose results are summed sends each share's sum on as it is made.
Shares travel round the ring of devices, one half of their rows each way, so that each link is used in both directions.

Source: the matmuls are the collective matmuls of "Overlap Communication with Dependent Computation via Decomposition in
Large Deep Learning Models" (Wang et al., ASPLOS 2023); tokens between layers are split as in Megatron-LM's sequence
parallelism (arXiv 2205.05198).
"""

from collections.abc import Callable, Sequence

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, Num

from model.plan import reads_of
from model.sharding import MODEL


def can_share(tokens: int, shards: int) -> bool:
    """Whether a call of so many tokens, and its reads, can be split into shares of two halves."""
    return not any(rows % (2 * shards) for rows in (tokens, reads_of(tokens)))


def all_rows(x: Num[Array, "share D"]) -> Num[Array, "M D"]:
    """The rows of all devices."""
    return lax.all_gather(x, MODEL, tiled=True)


def own_share(x: Float[Array, "M D"]) -> Float[Array, "share D"]:
    """This device's share of the sum of all devices' rows."""
    return lax.psum_scatter(x, MODEL, tiled=True)


def rows_at(x: Float[Array, "share D"], places: Int[Array, " R"]) -> Float[Array, "share_of_reads D"]:
    """This device's share of the rows at these places among all devices' rows."""
    local = places - lax.axis_index(MODEL) * len(x)
    here = (local >= 0) & (local < len(x))
    return own_share(jnp.where(here[:, None], x[jnp.where(here, local, 0)], 0.0))


def arriving(x: Num[Array, "share D"]) -> list[Num[Array, "share D"]]:
    """Each device's share as it arrives, this device's first.

    The upper half of the t-th is of the device t places before this one, the lower half of the one t places after it.
    """
    upper, lower = jnp.split(x, 2)
    shares = [x]
    for _ in range(1, lax.axis_size(MODEL)):
        upper, lower = _sent(upper, 1), _sent(lower, -1)
        shares.append(jnp.concatenate([upper, lower]))
    return shares


def in_order(parts: Sequence[Num[Array, "share F"]]) -> Num[Array, "M F"]:
    """What was made of each share of ``arriving``, as rows of all tokens."""
    half, count, me = len(parts[0]) // 2, len(parts), lax.axis_index(MODEL)
    rows = lax.empty((count, 2, half, parts[0].shape[1]), parts[0].dtype)
    for number, part in enumerate(parts):
        upper, lower = jnp.split(part, 2)
        for place, rows_of_half, device in ((0, upper, me - number), (1, lower, me + number)):
            rows = lax.dynamic_update_slice(rows, rows_of_half[None, None], (device % count, place, 0, 0))
    return rows.reshape(count * 2 * half, -1)


def leaving(x: Num[Array, "M F"]) -> list[Num[Array, "share F"]]:
    """The shares of all tokens' rows in the order of ``arriving``."""
    count, me = lax.axis_size(MODEL), lax.axis_index(MODEL)
    halves = x.reshape(count, 2, -1, x.shape[1])

    def half(device: Int[Array, ""], place: int) -> Num[Array, "half F"]:
        return lax.dynamic_slice(halves, (device % count, place, 0, 0), (1, 1, *halves.shape[2:]))[0, 0]

    return [jnp.concatenate([half(me - number, 0), half(me + number, 1)]) for number in range(count)]


def summed(
    shares: Sequence[Num[Array, "share F"]],
    product: Callable[[Num[Array, "share F"]], Float[Array, "share D"]],
    dtype: jnp.dtype,
) -> Float[Array, "share D"]:
    """This device's share of the sum of all devices' products, float32.

    Args:
        shares: in the order of ``arriving``.
        product: of one share.
        dtype: in which sums travel; each device adds in float32.
    """
    own, *others = shares
    upper = lower = None
    for share in (*others, own):
        new_upper, new_lower = jnp.split(product(share), 2)
        upper = new_upper if upper is None else _sent(upper.astype(dtype), 1).astype(jnp.float32) + new_upper
        lower = new_lower if lower is None else _sent(lower.astype(dtype), -1).astype(jnp.float32) + new_lower
    assert upper is not None
    assert lower is not None
    return jnp.concatenate([upper, lower])


def _sent(x: Num[Array, "half D"], places: int) -> Num[Array, "half D"]:
    """What the device so many places before this one has."""
    count = lax.axis_size(MODEL)
    return lax.ppermute(x, MODEL, [(device, (device + places) % count) for device in range(count)])
