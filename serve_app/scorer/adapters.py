"""The LoRA adapters of one replica: which of them are in which slot of its engine."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np

from serve_app import model_source
from serve_app.contract import Engine, ScoreJob
from serve_app.errors import NotFoundError, OverloadedError

logger = logging.getLogger("ray.serve")

LOADING_RETRY_S = 2


class AdapterSlots:
    """The adapters by name, see ``settings.ModelSettings.adapters``.

    Args:
        find: the local folder of what a setting names.
    """

    def __init__(self, engine: Engine, find: Callable[[str], Path] | None = None) -> None:
        self._engine = engine
        self._find = find or model_source.adapter
        self._loaded: dict[str, tuple[str, int]] = {}
        """Name -> where it comes from, and its slot."""
        self._free = list(range(1, engine.info.adapters + 1))
        self._inside: Counter[int] = Counter()
        """Jobs that are being computed, by slot."""
        self._failed: dict[str, str] = {}
        """Why an adapter could not be loaded."""
        self._wanted: Mapping[str, str] = {}
        self._left = asyncio.Event()
        self._changing = asyncio.Lock()

    async def change(self, wanted: Mapping[str, str]) -> None:
        """Have these adapters, and no others. What an adapter that goes was asked before is still computed.

        An adapter that cannot be loaded is logged, and requests that name it get the reason.
        """
        self._wanted = wanted
        async with self._changing:
            gone = [name for name, (source, _) in self._loaded.items() if self._wanted.get(name) != source]
            slots = [self._loaded.pop(name)[1] for name in gone]
            self._failed.clear()
            for slot in slots:
                while self._inside[slot]:  # its place is taken when its last job is computed
                    self._left.clear()
                    await self._left.wait()
            self._free += slots
            for name, source in self._wanted.items():
                if name not in self._loaded:
                    await self._load(name, source)

    async def _load(self, name: str, source: str) -> None:
        slot = self._free.pop(0)
        try:
            folder = await asyncio.to_thread(self._find, source)
            kind = await asyncio.to_thread(self._engine.load_adapter, slot, folder)
        except Exception as error:
            self._free.append(slot)
            self._failed[name] = str(error)
            logger.error("adapter %s (%s) cannot be loaded: %s", name, source, error)
            return
        self._loaded[name] = source, slot
        logger.info("adapter %s is loaded: %s (%s)", name, source, kind)

    def check(self) -> None:
        """Raise ValueError if an adapter could not be loaded."""
        for name, why in self._failed.items():
            raise ValueError(f"adapter {name} ({self._wanted[name]}) cannot be loaded: {why}")

    @contextmanager
    def used(self, job: ScoreJob) -> Generator[ScoreJob]:
        """The job with its adapter's slot in its batch. The slot stays the adapter's until the end.

        Raises:
            NotFoundError: there is no such adapter, or it could not be loaded.
            OverloadedError: it is still being loaded.
        """
        if not job.adapter:
            yield job
            return
        if job.adapter not in self._loaded:
            if why := self._failed.get(job.adapter):
                raise NotFoundError(f"adapter {job.adapter!r} could not be loaded: {why}", param="model")
            if job.adapter in self._wanted:
                loading = f"adapter {job.adapter!r} is still being loaded; try again"
                raise OverloadedError(loading, retry_after_s=LOADING_RETRY_S)
            names = ", ".join(self._wanted) or "none"
            raise NotFoundError(f"there is no adapter {job.adapter!r}; the adapters are {names}", param="model")
        _, slot = self._loaded[job.adapter]
        self._inside[slot] += 1
        try:
            slots = np.full(job.batch.num_sequences, slot, np.int32)
            yield replace(job, batch=replace(job.batch, adapters=slots))
        finally:
            self._inside[slot] -= 1
            self._left.set()
