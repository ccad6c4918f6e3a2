"""``score-serve tpu-check`` and ``gpu-check``: does the device of this machine compute what it should, and how fast?"""

from __future__ import annotations

import json
from typing import Annotated, Literal

import typer
from rich.console import Console

from serve_app.cli.client import REFUSED, complain
from serve_app.cli.dataset import BY_DEVICE, Dtype
from serve_app.model_source import ModelSourceError
from serve_app.settings import Limits, ModelSettings

Model = Annotated[str, typer.Option(help="'demo', a folder in Hugging Face layout, a hub id, or a .gguf file.")]
Type = Annotated[Dtype | None, typer.Option(help="Type of the weights.", show_default=BY_DEVICE)]
Longest = Annotated[
    int | None, typer.Option(min=1, help="Tokens of the longest prompt.", show_default="the model's context")
]


def tpu_check(model: Model = "demo", dtype: Type = None, max_prompt_tokens: Longest = None) -> None:
    """See whether this machine's TPU computes what it should, and time every program.

    Compares the attention kernel with a plain softmax, for all shapes of calls, and runs every program of the model on
    the first chip. Prints one JSON object: "right" is true if everything agrees, "programs" has for each program its
    time and what libtpu's model expects of its operations, the attention kernel left out. Exit code 0: right; 1: wrong
    results, no TPU, or no such model. No service may be using the chip. The first time it compiles, for some minutes.

    For example:
    score-serve tpu-check --model Qwen/Qwen3-0.6B > tpu.json
    """
    _check("tpu", model, dtype, max_prompt_tokens)


def gpu_check(model: Model = "demo", dtype: Type = None, max_prompt_tokens: Longest = None) -> None:
    """See whether this machine's GPU computes what it should, and time every program; as tpu-check.

    For example:
    score-serve gpu-check --model Qwen/Qwen3-0.6B > gpu.json
    """
    _check("gpu", model, dtype, max_prompt_tokens)


def _check(kind: Literal["tpu", "gpu"], model: str, dtype: Dtype | None, max_prompt_tokens: int | None) -> None:
    from serve_app.scorer import device_report  # loads Ray, for which --help need not wait

    lines = Console(stderr=True)
    settings = ModelSettings(model=model, dtype=dtype, limits=Limits(max_prompt_tokens=max_prompt_tokens))
    try:
        found = device_report.report(kind, settings, lambda line: lines.print(line, markup=False, highlight=False))
    except device_report.NoDeviceError as error:
        remedy = "libtpu (pip install '.[tpu]')" if kind == "tpu" else "CUDA (pip install '.[cuda]')"
        complain(f"{error}; it takes a machine with one, {remedy}, and no other process that uses it")
        raise typer.Exit(REFUSED) from None
    except (ModelSourceError, ValueError, RuntimeError) as error:
        complain(f"{model} does not run on this device: {error}")
        raise typer.Exit(REFUSED) from None
    typer.echo(json.dumps(found, allow_nan=False))
    if not found["right"]:
        complain("attention computes wrong values on this device; the report's 'attention' says where")
        raise typer.Exit(REFUSED)
