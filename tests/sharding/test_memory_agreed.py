"""Hosts of a slice with different free memory choose the same pool."""

from __future__ import annotations

import subprocess
import sys

import pytest

from serve_app.local_ray import free_port

CODE = """
import sys
from model.memory import agreed
from model.sharding import init_distributed
init_distributed("127.0.0.1:{port}", 2, int(sys.argv[1]))
print(agreed(int(sys.argv[2])), file=sys.stderr)  # gloo writes parts of lines to the other
"""


@pytest.mark.heavy
def test_all_hosts_take_the_least_that_one_of_them_has_free():
    command = [sys.executable, "-c", CODE.format(port=free_port())]
    hosts = [
        subprocess.Popen([*command, str(number), str(free)], stderr=subprocess.PIPE, text=True)
        for number, free in enumerate((40_000_000_000, 9_000_000_000))
    ]
    least = str(9_000_000_000 // 2**20 * 2**20)
    for host in hosts:
        assert least in host.communicate(timeout=120)[1].split()  # among lines of jax
