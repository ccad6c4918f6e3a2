"""What a model's rewards are: the names of its classes, and how its logits become probabilities."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

from serve_app.tasks.scores import label_scores

Activation = Literal["identity", "sigmoid", "softmax"]

_BY_PROBLEM: Mapping[Any, Activation] = {"regression": "identity", "multi_label_classification": "sigmoid"}
"""The activations of ``problem_type`` in ``config.json``."""


@dataclass(frozen=True, slots=True)
class Head:
    """The classes of a model, or of a judge, which has one: yes.

    Attributes:
        names: one for each class.
        activation: makes probabilities of the logits.
        raw: whether a reward is a logit where a request does not choose. A reward model was trained on its logits; a
            judge's reward is a probability.
    """

    names: Sequence[str]
    activation: Activation
    raw: bool

    @classmethod
    def of(cls, classes: int, config: Mapping[str, Any]) -> Head:
        """The head of a model.

        Args:
            classes: the number of its classes; 0: it is causal, and a judge.
            config: what its ``config.json`` says; empty: nothing is known.
        """
        if not classes:
            return cls(("yes",), "sigmoid", raw=False)
        return cls(_names(classes, config.get("id2label")), _activation(classes, config), raw=True)

    def values(self, logits: Sequence[float], use_activation: bool | None) -> list[float]:
        """The logits, or the probabilities that they stand for.

        Args:
            logits: finite numbers, one for each class.
            use_activation: whether to return probabilities. None: unless rewards are logits.
        """
        raw = self.raw if use_activation is None else not use_activation
        if raw or self.activation == "identity":
            return list(logits)
        if self.activation == "softmax":
            return label_scores(logits, 0, softmax=True)
        return [label_scores((logit, 0.0), 0, softmax=True)[0] for logit in logits]


def _names(classes: int, given: Any) -> Sequence[str]:
    """The names in ``id2label``, or transformers' default names if those are not of this many classes."""
    defaults = [f"LABEL_{number}" for number in range(classes)]
    if not isinstance(given, dict):
        return defaults
    named = cast(dict[str, Any], given)
    names = [named.get(str(number)) for number in range(classes)]
    known = [name for name in names if isinstance(name, str)]
    return known if len(known) == classes == len(named) else defaults


def _activation(classes: int, config: Mapping[str, Any]) -> Activation:
    """The activation that vLLM chooses for a sequence classifier."""
    if found := _BY_PROBLEM.get(config.get("problem_type")):
        return found
    return trained_activation(config) or ("softmax" if classes > 1 else "sigmoid")


_BY_MODULE: Mapping[Any, Activation] = {
    "torch.nn.modules.linear.Identity": "identity",
    "torch.nn.modules.activation.Sigmoid": "sigmoid",
    "torch.nn.modules.activation.Softmax": "softmax",
}
"""The activations of sentence-transformers' ``activation_fn``."""


def trained_activation(config: Mapping[str, Any]) -> Activation | None:
    """What sentence-transformers' CrossEncoder makes of the logits; None: its files do not say."""
    trained = config.get("sentence_transformers")
    named = cast(dict[str, Any], trained).get("activation_fn") if isinstance(trained, dict) else None
    return _BY_MODULE.get(named or config.get("sbert_ce_default_activation_function"))
