"""Probabilities of decisions against transformers' float32 softmax at the same position of the same tokens."""

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from model import loading
from serve_app.settings import ModelSettings
from serve_app.tasks.decisions.decider import Decider
from serve_app.tasks.decisions.questions import Decided, Judgement, Kind, Option, Question
from serve_app.tasks.model_facts import ModelFacts
from serve_app.tasks.steps import finish
from serve_app.tasks.tokenizer import TextTokenizer
from tests.parity.cases import HAVE_TORCH
from tests.published_prompts import PUBLISHED
from tests.tiny_families import make_family

pytestmark = [pytest.mark.heavy, pytest.mark.skipif(not HAVE_TORCH, reason="torch is not installed")]

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
STATE = "The parcel never came. Nobody answers! I want my money back."
QUESTIONS = (
    Question(Kind.NOUL, "Is the customer angry?", (Option("no"), Option("yes")), ()),
    Question(Kind.NOUL, None, (Option("no", "all is well"), Option("yes", "there is a fault")), ()),
    Question(Kind.CHOICE, "Which team?", (Option("Billing", "money"), Option("Shipping"), Option("Returns")), ()),
    Question(Kind.SCORE, "How urgent?", tuple(map(Option, ("not", "a bit", "very"))), ()),
    Question(Kind.CHOICE, "Which queue?", tuple(Option(f"q{n}") for n in range(30)), ()),
)
TEXTS = (
    ("Question: Is the customer angry?", {}, "yes or no"),
    ("", {"no": "all is well", "yes": "there is a fault"}, "yes or no"),
    ("Question: Which team?", {"A": "Billing - money", "B": "Shipping", "C": "Returns"}, "the letter of one option"),
    ("Question: How urgent?", {"0": "not", "1": "a bit", "2": "very"}, "the number of one level"),
    (
        "Question: Which queue?",
        {f"A{chr(65 + n)}" if n < 26 else f"B{chr(65 + n - 26)}": f"q{n}" for n in range(30)},
        "the code of one option",
    ),
)
"""What each question's prompt says: its first line, its options by code, and how the answer is asked for."""
ASKED = {"anyjev-v1": [0, 3], "decider-v1": [0, 1, 2, 3]}
"""The questions that a published prompt has a place for; the others ask yes or no."""
WORDS = {"chat-v1": ("", " "), "plain-v1": (" ",)}
"""What may be before a label."""


