"""Fits a calibration to labelled questions, and measures on questions that a fit has not seen what it changes."""

from __future__ import annotations

import zlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize, minimize_scalar
from scipy.special import expit, log_expit, logit, logsumexp

from serve_app.profiles.calibration import Calibration, Curve, Range, bucket
from serve_app.profiles.profile import Type

Floats = NDArray[np.float64]

FOLDS = 5
"""Parts of the states. Each part's answers are calibrated by curves fitted to the others."""
LEAST_STATES = 20
"""The fewest states of which parts say anything."""
LEAST_ROWS = 50
"""The fewest answers for a curve of one number of options."""
BINS = 15
"""Bins of the calibration error, as in Guo et al. 2017 (arXiv 1706.04599)."""

_SMALLEST = 1e-12
"""A probability of 0 would make every other one impossible."""
_LOG_TEMPERATURES = (-3.0, 4.0)
"""Bounds of a temperature's logarithm: a model that is always right, or never, must not have an infinite one."""
_BIASES = (-20.0, 20.0)


class Labelled(NamedTuple):
    """A labelled question with the model's answer.

    Attributes:
        state: the text that it is about; questions about one state are in one fold.
        probabilities: one for each option, before any calibration; of a ``noul`` no and yes.
        answer: the number of the right option.
    """

    type: Type
    state: str
    probabilities: Sequence[float]
    answer: int


@dataclass(frozen=True, slots=True)
class Quality:
    """How good probabilities are.

    Attributes:
        accuracy: the share of questions whose most probable option is the right one.
        ece: the expected calibration error: how far the top option's probability is from the frequency with which it is
            right, in the mean over ``BINS`` bins of equal width.
        brier: the mean of the summed squared differences from what is right (Brier 1950), 0 to 2.
        log_loss: the mean of the right option's negative log-probability, in nats.
    """

    accuracy: float
    ece: float
    brier: float
    log_loss: float


@dataclass(frozen=True, slots=True)
class Sure:
    """How sure a model is, and whether it is right.

    Attributes:
        confidence: the top option's probability of each question.
        right: whether that option is the right one.
    """

    confidence: Floats
    right: NDArray[np.bool_]

    def risk(self) -> Floats:
        """The share of errors among the most confident 1, 2, ... questions."""
        order = np.argsort(-self.confidence, kind="stable")
        return np.cumsum(~self.right[order]) / np.arange(1, len(order) + 1)


@dataclass(frozen=True)
class Measured:
    """What a calibration changes for one type of question, on questions that its fit has not seen."""

    rows: int
    raw: Quality
    raw_sure: Sure = field(repr=False)
    calibrated: Quality
    calibrated_sure: Sure = field(repr=False)

    @property
    def helps(self) -> bool:
        """Whether unseen questions have a lower loss."""
        return self.calibrated.log_loss < self.raw.log_loss


def fit(rows: Sequence[Labelled], name: str, model: str, profile: str, permutations: int = 1) -> Calibration:
    """Fit a curve for each type, and for each number of options that has enough rows."""
    curves: list[Curve] = []
    for type, own in _by_type(rows).items():
        curves.append(_curve(own, type, None))
        by_bucket: defaultdict[Range, list[Labelled]] = defaultdict(list)
        for row in own:
            by_bucket[bucket(len(row.probabilities))].append(row)
        if len(by_bucket) > 1:
            enough = ((options, each) for options, each in sorted(by_bucket.items()) if len(each) >= LEAST_ROWS)
            curves += [_curve(each, type, options) for options, each in enough]
    return Calibration(name=name, model=model, profile=profile, permutations=permutations, curves=tuple(curves))


