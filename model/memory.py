"""How much memory an engine takes, and which context and how many pages fit into what is free."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from model.config import ModelConfig
from model.contract import PAGE_TOKENS, MemoryUse
from model.delta import CHUNK
from model.families.registry import Abstract
from model.fields import ConfigError
from model.sizes import Layout

Fitted = TypeVar("Fitted")
Over = TypeVar("Over", bound=Mesh | None)

GB = 1e9
SHARE = 0.5
"""Pages take at most so much of what is left beside weights and workspace, unless a setting asks for more: the rest is
for front ends, Ray, and everything else that runs here."""
LEAST_CONTEXT = 2048
"""Tokens. A shorter context is never chosen, unless it is the model's own: what cannot have it is refused."""
PROCESS_BYTES = 600 * 2**20
"""A scorer's process on a CPU without weights, pages and activations: Python, Ray, jax, the compiled programs."""
LOADING = 1.2
"""What reading a parameter takes of the host's memory, as a multiple of the largest one."""
HBM_BYTES = {"TPU v4": 32e9, "TPU v5 lite": 16e9, "TPU v5": 95e9, "TPU v6 lite": 32e9}
"""Memory of a chip, by jax's name of its kind. Source: https://docs.cloud.google.com/tpu/docs/v4, .../v5e, .../v5p and
.../v6e, read in November 2026."""


@dataclass(frozen=True, slots=True)
class Room:
    """The memory that an engine may take.

    Attributes:
        free: bytes, on each of its devices.
        where: whose memory it is, in words.
        on_host: the devices have no memory of their own, so the process is in it, too.
        sharers: engines that are going to start in this memory, this one included.
        context: the context that the model's other engines have chosen; None: this is the first.
    """

    free: int
    where: str = "this host"
    on_host: bool = True
    sharers: int = 1
    context: int | None = None


@dataclass(frozen=True, slots=True)
class Weighed:
    """Sizes of a model's parameters on one device, in bytes: of all, and of the largest."""

    all: int
    largest: int

    @classmethod
    def of(cls, abstract: Abstract, layers: int) -> "Weighed":
        """Weigh shapes."""
        ends, block = (
            [leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state)]
            for _, state in (abstract.ends, abstract.block)
        )
        return cls(sum(ends) + layers * sum(block), max(*ends, *block))


class MemoryNeededError(ValueError):
    """A model does not fit into the free memory: the message has what it needs at least, and what to set."""


def roomiest(meshes: Sequence[Over], fitted: Callable[[Over], Fitted], longest: Callable[[Fitted], int]) -> Fitted:
    """What fits on the mesh that leaves room for the longest context; of several, on the first.

    Args:
        fitted: makes it for a mesh.
        longest: its context.

    Raises:
        MemoryNeededError, ConfigError: it fits on none.
    """
    found: list[Fitted] = []
    refused: list[MemoryNeededError | ConfigError] = []
    for over in meshes:
        try:
            found.append(fitted(over))
        except (MemoryNeededError, ConfigError) as error:
            refused.append(error)
    if not found:
        raise next((error for error in reversed(refused) if isinstance(error, MemoryNeededError)), refused[-1])
    return max(found, key=longest)


def on_host() -> bool:
    """Whether the devices share the host's memory."""
    return jax.default_backend() == "cpu"


def device_kind() -> str:
    """The devices' kind, in jax's words."""
    return jax.devices()[0].device_kind


def device_room(mesh: Mesh | None) -> Room | None:
    """The free memory of the devices, the least of all of them on all hosts; None: they do not tell."""
    devices = jax.local_devices()[:1] if mesh is None else list(mesh.local_devices)
    free = agreed(min(map(_free, devices)))
    return Room(free, f"each {devices[0].device_kind}", on_host=False) if free else None


