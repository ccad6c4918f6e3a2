"""Compiled programs on disk: found by everything that determines them, compiled again if they cannot be read."""

import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

from model import compiled, loading, sharding
from model.versions import versions
from serve_app import __version__
from tests.batches import label_batch
from tests.tiny import make_llama

PROMPTS = [[7, 8, 9], [7, 8, 10, 11], [5]]


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """An empty folder for the programs; jax's own cache is off."""
    before: str | None = jax.config.jax_compilation_cache_dir  # pyright: ignore[reportAttributeAccessIssue]
    jax.config.update("jax_compilation_cache_dir", None)  # pyright: ignore[reportUnknownMemberType]
    compilation_cache.reset_cache()  # jax keeps using a cache that it has opened
    yield tmp_path / "programs"
    jax.config.update("jax_compilation_cache_dir", before)  # pyright: ignore[reportUnknownMemberType]
    compilation_cache.reset_cache()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llama(tmp_path_factory.mktemp("model"), layers=2)


def score(model: Path, folder: Path | None) -> np.ndarray:
    scorer = loading.load(model, compiled_folder=folder, max_segment_tokens=16, call_tokens=16)
    return scorer.score(label_batch(PROMPTS, [(3, 4)] * 3)).values


STARTED = """
import sys
from pathlib import Path
from model import compiled, loading

count, compile_one = 0, compiled._compile


def counting(*given):
    global count
    count += 1
    return compile_one(*given)


compiled._compile = counting
engine = loading.load(
    Path(sys.argv[1]), compiled_folder=Path(sys.argv[2]), implementation="fused-interpreted", by_layer=False,
    large_calls=True, call_tokens=128, max_segment_tokens=128, chunks=(128,), head_sizes=(8,), argmax_sizes=(8,),
    target_sizes=(8,), prefix_cache_bytes=0,
)
engine.warmup()
print(count, engine.compilations)
"""


def started(model: Path, folder: Path) -> tuple[int, int]:
    """Programs that a new process has compiled when it is ready, and that it has: as a replica with an accelerator."""
    env = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
    command = [sys.executable, "-c", STARTED, str(model), str(folder)]
    found = subprocess.run(command, capture_output=True, text=True, env={**env, "JAX_PLATFORMS": "cpu"}, check=True)
    compiled_now, programs = map(int, found.stdout.split())
    return compiled_now, programs


def test_a_later_process_is_ready_without_compiling(tmp_path: Path) -> None:
    """As a replica beside which an earlier one, of the same update, has filled the shared folder."""
    model, folder = make_llama(tmp_path / "model", layers=1, context=300), tmp_path / "shared"
    first, programs = started(model, folder)
    assert first == programs + 1  # and the comparison of attention
    assert started(model, folder) == (0, programs)


def refuse(*_: object) -> None:
    raise AssertionError("compiled")


def test_the_second_engine_compiles_nothing(folder: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = score(model, folder)
    kept = sorted(folder.iterdir())
    monkeypatch.setattr(compiled, "_compile", refuse)
    np.testing.assert_array_equal(score(model, folder), first)
    assert sorted(folder.iterdir()) == kept


def test_another_constant_is_another_program(
    folder: Path, model: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All shapes are equal: only the base of the rotary positions differs."""
    score(model, folder)
    other = make_llama(tmp_path_factory.mktemp("other"), layers=2, theta=99.0)
    wanted = score(other, folder)
    monkeypatch.setattr(compiled, "_compile", refuse)
    np.testing.assert_array_equal(score(other, folder), wanted)
    assert np.abs(score(model, folder) - wanted).max() > 1e-3


@pytest.mark.slow
def test_another_order_of_the_devices_is_another_program(folder: Path, model: Path) -> None:
    """The devices' count and the text of the sharding are the same."""
    devices = jax.devices()[:2]
    wanted = score(model, folder)
    for order in (devices, devices[::-1]):
        scorer = loading.load(
            model, compiled_folder=folder, max_segment_tokens=16, call_tokens=16, mesh=sharding.mesh(1, 2, order)
        )
        found = scorer.score(label_batch(PROMPTS, [(3, 4)] * 3)).values
        np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5)


def test_a_broken_file_is_compiled_again(folder: Path, model: Path, caplog: pytest.LogCaptureFixture) -> None:
    wanted = score(model, folder)
    for file in folder.iterdir():
        file.write_bytes(file.read_bytes()[:1000])
    np.testing.assert_array_equal(score(model, folder), wanted)
    assert "is made again" in caplog.text
    assert all(file.is_file() for file in folder.iterdir())
    assert all(file.stat().st_size > 1000 for file in folder.iterdir())


@pytest.mark.parametrize("owner", ["everyone", "another user"])
def test_a_file_that_another_user_may_have_written_is_not_run(
    folder: Path, model: Path, owner: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = score(model, folder)
    for file in folder.iterdir():
        if owner == "everyone":
            file.chmod(0o666)
        elif os.getuid() == 0:
            os.chown(file, 12_345, -1)
    if owner == "another user" and os.getuid() != 0:
        monkeypatch.setattr(os, "getuid", lambda: 12_345)
    monkeypatch.setattr(pickle, "loads", refuse)
    np.testing.assert_array_equal(score(model, folder), wanted)
    assert "belongs to another user, or everyone may write it" in caplog.text


def test_without_a_writable_folder_programs_run_but_are_not_stored(
    folder: Path, model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder.write_text("a file, not a folder")
    assert np.isfinite(score(model, folder)).all()
    assert "cannot be kept" in caplog.text
    assert folder.read_text() == "a file, not a folder"


def test_nothing_is_stored_where_jax_has_its_own_cache(folder: Path, model: Path, tmp_path: Path) -> None:
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "jax"))  # pyright: ignore[reportUnknownMemberType]
    score(model, folder)
    assert not folder.exists()


@pytest.mark.parametrize(
    ("where", "changed"),
    [
        ("XLA_FLAGS", f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_enable_fast_min_max=false"),
        ("LIBTPU_INIT_ARGS", "--xla_tpu_scoped_vmem_limit_kib=65536"),
        ("jax", "0.0.1"),
        ("libtpu", "0.0.1"),
        ("jax-cuda12-plugin", "0.0.1"),
    ],
)
def test_another_flag_or_library_is_another_key(where: str, changed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def key() -> str:
        compiled._built_by.cache_clear()  # of this process, in which they do not change
        return compiled._key("double", (jax.numpy.zeros(3),), ())

    before = key()
    assert key() == before
    if where in compiled.FLAGS:
        monkeypatch.setenv(where, changed)
    else:
        monkeypatch.setattr(compiled, "versions", lambda: {**versions(), where: changed})
    assert key() != before
    monkeypatch.undo()
    assert key() == before
    assert versions()["jax"] == jax.__version__
    assert versions()["llm-score-serve"] == __version__
