"""Calibrations: how the probabilities that a model gives become the frequencies with which it is right.

``score-serve calibrate`` fits one to labelled questions and writes it as a TOML file. Its name is in every answer that
it changes, so a file never changes: a new fit gets a new name.
"""

from __future__ import annotations

import json
import math
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from serve_app.profiles.profile import Temperature, Type

Range = tuple[Annotated[int, Field(ge=2)], Annotated[int, Field(ge=2)]]

BUCKETS: tuple[Range, ...] = ((2, 2), (3, 5), (6, 10), (11, 26), (27, 255))
"""Fewest and most options of the questions that share a curve: models are surer, or less sure, among more options."""

COMMENT = "# Written by score-serve calibrate. Answers name this file: fit again under a new name, never change it.\n"


class Curve(BaseModel):
    """What is done to the probabilities of one type of question.

    Attributes:
        type: ``noul``, ``choice`` or ``score``.
        options: the fewest and the most options of the questions that it is for. None: any number that no other curve
            of this type is for.
        temperature: divides the logarithms of the probabilities, which are then normalised again.
        bias: added to the logit of yes after that, for a ``noul`` alone (Platt scaling).
        rows: the number of labelled questions that it was fitted to.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    type: Type
    options: Range | None = None
    temperature: Temperature
    bias: Annotated[float, Field(allow_inf_nan=False)] = 0.0
    rows: Annotated[int, Field(ge=1)]

    @model_validator(mode="after")
    def _fits_its_type(self) -> Self:
        if self.bias and self.type != "noul":
            raise ValueError("bias is for a noul alone; leave it out")
        return self

    def calibrated(self, probabilities: Sequence[float]) -> tuple[float, ...]:
        """The calibrated probabilities of a question's options; those of a ``noul`` are no and yes."""
        logs = [math.log(p) / self.temperature if p > 0 else -math.inf for p in probabilities]
        logs[-1] += self.bias
        return normalised(logs)


class Calibration(BaseModel):
    """The curves of one model, asked in one way.

    Attributes:
        version: of the file's form.
        name: the name in answers.
        model: the served name of the model that it was fitted to.
        profile: the ``decision_profile`` that asked: other prompts have other probabilities.
        permutations: the number of orders of the options that were averaged.
        curves: at most one for a type and a number of options. A question without one stays as it is.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: Literal[1] = 1
    name: Annotated[str, Field(pattern=r"^[\w.-]+$")]
    model: str
    profile: str
    permutations: Annotated[int, Field(ge=1)] = 1
    curves: tuple[Curve, ...] = ()

    @model_validator(mode="after")
    def _has_one_curve_for_each(self) -> Self:
        seen: set[tuple[str, Range | None]] = set()
        for curve in self.curves:
            key = curve.type, curve.options
            if key in seen or (curve.options and curve.options not in BUCKETS):
                expected = ", ".join(map(str, map(list, BUCKETS)))
                raise ValueError(f"curves of {curve.type}: options must be one of {expected}, each at most once")
            seen.add(key)
        return self

    @classmethod
    def of_file(cls, path: Path) -> Self:
        """Read a file that ``score-serve calibrate`` wrote.

        Raises:
            ValueError: it cannot be read, or is no calibration.
        """
        try:
            return cls.model_validate(tomllib.loads(path.read_text("utf-8")))
        except OSError as error:
            raise ValueError(f"{path} cannot be read: {error.strerror}; name a file of score-serve calibrate") from None
        except ValidationError as error:
            (first, *_) = error.errors(include_url=False)
            place = ".".join(map(str, first["loc"]))
            raise ValueError(f"{path} is not a calibration: {place} {first['msg']}") from None
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} is not TOML: {error}") from None

    def as_toml(self) -> str:
        """The text of the file."""
        own = self.model_dump(exclude={"curves"})
        lines = [COMMENT, *(f"{name} = {json.dumps(value)}\n" for name, value in own.items())]
        for curve in self.curves:
            fields = curve.model_dump(exclude_none=True, exclude_defaults=True)
            lines += ["\n[[curves]]\n", *(f"{name} = {json.dumps(value)}\n" for name, value in fields.items())]
        return "".join(lines)

    def curve(self, type: Type, options: int) -> Curve | None:
        """The curve of a question; None: it stays as it is."""
        own = [curve for curve in self.curves if curve.type == type]
        ranged = (curve for curve in own if curve.options and curve.options[0] <= options <= curve.options[1])
        return next(ranged, next((curve for curve in own if curve.options is None), None))


def normalised(logs: Sequence[float]) -> tuple[float, ...]:
    """Probabilities that are in proportion to the exponentials, of which one at least is not 0."""
    peak = max(logs)
    weights = [math.exp(value - peak) for value in logs]
    total = math.fsum(weights)
    return tuple(weight / total for weight in weights)


def bucket(options: int) -> Range:
    """The bucket of a number of options."""
    return next(each for each in BUCKETS if options <= each[1])
