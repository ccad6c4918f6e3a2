"""Time the fixed workloads on several systems, side by side in one run: scripts/bench --help."""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections import defaultdict
from collections.abc import Sequence
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from scripts.bench_systems import NAIVE_ITEMS, SYSTEMS, serve_commands
from scripts.bench_work import NAMES, Sizes, Variant, floor_flops, load

REPEATS = {"W4": 40}
"""Of one item a repeat is a few milliseconds, and a percentile is wanted."""

console = Console(stderr=True)


def gemm_gflops(dtype: str, width: int, ff_width: int) -> float:
    """The machine's matmul rate in GFLOP/s: median of 20 of the MLP's shapes at 1,024 rows, results in float32."""
    import jax
    import jax.numpy as jnp
    from jax import lax

    rates: list[float] = []
    for features_in, features_out in ((width, ff_width), (ff_width, width)):
        a, b = jnp.ones((1024, features_in), dtype), jnp.ones((features_in, features_out), dtype)
        matmul = jax.jit(lambda a, b: lax.dot(a, b, preferred_element_type=jnp.float32))
        matmul(a, b).block_until_ready()
        for _ in range(10):
            started = time.perf_counter()
            matmul(a, b).block_until_ready()
            rates.append(2 * 1024 * features_in * features_out / (time.perf_counter() - started) / 1e9)
    return statistics.median(rates)


def _gemm_worker(pipe: Any, dtypes: Sequence[str], width: int, ff_width: int) -> None:
    while pipe.recv():
        pipe.send({dtype: gemm_gflops(dtype, width, ff_width) for dtype in dtypes})


class System:
    """One system in its process."""

    def __init__(self, name: str, dtype: str) -> None:
        context = get_context("spawn")
        self.name, self.dtype = name, dtype
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=serve_commands, args=(name, dtype, theirs))
        self._process.start()
        theirs.close()

    def wait(self) -> None:
        self._pipe.recv()

    def run(self, variant: Variant) -> tuple[float, list[list[list[float]]], int]:
        self._pipe.send(variant)
        return self._pipe.recv()

    def close(self) -> None:
        self._pipe.send(None)
        self._process.join(60)


def difference(variant: Variant, answer: list[list[list[float]]]) -> float | None:
    """The largest distance from the reference log-probabilities, in nats; None where there is no reference."""
    if variant.reference is None:
        return None
    pairs = zip(variant.reference, answer, strict=True)
    return max(float(np.abs(np.array(rows) - np.array(known)[: len(rows)]).max()) for known, rows in pairs)


