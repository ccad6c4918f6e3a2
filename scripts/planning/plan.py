"""scripts/plan_tpu: estimates what a scoring workload needs on TPUs by compiling for them. See --help."""

from __future__ import annotations

import json
import math
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer
from huggingface_hub import hf_hub_download
from matplotlib.figure import Figure
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table

from model.config import ModelConfig
from model.families.registry import from_hf
from model.fields import read_config
from scripts.planning.chips import CHIPS, libtpu_version
from scripts.planning.estimate import Estimate, Workload, estimate
from scripts.planning.schedules import finished_programs
from serve_app import model_source

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
GB = 1e9


@app.command()
def plan_tpu(
    model: Annotated[str, typer.Argument(help="'demo', a folder with config.json, a config.json, or a hub id.")],
    chip: Annotated[str, typer.Option(help=f"One of {', '.join(CHIPS)}.")] = "v6e",
    topology: Annotated[
        list[str], typer.Option(help="Topology of the slice, such as 1x1. Repeatable, for more columns.")
    ] = ["1x1"],  # noqa: B006
    data: Annotated[
        int | None,
        typer.Option(min=1, help="Calls at once, each on an equal share of the chips.", show_default="by memory"),
    ] = None,
    query_tokens: Annotated[int, typer.Option(min=1, help="Tokens of a query.")] = 2000,
    items: Annotated[int, typer.Option(min=1, help="Items of a request.")] = 500,
    item_tokens: Annotated[int, typer.Option(min=1, help="Tokens of an item.")] = 20,
    requests_per_s: Annotated[float, typer.Option(min=0, help="Requests per second.")] = 1.0,
    prefix_cache_gb: Annotated[
        float | None, typer.Option(help="Memory for prefixes.", show_default="the engine's")
    ] = None,
    price: Annotated[float | None, typer.Option(help="Price of one chip for one hour, in any currency.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the figures here.")] = None,
    plot: Annotated[
        Path | None, typer.Option("--plot", help="Also draw items per second over topologies, as a PNG.")
    ] = None,
) -> None:
    """Estimate whether a model and a workload fit a TPU slice, how fast it could be, and how many chips are needed.

    The engine's own programs are compiled for the slice, which needs no TPU and takes some minutes. The launches are
    those that the engine's planner makes for the workload. The time is that of one request by itself: the instructions
    of its operations and of the attention kernel, the transfers, and this machine's time for the host's part, but for
    what it does while the chips compute. Nothing ran on a TPU. The roofline is arithmetic and memory traffic at the
    chip's peaks, which no program reaches. Every request has a query that no cache holds, and asks for full-vocabulary
    log-probabilities.
    """
    if chip not in CHIPS:
        raise typer.BadParameter(f"{chip!r} is not one of {', '.join(CHIPS)}", param_hint="--chip")
    workload, console = Workload(query_tokens, items, item_tokens), Console()
    cache = None if prefix_cache_gb is None else int(prefix_cache_gb * GB)
    try:
        config, found = read(model), dict[str, Estimate]()
        with finished_programs() as schedules:
            for name in topology:
                with Progress(console=Console(stderr=True), transient=True) as bar:
                    task = bar.add_task(f"compiling for {chip} {name}", total=None)
                    found[name] = estimate(
                        config,
                        chip,
                        name,
                        workload,
                        data=data,
                        prefix_cache_bytes=cache,
                        schedules=schedules,
                        progress=lambda done, of, bar=bar, task=task: bar.update(task, completed=done, total=of),
                    )
    except (ValueError, OSError) as error:
        Console(stderr=True).print(f"[red]{escape(str(error))}")
        raise typer.Exit(1) from error
    rows = {name: figures(one, requests_per_s, items, price) for name, one in found.items()}
    console.print(table(chip, rows, workload, requests_per_s))
    for name, row in rows.items():
        if row["dearest"]:
            console.print(f"{name}: the operations that take longest, ms a request:")
            console.print("\n".join(f"{seconds * 1e3:8.2f}  {operation}" for operation, seconds in row["dearest"]))
    console.print(
        "Estimates from programs that libtpu compiled for the chip; nothing ran on a TPU. "
        f"jax {version('jax')}, libtpu {libtpu_version()}."
    )
    if json_file:
        about = {
            "estimate": "from compilation; nothing ran on a TPU",
            "chip": chip,
            "workload": {"query_tokens": query_tokens, "items": items, "item_tokens": item_tokens},
            "requests_per_s": requests_per_s,
            "jax": version("jax"),
            "libtpu": libtpu_version(),
            "date": datetime.now(UTC).date().isoformat(),
        }
        first = next(iter(rows.values()))
        json_file.write_text(json.dumps({**about, **first, "topologies": rows}, indent=2) + "\n", encoding="utf-8")
    if plot:
        draw(plot, chip, rows)


def read(model: str) -> ModelConfig:
    """Read the config of the demo model, a folder, a file, or a model on the hub."""
    path = model_source.resolve(model) if model == "demo" else Path(model)
    if path.is_file():
        return from_hf(json.loads(path.read_text(encoding="utf-8")))
    if path.is_dir():
        return from_hf(read_config(path))
    return from_hf(json.loads(Path(hf_hub_download(model, "config.json")).read_text(encoding="utf-8")))


