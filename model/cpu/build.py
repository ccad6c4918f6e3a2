"""The kernels for a CPU: C++ beside this file, built by the machine's compiler and given to XLA (its FFI)."""

import ctypes
import hashlib
import logging
import os
import shutil
import subprocess
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import jax

from model import compiled

logger = logging.getLogger(__name__)

HERE = Path(__file__).parent
SOURCES = (HERE / "attention.cc", HERE / "linear.cc", HERE / "delta.cc", HERE / "pages.cc")
HEADER = HERE / "kernels.h"
SYMBOLS = {
    "attention": "ScoreAttention",
    "products": "ScoreProducts",
    "reduced": "ScoreReduced",
    "gated": "ScoreGated",
    "activated": "ScoreActivated",
    "layer_norms": "ScoreLayerNorms",
    "normalizers": "ScoreNormalizers",
    "tops": "ScoreTops",
    "dots": "ScoreDots",
    "delta": "ScoreDelta",
    "delta_kept": "ScoreDeltaKept",
    "pages": "ScorePages",
}
"""A kernel's name here -> its name in the sources."""
OPTIONS = ("-std=c++20", "-O3", "-march=native", "-ffp-contract=off", "-fPIC")
"""Products and sums are fused where the sources say so: where a compiler chooses, bits depend on its choice."""

PREFIX = "score_serve"


def target(kernel: str) -> str:
    """A kernel's name in compiled programs."""
    return f"{PREFIX}_{kernel}"


@dataclass(frozen=True, slots=True)
class Kernels:
    """The built kernels.

    Attributes:
        bfloat16: the processor multiplies it faster than float32.
    """

    bfloat16: bool


_loading = threading.Lock()
_loaded: list[Kernels | None] = []


def load(folder: Path | None) -> Kernels | None:
    """Build the kernels, or find them in ``folder``, and give them to XLA; once in a process.

    Args:
        folder: keeps them for the next start; what is in it runs as code. None: they are built for this process alone.

    Returns:
        None, after a warning: they cannot be built here.
    """
    with _loading:
        if not _loaded:
            _loaded.append(register(folder))
        return _loaded[0]


def register(folder: Path | None) -> Kernels | None:
    """``load``, without its once."""
    try:
        library = _library(folder)
    except (OSError, subprocess.CalledProcessError) as error:
        logger.warning(
            "layers run as XLA's matmuls alone, which takes up to twice as long: the kernels could not be built (%s). "
            "Install a C++20 compiler, g++ for example, or name one in CXX.",
            _reason(error),
        )
        return None
    for kernel, symbol in SYMBOLS.items():
        jax.ffi.register_ffi_target(target(kernel), jax.ffi.pycapsule(getattr(library, symbol)), platform="cpu")
    return Kernels(bfloat16=bool(library.ScoreHasBFloat16()))


def _library(folder: Path | None) -> ctypes.CDLL:
    """The kernels for this machine, from ``folder`` where they are there already."""
    compiler, options = os.environ.get("CXX", "c++"), [*OPTIONS, *os.environ.get("CXXFLAGS", "").split()]
    # Its predefined macros tell the compiler's version and the processor's instructions.
    macros = _run([compiler, *options, "-dM", "-E", "-x", "c++", os.devnull])
    decides = ([file.read_bytes() for file in (HEADER, *SOURCES)], macros, options, version("jaxlib"))
    name = f"kernels-{hashlib.sha256(repr(decides).encode()).hexdigest()}.so"
    file = folder and folder / name
    if file and (found := compiled.load_cached(file, lambda _: ctypes.CDLL(str(file)))):
        return found
    with tempfile.TemporaryDirectory() as scratch, ThreadPoolExecutor(len(SOURCES)) as pool:
        made = Path(scratch) / name
        parts = {str(source): str(made.with_name(f"{source.stem}.o")) for source in SOURCES}
        compiling = [compiler, *options, "-isystem", jax.ffi.include_dir(), "-c"]
        # At once: a first start waits for the longest of them.
        list(pool.map(_run, ([*compiling, source, "-o", part] for source, part in parts.items())))
        _run([compiler, *options, "-shared", *parts.values(), "-o", str(made)])
        if file:
            compiled.store(file, made.read_bytes)
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
