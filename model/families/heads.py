"""Which head a model has, where its ``config.json`` leaves that to the tensors or contradicts itself."""

import logging
from collections.abc import Mapping
from typing import Any

from model.families.registry import BASES, CLASSIFIERS
from model.families.wrappers import name_of
from model.fields import ConfigError
from model.tensors.folder import HEAD_PREFIX, Opened

logger = logging.getLogger(__name__)

OUTPUT, CLASSES = "lm_head.weight", "score.weight"
_WITH_CLASSES = {causal: name for name, causal in CLASSIFIERS.items()}


def decided(config: Mapping[str, Any], stored: Opened) -> dict[str, Any]:
    """``config``, unwrapped, with the head that is stored.

    Raises:
        ConfigError: a model without its head has no head stored, or two.
    """
    name = name_of(config)
    if name in BASES and any(each.startswith(HEAD_PREFIX) for each in stored.tensors):
        return {**config, "architectures": [BASES[name]]}
    if name in BASES:
        causal = BASES[name]
        known = (OUTPUT, CLASSES) if causal in _WITH_CLASSES else (OUTPUT,)
        found = [head for head in known if head in stored.tensors]
        if not found:
            raise ConfigError(
                f"architectures is [{name!r}], and no tensor is a head ({' or '.join(known)}): the model is an "
                "embedder, which makes vectors. Only a model with a head makes scores"
            )
        if len(found) > 1:
            raise ConfigError(
                f"architectures is [{name!r}], and both {OUTPUT} and {CLASSES} are stored; write the architecture that "
                f"is meant into config.json: {causal} or {_WITH_CLASSES[causal]}"
            )
        if found == [OUTPUT]:
            return {**config, "architectures": [causal]}
        return _classifier(config, causal, stored)
    if name in _WITH_CLASSES and stored.adapter and stored.adapter.classifies:
        if CLASSES not in stored.tensors:
            raise ConfigError(
                f"{stored.adapter.name} is an adapter of a classifier (task_type SEQ_CLS), and neither it nor its base "
                f"has the head, {CLASSES}: save it with modules_to_save=['score']"
            )
        return _classifier(config, name, stored)
    if name in CLASSIFIERS and CLASSES in stored.tensors:
        return _with_classes(config, stored.tensors[CLASSES].shape[0])
    return dict(config)


def _classifier(config: Mapping[str, Any], causal: str, stored: Opened) -> dict[str, Any]:
    """The classifier with the layers of ``causal``, and as many classes as its head has."""
    own = {key: value for key, value in config.items() if key not in ("id2label", "label2id")}
    classes = stored.tensors[CLASSES].shape[0]
    return {**own, "architectures": [_WITH_CLASSES[causal]], "num_labels": classes}


def _with_classes(config: Mapping[str, Any], stored: int) -> dict[str, Any]:
    """``config`` with the number of classes that is stored, where its two keys contradict each other about it."""
    names, number = config.get("id2label"), config.get("num_labels")
    if not isinstance(names, dict) or number is None or len(names) == number or stored not in (len(names), number):
        return dict(config)
    logger.warning(
        "config.json names %d classes in id2label and says num_labels: %s; %s has %d, and decides",
        len(names),
        number,
        CLASSES,
        stored,
    )
    return {**config, "id2label": None, "num_labels": stored}
