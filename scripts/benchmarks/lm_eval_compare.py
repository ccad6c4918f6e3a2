"""Runs lm-evaluation-harness on a task through a running service and with the harness' own HuggingFace backend.

The harness is unchanged: its model ``local-completions`` sends requests to the service, with token ids and with text,
and ``hf`` computes in float32 on this machine's processor.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from pathlib import Path
from typing import Annotated, Any

# Read when the harness is imported: nothing is fetched.
os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1")

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from serve_app import model_source

TASKS = Path(__file__).parents[2] / "tests" / "lm_eval"
TOLERANCE = 1e-3
"""Tolerance of a choice's log-likelihood, in nats."""

Results = dict[str, Any]


def evaluate(model: str, model_args: dict[str, Any], task: str, folder: Path, batch_size: int) -> Results:
    """The accuracies, and for each sample the choices' log-likelihoods and whether each is the greedy continuation."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    found = lm_eval.simple_evaluate(
        model=model,
        model_args=model_args,
        tasks=[task],
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
        batch_size=batch_size,
        bootstrap_iters=0,
    )
    samples = sorted(found["samples"][task], key=lambda sample: sample["doc_id"])
    return {
        "acc": found["results"][task]["acc,none"],
        "acc_norm": found["results"][task]["acc_norm,none"],
        "samples": [
            # What the harness keeps as text it had as (logprob, is greedy).
            [(float(logprob), str(greedy) == "True") for ((logprob, greedy),) in sample["resps"]]
            for sample in samples
        ],
    }


def difference(one: Results, other: Results) -> float:
    """The largest difference between log-likelihoods of the same choice, in nats."""
    pairs = zip(one["samples"], other["samples"], strict=True)
    return max(abs(a - b) for left, right in pairs for (a, _), (b, _) in zip(left, right, strict=True))


def compare(
    url: Annotated[str, typer.Option(help="Address of the running service.")] = "http://127.0.0.1:8000",
    model: Annotated[str, typer.Option(help="What it serves: 'demo', or a folder in Hugging Face layout.")] = "demo",
    task: Annotated[str, typer.Option(help="A multiple-choice task of --tasks.")] = "common_facts",
    tasks: Annotated[Path, typer.Option(help="Folder with the task's YAML.")] = TASKS,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts in a request, and in a batch of 'hf'.")] = 16,
    as_json: Annotated[bool, typer.Option("--json", help="Print the results as JSON.")] = False,
) -> None:
    """Print the backends' accuracy and the largest difference of their log-likelihoods; exit 1 if it is too large.

    Needs `pip install '.[test]'`.
    """
    logging.disable(logging.WARNING)
    folder = str(model_source.resolve(model))
    service = {
        "model": "default",
        "base_url": f"{url}/v1/completions",
        "tokenizer": folder,
        "tokenizer_backend": "huggingface",
    }
    reference = {"pretrained": folder, "dtype": "float32", "device": "cpu"}
    by_service = {
        f"local-completions, {kind}": evaluate(
            "local-completions", service | {"tokenized_requests": kind == "ids"}, task, tasks, batch_size
        )
        for kind in ("ids", "text")
    }
    by_hf = evaluate("hf", reference, task, tasks, batch_size)
    results = by_service | {"hf": by_hf}
    gap = max(difference(found, by_hf) for found in by_service.values())
    if as_json:
        sys.stdout.write(json.dumps({"backends": results, "max_difference": gap}) + "\n")
    else:
        _show(results, gap)
    if not gap <= TOLERANCE:
        raise typer.Exit(1)


def _show(results: dict[str, Results], gap: float) -> None:
    table = Table("backend", "samples", "acc", "acc_norm", "mean log-likelihood", "greedy choices", box=box.SIMPLE_HEAD)
    for name, found in results.items():
        choices = [choice for sample in found["samples"] for choice in sample]
        table.add_row(
            name,
            str(len(found["samples"])),
            f"{found['acc']:.4f}",
            f"{found['acc_norm']:.4f}",
            f"{sum(logprob for logprob, _ in choices) / len(choices):.5f}",
            f"{sum(greedy for _, greedy in choices)} of {len(choices)}",
        )
    # A fixed width: a narrow terminal would cut the names.
    console = Console(width=100, highlight=False)
    console.print(table)
    console.print(f"largest difference of a log-likelihood: {gap:.1e} (bound {TOLERANCE:g})")


if __name__ == "__main__":
    typer.run(compare)
