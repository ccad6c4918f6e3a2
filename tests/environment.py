"""Variables that jax and Ray Serve read on import, here and in Ray's workers. ``conftest`` imports this first."""

import os

from serve_app.local_ray import set_environment
from serve_app.scorer.engines import compiled_folder

# In most tests Ray simulates a cluster of several hosts, and calls as such a cluster does; ``test_launch`` uses gRPC.
os.environ.setdefault("RAY_SERVE_USE_GRPC_BY_DEFAULT", "0")
set_environment()
os.environ.setdefault("JAX_NUMPY_DTYPE_PROMOTION", "strict")
os.environ.setdefault("JAX_NUMPY_RANK_PROMOTION", "raise")
# With libtpu installed (tests/tpu_compile) jax would look for a TPU and, if there is one, run the tests on it.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Compiling is most of these tests' time; LLVM's lower level halves it and costs a run 15%. Eight devices are for
# tests/sharding; all else runs on the first.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=1 --xla_force_host_platform_device_count=8")
# Many tests build the same tiny model; one compiles its programs, the others load them.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(compiled_folder()))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
# Requests whose traceparent asks for it are traced, into files.
os.environ["RAY_SERVE_TRACING_EXPORTER_IMPORT_PATH"] = "ray.serve._private.tracing_utils:default_tracing_exporter"
os.environ["RAY_SERVE_TRACING_SAMPLING_RATIO"] = "0"
