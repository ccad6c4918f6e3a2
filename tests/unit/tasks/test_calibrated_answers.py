"""Calibrated answers: both numbers side by side, and files that do not fit are refused."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from serve_app.contract import BatchResult
from serve_app.profiles.calibration import BUCKETS, Calibration, Curve, bucket
from serve_app.scorer.fake_engine import FakeEngine
from serve_app.settings import ModelSettings, ServiceSettings
from serve_app.tasks.decisions.decider import Decider
from serve_app.tasks.decisions.questions import Judgement
from serve_app.tasks.model_facts import ModelFacts
from tests.unit.tasks.test_decider import CHOICE, NOUL, SCORE, Asked, tokenizer

CURVES = (
    Curve(type="noul", temperature=2.0, bias=0.5, rows=100),
    Curve(type="choice", temperature=3.0, rows=100),
    Curve(type="choice", options=(3, 5), temperature=4.0, rows=60),
)
MADE = Calibration(name="support-v1", model="judge", profile="chat-v1", curves=CURVES)


def facts(**settings: Any) -> ModelFacts:
    return ModelFacts.of(ModelSettings(**settings), tokenizer("yes", "no"), FakeEngine(20_000, 8_192).info)


def test_answers_have_the_raw_and_the_calibrated_probabilities():
    own = tokenizer("yes", "no")
    questions = [NOUL, CHOICE, SCORE]
    raw = Asked(Decider.of(facts()), own, questions).decided().judgements
    made = Asked(Decider.of(facts(calibration=MADE)), own, questions).decided().judgements
    for before, after in zip(raw, made, strict=True):
        assert isinstance(before, Judgement)
        assert isinstance(after, Judgement)
        assert before.raw is before.calibration is None
        assert after.label_mass == before.label_mass
        if after.raw is not None:
            assert (after.raw, after.calibration) == (before.probabilities, "support-v1")
    noul, choice, score = made
    assert isinstance(noul, Judgement)
    assert isinstance(choice, Judgement)
    assert noul.raw is not None
    assert choice.raw is not None
    logit = math.log(noul.raw[1] / noul.raw[0]) / 2 + 0.5
    assert noul.probabilities[1] == pytest.approx(1 / (1 + math.exp(-logit)))
    powers = [p ** (1 / 4) for p in choice.raw]
    assert choice.probabilities == pytest.approx([power / sum(powers) for power in powers])
    assert score == raw[2], "no curve is for scores"


def test_a_probability_of_nothing_stays_nothing():
    assert CURVES[1].calibrated((0.0, 0.5, 0.5)) == (0.0, 0.5, 0.5)
    assert CURVES[0].calibrated((1.0, 0.0)) == (1.0, 0.0)


def test_values_that_are_not_finite_are_still_an_error():
    own = Asked(Decider.of(facts(calibration=MADE)), tokenizer("yes", "no"), [NOUL])
    broken = BatchResult(np.full_like(FakeEngine(20_000).score(own.batch).values, np.nan), np.array([1], np.int32))
    (error,) = own.decided(broken).judgements
    assert "not finite" in str(error)


def test_every_number_of_options_is_in_one_bucket():
    assert [bucket(options) for options in (2, 3, 5, 6, 26, 27, 255)] == [
        BUCKETS[0], BUCKETS[1], BUCKETS[1], BUCKETS[2], BUCKETS[3], BUCKETS[4], BUCKETS[4]
    ]  # fmt: skip
    assert all(before[1] + 1 == after[0] for before, after in itertools.pairwise(BUCKETS))


class TestFiles:
    def test_a_file_reads_as_it_was_written(self, tmp_path: Path):
        file = tmp_path / "support-v1.toml"
        file.write_text(MADE.as_toml(), "utf-8")
        assert Calibration.of_file(file) == MADE
        settings = ModelSettings(calibration=str(file))  # type: ignore[arg-type]
        assert settings.calibration == MADE
        file.unlink()
        assert ModelSettings.model_validate(settings.model_dump()).calibration == MADE, "it is read once"

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (None, "cannot be read: No such file or directory; name a file of score-serve calibrate"),
            ("name = ", "is not TOML"),
            ('name = "a"\n', "is not a calibration: model Field required"),
            (MADE.as_toml().replace("version = 1", "version = 2"), "version Input should be 1"),
            (MADE.as_toml().replace("temperature = 3.0", "temperature = 0"), r"curves.1.temperature .*greater than 0"),
            (MADE.as_toml().replace("[3, 5]", "[3, 6]"), "options must be one of"),
            (MADE.as_toml().replace("temperature = 4.0", "temperature = 4.0\nbias = 1.0"), "bias is for a noul alone"),
        ],
    )
    def test_a_file_that_is_none_is_refused_with_the_reason(self, content: str | None, message: str, tmp_path: Path):
        file = tmp_path / "a.toml"
        if content is not None:
            file.write_text(content, "utf-8")
        with pytest.raises(ValidationError, match=message):
            ModelSettings(calibration=str(file))  # type: ignore[arg-type]

    def test_a_calibration_of_another_profile_is_refused(self):
        with pytest.raises(ValueError, match=r"support-v1 was fitted .* decision_profile chat-v1.* has plain-v1"):
            facts(calibration=MADE, decision_profile="plain-v1")


def test_the_setting_goes_through_the_services_settings():
    given = {"model": "demo", "calibration": MADE.model_dump(mode="json")}
    assert ServiceSettings.model_validate(given).models[0].calibration == MADE
