"""Calibrations fitted to answers whose true curve is known, against scikit-learn."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest
from sklearn.calibration import CalibratedClassifierCV
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import brier_score_loss, log_loss

from serve_app import model_source
from serve_app.contract import Engine
from serve_app.jobs import calibration
from serve_app.jobs.calibration import Labelled
from serve_app.jobs.calibration_plot import draw
from serve_app.profiles.calibration import Calibration
from serve_app.profiles.profile import Type
from serve_app.settings import ModelSettings
from serve_app.tasks import systemone
from serve_app.tasks.decisions.decider import Decider
from serve_app.tasks.decisions.questions import Judgement
from serve_app.tasks.model_facts import ModelFacts
from serve_app.tasks.steps import finish
from serve_app.tasks.tokenizer import TextTokenizer

EXAMPLE = Path(__file__).parents[3] / "examples" / "calibration"
"""The labelled set of the repository."""


def softmax(logits: np.ndarray) -> np.ndarray:
    weights = np.exp(logits - logits.max(axis=1, keepdims=True))
    return weights / weights.sum(axis=1, keepdims=True)


def answered(kind: Type, options: int, temperature: float, count: int, seed: int, bias: float = 0.0) -> list[Labelled]:
    """Answers of a model whose logits are ``temperature`` times too large."""
    rng = np.random.default_rng(seed)
    logits = 2 * rng.standard_normal((count, options))
    true = logits.copy()
    true[:, -1] += bias
    right = [int(rng.choice(options, p=p)) for p in softmax(true)]
    shown = softmax(logits * temperature)
    return [
        Labelled(kind, f"state {seed}-{n}", p.tolist(), answer)
        for n, (p, answer) in enumerate(zip(shown, right, strict=True))
    ]


def fitted(rows: list[Labelled]) -> Calibration:
    return calibration.fit(rows, "c-v1", "judge", "chat-v1", 2)


class TestFit:
    @pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
    def test_the_temperature_that_made_the_answers_is_found(self, temperature: float):
        (curve,) = fitted(answered("choice", 4, temperature, 4_000, 1)).curves
        assert curve.temperature == pytest.approx(temperature, rel=0.06)
        assert (curve.type, curve.options, curve.bias, curve.rows) == ("choice", None, 0.0, 4_000)

    def test_a_yes_or_no_is_scikit_learns_platt_scaling(self):
        rows = answered("noul", 2, 3.0, 600, 2, bias=-1.5)
        (curve,) = fitted(rows).curves
        logits = np.array([np.log(row.probabilities[1] / row.probabilities[0]) for row in rows])
        labels = np.array([row.answer for row in rows])
        prefit = LogisticRegression().fit(logits[:, None], labels)
        prefit.coef_, prefit.intercept_ = np.array([[1.0]]), np.array([0.0])  # the logit is the model's own
        from sklearn.frozen import FrozenEstimator

        reference = CalibratedClassifierCV(FrozenEstimator(prefit), method="sigmoid", ensemble=False)
        reference.fit(logits[:, None], labels)
        wanted = reference.predict_proba(logits[:, None])[:, 1]
        found = [curve.calibrated(row.probabilities)[1] for row in rows]
        np.testing.assert_allclose(found, wanted, atol=2e-3)
        assert abs(curve.bias) > 0.5

    def test_each_number_of_options_with_enough_labels_has_its_own_curve(self):
        rows = [
            *answered("choice", 2, 1.0, 3_000, 3),
            *answered("choice", 8, 5.0, 300, 4),
            *answered("choice", 30, 2.0, calibration.LEAST_ROWS - 1, 5),
            *answered("score", 5, 3.0, 300, 6),
        ]
        made = fitted(rows)
        assert [(each.type, each.options) for each in made.curves] == [
            ("choice", None), ("choice", (2, 2)), ("choice", (6, 10)), ("score", None)
        ]  # fmt: skip
        two, eight = made.curve("choice", 2), made.curve("choice", 7)
        assert two is not None
        assert eight is not None
        assert two.temperature == pytest.approx(1.0, rel=0.2)
        assert eight.temperature == pytest.approx(5.0, rel=0.2)
        assert made.curve("choice", 30) is made.curve("choice", 4) is made.curves[0]
        assert made.curve("noul", 2) is None

    @pytest.mark.parametrize("right", [0, 1])
    def test_answers_that_are_all_right_stay_finite(self, right: int):
        rows = [Labelled("noul", str(n), (1.0, 0.0) if right == 0 else (0.0, 1.0), right) for n in range(50)]
        (curve,) = fitted(rows).curves
        found = curve.calibrated(rows[0].probabilities)
        assert found[right] > 0.9
        assert sum(found) == pytest.approx(1)


class TestMeasure:
    def test_the_figures_are_those_of_scikit_learn(self):
        rows = answered("choice", 4, 3.0, 500, 7)
        raw = calibration.measure(rows)["choice"].raw
        probabilities, answers = np.array([row.probabilities for row in rows]), [row.answer for row in rows]
        assert raw.log_loss == pytest.approx(log_loss(answers, probabilities))
        wanted = brier_score_loss(answers, probabilities, labels=range(4), scale_by_half=False)
        assert raw.brier == pytest.approx(wanted)
        assert raw.accuracy == pytest.approx((probabilities.argmax(1) == answers).mean())

    def test_the_calibration_error_is_the_gap_in_each_bin(self):
        # Twenty answers with 0.9 of which half are right, twenty with 0.62 of which all are.
        rows = [Labelled("noul", f"a{n}", (0.1, 0.9), n % 2) for n in range(20)]
        rows += [Labelled("noul", f"b{n}", (0.38, 0.62), 1) for n in range(20)]
        assert calibration.measure(rows)["noul"].raw.ece == pytest.approx((0.4 + 0.38) / 2)

    def test_unseen_answers_get_better_where_the_model_is_too_sure(self):
        rows = [*answered("choice", 4, 4.0, 400, 8), *answered("noul", 2, 1.0, 400, 9, bias=-2.0)]
        for own in calibration.measure(rows).values():
            assert own.helps
            assert own.calibrated.ece < own.raw.ece / 2
            assert own.calibrated.brier < own.raw.brier

    def test_what_is_right_already_is_left_as_it_is(self):
        # Of four states of the same answer, one is another way round: a fit to the rest cannot help it.
        rows = [Labelled("choice", str(n), (0.5, 0.25, 0.25), n % 3 if n % 4 else 0) for n in range(20)]
        measured = calibration.measure(rows)
        assert not measured["choice"].helps
        assert calibration.kept(fitted(rows), measured).curves == ()

    def test_questions_about_one_state_are_unseen_together(self, monkeypatch: pytest.MonkeyPatch):
        seen: list[set[str]] = []
        real = calibration.fit

        def fit(rows: list[Labelled], *more: str) -> Calibration:
            seen.append({row.state for row in rows})
            return real(rows, *more)

        monkeypatch.setattr(calibration, "fit", fit)
        rows = answered("choice", 3, 2.0, 40, 10)
        calibration.measure([row for row in rows for _ in range(7)])
        assert [len(states) for states in seen] == [32] * calibration.FOLDS

    def test_too_few_states_are_refused(self):
        with pytest.raises(ValueError, match="there are 19 different states; label at least 20"):
            calibration.measure(answered("choice", 3, 2.0, 19, 11))

    def test_risk_is_the_share_of_errors_among_the_surest(self):
        sure = calibration.Sure(np.array([0.5, 0.9, 0.7]), np.array([False, True, False]))
        np.testing.assert_allclose(sure.risk(), [0, 1 / 2, 2 / 3])


def test_the_drawing_has_two_panels_for_each_type(tmp_path: Path):
    rows = [*answered("choice", 4, 4.0, 60, 12), *answered("noul", 2, 1.0, 30, 13)]
    png, svg = tmp_path / "c.png", tmp_path / "c.svg"
    draw(calibration.measure(rows), "judge", [png, svg])
    assert png.read_bytes().startswith(b"\x89PNG")
    axes = [each for each in ElementTree.parse(svg).iter() if each.get("id", "").startswith("axes_")]
    assert len(axes) == 4


@pytest.mark.slow
@pytest.mark.demo
def test_the_demo_models_answers_to_the_repositorys_labelled_set_get_better(demo_engine: Engine):
    folder = model_source.resolve("demo")
    settings = ModelSettings(model="demo")
    decider = Decider.of(ModelFacts.of(settings, TextTokenizer.load(folder), demo_engine.info, folder))
    asked = json.loads((EXAMPLE / "questions.json").read_text())
    rows: list[Labelled] = []
    for line in map(json.loads, (EXAMPLE / "tickets.jsonl").read_text().splitlines()):
        request = systemone.SystemOneRequest.model_validate({"state": line["state"], "questions": asked})
        prepared = finish(decider.prepare(line["state"], systemone.questions(request), 1, lambda decided: decided))
        decided = prepared.answer(demo_engine.score(prepared.batch))
        options = {"refund": [False, True], "team": list(asked["team"]["criteria"]), "urgency": [0, 1, 2]}
        for name, judged in zip(asked, decided.judgements, strict=True):
            assert isinstance(judged, Judgement)
            right = options[name].index(line["answers"][name])
            rows.append(Labelled(asked[name]["type"], line["state"], judged.probabilities, right))
    measured = calibration.measure(rows)
    assert {type: own.rows for type, own in measured.items()} == {"noul": 96, "choice": 96, "score": 96}
    for own in measured.values():
        assert own.calibrated.ece < own.raw.ece
        assert own.calibrated.brier < own.raw.brier
        assert own.calibrated.log_loss < own.raw.log_loss
