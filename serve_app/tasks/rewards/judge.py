"""Rewards of a causal model: what it answers, yes or no, to one question about each text.

The question is ``reward_question`` of the settings, asked as the decision routes ask (``serve_app/profiles``). The text
is the state; nothing in it becomes a control token. The logit of yes is ``log(P(yes) / P(no))``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import cast

from pydantic import TypeAdapter

from serve_app.contract import BatchResult
from serve_app.errors import InvalidRequestError, ScoringError
from serve_app.schemas import LOWEST
from serve_app.tasks.decisions.bodies import noul
from serve_app.tasks.decisions.conversation import Item, transcript
from serve_app.tasks.decisions.decider import Decider, Piece
from serve_app.tasks.decisions.questions import Judged
from serve_app.tasks.model_facts import ModelFacts
from serve_app.tasks.prompts import packed
from serve_app.tasks.rewards.inputs import Inputs, Outcome, Read, Reads, Wrong
from serve_app.tasks.scores import not_finite, usage
from serve_app.tasks.steps import Steps
from serve_app.tasks.task import PreparedRequest
from serve_app.tasks.validation import check_count, check_work, too_many_tokens

_ITEM: TypeAdapter[Item] = TypeAdapter(Item)


class Judge:
    """Asks a causal model about texts."""

    def __init__(self, model: ModelFacts) -> None:
        self._model = model
        self._decider = Decider.of(model)
        self._question = noul(model.reward_question, None, None, ())

    def prepare(self, inputs: Inputs) -> Steps[PreparedRequest[Reads]]:
        """Build the prompt of the question about each text.

        Raises:
            InvalidRequestError: the model cannot be asked so, or a text is wrong and the request does not go on without
                it.
            TooLargeError: the request has more texts or tokens than the limits allow.
        """
        limits, wrong, texts = self._model.limits, Wrong(fail=inputs.fail), _texts(inputs)
        check_count(texts, limits.max_items, inputs.field)
        characters = sum(map(len, texts)) + len(texts) * len(self._model.reward_question)
        check_work(characters, self._model.max_request_characters, inputs.field)
        pieces: dict[int, Piece] = {}
        total = 0
        for index, text in enumerate(texts):
            yield
            try:
                pieces[index] = piece = yield from self._piece(text, inputs.place(index))
            except InvalidRequestError as error:
                if error.param == "model":
                    raise
                wrong.add(InvalidRequestError(error.message, param=inputs.field, index=index))
                continue
            total += len(piece.made.batch.tokens)
            if total > limits.max_request_tokens:
                raise too_many_tokens(total, limits.max_request_tokens, inputs.field, index)
        return self._prepared(inputs, pieces, wrong)

    def _piece(self, text: str, place: str) -> Steps[Piece]:
        """The question about one text, with its prompt built.

        Args:
            place: the text's place in the request.

        Raises:
            InvalidRequestError: it cannot be asked.
        """
        asked = self._decider.asked(text, place, [self._question], 1)
        piece = yield from self._decider.some(asked, 0)
        for error in piece.errors.values():
            raise InvalidRequestError(f"{place}: {error.message}")
        return piece

    def _prepared(self, inputs: Inputs, pieces: Mapping[int, Piece], wrong: Wrong) -> PreparedRequest[Reads]:
        """The questions about all texts as one."""
        prompts = [replace(prompt, index=index) for index, piece in pieces.items() for prompt in piece.made.prompts]
        made = packed(prompts, (), 0, vocab_logprobs=True, classes=False, pad=None)
        reads = [read for piece in pieces.values() for read in piece.reads]
        together = Piece(self._model.profile, dict.fromkeys(pieces, self._question), made, reads, {})

        def answer(judged: Sequence[Judged], result: BatchResult) -> Reads:
            found: dict[int, Outcome] = dict(wrong.by_index)
            for index, judgement in zip(pieces, judged, strict=True):
                if isinstance(judgement, ScoringError):
                    error = not_finite(index, inputs.field)
                    if inputs.fail:
                        raise error
                    found[index] = error
                else:
                    no, yes = judgement.probabilities
                    found[index] = Read((_log_odds(no, yes),), judgement.label_mass)
            used = usage(made.prompt_tokens, int(result.computed_tokens.sum()))
            return Reads([found[index] for index in sorted(found)], used)

        return together.prepared(answer)


def _texts(inputs: Inputs) -> Sequence[str]:
    if inputs.conversation is not None:
        items = [_ITEM.validate_python({"role": each.role, "content": each.text}) for each in inputs.conversation]
        return [transcript(items)]
    if isinstance(inputs.entries[0], list):
        raise InvalidRequestError(
            f"{inputs.field} is token ids, but this model is causal and is asked about texts; send text or messages",
            param=inputs.field,
        )
    return cast(list[str], inputs.entries)


def _log_odds(no: float, yes: float) -> float:
    if no and yes:
        return math.log(yes) - math.log(no)
    return LOWEST if no else -LOWEST
