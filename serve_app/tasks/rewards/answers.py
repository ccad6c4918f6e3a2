"""The builder of the tasks that answer rewards, whatever the shape of their requests and answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from serve_app.errors import InvalidRequestError
from serve_app.schemas import RequestBody, Usage
from serve_app.tasks.model_facts import MOST_CLASSES, ModelFacts
from serve_app.tasks.rewards import classifier
from serve_app.tasks.rewards.head import Head
from serve_app.tasks.rewards.inputs import Inputs, Outcome, Read, Reads
from serve_app.tasks.rewards.judge import Judge
from serve_app.tasks.steps import Steps
from serve_app.tasks.task import Prepare, PreparedRequest

R = TypeVar("R", bound=RequestBody)
A = TypeVar("A")


@dataclass(frozen=True, slots=True)
class Rewarded:
    """The texts of a request with what the model says of them.

    Attributes:
        model: the model's name in the answer.
        request_id: the request's id.
    """

    head: Head
    model: str
    request_id: str
    reads: Reads

    @property
    def usage(self) -> Usage:
        """The tokens of all prompts."""
        return self.reads.usage

    def values(self, use_activation: bool | None) -> Sequence[list[float] | None]:
        """The logits or probabilities of each text, see ``Head.values``; None for a text that has an error."""
        return [
            self.head.values(outcome.logits, use_activation) if isinstance(outcome, Read) else None
            for outcome in self.reads.outcomes
        ]

    @property
    def rewards(self) -> list[float | None]:
        """One number for each text: the logit of the only class, or of the last of two less that of the first; a
        judge's probability of yes."""
        return list(map(self._reward, self.reads.outcomes))

    def _reward(self, outcome: Outcome) -> float | None:
        if not isinstance(outcome, Read):
            return None
        *other, last = self.head.values(outcome.logits, None)
        return last - sum(other)

    @property
    def label_masses(self) -> list[float | None] | None:
        """How much of a judge's next-token distribution its answers cover, for each text; None for a classifier."""
        if self.head.raw:
            return None
        return [outcome.label_mass if isinstance(outcome, Read) else None for outcome in self.reads.outcomes]


def builder(
    inputs: Callable[[R], Inputs], answer: Callable[[R, Rewarded], A], *, single: bool = False
) -> Callable[[ModelFacts], Prepare[R, A]]:
    """The ``Task.builder`` of a route that answers rewards.

    Args:
        inputs: the request's texts.
        answer: makes the answer.
        single: whether a reward must be one number.
    """

    def build(model: ModelFacts) -> Prepare[R, A]:
        classes = model.info.classes
        head = Head.of(classes, model.config)
        read = partial(classifier.prepare, model) if classes else Judge(model).prepare

        def prepare(request: R, request_id: str) -> Steps[PreparedRequest[A]]:
            if single and classes > MOST_CLASSES:
                raise InvalidRequestError(
                    f"this model is a classifier with {classes} classes, and no class is the reward; use /classify",
                    param="model",
                )
            prepared = yield from read(inputs(request))
            return prepared.converted(lambda reads: answer(request, Rewarded(head, model.name, request_id, reads)))

        return prepare

    return build
