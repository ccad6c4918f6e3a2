"""Laya's decisions against transformers' ModernBERT and torch's own layers in float32, prompts included."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from model import loading, plan, sharding
from serve_app import model_source
from serve_app.errors import InvalidRequestError
from serve_app.settings import ModelSettings
from serve_app.tasks.decisions.decider import Decider
from serve_app.tasks.decisions.questions import Judged, Judgement, Kind, Option, Question
from serve_app.tasks.model_facts import ModelFacts
from serve_app.tasks.steps import finish
from serve_app.tasks.systemone import SystemOneRequest, questions
from serve_app.tasks.tokenizer import TextTokenizer
from tests.parity.cases import HAVE_TORCH
from tests.parity.test_decision_heads import QUESTIONS, STATES, options_of, probabilities
from tests.parity.test_decision_heads import decide as decide_among
from tests.tiny_laya import Reference, make_laya

pytestmark = [pytest.mark.heavy, pytest.mark.skipif(not HAVE_TORCH, reason="torch is not installed")]

MORE: Mapping[str, Mapping[str, Any]] = {
    "long": {
        "type": "choice",
        "instructions": "Which?",
        "criteria": {
            f"{n}. option": "it says a great deal of itself, in words that nobody reads " * 2 for n in range(5)
        },
    },
    "many": {"type": "choice", "instructions": "Which?", "criteria": {f"{n} of many": "m" * 9 for n in range(30)}},
    "most": {
        "type": "choice",
        "instructions": "Which?",
        "criteria": {a + b: None for a in "abcdefgh" for b in "abcdefghijklmnop"},
    },
    "two": {"type": "score", "instructions": "How much?", "criteria": ["little", "much"]},
    "half": {"type": "noul", "instructions": "Late?", "criteria": {"true": "it is late"}},
}
ALL = {**QUESTIONS, **MORE}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_laya(tmp_path_factory.mktemp("laya") / "tiny")


@pytest.fixture(scope="module")
def reference(source: Path) -> Reference:
    return Reference(source)


@pytest.fixture(scope="module")
def folder(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SCORE_SERVE_CACHE", str(tmp_path_factory.mktemp("cache")))
        return model_source.resolve(str(source))


HOW: Mapping[str, Mapping[str, Any]] = {
    "kernels": {"implementation": "native"},
    "XLA": {"implementation": "paged"},
    "loop": {"implementation": "paged", "by_layer": False},
    "mesh": {"implementation": "paged", "mesh": sharding.mesh(2, 2, jax.devices()[:4])},
}
SELDOM = [pytest.param(each, marks=pytest.mark.slow) for each in ("loop", "mesh")]
SOME = ["XLA", *SELDOM, *(["kernels"] if shutil.which("c++") else [])]


@pytest.fixture(scope="module", params=SOME)
def how(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def scorer(how: str, folder: Path) -> Any:
    return loading.load(folder, call_tokens=640, **HOW[how])


@pytest.fixture(scope="module")
def facts(folder: Path, scorer: Any) -> ModelFacts:
    found = ModelFacts.of(ModelSettings(model=str(folder)), TextTokenizer.load(folder), scorer.info, folder)
    assert found.profile_problem is None
    return found


decide = partial(decide_among, among=ALL)


def expected(reference: Reference, state: Any, name: str, turn: int = 0) -> np.ndarray:
    question = ALL[name]
    shown = question.get("criteria", {}) if question["type"] == "noul" else options_of(question)
    return reference.probabilities(state, question["type"], question["instructions"], shown, turn)


@pytest.mark.parametrize("state", STATES)
def test_probabilities_are_the_published_ones(facts: ModelFacts, scorer: Any, reference: Reference, state: Any):
    for name, found in zip(ALL, probabilities(decide(facts, scorer, state)), strict=True):
        np.testing.assert_allclose(found, expected(reference, state, name), rtol=0, atol=1e-4, err_msg=name)
        assert np.ptp(found) > 1e-3, name


def test_orders_are_averaged(facts: ModelFacts, scorer: Any, reference: Reference):
    decided = decide(facts, scorer, STATES[0], "team", "urgent", permutations=3)
    for name, found in zip(("team", "urgent"), probabilities(decided), strict=True):
        logs = np.mean([np.log(expected(reference, STATES[0], name, turn)) for turn in range(3)], axis=0)
        np.testing.assert_allclose(found, np.exp(logs) / np.exp(logs).sum(), rtol=0, atol=1e-4)


def test_the_weights_dtype_is_kept_to(folder: Path, facts: ModelFacts, reference: Reference):
    rounded = loading.load(folder, call_tokens=640, implementation="paged", dtype="bfloat16")
    for name in ("team", "urgent"):
        (found,) = probabilities(decide(facts, rounded, STATES[0], name))
        np.testing.assert_allclose(found, expected(reference, STATES[0], name), rtol=0, atol=0.05)


def test_an_answer_is_the_same_alone_and_among_others(how: str, facts: ModelFacts, scorer: Any):
    together = probabilities(decide(facts, scorer, STATES[0]))
    alone = [probabilities(decide(facts, scorer, STATES[0], name))[0] for name in ALL]
    back = probabilities(decide(facts, scorer, STATES[0], *reversed([*ALL])))[::-1]
    if how == "kernels":
        assert together == alone == back
    for found, own, again in zip(together, alone, back, strict=True):
        np.testing.assert_allclose(found, own, rtol=0, atol=1e-5)
        np.testing.assert_allclose(found, again, rtol=0, atol=1e-5)


def test_what_would_be_cut_unseen_is_refused(facts: ModelFacts):
    def refused(question: Mapping[str, Any], state: str = "state") -> str:
        request = SystemOneRequest.model_validate({"state": state, "questions": {"q": question}})
        steps = Decider.of(facts).prepare(state, questions(request), 1, lambda decided: decided)
        prepared = finish(steps)
        (judged,) = prepared.answer(Nothing()).judgements  # pyright: ignore[reportArgumentType]
        assert isinstance(judged, InvalidRequestError)
        return judged.message

    class Nothing:
        values = np.zeros(0, np.float32)
        computed_tokens = np.zeros(0, np.int32)

    two = {"a": None, "b": None}
    assert "this model reads 1" in refused({"type": "choice", "instructions": "why " * 100, "criteria": two})
    alike = {f"{'the same beginning' * 3} {n}": None for n in range(12)}
    assert "options 0 and 1 begin alike" in refused({"type": "choice", "instructions": "?", "criteria": alike})
    assert "this model reads at most 900" in refused(
        {"type": "choice", "instructions": "?", "criteria": two}, "s" * 1000
    )


def test_too_many_options_are_refused_and_no_level_is_without_its_description(facts: ModelFacts, scorer: Any):
    asked = Question(Kind.CHOICE, "?", tuple(Option(str(n)) for n in range(129)), ())
    (refused,) = answered(facts, scorer, [asked])
    assert isinstance(refused, InvalidRequestError)
    assert "has 129 options; this model reads at most 128" in refused.message
    plain, described = (
        answered(facts, scorer, [Question(Kind.SCORE, "?", (Option("low", own), Option("high", own)), ())])[0]
        for own in (None, "words of the caller")
    )
    assert isinstance(plain, Judgement)
    assert isinstance(described, Judgement)
    assert plain.probabilities != described.probabilities
    with pytest.raises(ValueError, match="130 reads; an encoder's may have 128"):
        plan.whole([np.arange(200)], [range(130)])


def answered(facts: ModelFacts, scorer: Any, asked: list[Question]) -> Sequence[Judged]:
    prepared = finish(Decider.of(facts).prepare("A state.", asked, 1, lambda decided: decided))
    return prepared.answer(scorer.score(prepared.batch)).judgements


def test_info_tells_of_the_head(facts: ModelFacts, scorer: Any):
    assert (scorer.info.decision_head, facts.profile.name, scorer.info.max_prompt_tokens) == ("marker", "laya-v1", 900)
    assert any("marker head" in note for note in scorer.info.notes)
