"""Makes an engine from settings: in this process, or on the hosts of a slice.

This is the only module of the service that loads the model package and jax, in the process that computes.
"""

from __future__ import annotations

import glob
import hashlib
import logging
import os
import platform
import resource
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from serve_app import model_source
from serve_app.contract import MEMORY, Engine, LaunchingEngine, ModelInfo, Progress
from serve_app.scorer import host_memory
from serve_app.scorer.fake_engine import FakeEngine
from serve_app.scorer.slice_group import SliceGroup
from serve_app.scorer.slice_worker import Place
from serve_app.settings import ModelSettings

logger = logging.getLogger("ray.serve")
logging.getLogger("model").parent = logger  # what the model package says belongs in the replica's log, too

ACCELERATORS = ("/dev/accel*", "/dev/vfio/*", "/dev/nvidia*", "/dev/dxg", "/dev/kfd")
"""Device files of TPUs and GPUs."""

LIBTPU_STACK = "--fibers_default_thread_stack_size"
LIBTPU_STACK_BYTES = 2**21

GB = 1e9
TYPICAL_TOKENS = 2048
"""Tokens of a long prompt, as an example of what the pages hold."""
TELL_S = 3.0
"""Seconds between two log lines on the progress of a start."""


def load_engine(settings: ModelSettings, scorers: int = 1) -> Engine:
    """Load and warm up the engine for these settings. It takes seconds to minutes; the log shows the progress.

    Args:
        scorers: scorers of the service on this host, which share its memory.
    """
    if settings.tpu and settings.tpu.hosts > 1:
        engine: Engine = SliceGroup(settings, load_part)
    elif settings.engine == "fake":
        engine = FakeEngine(adapters=settings.adapter_room)
    else:
        engine = _load_model(settings, scorers)
    logger.info("weights are %s: %s", engine.info.dtype, settings.dtype_reason(engine.info.platform))
    if (memory := memory_line(engine.info)) is not None:
        logger.info("%s", memory)
    started = time.monotonic()
    engine.warmup(progress_log(logger.info))
    logger.info("the model's programs are ready after %.1f s", time.monotonic() - started)
    return engine


def progress_log(say: Callable[[str], None], now: Callable[[], float] = time.monotonic) -> Progress:
    """Return a callback that reports the progress every ``TELL_S`` seconds, with an estimate of the time left."""
    started = last = now()

    def progress(done: int, total: int, _what: str) -> None:
        nonlocal last
        if done < total and now() - last >= TELL_S:
            last = now()
            left = (last - started) / done * (total - done)
            about = f"{left / 60:.0f} min" if left >= 120 else f"{max(5, 5 * round(left / 5))} s"
            say(
                f"preparing the model's programs: {done} of {total}, about {about} left "
                "(the first start compiles them, later ones reuse them)"
            )

    return progress


def load_part(settings: ModelSettings, place: Place) -> LaunchingEngine:
    """Load the part of an engine that one host of a slice holds; see ``slice_worker.LoadPart``."""
    if settings.engine == "fake":
        return FakeEngine()
    from model.sharding import init_distributed

    init_distributed(place.coordinator, place.hosts, place.number)
    return _load_model(settings)


def card_environment(scorer_gpus: float | None) -> dict[str, str]:
    """The variables by which jax takes what a scorer has of a graphics card, or none."""
    if scorer_gpus is None:
        return {}
    if scorer_gpus == 0:
        return {"JAX_PLATFORMS": "cpu"}
    # A tenth is for what XLA's allocator does not hold: CUDA itself, the libraries' workspaces, the programs.
    return {"XLA_PYTHON_CLIENT_MEM_FRACTION": f"{0.9 * scorer_gpus:.3f}"}


