"""Choice of the rerank template that a model was trained on: by its files first, since copies may have any name."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from serve_app.settings import ModelSettings
from serve_app.tasks.checkpoint_files import CheckpointFiles
from serve_app.templates import MXBAI_RERANK, PLAIN, QWEN3_RERANKER, TEMPLATES, RerankTemplate

CUSTOM = "custom"
"""The name of a template that is written out in the settings."""


@dataclass(frozen=True, slots=True)
class Choice:
    """The template of ``/v1/rerank``.

    Attributes:
        name: the template's name in ``templates.py``, or ``custom``.
        because: why it was chosen.
        doubt: why it may be the wrong one, and the remedy. None: there is no such doubt.
        asked: whether it comes from the settings.
    """

    name: str
    template: RerankTemplate
    because: str
    doubt: str | None = None
    asked: bool = False

    def __str__(self) -> str:
        return f"/v1/rerank uses the template {self.name} ({self.because})"


PAIR = "pair"
"""The name of an encoder's template: its tokenizer's own of two texts."""
ENCODER_TYPES = frozenset({"bert", "xlm-roberta", "modernbert"})
"""``model_type`` of the encoders."""

UNNAMED = Choice(PLAIN, TEMPLATES[PLAIN], "nothing is known about the model")


class _Kind(NamedTuple):
    """A kind of model with its own template, and how it is recognised.

    Attributes:
        template: the template's name.
        model_type: ``model_type`` in its ``config.json``; a model with another type is not of this kind, whatever its
            name.
        named: a pattern in the names of these models and of models derived from them.
        asks: a sentence of the prompt, as it is in their chat templates.
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

_QWEN3_RERANKER_ROWS = 151_669
"""Vocabulary of Qwen3-Reranker in all sizes. Qwen3's chat models have 151,936 rows; a resized one may have this too."""
_RERANKER = re.compile(r"re-?rank|ranker|zerank|text-ranking", re.IGNORECASE)

_REMEDY = "set rerank_template (docs/clients.md)"


def choose(settings: ModelSettings, folder: Path | None = None) -> Choice:
    """Choose the template from the settings, else the model's own if it is recognised, else a plain one.

    Args:
        folder: the folder with the model's files. None: the model is recognised by its name alone.
    """
    asked = settings.rerank_template
    if isinstance(asked, RerankTemplate):
        return Choice(CUSTOM, asked, "from the settings", asked=True)
    if asked is not None:
        return Choice(asked, TEMPLATES[asked], "named in the settings", asked=True)
    files = CheckpointFiles(settings.model, folder)
    if files.model_type in ENCODER_TYPES:
        return Choice(PAIR, TEMPLATES[PLAIN], f"config.json says {files.model_type}: it reads two texts as a pair")
    if found := recognised(files):
        return found
    if files.model_type == "qwen3" and files.config.get("vocab_size") == _QWEN3_RERANKER_ROWS:
        because = f"config.json has Qwen3-Reranker's vocabulary of {_QWEN3_RERANKER_ROWS} tokens"
        doubt = (
            f"treated as a Qwen3-Reranker, since {because}; some other models derived from Qwen3 have it too: if this "
            f"is one of them, {_REMEDY}"
        )
        return Choice(QWEN3_RERANKER, TEMPLATES[QWEN3_RERANKER], because, doubt)
    return Choice(PLAIN, TEMPLATES[PLAIN], "nothing in the model's files or name says otherwise", _doubt(files))


def recognised(files: CheckpointFiles) -> Choice | None:
    """The template that a model was trained on, by what its files or its name say; None: they say nothing."""
    for kind in _KINDS:
        if files.model_type in (kind.model_type, None) and (because := _evidence(kind, files)):
            return Choice(kind.template, TEMPLATES[kind.template], because)
    return None


def _evidence(kind: _Kind, files: CheckpointFiles) -> str | None:
    """Why a model is of this kind; None if it is not recognised as one."""
    if kind.template == QWEN3_RERANKER:
        if files.config.get("is_original_qwen3_reranker") is True:
            return "config.json says is_original_qwen3_reranker"
        if files.config.get("classifier_from_token") == ["no", "yes"]:
            return "config.json says classifier_from_token: no, yes"
    for file, text in files.prompts():
        if kind.asks in text:
            return f"its question is in {file}"
    for where, name in files.names():
        if found := kind.named.search(name):
            return f"{where} says {found[0]}"
    return None


def _doubt(files: CheckpointFiles) -> str | None:
    """Doubt about a plain template: why it may be wrong for this model, or None."""
    rerankers = [where for where, name in files.names() if _RERANKER.search(name)]
    if "LogitScore" in files.text("modules.json"):
        rerankers.append("modules.json")
    if rerankers:
        return (
            f"{rerankers[0]} says that this is a reranker, but its prompt is unknown: /v1/rerank uses {PLAIN}, "
            f"which the model was not trained on; {_REMEDY}"
        )
    # Without a number of classes in its config, a classifier has two.
    classes = len(files.config.get("id2label") or "01")
    if files.has_classes and classes <= 2:
        return (
            "this model has a classification head, and its files do not say which prompt it was trained on: "
            f"/v1/rerank uses {PLAIN}; to rerank with this model, {_REMEDY}"
        )
    return None
