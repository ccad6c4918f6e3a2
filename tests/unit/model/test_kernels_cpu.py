"""How the CPU's kernels are built, kept and found again."""

import shutil
from pathlib import Path

import pytest

from model import compiled
from model.cpu import build

pytestmark = pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler is installed")


@pytest.fixture(autouse=True)
def _empty_kernels(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels that do nothing: nothing here is computed with them, and the compiler is done at once.

    Other tests compute with the real ones, which are built the same way.
    """
    source = tmp_path_factory.mktemp("kernels") / "empty.cc"
    kernels = [
        f"XLA_FFI_DEFINE_HANDLER_SYMBOL({symbol}, [] {{ return xla::ffi::Error::Success(); }}, xla::ffi::Ffi::Bind());"
        for symbol in build.SYMBOLS.values()
    ]
    flag = 'extern "C" int ScoreHasBFloat16() { return 0; }'
    source.write_text("\n".join(['#include "xla/ffi/api/ffi.h"', *kernels, flag, ""]))
    monkeypatch.setenv("CXXFLAGS", "-O0")
    monkeypatch.setattr(build, "SOURCES", (source,))


def test_built_once_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(build, "PREFIX", "kept_attention")
    assert build.register(tmp_path)
    (kept,) = tmp_path.iterdir()
    monkeypatch.setattr(compiled, "store", None)  # would fail
    monkeypatch.setattr(build, "PREFIX", "kept_attention_again")
    assert build.register(tmp_path)
    assert list(tmp_path.iterdir()) == [kept]
    assert not caplog.text


@pytest.mark.parametrize("spoil", [lambda file: file.write_bytes(b"\x7fELF"), lambda file: file.chmod(0o666)])
def test_a_file_that_is_broken_or_writable_by_everyone_is_not_run(
    spoil: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(build, "PREFIX", f"spoilt_attention_{id(spoil)}")
    assert callable(spoil)
    assert build._library(tmp_path).ScoreAttention  # pyright: ignore[reportPrivateUsage]
    (kept,) = tmp_path.iterdir()
    spoil(kept)
    before = kept.stat().st_ino
    assert build.register(tmp_path)
    assert "is made again" in caplog.text
    assert kept.stat().st_ino != before


def test_without_a_writable_folder_kernels_run_but_are_not_stored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(build, "PREFIX", "homeless_attention")
    (tmp_path / "folder").write_text("a file, not a folder")
    assert build.register(tmp_path / "folder")
    assert "cannot be kept" in caplog.text


@pytest.mark.parametrize(
    ("compiler", "reason"),
    [("no-such-compiler", "no compiler 'no-such-compiler' is installed"), ("false", "false ended")],
)
def test_without_a_compiler_it_says_what_to_do(
    compiler: str, reason: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("CXX", compiler)
    assert not build.register(None)
    assert reason in caplog.text
    assert "Install a C++20 compiler, g++ for example, or name one in CXX." in caplog.text
