"""Draws what a calibration changes: reliability, and risk against coverage."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from serve_app.jobs.calibration import Measured, Sure
from serve_app.profiles.profile import Type

POINTS = 10
"""The most points of a reliability curve, each with as many questions as the others."""
EACH = 20
"""The fewest questions of a point: fewer would say little."""


def draw(measured: Mapping[Type, Measured], title: str, files: list[Path]) -> None:
    """Draw two panels for each type of question into each of the files, whose names say the format."""
    figure = Figure(figsize=(9, 3.6 * len(measured)), layout="constrained")
    figure.suptitle(title, fontsize=10)
    rows = figure.subplots(len(measured), 2, squeeze=False)
    for (type, own), (left, right) in zip(measured.items(), rows, strict=True):
        left.plot([0, 1], [0, 1], color="0.7", linestyle="--", linewidth=1, label="as sure as right")
        for label, sure, color in (("raw", own.raw_sure, "C1"), ("calibrated, unseen", own.calibrated_sure, "C0")):
            _reliability(left, sure, label, color)
            risk = sure.risk()
            right.plot(np.arange(1, len(risk) + 1) / len(risk), risk, color=color, label=label)
        left.set(
            title=f"{type}: {own.rows} questions", xlabel="probability of the top option", ylabel="share that is right"
        )
        left.set(xlim=(0, 1), ylim=(0, 1))
        right.set(xlabel="coverage: share of questions, the surest first", ylabel="risk: share of these that is wrong")
        right.set(xlim=(0, 1), ylim=(0, 1))
        for axes in (left, right):
            axes.grid(color="0.9")
            axes.spines[["top", "right"]].set_visible(False)
            axes.legend(frameon=False, fontsize=8)
    for file in files:
        figure.savefig(file, dpi=150)


def _reliability(axes: Axes, sure: Sure, label: str, color: str) -> None:
    order = np.argsort(sure.confidence, kind="stable")
    parts = np.array_split(order, max(1, min(POINTS, len(order) // EACH)))
    axes.plot(
        [sure.confidence[part].mean() for part in parts],
        [sure.right[part].mean() for part in parts],
        marker="o",
        markersize=4,
        color=color,
        label=label,
    )
