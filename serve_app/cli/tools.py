"""``score-serve bench`` and ``score-serve plan``: the project's benchmark and planner as commands.

Both are in the source checkout, not in the installed package: the benchmark needs its inputs and reference scores, and
the planner shares its code. They have their own options and their own --help.
"""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path

import typer

from serve_app.cli.client import REFUSED, complain

CHECKOUT = Path(__file__).parents[2]

PASSED_ON = {"ignore_unknown_options": True, "allow_extra_args": True, "allow_interspersed_args": False}
"""Settings of a command that passes on all arguments, including --help."""

_QUIET_TPU = {"JAX_PLATFORMS": "cpu", "TPU_WORKER_HOSTNAMES": "localhost", "TPU_ACCELERATOR_TYPE": "v6e-1"}
"""Programs are compiled for a TPU but none runs here: jax must not look for one, nor libtpu for its neighbours."""


def bench(context: typer.Context) -> None:
    """Time fixed workloads on this engine, the service and transformers, side by side. It has its own --help."""
    _run("bench", "scripts.benchmarks.run", "bench", context)


def plan(context: typer.Context) -> None:
    """Estimate what a model and a workload need on TPUs, by compiling for them. It has its own --help."""
    for name, value in _QUIET_TPU.items():
        os.environ.setdefault(name, value)
    _run("plan", "scripts.planning.plan", "tpu-compile", context)


def _run(name: str, module: str, extra: str, context: typer.Context) -> None:
    """Run the Typer application in ``module``, which needs the packages of ``extra``."""
    script = CHECKOUT.joinpath(*module.split(".")).with_suffix(".py")
    if not script.is_file():
        complain(
            f"{name} needs the source checkout, which has its inputs, and {CHECKOUT} is an installed package; "
            "clone the repository and run its scripts there"
        )
        raise typer.Exit(REFUSED)
    sys.path.insert(0, str(CHECKOUT))
    try:
        tool: typer.Typer = importlib.import_module(module).app
    except ModuleNotFoundError as error:
        complain(
            f"{name} needs {error.name}, of the extra {extra!r}; run: pip install --editable '{CHECKOUT}[{extra}]'"
        )
        raise typer.Exit(REFUSED) from None
    tool(context.args, prog_name=f"score-serve {name}")
