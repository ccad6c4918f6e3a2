"""GPUs to compile for without one, by XLA's descriptions of them."""

from functools import cache
from importlib.metadata import distributions
from typing import Any

from jax.experimental import topologies

_INSTALLED = {each.name for each in distributions()}
MISSING = [name for name in ("jax-cuda12-plugin", "jax-cuda12-pjrt", "nvidia-cuda-nvcc-cu12") if name not in _INSTALLED]

_DESCRIPTION = """
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: {shared_per_core}
  threads_per_core_limit: {threads}
  core_count: {cores}
  fpus_per_core: {fpus}
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: {bandwidth}
  l2_cache_size: {cache}
  clock_rate_ghz: {clock}
  device_memory_size: {memory}
  shared_memory_per_block_optin: {shared}
  cuda_compute_capability {{ major: {major} minor: {minor} }}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 7 }}
runtime_version {{ major: 12 minor: 8 }}
device_description_str: "{name}"
"""

_FIELDS = (
    "name",
    "major",
    "minor",
    "cores",
    "fpus",
    "threads",
    "shared_per_core",
    "shared",
    "bandwidth",
    "cache",
    "clock",
    "memory",
)
_CARDS = {
    "a100": ("A100-SXM4-80GB", 8, 0, 108, 64, 2048, 167936, 166912, 2039040000000, 41943040, 1.41, 85100068864),
    "a6000": ("RTX A6000", 8, 6, 84, 128, 1536, 102400, 101376, 768096000000, 6291456, 1.8, 51041271808),
    "h100": ("H100 80GB HBM3", 9, 0, 132, 128, 2048, 233472, 232448, 3352320000000, 52428800, 1.98, 84942979072),
}
"""Source: xla/backends/gpu/target_config/specs in https://github.com/openxla/xla."""


@cache
def card(name: str) -> Any:
    """A device to compile for."""
    description = _DESCRIPTION.format(**dict(zip(_FIELDS, _CARDS[name], strict=True)))
    topology = topologies.get_topology_desc(platform="cuda", target_config=description, topology="1x1x1")
    return topology.devices[0]
