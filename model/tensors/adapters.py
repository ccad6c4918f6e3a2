"""A LoRA adapter of peft: merged onto the tensors of its base while these are read, or its factors alone.

The merge is peft's own, W + scaling * (B A), summed in float32. What else an adapter may ask for is refused by name.
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import numpy.typing as npt

from model.fields import ConfigError, Fields
from model.tensors.names import known_name
from model.tensors.stored import READ, Stored, Tensors

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

REMEDY = "merge it with peft (merge_and_unload, then save_pretrained), and name the merged model"

_BEGINNING = "base_model.model."
"""How the names of an adapter's tensors begin, before the name of the module in the base."""
_EMBEDDINGS = ("embed_tokens", "lm_head")
"""Modules that peft saves with an adapter, as they are, whenever it finds them changed."""
_BLOCK = 2**22
"""Numbers that are summed at a time."""

_IGNORED = {
    # About the file.
    "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "_name_or_path", "task_type",
    # Training's. What is adapted is what has tensors.
    "inference_mode", "lora_dropout", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern",
    "megatron_config", "megatron_core", "eva_config", "loftq_config", "corda_config", "lora_ga_config",
    # How peft runs an adapter that is not merged.
    "runtime_config", "ephemeral_gpu_offload",
}  # fmt: skip

_NEUTRAL: Mapping[str, object] = {
    "bias": "none",
    "fan_in_fan_out": False,
    "use_dora": False,
    "use_qalora": False,
    "use_bdlora": None,
    "qalora_group_size": 16,
    "lora_bias": False,
    "layer_replication": None,
    "target_parameters": [],
    "trainable_token_indices": [],
    "alora_invocation_tokens": [],
    "arrow_config": None,
    "ensure_weight_tying": False,
}
"""Keys that would change the merge, at the value that does not. A null is none in ``Fields``."""

_INITS = (True, False, "gaussian", "eva", "orthogonal")
"""Values of ``init_lora_weights`` that leave the base as it is; the others subtract something from it."""


@dataclass(frozen=True, slots=True)
class Adapter:
    """What ``adapter_config.json`` says.

    Attributes:
        name: the adapter's, for messages.
        base: the model that it is merged onto.
        classifies: it was trained with a classification head in place of the output head.
        rank: of A and B.
        alpha: the scaling is alpha / rank, or alpha / sqrt(rank) for rsLoRA.
        ranks: patterns of modules with another rank.
        alphas: patterns of modules with another alpha.
        saved: modules whose tensors it has as they are, besides the embeddings.
    """

    name: str
    base: str
    classifies: bool
    rank: int
    alpha: float
    ranks: Mapping[str, float]
    alphas: Mapping[str, float]
    rslora: bool
    saved: tuple[str, ...]

    def scaling(self, module: str) -> tuple[int, float]:
        """The rank and the scaling of a module, by its name in the base."""
        rank = int(_of_pattern(self.ranks, module, self.rank))
        alpha = _of_pattern(self.alphas, module, self.alpha)
        return rank, alpha / (math.sqrt(rank) if self.rslora else rank)

    def saves(self, module: str) -> bool:
        """Whether it may have a module's tensors as they are."""
        return any(module == name or module.endswith(f".{name}") for name in (*self.saved, *_EMBEDDINGS))

    @property
    def highest_rank(self) -> int:
        """The largest rank of any module."""
        return int(max(self.rank, *self.ranks.values(), 0))

    @property
    def kind(self) -> str:
        return "rsLoRA" if self.rslora else "LoRA"

    @property
    def numbers(self) -> str:
        """Its rank and scaling, in words."""
        scaling = f"{self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank):.4g}"
        others = ", other modules by their patterns" if self.ranks or self.alphas else ""
        return f"rank {self.rank}, scaling {scaling}{others}"

    @property
    def note(self) -> str:
        """What a user should know."""
        return f"{self.kind} adapter {self.name} is merged onto {self.base} ({self.numbers})"


