"""Measures the host's part of a request: the engine's own code, over programs that return at once."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from model.compiler import Compiler
from model.computations import Kind, Model, Size, Weights
from model.config import ModelConfig
from model.engine import Engine
from model.loading import choose
from model.programs import Programs
from model.sharding import mesh
from model.sizes import Sizes
from scripts.benchmarks.work import Request
from serve_app.batches import pack_labels, shared_tokens

_REPEATS = 7
_LABELS = (1, 2)


@dataclass(frozen=True, slots=True)
class HostCost:
    """What a request costs beside the device.

    Attributes:
        seconds: of processor time on this machine; the least of some requests.
        hidden: of these, from the first launch to the last: meanwhile a device computes what was launched.
        launches: of programs.
        sent: arrays that the host sends to the device.
        sent_bytes: of these.
        fetched_bytes: of what it fetches.
        waits: times that it waits for what it fetches.
    """

    seconds: float
    hidden: float
    launches: int
    sent: int
    sent_bytes: int
    fetched_bytes: int
    waits: int

    @property
    def bytes(self) -> int:
        """All that moves between host and device."""
        return self.sent_bytes + self.fetched_bytes


class _AtOnce(Compiler):
    """Programs that compute nothing. Their results are zeros, which say when they are fetched."""

    def __init__(self, model: Model, weights: Weights) -> None:
        super().__init__(model, weights, None)
        self._kept = jnp.zeros(0)
        self.start()

    def start(self) -> None:
        """Count, and take the time of launches, from here on."""
        self.launches = self.sent = self.sent_bytes = self.fetched_bytes = self.waits = 0
        self._computing = False
        self.first = self.last = 0.0

    def get(self, kind: Kind, size: Size) -> Callable[..., Any]:
        def program(*arguments: Any) -> Any:
            self._computing = True
            self.launches += 1
            self.last = time.process_time()
            self.first = self.first or self.last
            layout = self._model.layout
            on_device = [layout.pool.shape, (self._model.collected, self._model.config.width), (0,)]
            on_device += [part.shape for part in layout.snapshots or ()]
            for leaf in jax.tree.leaves(arguments):
                if isinstance(leaf, jax.Array) and leaf.shape not in on_device:
                    self.sent += 1
                    self.sent_bytes += leaf.nbytes
            match kind:
                case Kind.WRITE:
                    return arguments[0]
                case Kind.SEGMENTS:
                    return arguments[-1]
                case Kind.PREFILL:
                    return self._kept, arguments[-1]
                case _:
                    return _Zeros(size, self._fetch)

        return program

    def _fetch(self, nbytes: int) -> None:
        self.fetched_bytes += nbytes
        self.waits += self._computing
        self._computing = False


class _Zeros:
    """A result of the head, on its way."""

    def __init__(self, size: Size, fetched: Callable[[int], None]) -> None:
        self._size, self._fetched = size, fetched

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> npt.NDArray[np.float32]:
        array = np.zeros(self._size, np.float32)
        self._fetched(array.nbytes)
        return array


def host_cost(config: ModelConfig, sizes: Sizes, longest: int, requests: Callable[[], Request]) -> HostCost:
    """Measure one request by itself, with a query that no cache holds.

    Args:
        longest: tokens of the longest prompt.
        requests: makes another request of the same lengths at each call.
    """
    one_layer = replace(config, layers=1, sliding=config.sliding[:1])  # the layers run in one launch
    model = choose(
        one_layer,
        dtype="bfloat16",
        implementation="fused",
        by_layer=False,
        sizes=replace(sizes, prefix_cache_bytes=0),  # room for one query
        max_prompt_tokens=longest,
        mesh=mesh(1, 1, jax.devices("cpu")[:1]),
    ).model
    weights = Weights(model.abstract.ends[1], [model.abstract.block[1]])
    compiler = _AtOnce(model, weights)
    engine = Engine(Programs(model, weights, compiler=compiler))
    seconds: list[tuple[float, float]] = []
    for _ in range(_REPEATS):
        request = requests()
        batch = pack_labels(request.prompts, [_LABELS] * len(request.items_ids))
        batch = replace(batch, shared=shared_tokens(batch))  # the front end's part
        compiler.start()
        started = time.process_time()
        engine.score(batch)
        seconds.append((time.process_time() - started, compiler.last - compiler.first))
    counts = compiler.launches, compiler.sent, compiler.sent_bytes, compiler.fetched_bytes, compiler.waits
    return HostCost(*min(seconds[1:]), *counts)
