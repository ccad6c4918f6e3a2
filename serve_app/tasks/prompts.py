"""From a checked request to packed tokens: every rule that needs the model or the limits."""

from __future__ import annotations

from collections.abc import Sequence

from serve_app.schemas import ScoreRequest
from serve_app.tasks.model_facts import ServedModel
from serve_app.tasks.preparation import Preparation, Prepared
from serve_app.tasks.steps import Steps, finish
from serve_app.tasks.validation import check_count, check_ids


class Prompts:
    """Builds the prompts of requests, or says what is wrong with them."""

    def __init__(self, model: ServedModel) -> None:
        self._model = model

    def open(self, request: ScoreRequest) -> Preparation:
        """The request, ready to be prepared item by item.

        Of a model with classes the targets are all classes, and labels are ignored.

        Raises:
            InvalidRequestError: labels, ids or the combination of fields is wrong.
            TooLargeError: more items than the limits allow.
        """
        return Preparation(request, self._model)

    def prepare(self, request: ScoreRequest) -> Prepared:
        """All items of the request.

        Raises:
            InvalidRequestError: as ``open``, or what is wrong with an item, if that fails the request.
            TooLargeError: more items or tokens than the limits allow.
        """
        return finish(self.open(request).rest())

    def tokenize(self, texts: Sequence[str], add_special_tokens: bool) -> Steps[list[tuple[list[int], list[str]]]]:
        """Make ids and pieces of each text.

        Raises:
            InvalidRequestError: a text is too long to be tokenised at once.
            TooLargeError: more texts than a request may have items.
        """
        check_count(texts, self._model.limits.max_items, "prompt")
        made: list[tuple[list[int], list[str]]] = []
        for ids in self._model.encoded(texts, "prompt", add_special_tokens=add_special_tokens):
            made.append((ids, self._model.tokenizer.pieces(ids)))
            yield
        return made

    def detokenize(self, ids: list[int]) -> str:
        """The text of the ids.

        Raises:
            InvalidRequestError: an id is out of the vocabulary.
        """
        check_ids(ids, self._model.vocab_size, "tokens")
        return self._model.tokenizer.decode(ids)
