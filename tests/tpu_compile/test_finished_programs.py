"""The planner finds the finished programs of what it compiles, and their bundles are what the chip must do at least."""

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(find_spec("libtpu") is None, reason="libtpu is not installed")

CODE = """
import json, sys, jax, jax.numpy as jnp
from pathlib import Path
from jax.sharding import SingleDeviceSharding
from scripts.planning.schedules import Schedules
schedules = Schedules(Path(sys.argv[1]))  # before libtpu is loaded
from model.cost import program_cost
from scripts.planning.chips import CHIPS, devices
here = SingleDeviceSharding(devices("v6e", "1x1")[0])
def array(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=here)
traced = jax.jit(lambda x, w: jax.nn.silu(x @ w)).trace(array(4096, 1024), array(1024, 2048))
compiled = traced.lower().compile()
costs = [program_cost(traced, compiled, trips=1, rates=CHIPS["v6e"].rates, finished=way)[0]
         for way in (None, schedules.of)]
print(json.dumps([sum(cost.cycles.values()) for cost in costs] + [costs[1].flops / CHIPS["v6e"].rates.flops]))
"""


def test_a_product_takes_its_finished_bundles(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", CODE, str(tmp_path)], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
    modelled, counted, least = json.loads(done.stdout.splitlines()[-1])
    assert counted != modelled
    assert least < counted < 1.6 * least