def agreed(free: int) -> int:
    """The least ``free`` of all hosts of a slice, in whole MiB: all must choose the same pool."""
    if jax.process_count() == 1:
        return free
    found = multihost_utils.process_allgather(np.array(free // 2**20, np.int32))  # jax has no 64 bits
    return int(np.min(found)) * 2**20


def _free(device: Any) -> int:
    """A device's free memory; 0: not known."""
    found = device.memory_stats() or {}
    limit = found.get("bytes_limit") or HBM_BYTES.get(device.device_kind, 0)
    return max(0, int(limit) - found.get("bytes_in_use", 0))


def fit(
    config: ModelConfig,
    weighed: Weighed,
    laid: Callable[[int | None, int | None], Layout],
    room: Room | None,
    *,
    max_prompt_tokens: int | None,
    cache_bytes: int | None,
) -> tuple[Layout, MemoryUse]:
    """The layout that fits: of the model's whole context, if its pages are within their share, else of a shorter one.

    Contexts and pools that are cut to fit have few sizes, so that engines with about as much memory choose alike, and
    the next start finds the programs that this one has compiled.

    Args:
        config: of one device's part.
        laid: makes a layout from (longest prompt, bytes of the prefix cache); None: the default.
        room: None: not known, and everything fits.
        max_prompt_tokens: the longest prompt that is asked for; None: what fits.
        cache_bytes: pages that are asked for; None: what fits.

    Raises:
        MemoryNeededError: the least that can be chosen does not fit, or what is asked for.
    """
    asked = max_prompt_tokens or (room and room.context)
    chosen = laid(asked, cache_bytes)
    process = PROCESS_BYTES if room is not None and room.on_host else 0
    workspace = _activations(config, chosen) + process
    if room is None:
        return chosen, _use(weighed, workspace, chosen, None)
    fixed, page = weighed.all + workspace, chosen.page_share_bytes
    share = int(max(0, room.free / room.sharers - fixed) * SHARE)  # as if the others were as large
    if chosen.sizes.fill_memory and cache_bytes is None and chosen.pool_bytes < share:
        chosen = laid(asked, rounded(share // page - 1) * page)
    if chosen.pool_bytes > share:
        pages = max(share, cache_bytes or 0) // page
        longest = asked or max(rounded((pages - 2) * PAGE_TOKENS), LEAST_CONTEXT)
        chosen = laid(longest, rounded(pages - 1) * page if cache_bytes is None else cache_bytes)
    use = _use(weighed, workspace, chosen, room.free)
    needed = max(use.total, weighed.all + int(LOADING * weighed.largest) + process if room.on_host else 0)
    if needed > room.free:
        fits = rounded(((room.free - fixed) // page - 2) * PAGE_TOKENS)
        raise MemoryNeededError(_refusal(config, room, use, needed, chosen, fits=fits, cache_asked=bool(cache_bytes)))
    return chosen, use


def rounded(number: int) -> int:
    """The largest number up to ``number`` of two binary digits and zeros: 2, 3, 4, 6, 8, 12, 16, ..."""
    number = max(0, number)
    shift = max(0, number.bit_length() - 2)
    return number >> shift << shift


def _use(weighed: Weighed, workspace: int, laid: Layout, free: int | None) -> MemoryUse:
    tokens = (laid.pool.shape[0] - 1) * PAGE_TOKENS
    return MemoryUse(weighed.all, workspace, laid.pool_bytes, tokens, free)


def _activations(config: ModelConfig, laid: Layout) -> int:
    """What lies between the steps of the largest call, and the keys and values of the largest prefill, in bytes."""
    chunk = max(laid.sizes.chunks, default=0)
    tokens = max(laid.ladder[-1].tokens, chunk)
    heads = (config.heads + 2 * config.kv_heads) * config.head_width
    mlp = 3 * (config.ff_width * max(1, config.experts_per_token) + config.shared_ff_width)
    channels = 6 * config.width + max(mlp + 2 * heads, _recurrent(config))
    return 4 * tokens * channels + chunk * laid.page_bytes // PAGE_TOKENS


def _recurrent(config: ModelConfig) -> int:
    """Channels of a recurrent layer: the convolution's, and by XLA what all chunks of a call have at once."""
    if (r := config.recurrence) is None:
        return 0
    chunks = 0 if config.native else r.value_heads * (4 * (r.key_width + r.value_width) + 4 * CHUNK)
    return 2 * r.channels + 3 * r.values + chunks


def _refusal(
    config: ModelConfig, room: Room, use: MemoryUse, needed: int, laid: Layout, *, fits: int, cache_asked: bool
) -> str:
    remedies: list[str] = []
    if 0 < fits < laid.longest:
        remedies.append(f"limits.max_prompt_tokens of at most {fits:,}")
    if cache_asked:
        remedies.append("a smaller prefix_cache_gb")
    if laid.pool.dtype == np.float32:
        remedies.append("dtype bfloat16")
    if not config.int8 and not config.experts:
        remedies.append("quantization int8")
    settings = f"set {', or '.join(remedies)}, or " if remedies else ""
    more = "free memory, or take a larger machine" if room.on_host else "take more chips, or larger ones"
    return (
        f"{config.architecture} needs {needed / GB:.1f} GB of {room.where}, and {room.free / GB:.1f} GB are free: "
        f"weights {use.weights / GB:.1f} GB, workspace {use.workspace / GB:.1f} GB, and pages {use.pages / GB:.1f} GB "
        f"for prompts of up to {laid.longest:,} tokens; {settings}{more}"
    )
