"""Decision heads against their published mathematics over transformers' float32 hidden states, prompts included."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from model import loading
from serve_app import model_source
from serve_app.contract import BatchResult
from serve_app.settings import ModelSettings
from serve_app.tasks.decisions.decider import Decider
from serve_app.tasks.decisions.questions import Decided, Judgement, Question
from serve_app.tasks.model_facts import ModelFacts
from serve_app.tasks.steps import finish
from serve_app.tasks.systemone import SystemOneRequest, questions
from serve_app.tasks.tokenizer import TextTokenizer
from tests import tiny_heads
from tests.parity.cases import HAVE_TORCH
from tests.published_prompts import IN_PARTS
from tests.tiny_families import make_family

pytestmark = [pytest.mark.heavy, pytest.mark.skipif(not HAVE_TORCH, reason="torch is not installed")]

STATES: tuple[Any, ...] = (
    "The parcel never came. Nobody answers! I want my money back. " * 4,  # more than a page of the prefix cache
    {"order": {"items": [1, {"name": "chair"}], "paid": True}, "b": None, "a": "é"},
)
QUESTIONS: Mapping[str, Mapping[str, Any]] = {
    "angry": {"type": "noul", "instructions": "Is the customer angry?"},
    "fault": {"type": "noul", "instructions": {"ask": "A fault?"}, "criteria": {"true": "broken", "false": {"x": [1]}}},
    "team": {
        "type": "choice",
        "instructions": "Which team?",
        "criteria": {"Billing": "money", "Shipping": None, 'Re"turns': {"when": ["late", 2], "a": 1}},
    },
    "urgent": {"type": "score", "instructions": "How urgent?", "criteria": ["not", {"level": "a bit"}, "very"]},
    "queue": {"type": "choice", "instructions": "Which?", "criteria": {f"q{n}": None for n in range(12)}},
}


def options_of(question: Mapping[str, Any]) -> dict[str, Any]:
    """The descriptions of a question's options by their published keys."""
    criteria = question.get("criteria")
    if question["type"] == "noul":
        return {"false": "No", "true": "Yes"} if criteria is None else {key: criteria[key] for key in ("false", "true")}
    return criteria if isinstance(criteria, dict) else {str(n): each for n, each in enumerate(criteria or ())}


