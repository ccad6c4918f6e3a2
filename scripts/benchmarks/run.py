"""scripts/bench: time the fixed workloads on several systems, side by side in one run. See scripts/bench --help."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import track

from scripts.benchmarks.bars import bars, soak
from scripts.benchmarks.load import load_test
from scripts.benchmarks.machine import GemmRates, machine, versions
from scripts.benchmarks.plot import plot
from scripts.benchmarks.report import Measured, References, show
from scripts.benchmarks.systems import SYSTEMS, System
from scripts.benchmarks.work import NAMES, Sizes, floor_flops, load

USUAL = [name for name in SYSTEMS if name not in ("vllm", "http-serve-proxy")]
"""Other systems run only if named: vLLM's installation takes 3 GB and some minutes."""
DTYPES = ("float32", "bfloat16")
REPEATS = {"W4": 40}
"""Repeats of a workload that takes milliseconds, for which the spread matters."""

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
progress = Console(stderr=True)


def chosen(text: str, known: Sequence[str]) -> list[str]:
    """The names in a comma-separated list, in the order of ``known``."""
    names = text.split(",")
    if unknown := set(names) - set(known):
        raise typer.BadParameter(f"{', '.join(sorted(unknown))}: not one of {', '.join(known)}")
    return [name for name in known if name in names]


@app.callback(invoke_without_command=True)
def compare(
    context: typer.Context,
    systems: Annotated[
        str | None,
        typer.Option(
            help=f"Comma-separated, of {', '.join(SYSTEMS)}.",
            show_default="all but vllm and http-serve-proxy; quick: engine",
        ),
    ] = None,
    workloads: Annotated[
        str | None,
        typer.Option(help=f"Comma-separated, of {', '.join(NAMES)}.", show_default="all; quick: W1 and W4"),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(help="float32, bfloat16, or both, comma-separated.", show_default="both; quick: float32"),
    ] = None,
    repeats: Annotated[int, typer.Option(min=1, max=5, help="Timed variants of each workload, each used once.")] = 3,
    quick: Annotated[bool, typer.Option("--quick", help="One repeat, in under a minute.")] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the results here.")] = None,
) -> None:
    """Time this engine, this service over HTTP, and transformers on the same inputs, interleaved in one run.

    The floor is the least arithmetic that answers the workload, at the matmul rate that the same run measures between
    the repeats. Every repeat has its own inputs, so no cache can help. W4's seconds are those of one request.
    Answers are compared with transformers' in float32: stored ones for W1 to W5, hf-prefix's of the same run for the
    others. D1 to D3 are decisions; they are compared by the options' probabilities.
    """
    if context.invoked_subcommand is not None:
        return
    names = chosen(systems or ("engine" if quick else ",".join(USUAL)), list(SYSTEMS))
    dtypes = chosen(dtype or ("float32" if quick else ",".join(DTYPES)), DTYPES)
    sizes = Sizes.of_demo()
    rates, references = GemmRates(dtypes, sizes), References()
    measured: list[Measured] = []
    report: dict[str, Any] = {}
    try:
        for each in dtypes:
            with ExitStack() as stack:
                running = [stack.enter_context(System(name, each)) for name in names]
                for system in track(running, f"{each}: starting systems", console=progress):
                    system.wait()
                for workload in chosen(workloads or ("W1,W4" if quick else ",".join(NAMES)), NAMES):
                    timed = 1 if quick else repeats
                    timed = max(timed, REPEATS.get(workload, 0) // (4 if quick else 1))
                    measured += _time(workload, timed, running, each, sizes, rates, references)
                    gflops = rates.medians()
                    results = [one.result(gflops[one.dtype]) for one in measured]
                    report = {"machine": machine(), "versions": versions(), "gemm_gflops": gflops, "results": results}
                    if json_file is not None:  # a run takes long: what is measured is kept if the rest is stopped
                        json_file.write_text(json.dumps(report, indent=1) + "\n")
    except KeyboardInterrupt:
        progress.print("stopped" + (", with this measured before:" if report else " before anything was measured"))
    if report:
        show(report)


def _time(
    workload: str,
    repeats: int,
    systems: Sequence[System],
    dtype: str,
    sizes: Sizes,
    rates: GemmRates,
    references: References,
) -> list[Measured]:
    """One workload on all systems in turn, ``repeats`` times after a warm-up that is not counted."""
    variants = load(workload, most=repeats + 1)
    flops = statistics.mean(floor_flops(variant, sizes) for variant in variants[1:])
    found = {s.name: Measured(workload, s.name, dtype, variants[0].items, flops) for s in systems}
    for number, variant in enumerate(track(variants, f"{dtype}: {workload}", console=progress)):
        answers = {}
        for turn, system in enumerate(systems if number % 2 else systems[::-1]):
            if len(variants) < 10 or (number % 10 == 0 and turn == 0):
                rates.measure()  # beside each long run: the machine's rate drifts
            took, answers[system.name], peak = system.run(variant)
            if number:
                found[system.name].seconds.append(took)
                found[system.name].peak_mib = max(found[system.name].peak_mib, peak)
        if dtype == "float32" and "hf-prefix" in answers:
            references.add(workload, number, answers["hf-prefix"])
        for name, answer in answers.items():
            if number:
                found[name].differences += references.differences(workload, number, variant, answer)
    return list(found.values())


app.command("load")(load_test)
app.command()(plot)
app.command()(bars)
app.command()(soak)

if __name__ == "__main__":
    app()
