"""What a checkpoint's files and its name say about how it was trained to be asked."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_ORIGINS = {
    "config.json": ("_name_or_path",),
    "tokenizer_config.json": ("name_or_path",),
    "adapter_config.json": ("base_model_name_or_path",),
}
"""The fields in which files name the model that this one was derived from."""
_CHAT_TEMPLATES = (
    "chat_template.jinja",
    "chat_template.json",
    "tokenizer_config.json",
    "config_sentence_transformers.json",
)


class CheckpointFiles:
    """The files of a checkpoint.

    Args:
        model: its name in the settings.
        folder: its folder. None: there are no files.
    """

    def __init__(self, model: str, folder: Path | None) -> None:
        self._model, self._folder = model, folder
        self.config = self.object("config.json")

    @property
    def model_type(self) -> str | None:
        return self.config.get("model_type")

    @property
    def has_classes(self) -> bool:
        """Whether the model has a classification head."""
        architectures: list[Any] = self.config.get("architectures") or []
        return any(str(each).endswith("ForSequenceClassification") for each in architectures)

    def has(self, name: str) -> bool:
        """Whether there is a file of that name."""
        return self._path(name) is not None

    def text(self, name: str) -> str:
        """The text of a file; empty if there is none."""
        path = self._path(name)
        return path.read_text(encoding="utf-8", errors="replace") if path else ""

    def object(self, name: str) -> dict[str, Any]:
        """The JSON object in a file; empty if there is none."""
        try:
            found = json.loads(self.text(name) or "{}")
        except ValueError:  # code that needs the file reports it
            return {}
        return found if isinstance(found, dict) else {}

    def names(self) -> Iterator[tuple[str, str]]:
        """Names of this model and of the models that it was derived from, each with where it was found."""
        for file, keys in _ORIGINS.items():
            content = self.object(file)
            for key in keys:
                if isinstance(name := content.get(key), str):
                    yield file, name
        yield "README.md", self._card()
        yield "mergekit_config.yml", self.text("mergekit_config.yml")
        yield "its name", self._model

    def prompts(self) -> Iterator[tuple[str, str]]:
        """Prompts of the model: each file that may have its chat template or prompts, with the file's text."""
        for file in _CHAT_TEMPLATES:
            yield file, self.text(file)

    def _path(self, name: str) -> Path | None:
        path = self._folder / name if self._folder else None
        return path if path and path.is_file() else None

    def _card(self) -> str:
        """The head of the model's card and its title. The rest of the card may name other models too."""
        text = self.text("README.md")
        head = re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)
        title = re.search(r"^# .*", text[head.end() if head else 0 :], re.MULTILINE)
        return "\n".join(found[0] for found in (head, title) if found)
