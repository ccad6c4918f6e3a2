"""The host memory that a sharded load needs."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tiny import make_llama


@pytest.mark.skipif(sys.platform != "linux", reason="reads the process's memory from /proc")
def test_a_load_holds_little_more_than_the_devices_own_copy(tmp_path: Path) -> None:
    folder = make_llama(
        tmp_path / "llama", width=512, heads=8, kv_heads=8, head_width=64, ff=2048, layers=6, vocab=20_000, shards=4
    )
    files = [file.stat().st_size for file in folder.glob("*.safetensors")]
    child = subprocess.run(
        [sys.executable, "-m", "tests.sharding.loading_memory", str(folder), "8"],
        env={**os.environ, "JAX_ENABLE_COMPILATION_CACHE": "0"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert child.returncode == 0, child.stderr
    held, beyond = map(int, child.stdout.split())
    assert held > sum(files)
    assert beyond <= 1.2 * max(files)
