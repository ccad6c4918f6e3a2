"""Finds the rerank template that a model was trained on, by its files first: copies and fine-tunes have any name."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from serve_app.settings import ModelSettings
from serve_app.templates import MXBAI_RERANK, PLAIN, QWEN3_RERANKER, TEMPLATES, RerankTemplate

CUSTOM = "custom"
"""Name of a template that is written out in the settings."""


@dataclass(frozen=True, slots=True)
class Choice:
    """The template of ``/v1/rerank``.

    Attributes:
        name: in ``templates.py``, or ``custom``.
        because: what it was chosen by.
        doubt: why it may be the wrong one, and the remedy.
        asked: whether the settings name it.
    """

    name: str
    template: RerankTemplate
    because: str
    doubt: str | None = None
    asked: bool = False

    def __str__(self) -> str:
        return f"/v1/rerank uses the template {self.name} ({self.because})"


UNNAMED = Choice(PLAIN, TEMPLATES[PLAIN], "nothing is known of the model")


class _Kind(NamedTuple):
    """How the models of one template are recognised.

    Attributes:
        template: its name.
        model_type: of their ``config.json``; any other model is not one of them, whatever it is called.
        named: what their own names, and those of the models that were made of them, have.
        asks: a sentence of the prompt, which their chat templates have.
    """

    template: str
    model_type: str
    named: re.Pattern[str]
    asks: str


_KINDS = (
    _Kind(
        QWEN3_RERANKER,
        "qwen3",
        re.compile(r"qwen3[-_.]?reranker", re.IGNORECASE),
        "Judge whether the Document meets the requirements based on the Query and the Instruct provided.",
    ),
    _Kind(
        MXBAI_RERANK,
        "qwen2",
        re.compile(r"mxbai[-_]rerank[-_][a-z]+[-_]v2", re.IGNORECASE),
        "You are a search relevance expert who evaluates how well documents match search queries.",
    ),
)

_ORIGINS = {
    "config.json": ("_name_or_path",),
    "tokenizer_config.json": ("name_or_path",),
    "adapter_config.json": ("base_model_name_or_path",),
}
"""Where the name of the model is kept that another was made of."""
_CHAT_TEMPLATES = (
    "chat_template.jinja",
    "chat_template.json",
    "tokenizer_config.json",
    "config_sentence_transformers.json",
)

_QWEN3_RERANKER_ROWS = 151_669
"""Vocabulary of Qwen3-Reranker in all sizes; Qwen3's chat models have 151,936 rows. A resized one may have it too."""
_RERANKER = re.compile(r"re-?rank|ranker|zerank|text-ranking", re.IGNORECASE)

_REMEDY = "set rerank_template (docs/clients.md)"


def choose(settings: ModelSettings, folder: Path | None = None) -> Choice:
    """The template that the settings name, else the model's own as far as it is known, else a plain one.

    Args:
        folder: of the model's files; None: its name alone tells.
    """
    asked = settings.rerank_template
    if isinstance(asked, RerankTemplate):
        return Choice(CUSTOM, asked, "from the settings", asked=True)
    if asked is not None:
        return Choice(asked, TEMPLATES[asked], "named in the settings", asked=True)
    facts = _Facts(settings.model, folder)
    for kind in _KINDS:
        if facts.model_type in (kind.model_type, None) and (because := _recognised(kind, facts)):
            return Choice(kind.template, TEMPLATES[kind.template], because)
    if facts.model_type == "qwen3" and facts.config.get("vocab_size") == _QWEN3_RERANKER_ROWS:
        because = f"config.json has Qwen3-Reranker's vocabulary of {_QWEN3_RERANKER_ROWS} tokens"
        doubt = (
            f"taken for a Qwen3-Reranker, since {because}; some other models made of Qwen3 have it too: if this is "
            f"one of them, {_REMEDY}"
        )
        return Choice(QWEN3_RERANKER, TEMPLATES[QWEN3_RERANKER], because, doubt)
    return Choice(PLAIN, TEMPLATES[PLAIN], "nothing in the model's files or name tells another", facts.doubt())


def _recognised(kind: _Kind, facts: _Facts) -> str | None:
    """What tells that a model is of this kind."""
    if kind.template == QWEN3_RERANKER:
        if facts.config.get("is_original_qwen3_reranker") is True:
            return "config.json says is_original_qwen3_reranker"
        if facts.config.get("classifier_from_token") == ["no", "yes"]:
            return "config.json says classifier_from_token: no, yes"
    for file, text in facts.prompts():
        if kind.asks in text:
            return f"its question is in {file}"
    for where, name in facts.names():
        if found := kind.named.search(name):
            return f"{where} says {found[0]}"
    return None


class _Facts:
    """What a model's files and name say of it."""

    def __init__(self, model: str, folder: Path | None) -> None:
        self._model, self._folder = model, folder
        self.config = self._object("config.json")

    @property
    def model_type(self) -> str | None:
        return self.config.get("model_type")

    def names(self) -> Iterator[tuple[str, str]]:
        """Names of this model and of those that it was made of, and where each stands."""
        for file, keys in _ORIGINS.items():
            content = self._object(file)
            for key in keys:
                if isinstance(name := content.get(key), str):
                    yield file, name
        yield "README.md", self._card()
        yield "mergekit_config.yml", self._text("mergekit_config.yml")
        yield "its name", self._model

    def prompts(self) -> Iterator[tuple[str, str]]:
        """Files with the chat template or prompts of the model, and their text."""
        for file in _CHAT_TEMPLATES:
            yield file, self._text(file)

    def doubt(self) -> str | None:
        """Why a plain template may be wrong for this model."""
        rerankers = [where for where, name in self.names() if _RERANKER.search(name)]
        if "LogitScore" in self._text("modules.json"):
            rerankers.append("modules.json")
        if rerankers:
            return (
                f"{rerankers[0]} says that this is a reranker, but its prompt is not known: /v1/rerank uses {PLAIN}, "
                f"which it was not trained on; {_REMEDY}"
            )
        architectures: list[Any] = self.config.get("architectures") or []
        # A config that tells no number of classes has two.
        classes = len(self.config.get("id2label") or "01")
        if any(str(each).endswith("ForSequenceClassification") for each in architectures) and classes <= 2:
            return (
                "this model has a classification head, and nothing tells the prompt that it was trained on: /v1/rerank "
                f"uses {PLAIN}; to rerank with it, {_REMEDY}"
            )
        return None

    def _card(self) -> str:
        """The head of the model's card and its title. The rest may tell of other models as well."""
        text = self._text("README.md")
        head = re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)
        title = re.search(r"^# .*", text[head.end() if head else 0 :], re.MULTILINE)
        return "\n".join(found[0] for found in (head, title) if found)

    def _text(self, name: str) -> str:
        path = self._folder / name if self._folder else None
        return path.read_text(encoding="utf-8", errors="replace") if path and path.is_file() else ""

    def _object(self, name: str) -> dict[str, Any]:
        try:
            found = json.loads(self._text(name) or "{}")
        except ValueError:  # who needs the file says so
            return {}
        return found if isinstance(found, dict) else {}