def _load_model(settings: ModelSettings, scorers: int = 1) -> LaunchingEngine:
    for name, value in card_environment(settings.scorer_gpus).items():
        os.environ.setdefault(name, value)
    if settings.tpu:
        # Without it jax would go on with the CPU when libtpu fails, and keep libtpu's reason to itself.
        os.environ["JAX_PLATFORMS"] = "tpu,cpu"
        prepare_tpu()
    elif not any(map(glob.glob, ACCELERATORS)):
        # With libtpu installed, as for the tests, jax would look for a TPU and fill the log with errors.
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
    from model.config import Lora
    from model.loading import Choice, prepare, read
    from model.memory import Room, device_kind, device_room, on_host, roomiest
    from model.sharding import tpu_meshes

    tpu = settings.tpu
    meshes = tpu_meshes(tpu.chips, tpu.data) if tpu else [None]
    folder = model_source.resolve(settings.model, settings.revision, settings.base, say=logger.info)
    logger.info("loading %s", folder)
    cache: dict[str, Any] = (
        {} if settings.prefix_cache_gb is None else {"prefix_cache_bytes": int(settings.prefix_cache_gb * GB)}
    )

    def prepared(room: Room | None) -> Choice:
        on_mesh = partial(
            prepare,
            folder,
            trust_config=settings.trust_config,
            dtype=settings.dtype,
            quantization=settings.quantization,
            max_prompt_tokens=settings.limits.max_prompt_tokens,
            compiled_folder=compiled_folder(),
            room=room,
            lora=Lora(settings.adapter_room, settings.max_adapter_rank) if settings.adapter_room else None,
            **cache,
        )
        return roomiest(meshes, lambda mesh: on_mesh(mesh=mesh), lambda choice: choice.model.layout.longest)

    if not on_host():
        logger.info("computing on %s", device_kind())
        choice = prepared(device_room(meshes[0]))
    else:
        service, model = os.getppid(), memory_key(settings)
        with host_memory.opened(host_memory.PROMISES) as promises:
            own = [promise for promise in promises.others if promise.service == service]
            room = Room(
                max(0, host_memory.free_bytes() - promises.outstanding),
                sharers=max(1, scorers - len(own)),
                context=next((promise.context for promise in own if promise.model == model), None),
            )
            choice = prepared(room)
            context = choice.model.layout.longest
            promises.make(host_memory.Promise(service, model, choice.memory.total, context))
    engine = read(folder, choice, compiled_folder=compiled_folder())
    for note in engine.info.notes:
        logger.warning("%s: %s", settings.name, note)
    return engine


def prepare_tpu() -> None:
    """Set what libtpu needs of this process before jax loads it."""
    raise_locked_memory()
    deepen_libtpu_stacks()


def deepen_libtpu_stacks() -> None:
    """Give libtpu's threads deeper stacks than its own.

    Without, its compiler overflows them, and the process dies, in nested fusions of small encoders (libtpu 0.0.42.1).
    """
    flags = os.environ.get("LIBTPU_INIT_ARGS", "")
    if LIBTPU_STACK not in flags:
        os.environ["LIBTPU_INIT_ARGS"] = f"{flags} {LIBTPU_STACK}={LIBTPU_STACK_BYTES}".strip()


def raise_locked_memory() -> None:
    """Let libtpu lock host memory for its transfers, as far as this process may raise the limit.

    Source: docs.cloud.google.com/gemini-enterprise-agent-platform/machine-learning/predictions/use-tpu asks for
    ``ulimit -l 68719476736``, in KiB. In a container that takes the capability SYS_RESOURCE (setrlimit(2)).
    """
    _, hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    with suppress(ValueError, OSError):  # only a privileged process raises what the container was given
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        return
    resource.setrlimit(resource.RLIMIT_MEMLOCK, (hard, hard))
    logger.info("libtpu may lock %s of host memory", f"{hard / GB:.2f} GB" if hard >= 0 else "any amount")


def memory_key(settings: ModelSettings) -> str:
    """What decides what an engine takes: scorers for which it is the same should have the same context."""
    adapters = settings.adapter_room, settings.max_adapter_rank
    asked = (settings.limits.max_prompt_tokens, settings.prefix_cache_gb, *adapters)
    return str((settings.model, settings.revision, settings.base, settings.dtype, settings.quantization, *asked))


def memory_line(info: ModelInfo) -> str | None:
    """What an engine took of the memory, what that gives, and what to set for more; None: it is not known."""
    if (memory := info.memory) is None:
        return None
    whole = info.max_prompt_tokens == info.context_length
    context = (
        f"{info.context_length:,}" if whole else f"{info.max_prompt_tokens:,} of the model's {info.context_length:,}"
    )
    typical = min(TYPICAL_TOKENS, info.max_prompt_tokens)
    free = "" if memory.free is None else f" of {memory.free / GB:.1f} GB free"
    data, model = info.mesh or (1, 1)
    devices = f"{data} calls at once, each over {model} chips; on each chip " if data * model > 1 else ""
    taken = f"{MEMORY} {devices}weights {memory.weights / GB:.2f} GB, workspace {memory.workspace / GB:.2f} GB"
    if info.encoder:  # which keeps no pages
        return f"{taken}{free}; context {context} tokens"
    return (
        f"{taken}, pages {memory.pages / GB:.2f} GB{free} (by default pages take at most half of what weights and "
        f"workspace leave); context {context} tokens; the pages hold about {memory.page_tokens // typical} prompts of "
        f"{typical:,} tokens at once; for longer prompts set limits.max_prompt_tokens (--max-prompt-tokens), for more "
        "of them prefix_cache_gb (--prefix-cache-gb)"
    )


def compiled_folder() -> Path:
    """The folder of compiled programs for this kind of processor: different hosts may share a home directory."""
    processor = platform.processor() + platform.machine()
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        processor += next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return model_source.cache_folder() / "compiled" / hashlib.sha256(processor.encode()).hexdigest()[:12]
