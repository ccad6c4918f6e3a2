"""Facts about one model that a front end knows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from serve_app.contract import ModelInfo
from serve_app.errors import InvalidRequestError
from serve_app.profiles.calibration import Calibration
from serve_app.profiles.profile import PLAIN, PROFILES, Profile
from serve_app.schemas import Message
from serve_app.settings import REWARD_QUESTION, Limits, ModelSettings
from serve_app.tasks.chat import ChatTemplate
from serve_app.tasks.checkpoint_files import CheckpointFiles
from serve_app.tasks.profile_choice import choose_profile
from serve_app.tasks.template_choice import UNNAMED, Choice, choose
from serve_app.tasks.tokenizer import Joined, TextTokenizer
from serve_app.tasks.validation import check_characters, check_work

TEXT_CHARACTERS = 2**19
"""Characters that one text may always have, whatever the model's context: 0.3 s of one thread (a byte-level BPE)."""
CHARACTERS_PER_TOKEN = 64
"""Characters per token, more than the average of a text in any language."""
LABEL_CHARACTERS = 2**27
"""Characters that a request's labels may have together with the ends of their prompts: a minute of one thread."""

MOST_CLASSES = 2
"""The most classes of a model that can rerank: with more, no single class means relevance."""


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """Facts about a model that are needed to make prompts of a request.

    Attributes:
        name: the model's name in answers.
        info: what the engine says of the model.
        limits: the limits of a request.
        rerank: the template of ``/v1/rerank``.
        profile: how the decision routes ask.
        profile_problem: why the model cannot answer so; None if it can.
        calibration: how the answers' probabilities are calibrated; None: they are not.
        chat: the model's chat template; None if its files have none.
        reward_question: what a causal model is asked on the reward routes.
        config: what its ``config.json`` says, with the activation that ``config_sentence_transformers.json`` names;
            empty if that is not known.
    """

    name: str
    tokenizer: TextTokenizer
    info: ModelInfo
    limits: Limits
    rerank: Choice = UNNAMED
    profile: Profile = PROFILES[PLAIN]
    chat: ChatTemplate | None = None
    profile_problem: str | None = None
    reward_question: str = REWARD_QUESTION
    calibration: Calibration | None = None
    config: Mapping[str, Any] = field(default_factory=dict[str, Any])

    @classmethod
    def of(
        cls, settings: ModelSettings, tokenizer: TextTokenizer, info: ModelInfo, folder: Path | None = None
    ) -> ModelFacts:
        """Gather the facts about a served model.

        Args:
            folder: the folder with the model's files, by which template and profile are chosen. None: its name decides.

        Raises:
            ValueError: see ``choose_profile``; or the settings' calibration is for another profile.
        """
        chat = ChatTemplate.load(tokenizer)
        asked = choose_profile(settings, tokenizer, chat, folder)
        template, files = choose(settings, folder), CheckpointFiles(settings.model, folder)
        named = files.object("config_sentence_transformers.json").get("activation_fn")
        return cls(
            settings.name,
            tokenizer,
            info,
            settings.limits,
            template,
            asked.profile,
            chat,
            asked.problem or _head_problem(info, asked.profile),
            settings.reward_question,
            _calibration(settings, asked.profile),
            files.config | ({"sentence_transformers": {"activation_fn": named}} if named else {}),
        )

    @property
    def can_decide(self) -> bool:
        """Whether the model can answer the decision routes' questions."""
        return not self.info.classes and self.profile_problem is None

    @property
    def can_rerank(self) -> bool:
        """Whether the model can rerank."""
        return self.info.classes <= MOST_CLASSES and not self.info.decision_head

    @property
    def max_prompt_tokens(self) -> int:
        """The most tokens of a prompt that both the model and the limits allow."""
        most = self.info.max_prompt_tokens
        return min(most, self.limits.max_prompt_tokens or most)

    @property
    def most_tokens(self) -> str:
        """``max_prompt_tokens`` in words, for an error about a longer prompt: with the reason, if it is not the model's
        context."""
        most, context = self.max_prompt_tokens, self.info.context_length
        if most >= context:
            return str(most)
        if self.limits.max_prompt_tokens is not None:
            return f"{most} (limits.max_prompt_tokens)"
        return f"{most} of its {context} (what its memory holds; limits.max_prompt_tokens asks for more)"

    @property
    def max_text_characters(self) -> int:
        """The most characters of a text and all that is tokenised with it. A longer text, in any language, has more
        tokens than the model reads."""
        return max(TEXT_CHARACTERS, CHARACTERS_PER_TOKEN * self.max_prompt_tokens)

    @property
    def max_request_characters(self) -> int:
        """The most characters that may be tokenised for one request."""
        return CHARACTERS_PER_TOKEN * self.limits.max_request_tokens

    def prompt_of(self, messages: Sequence[Message], *, answer: bool = True) -> str:
        """The prompt of a conversation, see ``ChatTemplate.render``.

        Raises:
            InvalidRequestError: the model has no chat template, or it cannot show these messages.
        """
        if self.chat is None:
            raise InvalidRequestError(
                "this model's files have no chat template, so it takes no messages; send the whole prompt as text",
                param="messages",
            )
        if not messages:
            raise InvalidRequestError("messages is empty; send at least one message", param="messages")
        check_characters(sum(len(message.text) for message in messages), self.max_text_characters, "messages")
        return self.chat.render(
            [{"role": message.role, "content": message.text} for message in messages], answer=answer
        )

    def encoded(self, texts: Sequence[str], param: str, *, add_special_tokens: bool = True) -> Iterator[list[int]]:
        """Tokenise the texts, each when it is asked for. Lengths are checked before the first one.

        Args:
            param: the field of the texts.

        Raises:
            InvalidRequestError: a text is too long.
            TooLargeError: all texts together are too long.
        """
        for index, text in enumerate(texts):
            check_characters(len(text), self.max_text_characters, param, index)
        check_work(sum(map(len, texts)), self.max_request_characters, param)
        return Joined(self.tokenizer, "", add_special_tokens=add_special_tokens, many=False).each(texts)


def _head_problem(info: ModelInfo, profile: Profile) -> str | None:
    """Why a profile is not for a model with a decision head, or only for one; None if it fits."""
    if info.decision_head and not profile.option:
        return (
            f"this model reads its answers with a {info.decision_head} head in place of an output head, and the "
            f"profile {profile.name} asks for labels; leave decision_profile out"
        )
    if profile.option and not info.decision_head:
        return (
            f"the profile {profile.name} is for models with a decision head, and this one has an output head; leave "
            "decision_profile out"
        )
    return None


def _calibration(settings: ModelSettings, profile: Profile) -> Calibration | None:
    own = settings.calibration
    if own is not None and own.profile != profile.name:
        raise ValueError(
            f"calibration: {own.name} was fitted to answers with decision_profile {own.profile}, and this model has "
            f"{profile.name}, whose prompts have other probabilities; set that profile, or fit a new calibration"
        )
    return own
