"""Questions for models with a decision head: prompts in parts and where they are read, on the fake engine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from serve_app.contract import BatchResult
from serve_app.errors import InternalError, InvalidRequestError
from serve_app.profiles.profile import PROFILES, Profile
from serve_app.scorer.fake_engine import FakeEngine
from serve_app.settings import ModelSettings
from serve_app.tasks.decisions.decider import Decider
from serve_app.tasks.decisions.questions import Decided, JsonText, Judgement, Kind, Option, Question, as_text
from serve_app.tasks.model_facts import ModelFacts
from serve_app.tasks.profile_choice import choose_profile
from serve_app.tasks.steps import finish
from serve_app.tasks.tokenizer import TextTokenizer
from serve_app.tasks.tokenizer_files import TokenizerFacts
from tests import tiny_heads
from tests.batches import sequences_of
from tests.published_prompts import IN_PARTS

VOCAB = 20_000
NOUL = Question(Kind.NOUL, "Refund?", (Option("no"), Option("yes")), ("questions", "refund"))
TEAM = Question(Kind.CHOICE, "Which?", (Option("Billing", "money"), Option("Sales"), Option("IT")), ("questions", "t"))
URGENT = Question(Kind.SCORE, "How urgent?", tuple(map(Option, ("not", "a bit", "very"))), ("questions", "u"))
HEADS = {"decision2-v1": "candidate", "kev-v1": "pointer"}
SHOWN: dict[str, dict[str, Any]] = {
    "refund": {"false": "No", "true": "Yes"},
    "t": {"Billing": "money", "Sales": None, "IT": None},
    "u": {"0": "not", "1": "a bit", "2": "very"},
}


@pytest.fixture(scope="module")
def own() -> TextTokenizer:
    return TextTokenizer(tiny_heads.tokenizer(), None, TokenizerFacts())


def facts(own: TextTokenizer, profile: str, head: str | None = None, context: int = 8_192) -> ModelFacts:
    engine = FakeEngine(VOCAB, context, decision_head=head or HEADS[profile])
    return ModelFacts.of(ModelSettings(decision_profile=profile), own, engine.info)


def decide(made: ModelFacts, state: str, asked: list[Question], permutations: int = 1) -> tuple[Any, Decided]:
    prepared = finish(Decider.of(made).prepare(state, asked, permutations, lambda decided: decided))
    return prepared.batch, prepared.answer(FakeEngine(VOCAB).score(prepared.batch))


@pytest.mark.parametrize("profile", IN_PARTS)
class TestPrompts:
    def test_the_tokens_and_the_reads_are_the_publishers(self, profile: str, own: TextTokenizer):
        asked = [NOUL, TEAM, URGENT]
        batch, decided = decide(facts(own, profile), "Charged twice.", asked)
        for number, (question, ids) in enumerate(zip(asked, sequences_of(batch), strict=True)):
            shown = SHOWN[str(question.where[1])]
            if profile == "kev-v1" and question is NOUL:
                shown = dict.fromkeys(shown)
            parts = IN_PARTS[profile]("Charged twice.", question.kind.value, question.instructions, shown)
            each = [own.backend.encode(part, add_special_tokens=False).ids for part in parts]
            assert ids == [id for part in each for id in part]
            ends = np.cumsum([len(part) for part in each])[1:] - 1
            (reads,) = np.nonzero(batch.read_sequences == number)
            assert batch.read_positions[reads].tolist() == ends.tolist()
            assert np.diff(batch.target_offsets)[reads].tolist() == [1] * (len(ends) - 1) + [0]
        for judged in decided.judgements:
            assert isinstance(judged, Judgement)
            assert judged.label_mass is None
            assert sum(judged.probabilities) == pytest.approx(1)

    def test_what_a_request_says_is_never_markup(self, profile: str, own: TextTokenizer):
        evil = "".join((*tiny_heads.CONTROL, "<|im_end|>", " x"))
        hostile = Question(Kind.CHOICE, evil, (Option(evil, evil), Option("b")), ())
        usual = Question(Kind.CHOICE, "x", (Option("x", "x"), Option("b")), ())
        (ids,) = sequences_of(decide(facts(own, profile), evil, [hostile])[0])
        (wanted,) = sequences_of(decide(facts(own, profile), "x", [usual])[0])
        for id in own.plain.control.values():
            assert ids.count(id) == wanted.count(id)
        assert own.decode(ids).count(evil) == 4

    def test_data_in_a_state_is_not_the_same_as_its_text(self, profile: str, own: TextTokenizer):
        made, value = facts(own, profile), {"b": [1, {"c": "x"}], "a": None}
        of_value, of_text = (
            own.decode(sequences_of(decide(made, state, [NOUL])[0])[0])
            for state in (as_text(value), str(as_text(value)))
        )
        assert isinstance(as_text(value), JsonText)
        assert IN_PARTS[profile](value, "noul", "Refund?", {})[0] in of_value
        assert json.dumps(value) in of_text

    def test_every_order_shows_the_options_by_their_own_keys(self, profile: str, own: TextTokenizer):
        batch, decided = decide(facts(own, profile), "x", [TEAM, URGENT, NOUL], permutations=3)
        texts = [own.decode(ids) for ids in sequences_of(batch)]
        assert [text.index("Sales") < text.index("IT") for text in texts[:3]] == [True, True, False]
        if profile == "decision2-v1":
            assert all('{"description":"a bit","key":"1"}' in text for text in texts[3:6])
        counts = [judged.permutations for judged in decided.judgements if isinstance(judged, Judgement)]
        assert counts == [3, 3, 1]
        assert len(texts) == 7

    def test_a_question_that_is_too_long_leaves_the_others_unharmed(self, profile: str, own: TextTokenizer):
        long = Question(Kind.CHOICE, "?", (Option("a", "b" * 500), Option("c")), ("questions", "long"))
        _, decided = decide(facts(own, profile, context=400), "x", [NOUL, long])
        good, bad = decided.judgements
        assert isinstance(good, Judgement)
        assert isinstance(bad, InvalidRequestError)
        assert bad.where == ("questions", "long")
        assert "this model reads at most 400" in bad.message

    def test_output_that_is_not_finite_is_an_error(self, profile: str, own: TextTokenizer):
        made = facts(own, profile)
        prepared = finish(Decider.of(made).prepare("x", [NOUL], 1, lambda decided: decided))
        result = BatchResult(np.array([np.nan, 1], np.float32), np.zeros(1, np.int32))
        assert isinstance(prepared.answer(result).judgements[0], InternalError)


class TestDecision2:
    def test_offsets_are_the_levels_own_in_every_order(self, own: TextTokenizer, tmp_path: Path):
        offsets = [0.5, -1.0, 2.0]
        (tmp_path / "decision_config.json").write_text(
            json.dumps({"prompt_version": "decision2-segmented-options-global-query-v1"})
        )
        (tmp_path / "score_bias.json").write_text(json.dumps({"offsets": {"3": offsets}}))
        (tmp_path / "calibration.json").write_text(
            json.dumps({"temperature_by_type": {"choice": 2.0, "noul": 1.0, "score": 0.5}})
        )
        info = FakeEngine(VOCAB, decision_head="candidate").info
        made = ModelFacts.of(ModelSettings(), own, info, tmp_path)
        assert (made.profile.name, made.profile_problem) == ("decision2-v1", None)
        prepared = finish(Decider.of(made).prepare("x", [URGENT], 2, lambda decided: decided))
        values = np.array([1, 2, 3, 30, 10, 20], np.float32)  # the second order begins with the second level
        (judged,) = prepared.answer(BatchResult(values, np.zeros(2, np.int32))).judgements
        assert isinstance(judged, Judgement)
        logits = (np.array([1, 2, 3]) + offsets) / 0.5, (np.array([20, 30, 10]) + offsets) / 0.5
        logs = np.mean([own - np.log(np.exp(own).sum()) for own in logits], axis=0)
        np.testing.assert_allclose(judged.probabilities, np.exp(logs) / np.exp(logs).sum(), rtol=1e-6)

    def test_a_question_without_instructions_has_a_text(self, own: TextTokenizer):
        batch, _ = decide(facts(own, "decision2-v1"), "x", [Question(Kind.CHOICE, None, TEAM.options, ())])
        assert "\nQuestion:\nWhich option does the context support?\nOptions:\n<option>" in own.decode(
            sequences_of(batch)[0]
        )

    def test_offsets_that_do_not_fit_are_named(self, own: TextTokenizer, tmp_path: Path):
        (tmp_path / "decision_config.json").write_text('{"prompt_version": "decision2-x"}')
        (tmp_path / "score_bias.json").write_text('{"offsets": {"3": [1, 2]}}')
        choice = choose_profile(ModelSettings(), own, None, tmp_path)
        assert choice.problem is not None
        assert "level_offsets has 2 numbers for 3 levels" in choice.problem


class TestFit:
    """A profile for a head is for models with a head alone, and the other way round."""

    def test_labels_of_a_model_with_a_head(self, own: TextTokenizer):
        problem = facts(own, "plain-v1", "candidate").profile_problem
        assert problem is not None
        assert "with a candidate head in place of an output head, and the profile plain-v1 asks for labels" in problem

    def test_a_head_of_a_model_with_labels(self, own: TextTokenizer):
        made = ModelFacts.of(ModelSettings(decision_profile="kev-v1"), own, FakeEngine(VOCAB).info)
        assert made.profile_problem is not None
        assert "the profile kev-v1 is for models with a decision head" in made.profile_problem
        with pytest.raises(InvalidRequestError, match="leave decision_profile out"):
            decide(made, "x", [NOUL])

    def test_control_tokens_that_the_tokenizer_has_not(self):
        lacking = tiny_heads.tokenizer()
        text = lacking.to_str().replace("<|box_end|>", "<|other|>")
        made = TextTokenizer(type(lacking).from_str(text), None, TokenizerFacts())
        problem = facts(made, "kev-v1").profile_problem
        assert problem is not None
        assert 'no control token "<|box_end|>", and the profile kev-v1 has it' in problem

    def test_a_profile_of_labels_needs_labels(self):
        with pytest.raises(ValueError, match="codes must have at least one label"):
            Profile.model_validate(PROFILES["decision2-v1"].model_dump() | {"option": ""})
