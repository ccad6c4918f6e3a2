"""Attention on a CPU in one kernel, ``attention_cpu.cc``: built by the machine's C++ compiler, called by XLA (its FFI).

It takes half the time of ``attention``'s paged matmuls and, since it looks at every row by itself, does not care how
rows are packed.
"""

import ctypes
import hashlib
import logging
import os
import shutil
import subprocess
import tempfile
import threading
from importlib.metadata import version
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Shaped

from model import compiled

logger = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name("attention_cpu.cc")
TARGET = "score_serve_attention"
"""Name of the kernel in compiled programs."""
OPTIONS = ("-std=c++20", "-O3", "-march=native", "-fPIC", "-shared")
UNLIMITED = 2**30
"""A window that nothing is beyond."""


def attend_native(
    q: Float[Array, "Q N H"],
    k: Float[Array, "M K H"],
    v: Float[Array, "M K H"],
    segments: Int[Array, "B T"],
    pool: Shaped[Array, "pages L 2 K page H"],
    page_table: Int[Array, " slots"],
    prefix_length: Int[Array, ""],
    layer: int | Int[Array, ""],
    window: Int[Array, ""] | None,
    softcap: float | None,
    reads: Int[Array, " Q"] | None,
) -> Float[Array, "Q N H"]:
    """As ``attention.attend``, in q's dtype; ``load`` comes before it."""
    queries = jnp.arange(len(q), dtype=jnp.int32) if reads is None else reads
    scalars = [jnp.asarray(x, jnp.int32) for x in (prefix_length, layer, UNLIMITED if window is None else window)]
    kernel = jax.ffi.ffi_call(TARGET, jax.ShapeDtypeStruct(q.shape, q.dtype))
    operands = (q, k, v, segments.reshape(-1), pool, page_table, *scalars, queries)
    return kernel(*operands, softcap=np.float32(softcap or 0))


_loading = threading.Lock()
_loaded: list[bool] = []


def load(folder: Path | None) -> bool:
    """Build the kernel, or find it in ``folder``, and give it to XLA; once in a process.

    Args:
        folder: keeps it for the next start; what is in it runs as code. None: it is built for this process alone.

    Returns:
        False, after a warning: it cannot be built here.
    """
    with _loading:
        if not _loaded:
            _loaded.append(register(folder))
        return _loaded[0]


def register(folder: Path | None) -> bool:
    """``load``, without its once."""
    try:
        library = _library(folder)
    except (OSError, subprocess.CalledProcessError) as error:
        logger.warning(
            "attention runs as XLA's matmuls, which takes about twice as long: its kernel could not be built (%s). "
            "Install a C++20 compiler, g++ for example, or name one in CXX.",
            _reason(error),
        )
        return False
    jax.ffi.register_ffi_target(TARGET, jax.ffi.pycapsule(library.ScoreAttention), platform="cpu")
    return True


def _library(folder: Path | None) -> ctypes.CDLL:
    """The kernel for this machine, from ``folder`` where it is there already."""
    compiler, options = os.environ.get("CXX", "c++"), [*OPTIONS, *os.environ.get("CXXFLAGS", "").split()]
    # Its predefined macros tell the compiler's version and the processor's instructions.
    macros = _run([compiler, *options, "-dM", "-E", "-x", "c++", os.devnull])
    decides = (SOURCE.read_bytes(), macros, options, version("jaxlib"))
    name = f"attention-{hashlib.sha256(repr(decides).encode()).hexdigest()}.so"
    file = folder and folder / name
    if file and (found := compiled.kept(file, lambda _: ctypes.CDLL(str(file)))):
        return found
    with tempfile.TemporaryDirectory() as scratch:
        made = Path(scratch) / name
        _run([compiler, *options, "-isystem", jax.ffi.include_dir(), str(SOURCE), "-o", str(made)])
        if file:
            compiled.keep(file, made.read_bytes)
        return ctypes.CDLL(str(made))


def _run(command: list[str]) -> bytes:
    if shutil.which(command[0]) is None:
        raise FileNotFoundError(f"no compiler {command[0]!r} is installed")
    return subprocess.run(command, check=True, capture_output=True).stdout


def _reason(error: OSError | subprocess.CalledProcessError) -> str:
    if isinstance(error, subprocess.CalledProcessError):
        said = error.stderr.decode(errors="replace").strip().splitlines()
        return said[0] if said else f"{error.cmd[0]} ended with {error.returncode}"
    return str(error)
