"""One model over two processes, as over two hosts: collectives go through gloo."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from model import loading
from serve_app.local_ray import free_port
from tests.invariance.rows import TOLERANCE, values, with_halved_head
from tests.sharding.one_of_two import SIZES, sequences
from tests.tiny import make_llama


@pytest.mark.timeout(180)
def test_two_processes_score_as_one(tmp_path: Path) -> None:
    folder = with_halved_head(make_llama(tmp_path / "llama", heads=4, ff=32, layers=2))
    results = [tmp_path / f"{number}.npy" for number in range(2)]
    flags = "--xla_backend_optimization_level=1 --xla_force_host_platform_device_count=2"
    command = [sys.executable, "-m", "tests.sharding.one_of_two", str(folder), f"127.0.0.1:{free_port()}", "2"]
    started = [
        subprocess.Popen(
            [*command, str(number), str(result)],
            env={**os.environ, "XLA_FLAGS": flags, "JAX_ENABLE_COMPILATION_CACHE": "0"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for number, result in enumerate(results)
    ]
    try:
        for process in started:
            output, _ = process.communicate(timeout=150)
            assert process.returncode == 0, output
    finally:
        for process in started:
            process.kill()
    wanted = values(loading.load(folder, **SIZES), sequences())
    for result in results:
        for found in np.load(result):
            np.testing.assert_allclose(found, wanted, rtol=0, atol=TOLERANCE)