def measure(rows: Sequence[Labelled]) -> dict[Type, Measured]:
    """Measure by cross-validation what a fit changes for each type of question.

    Raises:
        ValueError: there are too few states.
    """
    labels: defaultdict[str, list[tuple[Type, int]]] = defaultdict(list)
    for row in rows:
        labels[row.state].append((row.type, row.answer))
    if len(labels) < LEAST_STATES:
        raise ValueError(f"there are {len(labels)} different states; label at least {LEAST_STATES}")
    # States with the same labels are dealt in turn, so that all folds have about as many of each.
    states = sorted(labels, key=lambda state: (labels[state], zlib.crc32(state.encode())))
    fold_of = {state: number % FOLDS for number, state in enumerate(states)}
    unseen: list[tuple[float, ...]] = [()] * len(rows)
    for fold in range(FOLDS):
        fitted = fit([row for row in rows if fold_of[row.state] != fold], "fold", "", "")
        for number, row in enumerate(rows):
            if fold_of[row.state] == fold:
                curve = fitted.curve(row.type, len(row.probabilities))
                unseen[number] = curve.calibrated(row.probabilities) if curve else tuple(row.probabilities)
    numbers: defaultdict[Type, list[int]] = defaultdict(list)
    for number, row in enumerate(rows):
        numbers[row.type].append(number)
    found: dict[Type, Measured] = {}
    for type, own in numbers.items():
        answers = [rows[number].answer for number in own]
        raw = _judged([rows[number].probabilities for number in own], answers)
        calibrated = _judged([unseen[number] for number in own], answers)
        found[type] = Measured(len(own), *raw, *calibrated)
    return found


def kept(calibration: Calibration, measured: Mapping[Type, Measured]) -> Calibration:
    """The calibration without the types that it does not help."""
    curves = tuple(curve for curve in calibration.curves if measured[curve.type].helps)
    return calibration.model_copy(update={"curves": curves})


def _by_type(rows: Sequence[Labelled]) -> dict[Type, list[Labelled]]:
    found: defaultdict[Type, list[Labelled]] = defaultdict(list)
    for row in rows:
        found[row.type].append(row)
    return dict(found)


def _curve(rows: Sequence[Labelled], type: Type, options: Range | None) -> Curve:
    temperature, bias = _platt(rows) if type == "noul" else (_temperature(rows), 0.0)
    return Curve(type=type, options=options, temperature=temperature, bias=bias, rows=len(rows))


def _temperature(rows: Sequence[Labelled]) -> float:
    """The temperature with the lowest loss."""
    most = max(len(row.probabilities) for row in rows)
    logs = np.full((len(rows), most), -np.inf)
    for number, row in enumerate(rows):
        logs[number, : len(row.probabilities)] = np.log(np.maximum(row.probabilities, _SMALLEST))
    answers = np.array([row.answer for row in rows])[:, None]

    def loss(log_temperature: float) -> float:
        own = logs / np.exp(log_temperature)
        return float((logsumexp(own, axis=1) - np.take_along_axis(own, answers, axis=1)[:, 0]).mean())

    return float(np.exp(minimize_scalar(loss, bounds=_LOG_TEMPERATURES, method="bounded").x))


def _platt(rows: Sequence[Labelled]) -> tuple[float, float]:
    """The temperature and the bias with the lowest loss against Platt's targets, which are not quite 0 and 1, so that
    answers that are all right do not make them infinite (Platt 1999; Lin, Lin and Weng 2007)."""
    logits = logit(np.clip([row.probabilities[1] for row in rows], _SMALLEST, 1 - _SMALLEST))
    yes = np.array([row.answer for row in rows]) == 1
    targets = np.where(yes, (yes.sum() + 1) / (yes.sum() + 2), 1 / ((~yes).sum() + 2))

    def loss(at: Floats) -> tuple[float, Floats]:
        slope = np.exp(-at[0])
        own = slope * logits + at[1]
        wrong = expit(own) - targets
        value = -(targets * log_expit(own) + (1 - targets) * log_expit(-own)).mean()
        return float(value), np.array([(wrong * -slope * logits).mean(), wrong.mean()])

    found = minimize(loss, np.zeros(2), jac=True, method="L-BFGS-B", bounds=(_LOG_TEMPERATURES, _BIASES)).x
    return float(np.exp(found[0])), float(found[1])


def _judged(probabilities: Sequence[Sequence[float]], answers: Sequence[int]) -> tuple[Quality, Sure]:
    top = [int(np.argmax(each)) for each in probabilities]
    own = Sure(np.array([max(each) for each in probabilities]), np.equal(top, answers))
    bins = np.minimum((own.confidence * BINS).astype(int), BINS - 1)
    gaps = [abs((own.confidence - own.right)[bins == each].sum()) for each in range(BINS)]
    of_right = np.array([each[answer] for each, answer in zip(probabilities, answers, strict=True)])
    squares = np.array([sum(p * p for p in each) for each in probabilities])
    quality = Quality(
        accuracy=float(own.right.mean()),
        ece=float(sum(gaps) / len(answers)),
        brier=float((squares - 2 * of_right + 1).mean()),
        log_loss=float(-np.log(np.maximum(of_right, _SMALLEST)).mean()),
    )
    return quality, own
