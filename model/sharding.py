"""One model over a mesh of devices: which part of each array a device holds.

Every device runs the same program on its own part (``jax.shard_map``), with the sizes that ``divided`` gives. Split
over the axis ``model`` are attention's heads, the MLP's inner channels, the vocabulary and the page pool; a layer sums
over that axis twice, after attention's output projection and after the MLP's last one, or, in large calls on a TPU,
sends shares of the tokens round it (``model.overlap``). Over the axis ``data`` a launch
runs several calls at once, each on devices of its own.

Source: the split of a layer is that of Megatron-LM (arXiv 1909.08053), section 3.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from model.config import ModelConfig
from model.fields import ConfigError

DATA, MODEL = "data", "model"

LANES = 128
"""Width of a TPU's rows: the last axis of an array takes whole ones."""


@dataclass(frozen=True, slots=True)
class Rules:
    """Name of an array's axis -> the mesh's axis that it is split over; None: every device holds all of it."""

    calls: str | None = DATA
    vocab: str | None = MODEL
    heads: str | None = MODEL
    kv_heads: str | None = MODEL
    mlp: str | None = MODEL
    embed: str | None = None
    experts: str | None = None

    def spec(self, *axes: str | None) -> P:
        """The spec of an array with these axes; None: an axis without a name, which is not split."""
        return P(*(None if axis is None else getattr(self, axis) for axis in axes))


RULES = Rules()


class Tensor(Protocol):
    """A parameter of the whole model that is read as it is cut, see ``model.checkpoint``."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    def __getitem__(self, index: tuple[slice, ...], /) -> npt.NDArray[Any]: ...


def mesh(data: int, model: int, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh of ``data`` x ``model`` devices. Those that a model is over are in the order of a ring, if they can be.

    Args:
        devices: None: all that jax sees, on all hosts.

    Raises:
        ConfigError: there are fewer or more devices.
    """
    devices = jax.devices() if devices is None else devices
    if len(devices) != data * model:
        raise ConfigError(
            f"a mesh of {data} x {model} (data x model) takes {data * model} devices and there are {len(devices)}"
        )
    rows = [ring(devices[start : start + model]) for start in range(0, data * model, model)]
    return Mesh(np.array(rows), (DATA, MODEL))


def ring(devices: Sequence[Any]) -> list[Any]:
    """Devices in an order in which each has a link to the next, and the last to the first.

    Where they are no grid with an even number of rows, they stay as they are.
    """
    places = {tuple(coords): device for device in devices if (coords := getattr(device, "coords", None))}
    axes = [sorted(set(axis)) for axis in zip(*places, strict=True)]
    axes = sorted((axis for axis in enumerate(axes) if len(axis[1]) > 1), key=lambda axis: len(axis[1]) % 2)
    cells = math.prod(len(axis) for _, axis in axes)
    if len(axes) != 2 or len(axes[0][1]) % 2 or not len(devices) == len(places) == cells:
        return list(devices)
    (first, rows), (second, columns) = axes
    found = {(place[first], place[second]): device for place, device in places.items()}
    there = [(row, c) for n, row in enumerate(rows) for c in (columns[1:] if n % 2 == 0 else columns[:0:-1])]
    return [found[each] for each in (*there, *((row, columns[0]) for row in reversed(rows)))]


