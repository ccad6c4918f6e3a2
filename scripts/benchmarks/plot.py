"""scripts/bench plot: draws throughput against the number of items and against the query's length."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, LogLocator, NullFormatter, NullLocator, StrMethodFormatter
from rich.console import Console
from rich.progress import track

from scripts.benchmarks.machine import GemmRates, machine
from scripts.benchmarks.systems import System
from scripts.benchmarks.work import Sizes, Variant, cut_request, floor_flops

ITEM_TOKENS = 32
QUERY = 256
ITEMS = (1, 5, 20, 100, 500)
FIXED_ITEMS = 50
QUERIES = (16, 64, 256, 1024, 4096)

Curve = dict[str, list[float]]
"""Items a second by system, one value a point; ``floor`` is one of them."""


def plot(
    file: Annotated[Path, typer.Argument(help="The PNG to write.")],
    systems: Annotated[str, typer.Option(help="Comma-separated; each is one curve.")] = "engine",
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
    repeats: Annotated[
        int, typer.Option(min=1, help="Runs of each point, each with its own text; the median is drawn.")
    ] = 3,
) -> None:
    """Draw items per second against the number of items and against the query's length, beside the floor."""
    sizes = Sizes.of_demo()
    rates = GemmRates([dtype], sizes)
    shapes = [(QUERY, items) for items in ITEMS] + [(query, FIXED_ITEMS) for query in QUERIES]
    curves: Curve = {name: [] for name in systems.split(",")}
    flops: list[float] = []
    with ExitStack() as stack:
        running = [stack.enter_context(System(name, dtype)) for name in curves]
        for system in running:
            system.wait()
            system.run(_variant(QUERY, 20, seed=0))
        for query, items in track(shapes, "points", console=Console(stderr=True)):
            rates.measure()
            variants = [_variant(query, items, seed) for seed in range(1, repeats + 1)]
            flops.append(floor_flops(variants[0], sizes))
            for system in running:
                curves[system.name].append(items / statistics.median(system.run(variant)[0] for variant in variants))
    rate = rates.medians()[dtype] * 1e9
    curves["floor"] = [items * rate / total for (_, items), total in zip(shapes, flops, strict=True)]
    title = f"Scoring throughput, SmolLM2-135M, {dtype} · {machine()} · {datetime.now(UTC):%Y-%m-%d}"
    draw(file, title, curves)


def _variant(query: int, items: int, seed: int) -> Variant:
    rng = np.random.default_rng([query, items, seed])
    return Variant([cut_request(rng, query, [ITEM_TOKENS] * items)], None)


def draw(file: Path, title: str, curves: Curve) -> None:
    """Two panels: the points of ``ITEMS``, then those of ``QUERIES``."""
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    figure.suptitle(title, fontsize=10)
    _panel(left, ITEMS, {name: values[: len(ITEMS)] for name, values in curves.items()})
    left.set(
        xlabel=f"items in the request (query {QUERY} tokens, items of {ITEM_TOKENS})", ylabel="items scored a second"
    )
    _panel(right, QUERIES, {name: values[len(ITEMS) :] for name, values in curves.items()})
    right.set(xlabel=f"query length in tokens ({FIXED_ITEMS} items of {ITEM_TOKENS} tokens)")
    left.legend(frameon=False)
    figure.savefig(file, dpi=150)


def _panel(axes: Axes, points: Sequence[int], curves: Curve) -> None:
    styles: dict[str, dict[str, Any]] = {
        "floor": {"color": "0.5", "linestyle": "--", "marker": "", "label": "at the floor (matmuls alone)"}
    }
    for name, values in curves.items():
        axes.plot(points, values, **({"marker": "o", "markersize": 4, "label": name} | styles.get(name, {})))
    axes.set(xscale="log", yscale="log")
    axes.xaxis.set_major_locator(FixedLocator(points))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_minor_formatter(NullFormatter())
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(StrMethodFormatter("{x:,g}"))
    axes.grid(color="0.9")
    axes.spines[["top", "right"]].set_visible(False)
