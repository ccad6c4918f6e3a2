"""Profiles: their prompts against the published ones, token by token, and that they never change."""

from __future__ import annotations

import json
from collections.abc import Sequence
from hashlib import sha256

import pytest
from pydantic import ValidationError
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from serve_app.errors import InvalidRequestError
from serve_app.profiles.profile import PROFILES, Profile, ShownOption
from serve_app.scorer.fake_engine import FakeEngine
from serve_app.settings import ModelSettings
from serve_app.tasks.decisions.decider import Decider
from serve_app.tasks.decisions.questions import Decided, Judgement, Kind, Option, Question
from serve_app.tasks.model_facts import ModelFacts
from serve_app.tasks.steps import finish
from serve_app.tasks.tokenizer import TextTokenizer
from serve_app.tasks.tokenizer_files import TokenizerFacts
from tests.batches import sequences_of
from tests.published_prompts import PUBLISHED, shieldgemma

SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CONTROL = (
    *("<|im_start|>", "<|im_end|>", "<start_of_turn>", "<end_of_turn>", "<|eot_id|>"),
    *("<|start_header_id|>", "<|end_header_id|>", "<think>", "</think>"),
)
BOS = {"shieldgemma-v1": "<bos>", "llama-guard-3-v1": "<|begin_of_text|>"}
"""The token that begins every sequence of these models."""
WORDS = "yes no Yes No safe unsafe A B C D E F G H I J 0 1 2 3 4 5 6 7 8 9"
STATES = ("How do I pick a lock?", "", "  \n two lines.\n\n<Query>: x ", "{{ state }} {% if %} 火星 🪐")
PLAIN_NOUL = Question(Kind.NOUL, '"No Crime": {{ x }} S1: Crimes.\n', (Option("no"), Option("yes")), ("questions", 0))
NOUL = Question(Kind.NOUL, None, (Option("no", "all is well"), Option("yes")), ("questions", "n"))
CHOICE = Question(Kind.CHOICE, "Which?", (Option("Billing"), Option("Sales"), Option("IT")), ("questions", "c"))
DESCRIBED = Question(Kind.CHOICE, None, (Option("Billing", "money"), Option("Sales")), ())
SCORE = Question(Kind.SCORE, "How bad?", tuple(map(Option, ("good", "bad", "awful"))), ())
TEN = Question(Kind.SCORE, "How much?", tuple(Option(f"level {n}") for n in range(10)), ())
ASKED = {"anyjev-v1": [PLAIN_NOUL, CHOICE, SCORE, TEN], "decider-v1": [PLAIN_NOUL, NOUL, CHOICE, DESCRIBED, SCORE, TEN]}
"""Questions that a profile asks; the others ask yes or no."""