def splits(chips: int, data: int | None = None) -> list[tuple[int, int]]:
    """The (data, model) sizes of all meshes of so many chips, or of those with this ``data``, the largest first."""
    return [(n, chips // n) for n in range(chips, 0, -1) if chips % n == 0 and data in (None, n)]


def tpu_meshes(chips: int, data: int | None = None) -> list[Mesh]:
    """The meshes of all chips that this process was given; see ``splits``.

    Raises:
        RuntimeError: jax finds no TPU, or libtpu cannot use it.
        ConfigError: it finds more or fewer chips.
    """
    remedy = "is the extra tpu installed (pip install '.[tpu]' in a checkout), and does another process hold the chips?"
    try:
        found = jax.default_backend()
    except RuntimeError as error:
        raise RuntimeError(f"the replica was given TPU chips and jax cannot use them: {error}; {remedy}") from error
    if found != "tpu":
        raise RuntimeError(f"the replica was given TPU chips and jax found only {found}; {remedy}")
    return [mesh(*sizes) for sizes in splits(chips, data)]


def init_distributed(coordinator: str, hosts: int, number: int) -> None:
    """Make this process one of several, one a host, that run the same programs at once. Call it once in a process,
    before any other use of jax.

    Args:
        coordinator: address and port of a service that host 0's process starts.
        number: this host's, from 0.
    """
    jax.distributed.initialize(coordinator, hosts, number)


def divided(config: ModelConfig, shards: int) -> ModelConfig:
    """What one of ``shards`` devices computes of each layer.

    With fewer key/value heads than devices each device has one, the one that its queries attend to. Experts that
    multiply by ``lax.ragged_dot`` have whole rows of a TPU's arrays on each device: else the compiler would store them
    the other way, and turn all of them in every call.

    Raises:
        ConfigError: the heads or the MLP's channels cannot be divided so.
    """
    if shards == 1:
        return config
    sizes = {"attention heads": config.heads, "MLP channels": config.ff_width}
    ff_width = config.ff_width // shards
    if config.ragged:  # as a TPU holds arrays; the last devices have fewer channels and zeros
        del sizes["MLP channels"]
        ff_width = -(-config.ff_width // shards // LANES) * LANES
    for name, size in sizes.items():
        if size % shards:
            fitting = [n for n in range(2, shards) if not any(size % n for size in sizes.values())]
            raise ConfigError(
                f"{config.architecture}'s {size} {name} cannot be divided among {shards} devices; "
                f"use {' or '.join(map(str, [1, *fitting]))}"
            )
    if config.kv_heads % shards and shards % config.kv_heads:
        raise ConfigError(
            f"{config.architecture}'s {config.kv_heads} key/value heads cannot be divided among, nor each copied to as "
            f"many of, {shards} devices; use a divisor or a multiple of {config.kv_heads}"
        )
    return replace(
        config,
        heads=config.heads // shards,
        kv_heads=max(1, config.kv_heads // shards),
        ff_width=ff_width,
        shared_ff_width=-(-config.shared_ff_width // shards),  # the last device may have zeros
        shards=shards,
    )


def whole_shape(shape: Sequence[int], spec: P, over: Mesh) -> tuple[int, ...]:
    """Shape of the whole array, from the ``shape`` of one device's part."""
    axes = [*spec, *[None] * (len(shape) - len(spec))]
    return tuple(size * (1 if axis is None else over.shape[axis]) for size, axis in zip(shape, axes, strict=True))


def abstract(tree: Any, specs: Any, over: Mesh) -> Any:
    """Whole arrays' shapes and shardings, from their parts' shapes.

    Args:
        specs: one for each leaf, or for whole branches.
    """

    def leaf(part: Any, spec: P) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(whole_shape(part.shape, spec, over), part.dtype, sharding=NamedSharding(over, spec))

    return _mapped(leaf, tree, specs)


def put(tree: Any, specs: Any, over: Mesh) -> Any:
    """Host arrays, the same on all hosts, spread over the mesh.

    Args:
        specs: one for each array, or for whole branches.
    """

    def leaf(array: npt.NDArray[Any], spec: P) -> jax.Array:
        return jax.make_array_from_callback(array.shape, NamedSharding(over, spec), array.__getitem__)

    return _mapped(leaf, tree, specs)


def _mapped(function: Callable[[Any, P], Any], tree: Any, specs: Any) -> Any:
    """Apply ``function`` to every leaf and its spec."""
    return jax.tree.map(
        lambda spec, branch: jax.tree.map(lambda part: function(part, spec), branch),
        specs,
        tree,
        is_leaf=lambda node: isinstance(node, P),
    )


def place(tensor: Tensor, axes: Sequence[str | None], part: Sequence[int], dtype: Any, over: Mesh) -> jax.Array:
    """Put a parameter on the mesh. Only what this host's devices hold is read of the tensor.

    Args:
        axes: the parameter's.
        part: shape of what one device holds. Where the parts are together more than the tensor, vocabulary rows and
            experts' channels are padded with zeros, and key/value heads repeated.
    """
    spec = RULES.spec(*axes)
    shape = whole_shape(part, spec, over)

    def cut(index: Any) -> npt.NDArray[Any]:
        source: list[slice] = []
        padding: list[tuple[int, int]] = []
        for size, piece, axis, held, whole in zip(tensor.shape, index, axes, part, shape, strict=True):
            start, stop, _ = piece.indices(whole)
            if axis == "kv_heads" and whole > size:
                start = start // held // (whole // size) * held
                stop = start + held
            end = min(stop, size)
            source.append(slice(min(start, size), end))
            padding.append((0, stop - start - (source[-1].stop - source[-1].start)))
        if any(each.start == each.stop for each in source):
            return np.zeros([piece.stop - piece.start for piece in source] + np.array(padding)[:, 1], dtype)
        values = tensor[tuple(source)]
        return np.pad(values, padding).astype(dtype) if any(after for _, after in padding) else values.astype(dtype)

    return jax.make_array_from_callback(shape, NamedSharding(over, spec), cut)


def stacked(array: jax.Array, count: int) -> jax.Array:
    """Zeros for a stack of ``count`` such arrays, on the same devices."""
    part = array.sharding
    whole = NamedSharding(part.mesh, P(None, *part.spec)) if isinstance(part, NamedSharding) else part
    return jnp.zeros((count, *array.shape), array.dtype, device=whole)


def by_device(function: Callable[[jax.Array], Any], array: jax.Array) -> Any:
    """Apply ``function`` to each device's part; the results are split as the array is.

    It is compiled once for all arrays of a shape and a split, as long as ``function`` is the same object.
    """
    return _on_parts(function, array.sharding)(array)


@cache
def _on_parts(function: Callable[[jax.Array], Any], split: jax.sharding.Sharding) -> Callable[[jax.Array], Any]:
    if isinstance(split, NamedSharding):
        function = jax.shard_map(function, mesh=split.mesh, in_specs=split.spec, out_specs=split.spec, check_vma=False)
    return jax.jit(function)