@pytest.fixture(scope="module", params=["Kai", pytest.param("Eos", marks=pytest.mark.slow), "kev"])
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def source(kind: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A published folder: Decision 2.0 on Qwen3 or Qwen3.5, or kev's head beside a merged model."""
    folder = tmp_path_factory.mktemp("heads") / kind
    if kind == "kev":
        made = make_family(folder, "qwen3", changes={"max_position_embeddings": 2_048})
        return tiny_heads.add_kev_head(made, json.loads((made / "config.json").read_text())["hidden_size"])
    return tiny_heads.make_decision2(folder, {"Kai": "qwen3", "Eos": "qwen3_5"}[kind])


@pytest.fixture(scope="module")
def folder(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SCORE_SERVE_CACHE", str(tmp_path_factory.mktemp("cache")))
        return model_source.resolve(str(source))


@pytest.fixture(scope="module")
def scorer(folder: Path) -> Any:
    implementation = "native" if shutil.which("c++") else None
    sizes: dict[str, Any] = {"max_segment_tokens": 96, "call_tokens": 160, "chunks": (64, 160)}
    return loading.load(folder, implementation=implementation, prefix_cache_bytes=2**22, **sizes)


@pytest.fixture(scope="module")
def facts(folder: Path, scorer: Any) -> ModelFacts:
    found = ModelFacts.of(ModelSettings(model=str(folder)), TextTokenizer.load(folder), scorer.info, folder)
    assert found.profile_problem is None
    return found


def asked(
    state: Any, names: Sequence[str], permutations: int, among: Mapping[str, Mapping[str, Any]]
) -> tuple[SystemOneRequest, list[Question]]:
    own = {name: among[name] for name in names or among}
    request = SystemOneRequest.model_validate({"state": state, "questions": own, "permutations": permutations})
    return request, questions(request)


def decide(
    facts: ModelFacts,
    scorer: Any,
    state: Any = STATES[0],
    *names: str,
    permutations: int = 1,
    among: Mapping[str, Mapping[str, Any]] = QUESTIONS,
) -> Decided:
    """The answers to the questions of these names, or to all."""
    from serve_app.tasks.systemone import _state  # pyright: ignore[reportPrivateUsage]

    request, own = asked(state, names, permutations, among)
    prepared = finish(Decider.of(facts).prepare(_state(request), own, permutations, lambda decided: decided))
    result: BatchResult = scorer.score(prepared.batch)
    return prepared.answer(result)


def probabilities(decided: Decided) -> list[tuple[float, ...]]:
    assert all(isinstance(each, Judgement) for each in decided.judgements), decided.judgements
    return [each.probabilities for each in decided.judgements if isinstance(each, Judgement)]


class Reference:
    """The published way from a question to the probabilities of its options."""

    def __init__(self, kind: str, source: Path) -> None:
        self._kind = kind
        self._tokenizer = tiny_heads.tokenizer()
        width = json.loads((source / "config.json").read_text()).get("hidden_size", 48)
        if kind == "kev":
            self._build, self._temperature = IN_PARTS["kev-v1"], tiny_heads.TEMPERATURE
            self._backbone = tiny_heads.Backbone(source)
            self._logits = partial(tiny_heads.pointer_logits, tiny_heads.pointer_head(width))
        else:
            self._build, self._temperature = IN_PARTS["decision2-v1"], 1.0
            load = "AutoModel" if kind == "Kai" else "Qwen3_5TextModel"
            self._backbone = tiny_heads.Backbone(source / "backbone", load)
            self._logits = partial(tiny_heads.candidate_logits, tiny_heads.candidate_head(width))

    def probabilities(self, state: Any, question: Mapping[str, Any], turn: int = 0) -> np.ndarray:
        shown = options_of(question)
        if self._kind == "kev" and question["type"] == "noul" and "criteria" not in question:
            shown = {"false": None, "true": None}
        keys = [*shown][turn:] + [*shown][:turn]
        parts = self._build(state, question["type"], question["instructions"], {key: shown[key] for key in keys})
        ids, ends = list[int](), list[int]()
        for part in parts:
            ids += self._tokenizer.encode(part, add_special_tokens=False).ids
            ends.append(len(ids) - 1)
        states = self._backbone.states(ids, ends[1:])
        logits = self._logits(states[:-1], states[-1]).double().numpy()
        if self._kind != "kev" and question["type"] == "score":
            offsets = tiny_heads.OFFSETS.get(str(len(keys)), [0.0] * len(keys))
            logits = logits + np.array([offsets[int(key)] for key in keys])
        own = np.exp(logits / self._temperature)
        found = dict(zip(keys, own / own.sum(), strict=True))
        return np.array([found[key] for key in shown])


@pytest.fixture(scope="module")
def reference(kind: str, source: Path) -> Reference:
    return Reference(kind, source)


@pytest.mark.parametrize("state", STATES)
def test_probabilities_are_the_published_ones(facts: ModelFacts, scorer: Any, reference: Reference, state: Any):
    for name, found in zip(QUESTIONS, probabilities(decide(facts, scorer, state)), strict=True):
        expected = reference.probabilities(state, QUESTIONS[name])
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)
        assert np.ptp(found) > 1e-3


def test_orders_are_averaged(facts: ModelFacts, scorer: Any, reference: Reference):
    decided = decide(facts, scorer, STATES[0], "team", "urgent", permutations=3)
    for name, found in zip(("team", "urgent"), probabilities(decided), strict=True):
        logs = np.mean([np.log(reference.probabilities(STATES[0], QUESTIONS[name], turn)) for turn in range(3)], axis=0)
        expected = np.exp(logs) / np.exp(logs).sum()
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)


@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler is installed")
def test_an_answer_has_the_same_bits_alone_among_others_cold_and_warm(facts: ModelFacts, scorer: Any):
    def forget() -> None:
        scorer._forget_prefixes()

    for state in STATES:
        alone: list[tuple[float, ...]] = []
        for name in QUESTIONS:
            forget()
            alone += probabilities(decide(facts, scorer, state, name))
        forget()
        cold, warm = decide(facts, scorer, state), decide(facts, scorer, state)
        assert probabilities(cold) == probabilities(warm) == alone
        assert warm.cached_tokens > cold.cached_tokens == 0
        assert probabilities(decide(facts, scorer, state, *reversed([*QUESTIONS]))) == alone[::-1]


def test_info_tells_of_the_head(kind: str, scorer: Any, facts: ModelFacts):
    head, profile = ("pointer", "kev-v1") if kind == "kev" else ("candidate", "decision2-v1")
    assert (scorer.info.decision_head, facts.profile.name) == (head, profile)
    assert any(f"read by a {head} head of 20 channels" in note for note in scorer.info.notes)
    assert scorer.info.max_prompt_tokens == (2_048 if kind == "kev" else 1_024)
