"""What a device does with a model, measured and compared: the report of ``score-serve tpu-check`` and ``gpu-check``."""

from __future__ import annotations

import dataclasses
import math
import os
import platform
import time
from collections.abc import Callable
from typing import Any, Literal

from serve_app import model_source
from serve_app.scorer.engines import compiled_folder, prepare_tpu, progress_log
from serve_app.settings import ModelSettings

Platform = Literal["tpu", "gpu", "cpu"]

ASKED = {"tpu": "tpu,cpu", "gpu": "cuda,cpu", "cpu": "cpu"}
"""jax's platforms, the first of which must start."""


class NoDeviceError(Exception):
    """There is no such device here, or it does not start."""


def report(kind: Platform, settings: ModelSettings, say: Callable[[str], None]) -> dict[str, Any]:
    """Load the model onto the first device of this kind, compare attention with a plain softmax, and time everything.

    Args:
        kind: ``cpu`` is for tests: there the kernels are others.
        settings: the model, its dtype and quantisation, and its longest prompt.
        say: takes lines on the progress.

    Returns:
        JSON's types alone; ``right`` says whether all that was compared agrees.

    Raises:
        NoDeviceError: see there.
    """
    os.environ["JAX_PLATFORMS"] = ASKED[kind]
    if kind == "tpu":
        prepare_tpu()
    import jax

    from model import device_check, loading
    from model.sharding import mesh
    from model.versions import versions

    try:
        devices = jax.devices()
    except RuntimeError as error:
        raise NoDeviceError(f"jax cannot use a {kind.upper()} here: {error}") from error
    if devices[0].platform != kind:
        raise NoDeviceError(f"jax found only {devices[0].platform} here, no {kind.upper()}")
    started = time.perf_counter()
    folder = model_source.resolve(settings.model, settings.revision, settings.base, say=say)
    say(f"loading {folder} onto {devices[0].device_kind}")
    programs = loading.load_programs(
        folder,
        compiled_folder=compiled_folder(),
        trust_config=settings.trust_config,
        dtype=settings.dtype,
        quantization=settings.quantization,
        max_prompt_tokens=settings.limits.max_prompt_tokens,
        prefix_cache_bytes=0,  # one prompt's pages: the programs are then run beside a second pool
        mesh=mesh(1, 1, devices[:1]) if kind == "tpu" else None,
    )
    loaded = time.perf_counter()
    compared: list[dict[str, Any]] = []
    for found in device_check.compare(programs, programs.model.layout.ladder):
        difference = found.difference if math.isfinite(found.difference) else None
        compared.append({**dataclasses.asdict(found), "difference": difference, "right": found.right})
        say(f"attention {found.shape}, prefixes of {found.prefixes} tokens: {'right' if found.right else 'WRONG'}")
    ran: list[dict[str, Any]] = []
    total = len(programs.wanted())
    for timing in device_check.timings(programs, progress_log(say)):
        ran.append(
            {
                "program": timing.program,
                "ms": round(timing.seconds * 1e3, 4),
                "expected_ms": None if timing.expected is None else round(timing.expected * 1e3, 4),
                "attention_kernels": timing.kernels,
            }
        )
        say(f"{len(ran)} of {total} programs: {timing.program} takes {ran[-1]['ms']} ms")
    memory: dict[str, int] = devices[0].memory_stats() or {}
    return {
        "right": all(each["right"] for each in compared),
        "platform": kind,
        "device": devices[0].device_kind,
        "devices": len(devices),
        "memory_bytes": memory.get("bytes_limit"),
        "peak_memory_bytes": memory.get("peak_bytes_in_use"),
        "versions": {"python": platform.python_version(), **versions()},
        "driver": devices[0].client.platform_version,
        "flags": {name: os.environ.get(name) for name in ("XLA_FLAGS", "LIBTPU_INIT_ARGS")},
        "model": settings.model,
        "architecture": programs.model.config.architecture,
        "dtype": programs.model.dtype.name,
        "attention": compared,
        "programs": ran,
        "load_s": round(loaded - started, 1),
        "check_s": round(time.perf_counter() - loaded, 1),
    }
