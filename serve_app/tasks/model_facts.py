"""What a front end knows of one model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from serve_app.contract import ModelInfo
from serve_app.settings import Limits, ModelSettings
from serve_app.tasks.template_choice import UNNAMED, Choice, choose
from serve_app.tasks.tokenizer import Joined, TextTokenizer
from serve_app.tasks.validation import check_characters, check_work

TEXT_CHARACTERS = 2**19
"""Characters of one text that may be tokenised whatever the context: 0.3 s of one thread (a byte-level BPE)."""
CHARACTERS_PER_TOKEN = 64
"""More than a text has, on average, in any language."""


MOST_CLASSES = 2
"""Most classes of a model that can rerank: with more, no single class means relevance."""


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """All that a request becomes prompts by.

    Attributes:
        name: in answers.
        info: what the engine says of it.
        limits: of a request.
        rerank: the template of ``/v1/rerank``.
    """

    name: str
    tokenizer: TextTokenizer
    info: ModelInfo
    limits: Limits
    rerank: Choice = UNNAMED

    @classmethod
    def of(
        cls, settings: ModelSettings, tokenizer: TextTokenizer, info: ModelInfo, folder: Path | None = None
    ) -> ModelFacts:
        """Gather what is known of a served model.

        Args:
            folder: the model's files, which tell the template; None: its name alone does.
        """
        return cls(settings.name, tokenizer, info, settings.limits, choose(settings, folder))

    @property
    def can_rerank(self) -> bool:
        """Whether an answer of the model can mean relevance."""
        return self.info.classes <= MOST_CLASSES

    @property
    def max_prompt_tokens(self) -> int:
        """The longest prompt that the model reads and a request may have."""
        most = self.info.max_prompt_tokens
        return min(most, self.limits.max_prompt_tokens or most)

    @property
    def max_text_characters(self) -> int:
        """The longest text, with all that is tokenised with it: a longer real text has more tokens than the
        model reads."""
        return max(TEXT_CHARACTERS, CHARACTERS_PER_TOKEN * self.max_prompt_tokens)

    @property
    def max_request_characters(self) -> int:
        """Most characters that may be tokenised for one request."""
        return CHARACTERS_PER_TOKEN * self.limits.max_request_tokens

    def encoded(self, texts: Sequence[str], param: str, *, add_special_tokens: bool = True) -> Iterator[list[int]]:
        """The tokens of each text, made as they are wanted.

        Args:
            param: the field that they came in.

        Raises:
            InvalidRequestError: before anything is made: a text is too long.
            TooLargeError: likewise: they are too much together.
        """
        for index, text in enumerate(texts):
            check_characters(len(text), self.max_text_characters, param, index)
        check_work(sum(map(len, texts)), self.max_request_characters, param)
        return Joined(self.tokenizer, "", add_special_tokens=add_special_tokens, many=False).each(texts)