def read(folder: Path) -> Adapter | None:
    """The adapter in a folder, beside its base; None: there is none.

    Raises:
        ConfigError: it asks for something that is not implemented.
    """
    path = folder / CONFIG
    if not path.is_file():
        return None
    try:
        config: object = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise ConfigError(f"{path} holds {type(config).__name__}; it must be a JSON object")
    try:
        return _parsed(cast("dict[str, Any]", config), folder)
    except ConfigError as error:
        raise ConfigError(f"{error}. To use this adapter all the same, {REMEDY}") from None


def _parsed(config: Mapping[str, Any], folder: Path) -> Adapter:
    fields = Fields(config, CONFIG)
    if (kind := config.get("peft_type")) != "LORA":
        raise ConfigError(f"{CONFIG}: peft_type is {kind!r}, and only 'LORA' is implemented")
    if (init := config.get("init_lora_weights", True)) not in _INITS:
        raise ConfigError(f"{CONFIG}: init_lora_weights is {init!r}, which changes the base as well")
    adapter = Adapter(
        name=str(config.get("_name_or_path") or folder),
        base=str(config.get("base_model_name_or_path")),
        classifies=config.get("task_type") == "SEQ_CLS",
        rank=fields.integer("r", 8),
        alpha=fields.number("lora_alpha", 8.0),
        ranks=_patterns(fields, config, "rank_pattern"),
        alphas=_patterns(fields, config, "alpha_pattern"),
        rslora=fields.flag("use_rslora", False),
        saved=tuple(fields.texts("modules_to_save", ())),
    )
    fields.refuse_rest(ignored=_IGNORED | {"init_lora_weights"}, neutral=_NEUTRAL)
    return adapter


def _patterns(fields: Fields, config: Mapping[str, Any], key: str) -> Mapping[str, float]:
    if key not in fields:
        return {}
    fields.group(key)
    numbers: dict[str, object] = config[key]
    if not all(isinstance(number, int | float) and number > 0 for number in numbers.values()):
        raise ConfigError(f"{CONFIG}: {key} is {numbers!r}; each of its values must be a number above 0")
    return cast("dict[str, float]", numbers)


def _of_pattern(patterns: Mapping[str, float], module: str, otherwise: float) -> float:
    """The value of the first pattern that a module's name ends in, as peft finds it."""
    found = (value for pattern, value in patterns.items() if re.match(rf"(.*\.)?({pattern})$", module))
    return next(found, otherwise)


def merged(base: Tensors, own: Tensors, adapter: Adapter) -> tuple[dict[str, Stored], list[str]]:
    """The base's tensors with an adapter's merged onto them, and what is wrong.

    Args:
        own: the adapter's tensors, each of which must find its place.
    """
    result = dict(base)
    problems: list[str] = []
    for name, tensor in sorted(own.items()):
        module, _, kind = name.removeprefix(_BEGINNING).rpartition(".lora_")
        if not name.startswith(_BEGINNING) or (module and kind not in ("A.weight", "B.weight")):
            problems.append(f"not implemented: {name} of the adapter; {REMEDY}")
        elif module:
            problems += _merge(result, own, adapter, module) if kind == "A.weight" else _without_a(own, name)
        else:
            problems += _replace(result, base, name, tensor, adapter)
    return result, problems


class Factors(NamedTuple):
    """A [rank, in] and B [out, rank] of one module, and what their product is multiplied by."""

    a: Stored
    b: Stored
    scaling: float


def factors(
    own: Tensors, adapter: Adapter, shapes: Mapping[str, tuple[int, ...]]
) -> tuple[dict[str, Factors], Stored | None, list[str]]:
    """The factors of each weight that an adapter changes, its head of classes if it has one, and what is wrong.

    Args:
        own: the adapter's tensors, each of which must find its place.
        shapes: of the base's weights in its layers, by their names.
    """
    found: dict[str, Factors] = {}
    head: Stored | None = None
    problems: list[str] = []
    for name, tensor in sorted(own.items()):
        module, _, kind = name.removeprefix(_BEGINNING).rpartition(".lora_")
        target = known_name(f"{module}.weight")
        if module and kind == "B.weight":
            problems += _without_a(own, name)
        elif module and kind == "A.weight" and target in shapes:
            pair, more = _pair(own, adapter, module, shapes[target])
            problems += more
            if pair is not None:
                found[target] = pair
        elif name == f"{_BEGINNING}score.weight" and adapter.saves("score"):
            head = tensor
        else:
            problems.append(f"no place: {name} of the adapter beside its base; {REMEDY}")
    return found, head, problems


