"""The comparison's results: differences from the reference, the JSON report, and its table."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from scripts.benchmarks.systems import NAIVE_ITEMS, Answer
from scripts.benchmarks.work import Variant

# A fixed width: on a narrow terminal a wrapped line still shows what a cut cell would hide.
output = Console(width=100, highlight=False)


@dataclass
class Measured:
    """What one system did on one workload in one dtype: one entry a timed variant."""

    workload: str
    system: str
    dtype: str
    items: int
    floor_flops: float
    seconds: list[float] = field(default_factory=list[float])
    differences: list[float] = field(default_factory=list[float])
    peak_mib: int = 0

    def result(self, gflops: float) -> dict[str, Any]:
        """One element of the JSON's ``results``; ``gflops`` is the matmul rate of the dtype."""
        median = statistics.median(self.seconds)
        floor = self.floor_flops / gflops / 1e9
        known = self.differences
        return {
            "workload": self.workload,
            "system": self.system,
            "dtype": self.dtype,
            "seconds": {"min": min(self.seconds), "median": median, "max": max(self.seconds)},
            "items_per_s": self.items / median,
            "floor_seconds": floor,
            "times_floor": median / floor,
            "max_abs_dlogprob": max(known) if known else None,
            "mean_abs_dlogprob": statistics.fmean(known) if known else None,
            "peak_mib": self.peak_mib,
        }


class References:
    """Float32 log-probabilities to compare with: the stored ones, or transformers' of the same run where none are."""

    def __init__(self) -> None:
        self._found: dict[tuple[str, int], Answer] = {}

    def add(self, workload: str, number: int, answer: Answer) -> None:
        """Keep ``hf-prefix``'s float32 answer to variant ``number``."""
        self._found[workload, number] = answer

    def differences(self, workload: str, number: int, variant: Variant, answer: Answer) -> list[float]:
        """|Δ log-probability| of every item and label that both have, in nats; empty where nothing is known."""
        known = variant.reference or self._found.get((workload, number))
        if known is None:
            return []
        return [
            abs(ours - right)
            # hf-naive answers some of the items, vLLM for the first label.
            for rows, wanted in zip(answer, known, strict=True)
            for labels, known_labels in zip(rows, wanted, strict=False)
            for ours, right in zip(labels, known_labels, strict=False)
        ]


def show(report: dict[str, Any]) -> None:
    """The results as a table; ``x engine`` is a system's time as a multiple of this engine's in the same dtype."""
    output.print(report["machine"])
    output.print("matmul GFLOP/s: " + ", ".join(f"{name} {rate:.0f}" for name, rate in report["gemm_gflops"].items()))
    if "bfloat16" in report["gemm_gflops"] and "no bfloat16" in report["machine"]:
        output.print("bfloat16 is emulated here; judge its speed on a processor that has the instructions.")
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    for heading in ("", "system", "dtype"):
        table.add_column(heading, no_wrap=True)
    for heading in ("seconds", "±%", "items/s", "x floor", "x engine", "max |Δ|", "mean |Δ|", "MiB"):
        table.add_column(heading, justify="right", no_wrap=True)
    engine = {(r["workload"], r["dtype"]): r["seconds"]["median"] for r in report["results"] if r["system"] == "engine"}
    for result in report["results"]:
        table.add_row(*row(result, engine.get((result["workload"], result["dtype"]))))
    output.print(table)
    output.print("seconds: median; ±%: half of (max - min), of the median; W4's are of one request")
    if any(result["system"] == "hf-naive" for result in report["results"]):
        output.print(f"~ timed on {NAIVE_ITEMS} items of a request at most, and scaled")


def row(result: dict[str, Any], engine_seconds: float | None) -> Sequence[str]:
    """A result's cells."""
    took = result["seconds"]
    scaled = result["system"] == "hf-naive" and result["workload"] not in ("W4", "W5")
    known = result["max_abs_dlogprob"] is not None
    return (
        result["workload"],
        result["system"] + "~" * scaled,
        result["dtype"],
        f"{took['median']:#.4g}",
        f"{50 * (took['max'] - took['min']) / took['median']:.0f}",
        f"{result['items_per_s']:#.4g}".rstrip("."),
        f"{result['times_floor']:.2f}",
        f"{took['median'] / engine_seconds:.2f}" if engine_seconds else "",
        f"{result['max_abs_dlogprob']:.1e}" if known else "",
        f"{result['mean_abs_dlogprob']:.1e}" if known else "",
        str(result["peak_mib"]),
    )
