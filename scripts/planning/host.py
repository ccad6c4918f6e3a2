"""Measures the host's part of a request: the engine's own code, over programs that return at once."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp

from model.compiler import Compiler
from model.computations import Kind, Model, Size, Weights
from model.config import ModelConfig
from model.engine import Engine
from model.loading import choose
from model.programs import Programs
from model.sharding import mesh
from model.sizes import Sizes
from scripts.benchmarks.work import Request
from serve_app.batches import pack_labels

_REPEATS = 7
_LABELS = (1, 2)


@dataclass(frozen=True, slots=True)
class HostCost:
    """What a request costs beside the device.

    Attributes:
        seconds: of processor time on this machine; the least of some requests.
        bytes: that the host sends to the device and fetches from it.
    """

    seconds: float
    bytes: int


class _AtOnce(Compiler):
    """Programs that compute nothing: their results are zeros."""

    def __init__(self, model: Model, weights: Weights) -> None:
        super().__init__(model, weights, None)
        self._zeros: dict[tuple[Kind, Size], Any] = {}
        self.moved = 0

    def get(self, kind: Kind, size: Size) -> Callable[..., Any]:
        def program(*arguments: Any) -> Any:
            arrays = {id(leaf): leaf for leaf in jax.tree.leaves(arguments) if isinstance(leaf, jax.Array)}
            pool = next((leaf for leaf in arrays.values() if leaf.shape == self._model.layout.pool.shape), None)
            result = pool if kind is Kind.WRITE else self._result(kind, size)
            self.moved += sum(leaf.nbytes for leaf in arrays.values() if leaf is not pool)
            self.moved += 0 if kind is Kind.WRITE else sum(leaf.nbytes for leaf in jax.tree.leaves(result))
            return result

        return program

    def _result(self, kind: Kind, size: Size) -> Any:
        if (kind, size) not in self._zeros:
            shape = {Kind.SEGMENTS: lambda: (size.reads, self._model.config.width), Kind.PREFILL: lambda: (0,)}
            self._zeros[kind, size] = jnp.zeros(shape.get(kind, lambda: (size,))(), jnp.float32)
        return self._zeros[kind, size]


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
    seconds: list[float] = []
    moved = 0
    for _ in range(_REPEATS):
        request = requests()
        batch = pack_labels(request.prompts, [_LABELS] * len(request.items_ids))
        compiler.moved, started = 0, time.process_time()
        engine.score(batch)
        seconds.append(time.process_time() - started)
        moved = compiler.moved
    return HostCost(min(seconds[1:]), moved)
