"""``score-serve bench`` and ``score-serve plan``: what the project's scripts measure and estimate, as commands.

They are in the source checkout, not in the installed package: the benchmark's inputs and reference scores are, and the
planner counts its floor from them. Their options are their own, and so is their --help.
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
"""For commands that hand on all arguments, --help among them."""

_QUIET_TPU = {"JAX_PLATFORMS": "cpu", "TPU_WORKER_HOSTNAMES": "localhost", "TPU_ACCELERATOR_TYPE": "v6e-1"}
"""Programs are compiled for a TPU, but nothing runs on one: jax need not look for it, nor libtpu for its neighbours."""


def bench(context: typer.Context) -> None:
    """Time fixed workloads on this engine, the service and transformers, side by side. --help tells the options."""
    _run("bench", "scripts.benchmarks.run", "bench", context)


def plan(context: typer.Context) -> None:
    """Estimate what a model and a workload need on TPUs, by compiling for them. --help tells the options."""
    for name, value in _QUIET_TPU.items():
        os.environ.setdefault(name, value)
    _run("plan", "scripts.planning.plan", "tpu-compile", context)


def _run(name: str, module: str, extra: str, context: typer.Context) -> None:
    """Hand on to the typer application in ``module``, which needs the packages of ``extra``."""
    script = CHECKOUT.joinpath(*module.split(".")).with_suffix(".py")
    if not script.is_file():
        complain(
            f"{name} belongs to the source checkout, which has its inputs, and {CHECKOUT} is an installed package; "
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
