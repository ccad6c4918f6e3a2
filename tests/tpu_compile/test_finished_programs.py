"""The planner finds the finished programs of what it compiles, and their bundles are what the chip must do at least."""

import json
import subprocess
import sys
from importlib.util import find_spec

import pytest

pytestmark = pytest.mark.skipif(find_spec("libtpu") is None, reason="libtpu is not installed")

CODE = """
import json, jax, jax.numpy as jnp
from jax.sharding import SingleDeviceSharding
from scripts.planning.schedules import finished_programs
from model.cost import program_cost
from scripts.planning.chips import CHIPS, devices
with finished_programs() as schedules:
    here = SingleDeviceSharding(devices("v6e", "1x1")[0])
    def array(*shape):
        return jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=here)
    traced = jax.jit(lambda x, w: jax.nn.silu(x @ w)).trace(array(4096, 1024), array(1024, 2048))
    compiled = traced.lower().compile()
    schedules.read()
    costs = [program_cost(traced, compiled, trips=1, rates=CHIPS["v6e"].rates, finished=way)[0]
             for way in (None, schedules.of)]
    print(json.dumps([sum(cost.cycles.values()) for cost in costs] + [costs[1].flops / CHIPS["v6e"].rates.flops]))
"""


def test_a_product_takes_its_finished_bundles() -> None:
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
    modelled, counted, least = json.loads(done.stdout.splitlines()[-1])
    assert counted != modelled
    assert least < counted < 1.6 * least
