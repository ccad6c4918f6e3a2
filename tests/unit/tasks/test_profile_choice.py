"""The profile that a model gets by what its files declare, and the models that the decision routes refuse."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from serve_app.errors import InvalidRequestError
from serve_app.frontend.info import info as told
from serve_app.frontend.service import ModelService
from serve_app.scorer.fake_engine import FakeEngine
from serve_app.settings import ModelSettings
from serve_app.tasks.chat import ChatTemplate
from serve_app.tasks.decisions.decider import Decider
from serve_app.tasks.decisions.questions import Judgement, Kind, Option, Question
from serve_app.tasks.model_facts import ModelFacts
from serve_app.tasks.profile_choice import ProfileChoice, choose_profile
from serve_app.tasks.steps import finish
from serve_app.tasks.tokenizer import TextTokenizer
from serve_app.tasks.tokenizer_files import TokenizerFacts
from tests.batches import sequences_of
from tests.local import DirectReplicas

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
QWEN3: dict[str, Any] = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"}
GEMMA2: dict[str, Any] = {"model_type": "gemma2"}
LLAMA: dict[str, Any] = {"model_type": "llama"}
GUARD = "ONLY THE LAST {{ role }} message ...: <BEGIN UNSAFE CONTENT CATEGORIES> ... of violated categories."
REFUSED = "name a profile in decision_profile"
NOUL = Question(Kind.NOUL, "Refund?", (Option("no"), Option("yes")), ())


@pytest.fixture(scope="module")
def own() -> TextTokenizer:
    """A byte-level BPE for which each letter, digit and answer is one token."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        min_frequency=10,
        special_tokens=["<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(["yes no safe unsafe Yes No"] * 10, trainer)
    return TextTokenizer(made, None, TokenizerFacts(chat_template=CHATML))


def files(folder: Path, config: dict[str, Any], contents: dict[str, object]) -> Path:
    for name, content in {"config.json": config, **contents}.items():
        (folder / name).write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return folder


def chosen(
    own: TextTokenizer, folder: Path, config: dict[str, Any], contents: dict[str, object], **settings: Any
) -> ProfileChoice:
    asked = ModelSettings.model_validate({"model": "/models/mine", **settings})
    return choose_profile(asked, own, ChatTemplate.load(own), files(folder, config, contents))


DECLARED: dict[str, tuple[dict[str, Any], dict[str, object], str, str]] = {
    "codes": (QWEN3, {"decision_config.json": {"codes": ["A", "B"]}}, "decider-v1", "decision_config.json says"),
    "ShieldGemma by its prompt": (
        GEMMA2,
        {"tokenizer_config.json": {"chat_template": "x\n\nOur safety principle is defined in the below:\n\n* "}},
        "shieldgemma-v1",
        "its prompt is in tokenizer_config.json",
    ),
    "ShieldGemma by its card": (
        GEMMA2,
        {"README.md": "---\nbase_model: google/shieldgemma-2b\n---\n"},
        "shieldgemma-v1",
        "README.md says shieldgemma",
    ),
    "Llama Guard 3 8B": (
        LLAMA,
        {"chat_template.jinja": GUARD + "<|eot_id|>"},
        "llama-guard-3-v1",
        "its prompt is in chat_template.jinja",
    ),
    "Qwen3-Reranker": (
        QWEN3,
        {"config_sentence_transformers.json": {}, "config.json": {**QWEN3, "is_original_qwen3_reranker": True}},
        "qwen3-reranker-v1",
        "is_original_qwen3_reranker",
    ),
    "a causal decision_config.json": (
        QWEN3,
        {"decision_config.json": {"codes": ["A", "B"], "attention_mode": "causal"}},
        "decider-v1",
        '"codes"',
    ),
    "nothing": (QWEN3, {}, "chat-v1", "the model has a chat template"),
    "Decision 2.0": (
        QWEN3,
        {"decision_config.json": {"prompt_version": "decision2-segmented-options-global-query-v1"}},
        "decision2-v1",
        "decision_config.json says",
    ),
    "ShieldGemma's name on another family": (LLAMA, {"README.md": "# like ShieldGemma"}, "chat-v1", "a chat template"),
}

UNREADABLE: dict[str, tuple[dict[str, Any], dict[str, object], str]] = {
    "d3, Jeff": (QWEN3, {"readout.safetensors": "x", "decision_config.json": {"codes": ["A"]}}, "rows of its own"),
    "pplx-decider": (
        QWEN3,
        {"decision_config.json": {"attention_mode": "noncausal_full_attention", "codes": ["A"]}},
        '"attention_mode": "noncausal_full_attention": this model attends to the tokens that follow',
    ),
    "any2jev": (QWEN3, {"head.safetensors": "x"}, "it has head.safetensors: this model reads its answers with a head"),
    "Drex": (
        QWEN3,
        {"head.pt": "x", "training_config.json": {}},
        "it has head.pt: this model reads its answers with a",
    ),
    "Clef": (QWEN3, {"joint_head_config.json": {}}, "a head of its own"),
    "a causal model with Laya's file": (QWEN3, {"rl_agent_config.json": {}}, "a head of its own"),
    "Liquid D1": ({**QWEN3, "auto_map": {"AutoModel": "modeling_d1.D1Model"}}, {}, "code of its own"),
    "Bosun": (
        {**QWEN3, "auto_map": {"AutoModelForCausalLM": "Hanno-Labs/bosun--modeling_bosun.BosunForDecision"}},
        {},
        "code of its own",
    ),
    "lev": (QWEN3, {"lev_release.json": {}}, "a prompt of its own"),
    "Nimble": (QWEN3, {"schema_config.json": {"task": "schema_candidate_classification_v2"}}, "a prompt of its own"),
    "Mapika's decider": (QWEN3, {"decider_config.json": {"layout": "plain"}}, "a prompt of its own"),
    "Winnow": ({**QWEN3, "decision_read_strategy": "winnow"}, {}, "a prompt of its own"),
    "Llama Guard 3 1B": (LLAMA, {"chat_template.jinja": GUARD + " <|eot_id|>"}, "send that prompt to /v1/score"),
    "Qwen3Guard": (
        QWEN3,
        {"README.md": "# Qwen3Guard-Gen-0.6B"},
        "README.md says Qwen3Guard: this model was trained on",
    ),
    "mxbai-rerank-v2": (
        {"model_type": "qwen2", "_name_or_path": "mixedbread-ai/mxbai-rerank-base-v2"},
        {},
        "use it with /v1/rerank",
    ),
}


class TestDeclared:
    @pytest.mark.parametrize("kind", DECLARED)
    def test_by_what_is_in_the_folder(self, kind: str, own: TextTokenizer, tmp_path: Path):
        config, contents, profile, because = DECLARED[kind]
        choice = chosen(own, tmp_path, config, contents)
        assert (choice.profile.name, choice.problem) == (profile, None)
        assert because in choice.because
        assert str(choice) == f"decisions use the profile {profile} ({choice.because})"

    @pytest.mark.parametrize(
        ("model", "profile"),
        [
            ("google/shieldgemma-9b", "shieldgemma-v1"),
            ("meta-llama/Llama-Guard-3-8B", "llama-guard-3-v1"),
            ("Qwen/Qwen3-Reranker-0.6B", "qwen3-reranker-v1"),
            ("Qwen/Qwen3-0.6B", "chat-v1"),
        ],
    )
    def test_by_name(self, model: str, profile: str, own: TextTokenizer):
        choice = choose_profile(ModelSettings(model=model), own, ChatTemplate.load(own))
        assert (choice.profile.name, choice.problem) == (profile, None)

    @pytest.mark.parametrize("kind", [*DECLARED, *UNREADABLE])
    def test_the_settings_come_first(self, kind: str, own: TextTokenizer, tmp_path: Path):
        config, contents, *_ = {**DECLARED, **UNREADABLE}[kind]
        choice = chosen(own, tmp_path, config, contents, decision_profile="anyjev-v1")
        assert choice[:] == (choice.profile, "named in the settings", None)
        assert choice.profile.name == "anyjev-v1"

    def test_codes_and_temperature_are_the_checkpoints(self, own: TextTokenizer, tmp_path: Path):
        codes = ["D", "C", "B", "A"]
        ids = [own.backend.token_to_id(code) for code in codes]
        contents: dict[str, object] = {
            "decision_config.json": {"format_version": 1, "codes": codes, "token_ids": ids, "temperature": 1.25}
        }
        info = FakeEngine(20_000).info
        facts = ModelFacts.of(ModelSettings(), own, info, files(tmp_path, QWEN3, contents))
        assert dict(facts.profile.temperature) == {"noul": 1.25, "choice": 1.25, "score": 1.25}
        three = Question(Kind.CHOICE, "Which?", tuple(map(Option, "xyz")), ())
        five = replace(three, options=tuple(map(Option, "vwxyz")), where=("questions", "five"))
        prepared = finish(Decider.of(facts).prepare("s", [NOUL, three, five], 1, lambda decided: decided))
        noul, choice = map(own.decode, sequences_of(prepared.batch))
        assert "Options:\nD: No / false\nC: Yes / true\n\n" in noul
        assert "Options:\nD: x\nC: y\nB: z\n\n" in choice
        *judged, error = prepared.answer(FakeEngine(20_000).score(prepared.batch)).judgements
        assert [each.reads for each in judged if isinstance(each, Judgement)] == [
            (("D",), ("C",)),
            (("D",), ("C",), ("B",)),
        ]
        assert isinstance(error, InvalidRequestError)
        assert "questions[2] has 5 options; this model has codes for at most 4" in error.message


class TestRefused:
    @pytest.mark.parametrize("kind", UNREADABLE)
    def test_by_name_with_the_reason(self, kind: str, own: TextTokenizer, tmp_path: Path):
        config, contents, said = UNREADABLE[kind]
        choice = chosen(own, tmp_path, config, contents)
        assert choice.problem is not None
        assert said in choice.problem
        assert REFUSED in choice.problem
        assert str(choice) == f"decisions are refused ({choice.because})"
        facts = ModelFacts.of(ModelSettings(model="/models/mine"), own, FakeEngine(20_000).info, tmp_path)
        with pytest.raises(InvalidRequestError) as refused:
            finish(Decider.of(facts).prepare("s", [NOUL], 1, lambda decided: decided))
        assert (refused.value.message, refused.value.param) == (choice.problem, "model")

    def test_info_tells_of_no_profile(self, own: TextTokenizer, tmp_path: Path):
        engine = FakeEngine(1_024, 512)
        settings = ModelSettings.model_validate({"model": "mine", "engine": "fake"})
        files(tmp_path, QWEN3, {})
        service = ModelService(settings, own, engine.info, DirectReplicas(engine), folder=tmp_path)
        assert told(service, ["mine"]).decision_profile == "chat-v1"
        files(tmp_path, QWEN3, {"head.pt": "x"})
        service = ModelService(settings, own, engine.info, DirectReplicas(engine), folder=tmp_path)
        assert told(service, ["mine"]).decision_profile is None

    @pytest.mark.parametrize(
        ("content", "said"),
        [
            ({"codes": ["A", "B"], "temperature": 0}, "temperature.noul Input should be greater than 0"),
            ({"codes": "A"}, "alphabet Input should be a valid tuple"),
            ({"codes": ["A", "B"], "token_ids": [65]}, "token_ids has 1 tokens for 2 codes"),
            ({"codes": ["A", "B"], "token_ids": [0, 1]}, 'the code "A" is not this model\'s token 0, as its files say'),
            ({"codes": ["A", "A"]}, 'the labels "A" and "A" are not distinct'),
            ({"codes": ["A", "AB"]}, 'the labels "A" and "AB" are not distinct'),
            ({"codes": ["A", ""]}, 'no tokens for the label ""'),
        ],
    )
    def test_a_declaration_that_does_not_fit(
        self, content: dict[str, object], said: str, own: TextTokenizer, tmp_path: Path
    ):
        choice = chosen(own, tmp_path, QWEN3, {"decision_config.json": content})
        assert choice.problem is not None
        assert said in choice.problem

    def test_a_profile_with_a_system_text_needs_a_template_that_shows_it(self, tmp_path: Path, own: TextTokenizer):
        without = CHATML.replace("{% for m in messages %}", "{% for m in messages if m.role != 'system' %}")
        other = TextTokenizer(own.backend, None, TokenizerFacts(chat_template=without))
        assert chosen(other, tmp_path, QWEN3, {}).problem is None
        choice = chosen(other, tmp_path, QWEN3, {}, decision_profile="anyjev-v1")
        assert choice.problem == "this model's chat template shows no system text, and the profile anyjev-v1 has one"

    def test_a_declared_chat_model_needs_a_template(self, tmp_path: Path, own: TextTokenizer):
        without = TextTokenizer(own.backend, None, TokenizerFacts())
        choice = chosen(without, tmp_path, QWEN3, {"decision_config.json": {"codes": ["A", "B"]}})
        assert choice.problem is not None
        assert "no chat template" in choice.problem