def figures(found: Estimate, requests_per_s: float, items: int, price: float | None) -> dict[str, Any]:
    """The figures of one topology for the table and ``--json``; bytes, FLOPs and seconds are one chip's per request."""
    fits = not found.missing_bytes
    expected = found.expected
    per_chip = expected and items / expected.total / found.chips
    slices = per_chip and math.ceil(requests_per_s * items / (per_chip * found.chips))
    return {
        "chips": found.chips,
        "data": found.data,
        "fits": fits,
        "missing_bytes": found.missing_bytes,
        "bytes_per_chip": found.bytes_per_chip,
        "launches": found.launches,
        "flops": found.cost and found.cost.flops,
        "bytes_moved": found.cost and found.cost.bytes,
        "collective_seconds": found.collective_seconds,
        "floor_seconds": found.floor_seconds,
        "roofline_seconds": found.roofline_seconds,
        "operations_seconds": expected and expected.operations,
        "modelled_seconds": expected and expected.modelled,
        "counted_share": expected and expected.counted,
        "attention_seconds": expected and expected.attention,
        "experts_seconds": expected and expected.experts,
        "experts_worst_seconds": expected and expected.experts_worst,
        "transfer_seconds": expected and expected.transfers,
        "host_seconds": expected and expected.host,
        "hidden_seconds": expected and expected.hidden,
        "expected_seconds": expected and expected.total,
        "times_floor": expected and expected.total / found.floor_seconds,
        "dearest": list(expected.dearest) if expected else [],
        "items_per_s_per_chip": per_chip,
        "items_per_s": per_chip and per_chip * found.chips,
        "chips_needed": slices * found.chips if fits and slices else None,
        "price_per_million_items": price / 3600 / per_chip * 1e6 if price and per_chip else None,
    }


def table(chip: str, rows: dict[str, dict[str, Any]], workload: Workload, requests_per_s: float) -> Table:
    """Make the table, with a column for each topology."""
    title = (
        f"{chip}, requests a second: {requests_per_s:g}, each a query of {workload.query_tokens:,} tokens and "
        f"{workload.items:,} items of {workload.item_tokens}"
    )
    made = Table(title=title, title_justify="left", min_width=60)
    made.add_column("", ratio=1)
    for name in rows:
        made.add_column(name, justify="right")

    def line(label: str, show: Any) -> None:
        made.add_row(label, *(show(row) for row in rows.values()))

    def number(key: str, scale: float, digits: int) -> Any:
        return lambda row: "-" if row[key] is None else f"{row[key] / scale:,.{digits}f}"

    line("calls at once x chips of each", lambda row: f"{row['data']} x {row['chips'] // row['data']}")
    line("fits", lambda row: "yes" if row["fits"] else f"no, {row['missing_bytes'] / GB:,.1f} GB are lacking")
    for kind in ("weights", "prefix_cache", "temporaries"):
        line(f"{kind.replace('_', ' ')}, GB a chip", lambda row, kind=kind: _gb(row["bytes_per_chip"].get(kind)))
    line("of a chip's GB", lambda _: f"{CHIPS[chip].hbm_bytes / GB:,.0f}")
    line("TFLOP a chip", number("flops", 1e12, 2))
    line("GB moved a chip", number("bytes_moved", GB, 2))
    line("floor, ms", number("floor_seconds", 1e-3, 1))
    line("roofline, ms", number("roofline_seconds", 1e-3, 1))
    line("waiting for collectives, ms", number("collective_seconds", 1e-3, 2))
    line("operations and that, ms", number("operations_seconds", 1e-3, 1))
    line("of it by finished programs, %", number("counted_share", 1e-2, 0))
    line("all by libtpu's model, ms", number("modelled_seconds", 1e-3, 1))
    line("attention kernel, ms", number("attention_seconds", 1e-3, 1))
    if any(row["experts_seconds"] for row in rows.values()):
        line("experts, ms", number("experts_seconds", 1e-3, 1))
        line("experts at worst, ms", number("experts_worst_seconds", 1e-3, 1))
    line("transfers, ms", number("transfer_seconds", 1e-3, 1))
    line("host, ms", number("host_seconds", 1e-3, 1))
    line("of it while chips compute, ms", number("hidden_seconds", 1e-3, 1))
    line("a request, ms", number("expected_seconds", 1e-3, 1))
    line("times the floor", number("times_floor", 1, 2))
    line("items/s a chip", number("items_per_s_per_chip", 1, 0))
    line("items/s a slice", number("items_per_s", 1, 0))
    line("chips needed", number("chips_needed", 1, 0))
    if any(row["price_per_million_items"] is not None for row in rows.values()):
        line("price of a million items", number("price_per_million_items", 1, 4))
    return made


def _gb(size: int | None) -> str:
    return "-" if size is None else f"{size / GB:,.2f}"


def draw(file: Path, chip: str, rows: dict[str, dict[str, Any]]) -> None:
    """Draw a slice's items per second over topologies, beside the floor's."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    items = [row["items_per_s"] or 0 for row in rows.values()]
    names = [
        f"{topology}\n{f'{n:,.0f}' if row['fits'] else 'does not fit'}"
        for n, (topology, row) in zip(items, rows.items(), strict=True)
    ]
    axes.bar(names, items, width=0.5, label="estimate, one request at a time")
    floors = [n * row["times_floor"] if n else 0 for n, row in zip(items, rows.values(), strict=True)]
    axes.plot(names, floors, "_", markersize=24, color="black", label="the algorithm's floor")
    axes.margins(x=0.5, y=0.15)
    axes.set(xlabel=f"{chip} topology", ylabel="items a second, estimated", title="Estimated from compilation")
    figure.legend(loc="outside lower center", ncols=2)
    figure.savefig(file, dpi=150)


if __name__ == "__main__":
    app()