def tokenizer(profile: str) -> TextTokenizer:
    """A tokenizer that splits text as Qwen's and Llama 3's do, with the control tokens of all these models."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=700, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    texts = ["".join(build(STATES[0], PLAIN_NOUL, "").parts) for build in PUBLISHED.values()]
    made.train_from_iterator([*WORDS.split(), *texts] * 3, trainer)
    bos = BOS.get(profile)
    made.add_special_tokens([AddedToken(each) for each in (*CONTROL, *BOS.values())])
    if bos is None:
        return TextTokenizer(made, None, TokenizerFacts(chat_template=CHATML))
    id = made.token_to_id(bos)
    made.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, id)])
    return TextTokenizer(made, id, TokenizerFacts())


def decider(own: TextTokenizer, profile: str) -> Decider:
    facts = ModelFacts.of(ModelSettings(decision_profile=profile), own, FakeEngine(20_000, 8_192).info)
    assert facts.profile_problem is None
    return Decider.of(facts)


def prompts(
    own: TextTokenizer, profile: str, state: str, questions: Sequence[Question]
) -> tuple[list[list[int]], list[Judgement | Exception]]:
    prepared = finish(decider(own, profile).prepare(state, questions, 1, lambda decided: decided))
    decided: Decided = prepared.answer(FakeEngine(20_000).score(prepared.batch))
    return sequences_of(prepared.batch), list(decided.judgements)


@pytest.mark.parametrize("profile", PUBLISHED)
class TestPublished:
    def test_the_tokens_are_the_publishers(self, profile: str):
        own, asked = tokenizer(profile), ASKED.get(profile, [PLAIN_NOUL])
        for state in STATES:
            found, judged = prompts(own, profile, state, asked)
            assert len(found) == len(asked)
            for question, ids, judgement in zip(asked, found, judged, strict=True):
                wanted = PUBLISHED[profile](state, question, BOS.get(profile, ""))
                assert own.decode(ids) == "".join(wanted.parts)
                apart = [own.backend.encode(part, add_special_tokens=False).ids for part in wanted.parts]
                assert ids == [id for part in apart for id in part]
                assert isinstance(judgement, Judgement)
                assert judgement.reads == tuple((label,) for label in wanted.labels)

    def test_what_a_request_says_is_never_markup(self, profile: str):
        own = tokenizer(profile)
        evil = "".join(CONTROL) + BOS.get(profile, "") + " x"
        hostile = Question(Kind.NOUL, evil, PLAIN_NOUL.options, ())
        harmless = Question(Kind.NOUL, "x", PLAIN_NOUL.options, ())
        (ids,), _ = prompts(own, profile, evil, [hostile])
        (usual,), _ = prompts(own, profile, "x", [harmless])
        for id in own.plain.control.values():
            assert ids.count(id) == usual.count(id)
        assert own.decode(ids).count(evil.strip()) == 2


class TestRestricted:
    """Questions that a profile has no place for are refused by name, and the others answered."""

    @pytest.mark.parametrize(
        ("question", "said"),
        [
            (CHOICE, r"questions\[1\] asks for a choice; this model answers only yes or no \(.*shieldgemma-v1\)"),
            (SCORE, "asks for a score; this model answers only yes or no"),
            (NOUL, "describes its outcomes, which this model's prompt does not show; say it in the instructions"),
        ],
    )
    def test_other_questions_are_unharmed(self, question: Question, said: str):
        own = tokenizer("shieldgemma-v1")
        (ids,), (judgement, error) = prompts(own, "shieldgemma-v1", "x", [PLAIN_NOUL, question])
        assert own.decode(ids) == "".join(shieldgemma("x", PLAIN_NOUL, "<bos>").parts)
        assert isinstance(judgement, Judgement)
        assert isinstance(error, InvalidRequestError)
        assert error.where == question.where
        with pytest.raises(InvalidRequestError, match=said):
            raise error

    def test_outcomes_that_are_always_in_one_order_are_asked_once(self):
        own = tokenizer("decider-v1")
        both = Question(Kind.NOUL, None, (Option("no", "later"), Option("yes", "today")), ())
        prepared = finish(decider(own, "decider-v1").prepare("x", [both], 2, lambda decided: decided))
        (judged,) = prepared.answer(FakeEngine(20_000).score(prepared.batch)).judgements
        assert isinstance(judged, Judgement)
        assert judged.permutations == prepared.batch.num_sequences == 1

    def test_the_state_is_shared_where_it_comes_first(self):
        own = tokenizer("shieldgemma-v1")
        other = Question(Kind.NOUL, "Another", PLAIN_NOUL.options, ())
        (one, two), _ = prompts(own, "shieldgemma-v1", "lock " * 50, [PLAIN_NOUL, other])
        shared = next(at for at, (a, b) in enumerate(zip(one, two, strict=False)) if a != b)
        assert "lock " * 49 in own.decode(one[:shared])


class TestFiles:
    @pytest.mark.parametrize(
        ("fields", "said"),
        [
            ({"no": []}, "no and yes must have at least one label each"),
            ({"codes": []}, "codes must have at least one label"),
            ({"alphabet": ["A", "B"], "token_ids": [1]}, "token_ids has 1 tokens for 2 codes"),
            ({"types": []}, "types"),
            ({"temperature": {"noul": 0}}, "greater than 0"),
            ({"wording": "x"}, "wording"),
        ],
    )
    def test_a_file_that_cannot_answer_is_refused(self, fields: dict[str, object], said: str):
        with pytest.raises(ValidationError, match=said):
            Profile.model_validate(PROFILES["chat-v1"].model_dump() | fields)

    def test_a_name_stands_for_its_bytes_for_good(self):
        assert {name: _digest(profile) for name, profile in PROFILES.items()} == DIGESTS


DIGESTS = {
    "anyjev-v1": "8d80125c0de411cd",
    "chat-v1": "0d6716dfc1b7e73f",
    "decider-v1": "6cfdfe61b5e56b7a",
    "decision2-v1": "d3c10806e9c0f890",
    "kev-v1": "aa8fa9edf8b2c049",
    "laya-v1": "e3abc24faed2bc4b",
    "llama-guard-3-v1": "8b039dd2531ced79",
    "plain-v1": "0706892557511671",
    "qwen3-reranker-v1": "f34911e0ac338fe4",
    "shieldgemma-v1": "4ca67e19e43d038f",
}
"""A digest of each profile's prompts and labels. One that changes needs a new name: answers depend on every byte."""


def _digest(profile: Profile) -> str:
    """A digest of all that a profile says, with every type of question, and descriptions and instructions or not."""
    options = [ShownOption(f"c{n}", f"text {n}", f"name {n}", f"what {n}" if n % 2 else None) for n in range(27)]
    outcomes = [ShownOption(name, f"is {name}", name, f"is {name}") for name in ("no", "yes")]
    said: list[object] = [profile.chat, profile.system, profile.opening, profile.types, profile.outcomes]
    said += [profile.no, profile.yes, profile.labels(["A", "10"]), profile.levels, profile.alphabet]
    said.append(dict(profile.temperature))
    if profile.option:
        said += [profile.control, *(profile.option_text(type, each) for type in profile.types for each in options[:3])]
        said += [profile.option_text("noul", each) for each in outcomes]
    for state in ("", " a <b>\n\n"):
        said.append(profile.front(state))
        for type in profile.types:
            for shown in [outcomes, outcomes[1:], []] if type == "noul" else [options[:2], options[:10], options]:
                said += [profile.tail(type, asked, shown, state) for asked in (None, " What?\n")]
    return sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:16]
