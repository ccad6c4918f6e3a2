"""What both routes' answers share: how an answer was read, and how sure it is.

The confidence is by TypeSafe's formulas on both routes, so that a threshold means the same on each.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from serve_app.schemas import ResponseBody
from serve_app.tasks.decisions.questions import Judgement


class Read(ResponseBody):
    """How an answer was read.

    Attributes:
        x_label_mass: how much of the model's next-token distribution the options' labels cover, 0 to 1; left out by a
            model that reads its options with a head.
        x_permutations: the number of cyclic orders of the options whose probabilities were averaged.
        x_reads: for each option in turn, the labels that stand for it; left out as ``x_label_mass`` is.
        x_raw: for each option in turn, its probability before calibration, if there was one.
        x_calibration: the calibration's name.
    """

    x_label_mass: float | None = None
    x_permutations: int
    x_reads: list[list[str]] | None = None
    x_raw: list[float] | None = None
    x_calibration: str | None = None


def read_of(judged: Judgement) -> dict[str, Any]:
    """The fields of ``Read``."""
    return {
        "x_label_mass": judged.label_mass,
        "x_permutations": judged.permutations,
        "x_reads": None if judged.label_mass is None else [list(labels) for labels in judged.reads],
        "x_raw": None if judged.raw is None else list(judged.raw),
        "x_calibration": judged.calibration,
    }


def choice_confidence(probabilities: Sequence[float]) -> float:
    """How far the top option is above an even spread: 0 where all are equal, 1 where one is certain."""
    even = 1 / len(probabilities)
    return min(max((max(probabilities) - even) / (1 - even), 0.0), 1.0)


def score_confidence(probabilities: Sequence[float]) -> float:
    """How near the levels' probability is to the top level.

    1 less the mean distance from the top level, in units of an even spread's mean distance from its middle; at least 0.
    """
    levels = range(len(probabilities))
    top = max(levels, key=probabilities.__getitem__)
    spread = sum(p * abs(level - top) for level, p in enumerate(probabilities))
    even = sum(abs(level - (len(levels) - 1) / 2) for level in levels) / len(levels)
    return max(1 - spread / even, 0.0)


def expected_level(probabilities: Sequence[float]) -> float:
    """The mean level, counted from 0."""
    return sum(level * p for level, p in enumerate(probabilities))
