"""Compiled programs on disk. A later start reads them and neither traces, lowers nor compiles anything.

jax's own cache spares only the last of the three, which is the least once programs are many and small: of a warm-up of
97 programs, tracing and lowering took 12 of 14.5 CPU seconds; reading the programs takes 2.
"""

import hashlib
import logging
import os
import pickle
import stat
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import serialize_executable
from jax.sharding import NamedSharding

from model.versions import versions

logger = logging.getLogger(__name__)

T = TypeVar("T")

FLAGS = ("XLA_FLAGS", "LIBTPU_INIT_ARGS")
"""Variables of the environment with the compilers' flags. Each compiler reads its own once, when it is loaded."""


def program(
    name: str,
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
    donated: tuple[int, ...],
    folder: Path | None,
) -> Any:
    """``function`` compiled for ``arguments``, from ``folder`` where it is there already.

    Where jax's own cache is on (``jax_compilation_cache_dir``) nothing is kept: XLA's CPU backend writes a program that
    was itself read from a cache without its code.

    Args:
        name: tells the function from all others of this package that take the same arguments, constants included.
        arguments: arrays, or their shapes; their shardings are part of the program.
        donated: numbers of the arguments that may be overwritten.
        folder: what is in it runs as code, so that it must be writable by trusted users alone; None: nothing is kept.
    """
    if folder is None or jax.config.jax_compilation_cache_dir:  # pyright: ignore[reportAttributeAccessIssue]
        return _compile(function, arguments, donated)
    file = folder / _key(name, arguments, donated)
    structure = jax.tree.structure((arguments, {}))

    def loaded(content: bytes) -> Any:
        binary, results = pickle.loads(content)
        return serialize_executable.deserialize_and_load(
            binary, structure, results, execution_devices=_devices(arguments)
        )

    if (found := load_cached(file, loaded)) is not None:
        return found
    compiled = _compile(function, arguments, donated)

    def content() -> bytes:
        binary, _, results = serialize_executable.serialize(compiled)
        return pickle.dumps((binary, results))

    store(file, content)
    return compiled


def load_cached(file: Path, use: Callable[[bytes], T]) -> T | None:
    """Return what ``use`` makes of a file that runs as code; None if it is absent or, after a warning, unusable."""
    try:
        return use(_read(file))
    except FileNotFoundError:
        return None
    except Exception:  # a truncated or foreign file can fail in any way; it can be made again
        logger.warning("%s cannot be read and is made again", file, exc_info=True)
        return None


def store(file: Path, content: Callable[[], bytes]) -> None:
    """Write a file for ``load_cached``, or warn."""
    try:
        _write(file, content())
    except Exception as error:  # a full disk, another user's folder: the next start makes it again
        logger.warning("%s cannot be kept: %s", file, error)


def _read(file: Path) -> bytes:
    """The bytes of a file that runs as code. Raise PermissionError if another user but root can have written them."""
    with file.open("rb") as content:
        found = os.fstat(content.fileno())
        if found.st_uid not in (0, os.getuid()) or found.st_mode & stat.S_IWOTH:
            raise PermissionError(f"{file} belongs to another user, or everyone may write it")
        return content.read()


def _compile(function: Callable[..., Any], arguments: tuple[Any, ...], donated: tuple[int, ...]) -> Any:
    return jax.jit(function, donate_argnums=donated).lower(*arguments).compile()


def _devices(arguments: tuple[Any, ...]) -> list[Any]:
    """The devices that hold the arguments, in the program's order: a host may have more."""
    for leaf in jax.tree.leaves(arguments):
        if isinstance(leaf.sharding, NamedSharding):
            return np.asarray(leaf.sharding.mesh.devices).ravel().tolist()
    return jax.devices()[:1]


def _key(name: str, arguments: tuple[Any, ...], donated: tuple[int, ...]) -> str:
    leaves, structure = jax.tree.flatten(arguments)
    shapes = [(leaf.shape, str(leaf.dtype), str(leaf.sharding)) for leaf in leaves]
    order = [device.id for device in _devices(arguments)]  # which a sharding does not print
    precision = jax.config.jax_default_matmul_precision  # pyright: ignore[reportAttributeAccessIssue]
    return hashlib.sha256(repr((_built_by(), precision, name, structure, shapes, order, donated)).encode()).hexdigest()


@cache
def _built_by() -> tuple[str, ...]:
    """What decides the program besides its function: this package's code, the compilers, their flags, the devices."""
    package = Path(__file__).parent
    files = sorted(path for kind in ("*.py", "*.cc", "*.h") for path in package.rglob(kind))
    sources = hashlib.sha256(b"".join(path.read_bytes() for path in files))
    devices = [f"{device.device_kind} {device.id}" for device in jax.devices()]
    client = jax.devices()[0].client  # its version is that of the driver and of the library that was loaded
    flags = [os.environ.get(name, "") for name in FLAGS]
    return (sources.hexdigest(), str(versions()), *flags, client.platform, client.platform_version, *devices)


def _write(file: Path, content: bytes) -> None:
    """Write the file whole or not at all: several replicas may start at once."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=file.parent) as scratch:
        part = Path(scratch) / "part"
        part.write_bytes(content)
        part.replace(file)