def _pair(own: Tensors, adapter: Adapter, module: str, shape: tuple[int, ...]) -> tuple[Factors | None, list[str]]:
    """A module's factors, for a weight of this shape, or what is wrong with them."""
    a = own[f"{_BEGINNING}{module}.lora_A.weight"]
    if (b := own.get(f"{_BEGINNING}{module}.lora_B.weight")) is None:
        return None, [f"missing: {_BEGINNING}{module}.lora_B.weight of the adapter"]
    rank, scaling = adapter.scaling(module)
    if len(shape) != 2 or a.shape != (rank, shape[1]) or b.shape != (shape[0], rank):
        return None, [f"mis-shaped: A and B of {module} are {a.shape} and {b.shape}, for {shape} in rank {rank}"]
    if bad := {a.dtype, b.dtype}.difference(READ):
        return None, [f"dtype: A and B of {module} are {', '.join(bad)}; read are {', '.join(READ)}"]
    return Factors(a, b, scaling), []


def _without_a(own: Tensors, name: str) -> list[str]:
    other = name.replace(".lora_B.", ".lora_A.")
    return [] if other in own else [f"missing: {other} of the adapter"]


def _merge(result: dict[str, Stored], own: Tensors, adapter: Adapter, module: str) -> list[str]:
    """Merge onto one module's weight."""
    target = known_name(f"{module}.weight")
    weight = result.get(target)
    if weight is None and f"{_BEGINNING}{module}.lora_B.weight" in own:
        return [f"no place: {_BEGINNING}{module} of the adapter, since its base has no {target}"]
    pair, problems = _pair(own, adapter, module, () if weight is None else weight.shape)
    if pair is not None and weight is not None:
        result[target] = Merged(weight, *pair)
    return problems


def _replace(result: dict[str, Stored], base: Tensors, name: str, tensor: Stored, adapter: Adapter) -> list[str]:
    """Put a tensor of the adapter in the place of its base's."""
    # Of an adapted module that is saved all the same, its own weight is within it.
    target = known_name(name.removeprefix(_BEGINNING).replace(".base_layer.", "."))
    module = target.rpartition(".")[0]
    if not adapter.saves(module) or (target not in base and module not in (*adapter.saved, "score", "lm_head")):
        return [f"no place: {name} of the adapter; it is none of the modules that it says it saves"]
    result[target] = tensor
    if target == "model.embed_tokens.weight" and target in base:
        # peft changes a copy for the entry: the output head stays the base's, even where they were tied.
        result.setdefault("lm_head.weight", base[target])
    return []


@dataclass(frozen=True, slots=True)
class Merged:
    """A weight with B A added, see ``Stored``."""

    base: Stored
    a: Stored
    b: Stored
    scaling: float

    @property
    def shape(self) -> tuple[int, ...]:
        return self.base.shape

    @property
    def dtype(self) -> str:
        return "F32" if self.base.dtype in READ else self.base.dtype

    @property
    def file(self) -> str:
        return self.base.file

    def read(self, cut: tuple[slice, ...]) -> npt.NDArray[Any]:
        """Read a part: no more than a block of the product and of the base is in memory beside the result."""
        (first, stop), (left, right) = (part.indices(size)[:2] for part, size in zip(cut, self.shape, strict=True))
        rank = slice(0, self.a.shape[0])
        down = self.a.read((rank, slice(left, right))).astype(np.float32)
        up = self.b.read((slice(first, stop), rank)).astype(np.float32)
        result = np.empty((stop - first, right - left), np.float32)
        step = max(1, _BLOCK // max(1, right - left))
        for start in range(0, len(result), step):
            block = result[start : start + step]
            np.matmul(up[start : start + step], down, out=block)
            block *= self.scaling
            rows = slice(first + start, first + start + len(block))
            block += self.base.read((rows, slice(left, right))).astype(np.float32)
        return result