@pytest.fixture(scope="module", params=["llama", "qwen3"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_judge(tmp_path_factory.mktemp("decides") / "judge", request.param)


def make_judge(folder: Path, family: str, template: str = CHATML) -> Path:
    """A tiny model with a chat template. Some answers are one token of its tokenizer, others are several."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=290,
        special_tokens=["<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([" yes Yes no AC AD AF BA"] * 50, trainer)
    made = make_family(folder, family)
    tokenizer.save(str(made / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": template}
    (made / "tokenizer_config.json").write_text(json.dumps(config))
    # Published prompts are long in so small a vocabulary.
    config = json.loads((made / "config.json").read_text()) | {"max_position_embeddings": 1_024}
    (made / "config.json").write_text(json.dumps(config))
    return made


@pytest.fixture(scope="module")
def scorer(folder: Path) -> Any:
    return loading.load(folder, max_segment_tokens=32, call_tokens=64, chunks=(64,), prefix_cache_bytes=2**21)


def decide(
    folder: Path, scorer: Any, profile: str, permutations: int = 1, questions: Sequence[Question] = QUESTIONS
) -> Decided:
    tokenizer = TextTokenizer.load(folder)
    facts = ModelFacts.of(ModelSettings(decision_profile=profile), tokenizer, scorer.info, folder)
    prepared = finish(Decider.of(facts).prepare(STATE, questions, permutations, lambda decided: decided))
    return prepared.answer(scorer.score(prepared.batch))


class Reference:
    """transformers' model and tokenizer."""

    def __init__(self, folder: Path, profile: str) -> None:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self._torch, self._profile = torch, profile
        load: Callable[..., Any] = AutoModelForCausalLM.from_pretrained
        self._model = load(folder, dtype=torch.float32, attn_implementation="eager").eval()
        self._known: dict[tuple[int, ...], Any] = {}
        self._tokenizer: Any = AutoTokenizer.from_pretrained(folder)

    def prompt(self, number: int, turn: int) -> str:
        """The prompt of a question with its options turned by so many places."""
        first, shown, asked = TEXTS[number]
        kind, codes = QUESTIONS[number].kind, [*shown]
        order = codes[turn:] + codes[:turn]
        lines = [first] if first else []
        for place, code in enumerate(order):
            lines.append(f"{codes[place] if kind is Kind.CHOICE else code}: {shown[code]}")
        if self._profile == "plain-v1":
            return "\n".join([STATE, "", *lines, f"Answer ({asked}):"])
        ask = asked if kind is Kind.NOUL else f"with {asked}"
        content = "\n".join([STATE, "", *lines, f"Answer {ask} only."])
        messages = [{"role": "user", "content": content}]
        return self.conversation(messages)

    def conversation(self, messages: Sequence[dict[str, str]]) -> str:
        """The prompt of a conversation, without thinking."""
        how: dict[str, Any] = {"add_generation_prompt": True, "tokenize": False, "enable_thinking": False}
        return self._tokenizer.apply_chat_template(messages, **how)

    def probabilities(self, number: int, turn: int) -> tuple[list[float], float]:
        """The probability of each option, in the request's order, normalised; and before that, of all together."""
        question, codes = QUESTIONS[number], [*TEXTS[number][1]]
        if question.kind is Kind.NOUL:
            words = [["no", "No", "NO"], ["yes", "Yes", "YES"]]
        else:
            count = len(codes)
            own = [codes[(place - turn) % count if question.kind is Kind.CHOICE else place] for place in range(count)]
            words = [[code] for code in own]
        text = self.prompt(number, turn)
        ids = self._ids(text)
        firsts = [self._added(text, ids, WORDS[self._profile][0] + each[0]) for each in words]
        taken = {tokens[0] for tokens in firsts}
        labels = [[tokens] for tokens in firsts]
        for place, each in enumerate(words):
            for word in [before + word for before in WORDS[self._profile] for word in each]:
                if len(tokens := self._added(text, ids, word)) == 1 and tokens[0] not in taken:
                    taken.add(tokens[0])
                    labels[place].append(tokens)
        sums = [math.fsum(self._probability(ids, tokens) for tokens in own) for own in labels]
        return [each / math.fsum(sums) for each in sums], math.fsum(sums)

    def of_labels(self, text: str, labels: Sequence[str]) -> tuple[list[float], float]:
        """The probability of each label after a prompt, normalised; and before that, of all together."""
        ids = self._ids(text)
        found = [self._probability(ids, self._added(text, ids, label)) for label in labels]
        return [each / math.fsum(found) for each in found], math.fsum(found)

    def _ids(self, text: str) -> list[int]:
        return self._tokenizer(text, add_special_tokens=self._profile == "plain-v1").input_ids

    def _added(self, text: str, ids: Sequence[int], word: str) -> list[int]:
        whole = self._ids(text + word)
        assert whole[: len(ids)] == ids
        return whole[len(ids) :]

    def _probability(self, ids: list[int], tokens: list[int]) -> float:
        return math.exp(sum(float(self._logprobs((*ids, *tokens[:at]))[each]) for at, each in enumerate(tokens)))

    def _logprobs(self, ids: tuple[int, ...]) -> Any:
        """Log-probabilities of the token after these."""
        if ids not in self._known:
            with self._torch.no_grad():
                logits = self._model(self._torch.tensor([ids])).logits[0, -1].double()
            self._known[ids] = self._torch.log_softmax(logits, dim=-1)
        return self._known[ids]


@pytest.mark.parametrize("profile", ["chat-v1", "plain-v1"])
@pytest.mark.parametrize("permutations", [1, 2])
def test_probabilities_are_transformers(folder: Path, scorer: Any, profile: str, permutations: int):
    decided, reference = decide(folder, scorer, profile, permutations), Reference(folder, profile)
    for number, (question, judgement) in enumerate(zip(QUESTIONS, decided.judgements, strict=True)):
        assert isinstance(judgement, Judgement)
        count = len(question.options)
        turns = [turn * count // permutations for turn in range(permutations)]
        wanted = [reference.probabilities(number, turn) for turn in turns]
        logs = np.mean([np.log(own) for own, _ in wanted], axis=0)
        expected = np.exp(logs) / np.exp(logs).sum()
        np.testing.assert_allclose(judgement.probabilities, expected, rtol=0, atol=1e-5)
        np.testing.assert_allclose(judgement.label_mass, np.mean([mass for _, mass in wanted]), rtol=1e-4)
        unshown = question.kind is Kind.NOUL and question.options[0].description is None
        assert judgement.permutations == (1 if unshown else permutations)
        assert np.ptp(judgement.probabilities) > 1e-3


@pytest.mark.parametrize("profile", PUBLISHED)
def test_published_prompts_have_transformers_probabilities(folder: Path, scorer: Any, profile: str):
    questions = [QUESTIONS[number] for number in ASKED.get(profile, [0])]
    decided, reference = decide(folder, scorer, profile, questions=questions), Reference(folder, profile)
    for question, judgement in zip(questions, decided.judgements, strict=True):
        assert isinstance(judgement, Judgement)
        asked = PUBLISHED[profile](STATE, question, "")
        expected, mass = reference.of_labels("".join(asked.parts), asked.labels)
        np.testing.assert_allclose(judgement.probabilities, expected, rtol=0, atol=1e-5)
        np.testing.assert_allclose(judgement.label_mass, mass, rtol=1e-4)
        assert np.ptp(judgement.probabilities) > 1e-3
