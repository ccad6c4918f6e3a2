"""The compiled programs of one model, by kind and size."""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, final

import jax
import jax.numpy as jnp

from model import compiled
from model.computations import Definition, Kind, Model, Size, Weights, definition
from model.contract import Progress
from model.sharding import abstract


@final
class Compiler:
    """Compiles programs ahead of time, each once, and keeps them.

    Args:
        folder: of compiled programs, see ``model.compiled``.

    Attributes:
        compilations: programs that were compiled or read from ``folder``.
    """

    def __init__(self, model: Model, weights: Weights, folder: Path | None) -> None:
        self._model, self._weights, self._folder = model, weights, folder
        self._code = (
            f"{'by layer' if model.by_layer else 'in a loop'} {model.abstract.ends[0]} {model.abstract.block[0]}"
        )
        """With a program's kind and size it tells what is computed; the graphs hold all constants of the config."""
        self._compiled: dict[tuple[Kind, Size], Callable[..., Any]] = {}
        self.compilations = 0

    def get(self, kind: Kind, size: Size) -> Callable[..., Any]:
        """The program, compiled now if it was not yet."""
        return self._compiled.get((kind, size)) or self.compile(kind, size)

    def compile(self, kind: Kind, size: Size) -> Callable[..., Any]:
        """Build, or find on disk, one program for one size."""
        program = self.build(f"{kind} {size}", definition(self._model, self._weights, kind, size))
        self.compilations += 1
        self._compiled[kind, size] = program
        return program

    def compile_all(self, wanted: Sequence[tuple[Kind, Size]], progress: Progress | None = None) -> None:
        """``compile`` of all of them, several at a time."""
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            compiling = {pool.submit(self.compile, kind, size): f"{kind} {size}" for kind, size in wanted}
            for done, future in enumerate(as_completed(compiling), 1):
                future.result()
                if progress is not None:
                    progress(done, len(wanted), compiling[future])

    def build(self, name: str, one: Definition) -> Callable[..., Any]:
        """Build, or find on disk, a program that is not kept here.

        Args:
            name: tells its function from all others of this model that take the same arguments.
        """
        function, arguments, donated = self.on_all_devices(one)
        with self._precision():
            return compiled.program(f"{name} {self._code}", function, arguments, donated, self._folder)

    def trace(self, kind: Kind, size: Size) -> jax.stages.Traced:
        """One program for one size, before it is lowered."""
        function, arguments, donated = self.on_all_devices(definition(self._model, self._weights, kind, size))
        with self._precision():
            return jax.jit(function, donate_argnums=donated).trace(*arguments)

    def on_all_devices(self, one: Definition) -> tuple[Callable[..., Any], tuple[Any, ...], tuple[int, ...]]:
        """A program's function over all devices, the shapes of its arguments, and which of them it may overwrite."""
        mesh = self._model.mesh
        arguments = tuple(argument.part for argument in one.arguments)
        if mesh is None:
            return one.function, arguments, one.donated
        specs = tuple(argument.spec for argument in one.arguments)
        function = jax.shard_map(one.function, mesh=mesh, in_specs=specs, out_specs=one.results, check_vma=False)
        return function, abstract(arguments, specs, mesh), one.donated

    def _precision(self) -> AbstractContextManager[None]:
        return jax.default_matmul_precision("highest" if self._model.dtype == jnp.float32 else "default")