def main(
    systems: Annotated[str, typer.Option(help=f"Comma-separated, of {', '.join(SYSTEMS)}.")] = ",".join(SYSTEMS),
    workloads: Annotated[str, typer.Option(help=f"Comma-separated, of {', '.join(NAMES)}.")] = ",".join(NAMES),
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, or both, comma-separated.")] = "float32,bfloat16",
    repeats: Annotated[int, typer.Option(min=1, max=5, help="Timed variants of each workload, each used once.")] = 3,
    quick: Annotated[bool, typer.Option(help="W1 and W4, one repeat, the engine in float32.")] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the results here.")] = None,
) -> None:
    """Time this engine, this service over HTTP, and transformers on the same inputs, interleaved in one run.

    The floor is the least arithmetic that answers the workload, at the matmul rate that the same run measures between
    the repeats. Every repeat has inputs of its own, so no cache can help. W4's seconds are of one request.
    """
    if quick:
        systems, workloads, dtype, repeats = "engine", "W1,W4", "float32", 1
    dtypes = dtype.split(",")
    from serve_app import model_source

    config = json.loads((model_source.resolve("demo") / "config.json").read_text())
    sizes = Sizes(
        width=config["hidden_size"],
        layers=config["num_hidden_layers"],
        heads=config["num_attention_heads"],
        kv_heads=config["num_key_value_heads"],
        head_width=config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"],
        ff_width=config["intermediate_size"],
        vocab=config["vocab_size"],
    )
    context = get_context("spawn")
    gemm, theirs = context.Pipe()
    context.Process(target=_gemm_worker, args=(theirs, dtypes, sizes.width, sizes.ff_width), daemon=True).start()
    rates: dict[str, list[float]] = defaultdict(list)

    def measure_rates() -> None:
        gemm.send(True)
        for name, rate in gemm.recv().items():
            rates[name].append(rate)

    results: list[dict[str, Any]] = []
    for each in dtypes:
        running = [System(name, each) for name in systems.split(",")]
        for system in track(running, f"{each}: starting systems", console=console):
            system.wait()
        for workload in workloads.split(","):
            timed = REPEATS.get(workload, repeats) if not quick else 1 + 9 * (workload == "W4")
            variants = load(workload, most=timed + 1)
            seconds: dict[str, list[float]] = defaultdict(list)
            differences: dict[str, list[float]] = defaultdict(list)
            peaks: dict[str, int] = {}
            for number, variant in enumerate(track(variants, f"{each}: {workload}", console=console)):
                if number % 10 == 0 or len(variants) < 10:
                    measure_rates()
                for system in running if number % 2 else running[::-1]:
                    took, answer, peaks[system.name] = system.run(variant)
                    if number:  # the first variant warms up
                        seconds[system.name].append(took)
                        if (far := difference(variant, answer)) is not None:
                            differences[system.name].append(far)
            flops = statistics.mean(floor_flops(variant, sizes) for variant in variants[1:])
            for system in running:
                took = seconds[system.name]
                results.append(
                    {
                        "workload": workload,
                        "system": system.name,
                        "dtype": each,
                        "seconds": {"min": min(took), "median": statistics.median(took), "max": max(took)},
                        "items_per_s": variants[0].items / statistics.median(took),
                        "floor_flops": flops,
                        "max_abs_dlogprob": max(differences[system.name], default=None),
                        "peak_mib": peaks[system.name],
                    }
                )
        for system in running:
            system.close()
    gemm.send(False)
    gflops = {name: statistics.median(values) for name, values in rates.items()}
    for result in results:
        result["floor_seconds"] = result.pop("floor_flops") / gflops[result["dtype"]] / 1e9
        result["times_floor"] = result["seconds"]["median"] / result["floor_seconds"]
    machine = f"{_processor()}, {os.cpu_count()} cores, {platform.system()} {platform.machine()}"
    versions = {name: version(name) for name in ("jax", "jaxlib", "flax", "ray", "torch", "transformers")}
    report = {"machine": machine, "versions": versions, "gemm_gflops": gflops, "results": results}
    show(report)
    if json_file is not None:
        json_file.write_text(json.dumps(report, indent=1) + "\n")


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def show(report: dict[str, Any]) -> None:
    """The results as a table, with each system's time as a multiple of the engine's."""
    rates = ", ".join(f"{name} {rate:.0f}" for name, rate in report["gemm_gflops"].items())
    table = Table(title=f"{report['machine']}; matmul GFLOP/s: {rates}")
    for heading in ("", "system", "dtype", "seconds (min-max)", "items/s", "x floor", "x engine", "max |Δ|", "MiB"):
        table.add_column(heading, justify="left" if heading in ("", "system", "dtype") else "right")
    ours = {(r["workload"], r["dtype"]): r["seconds"]["median"] for r in report["results"] if r["system"] == "engine"}
    for r in report["results"]:
        took, engine = r["seconds"], ours.get((r["workload"], r["dtype"]))
        far = r["max_abs_dlogprob"]
        table.add_row(
            r["workload"],
            r["system"] + ("~" if r["system"] == "hf-naive" and r["workload"] not in ("W4", "W5") else ""),
            r["dtype"],
            f"{took['median']:.3f} ({took['min']:.3f}-{took['max']:.3f})",
            f"{r['items_per_s']:.1f}",
            f"{r['times_floor']:.2f}",
            f"{took['median'] / engine:.2f}" if engine else "",
            f"{far:.1e}" if far is not None else "",
            str(r["peak_mib"]),
        )
    Console().print(table)
    Console().print(f"~ timed on {NAIVE_ITEMS} items of a request at most and scaled")


if __name__ == "__main__":
    typer.run(main)
