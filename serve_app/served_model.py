"""What a front end knows of one model."""

from __future__ import annotations

from dataclasses import dataclass

from serve_app.contract import ModelInfo
from serve_app.settings import Limits
from serve_app.tokenizer import TextTokenizer


@dataclass(frozen=True, slots=True)
class ServedModel:
    """All that a request becomes prompts by.

    Attributes:
        name: in answers.
        info: what the engine says of it.
        limits: of a request.
    """

    name: str
    tokenizer: TextTokenizer
    info: ModelInfo
    limits: Limits

    @property
    def vocab_size(self) -> int:
        """Ids below it are the model's."""
        return self.info.vocab_size

    @property
    def classes(self) -> int:
        """Of a model with a classification head, which are then the labels; or 0."""
        return self.info.classes

    @property
    def pad_token_id(self) -> int | None:
        """See ``ModelInfo``."""
        return self.info.pad_token_id

    @property
    def max_prompt_tokens(self) -> int:
        """That the model reads, and a request may use."""
        most = self.info.max_prompt_tokens
        return min(most, self.limits.max_prompt_tokens or most)
