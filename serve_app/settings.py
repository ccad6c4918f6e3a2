"""The configuration: typed, frozen, and strict about unknown keys.

Serve passes ``args:`` of a YAML file, or ``key=value`` words of ``serve run``, to ``app.build`` as ``ServiceSettings``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_core import InitErrorDetails

from serve_app.profiles.calibration import Calibration
from serve_app.profiles.profile import PROFILES
from serve_app.templates import TEMPLATES, RerankTemplate
from serve_app.tpu import Tpu

ANY_ORIGIN = "*"
_ORIGIN = re.compile(r"\*|null|[a-z][a-z0-9+.-]*://[^/\s*]+")

DEFAULT_NAME = "default"
"""The name that the first model always has, besides its own."""

RECONFIGURABLE = {"adapters", "aliases", "limits", "max_batch_tokens", "stall_s", "timeout_s"}
"""Settings that a running replica can change, by ``user_config``."""
_FIXED_LIMITS = {
    "max_prompt_tokens": "programs are compiled for it",
    "max_body_bytes": "a body is read before its model is known",
}
"""Limits that a running replica cannot change, and why."""

REWARD_QUESTION = "Is the last answer correct, helpful and harmless?"
"""What a causal model is asked if the settings do not say it. Rewards depend on every byte of it."""

BATCH_TOKENS_ON_CPU, BATCH_TOKENS_ON_ACCELERATORS = 8_192, 32_768
"""Defaults of ``max_batch_tokens``. An accelerator computes a request of 500 items of 20 tokens as one batch: in two
it would compute less at once, and answer later."""

MOST_QUEUED_TOKENS = 4_000_000
"""The largest default of ``limits.max_queued_tokens``: 16 MB of token ids, and several times that with their arrays."""

LEAST_ADAPTER_ROOM = 4
"""Adapters that have room where there are any, so that others can be added while the service runs."""

_OF_ONE = {"model", "revision", "base", "served_name", "adapters", "aliases", "trust_config"}
"""Settings that models cannot share."""


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class Limits(_Frozen):
    """Limits of a single request, and of the queue. ``/v1/info`` shows them."""

    max_items: Annotated[int, Field(ge=1)] = 10_000
    """Items, documents or prompts of a request."""
    max_labels: Annotated[int, Field(ge=1)] = 1_000
    """Labels of an item."""
    max_body_bytes: Annotated[int, Field(ge=1024)] = 32 * 2**20
    """Bytes of a request's body, as it is sent and decoded."""
    max_prompt_tokens: Annotated[int, Field(ge=1)] | None = None
    """Tokens of one item's prompt, query included. None: the model's context, or a shorter one whose pages fit into
    their share of the free memory (``prefix_cache_gb``)."""
    max_request_tokens: Annotated[int, Field(ge=1)] = 20_000_000
    """Tokens of all prompts of a request; the query counts once per item."""
    max_queued_tokens: Annotated[int, Field(ge=1)] | None = None
    """Tokens that may wait for one replica, shared prefixes counted once. A request that exceeds this gets a 503 with
    Retry-After. The front end checks it against all unanswered requests (with several front ends, each checks its
    share), and the replica's queue checks it again. None: as many tokens as a replica computes in half of
    ``timeout_s`` at its measured speed, and at most 4,000,000."""


class Autoscaling(_Frozen):
    """Bounds and pace of a replica count that follows the load."""

    min_replicas: Annotated[int, Field(ge=0)] = 1
    """0: no replica runs while there are no requests, and the next request waits until one has started."""
    max_replicas: Annotated[int, Field(ge=1)]
    """The largest number of scorers."""
    tokens_per_replica: Annotated[int, Field(ge=1)] = 65_536
    """Unanswered tokens per replica, shared prefixes counted once. Above this, another replica starts."""
    upscale_delay_s: Annotated[float, Field(ge=0)] = 10.0
    """How long the load must be high before a replica starts."""
    downscale_delay_s: Annotated[float, Field(ge=0)] = 300.0
    """How long the load must be low before a replica stops. Starting one again takes minutes."""


class ModelSettings(_Frozen):
    """One model: its engine, its replicas, and the limits of its requests."""

    model: str = "demo"
    """``demo``, a folder in Hugging Face layout, a hub id, or a ``.gguf`` file."""
    revision: str | None = None
    """Branch, tag or commit, if ``model`` is a hub id. None: the main branch."""
    base: str | None = None
    """If ``model`` is a LoRA adapter: the model that it is merged onto, named like ``model``. None: the one that its
    ``adapter_config.json`` names."""
    served_name: str | None = None
    """Name of the model in requests and in ``/v1/models``. None: the last part of ``model``."""
    aliases: tuple[str, ...] = ()
    """More names of the model. The first model is also named ``default``."""
    adapters: dict[str, str] = {}
    """LoRA adapters that requests choose by their names as ``model``, beside the model's own weights: name -> a folder
    that peft has saved, or a hub id. Requests for several of them share device batches."""
    max_adapters: Annotated[int, Field(ge=0)] | None = None
    """Room for adapters, which takes memory whether it is used or not. None: for those in ``adapters``, and for 4 if
    there are any; without any, none."""
    max_adapter_rank: Annotated[int, Field(ge=1, le=512)] = 16
    """The highest rank of an adapter. Each has room for it, and takes as much time as if it had it."""
    trust_config: tuple[str, ...] = ()
    """Keys of ``config.json`` that are skipped although this program does not know what they mean. If one of them
    matters, all scores are wrong, and nothing else says so: name only what you know to change no score."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Type of the weights and of matmul operands. Sums, norms, softmax and the output head are always float32. None:
    float32 on a CPU, and bfloat16 on a TPU or GPU, where a float32 product takes several passes of the matrix unit."""
    quantization: Literal["int8"] | None = None
    """``int8``: the layers' weights have 8 bits and a scale for each output channel, a quarter of float32's memory.
    None: they have ``dtype``."""
    prefix_cache_gb: Annotated[float, Field(ge=0)] | None = None
    """Memory of each device for the pages that keep prompts' beginnings, in GB; one prompt of the longest kind always
    has room. None: 0.4 on a CPU, or more for the model's context, but at most half of what is free beside the weights;
    on a TPU or GPU about that half."""
    engine: Literal["jax", "fake"] = "jax"
    """``fake``: deterministic scores from hashed tokens, to test everything but the model."""

    max_batch_tokens: Annotated[int, Field(ge=64)] | None = None
    """The most tokens in one device batch, shared prefixes counted once. On a slow device batches are smaller. None:
    8,192 on a CPU, and 32,768 on a TPU or GPU."""
    scorer_replicas: Annotated[int, Field(ge=1)] = 1
    """Number of scorers, each with the whole model. With ``autoscaling`` it is the number at the start."""
    autoscaling: Autoscaling | None = None
    """None: the number of scorers is fixed."""
    max_surge_percent: Annotated[int, Field(ge=0, le=100)] = 0
    """Additional scorers while a new version replaces the old one, in percent of all, rounded up: 1 allows one more
    for up to a hundred. They need free chips and processors, and the update waits for these. 0: old scorers stop
    first, a fifth of them at a time, but at least one."""
    scorer_cpus: Annotated[float, Field(ge=0)] = 1.0
    """Processors that Ray reserves for each scorer."""
    scorer_gpus: Annotated[float, Field(ge=0, le=1)] | None = None
    """Graphics card that Ray reserves for each scorer and hides from others; below 1 that share of one. 0: it computes
    on processors. None: a card, where the cluster has one for each scorer, else an equal share; none where there are no
    cards when the service is built."""
    tpu: Tpu | None = None
    """TPU chips of each scorer. None: it uses the devices that its host has."""
    tokenizer_threads: Annotated[int, Field(ge=1)] = 2
    """Threads for this model's prompts in each front end."""
    timeout_s: Annotated[float, Field(gt=0)] = 600.0
    """Longest time for a request. After it the request gets a 504, and its queued work is dropped."""
    stall_s: Annotated[float, Field(gt=0)] = 300.0
    """Longest time for a device batch, unless its tokens need more at the measured speed. After it the replica is
    unhealthy and Serve replaces it; a slice of several hosts restarts its processes first. A front end is unhealthy
    when its tokenizer spends longer than this on one request."""
    rebuild_s: Annotated[float, Field(gt=0)] = 900.0
    """Longest time for the processes of a slice to restart. After it Serve replaces the replica."""

    rerank_template: str | RerankTemplate | None = None
    """Template of ``/v1/rerank``: a name in ``templates.py``, or a template itself. None: chosen by the model's files
    and name (``template_choice.py``); a plain one if these say nothing."""

    decision_profile: str | None = None
    """How a decision route's question becomes a prompt: the name of a file in ``serve_app/profiles``. None: chosen by
    the model's files and name (``profile_choice.py``); ``chat-v1``, or ``plain-v1`` for a model without a chat
    template, if these say nothing."""

    calibration: Calibration | None = None
    """How the probabilities of the decision routes are calibrated: a file that ``score-serve calibrate`` wrote, or its
    contents. It is read when the settings are, so other machines do not need it. None: they stay as the model gives
    them."""

    reward_question: Annotated[str, Field(pattern=r"\S")] = REWARD_QUESTION
    """What a causal model is asked about each text on the reward routes; the reward is the probability of yes. A
    classifier has rewards of its own."""

    limits: Limits = Limits()
    """Limits of a request and of the queue."""

    @field_validator("decision_profile")
    @classmethod
    def _known_profile(cls, name: str | None) -> str | None:
        if name is not None and name not in PROFILES:
            raise ValueError(f"there is no profile {name!r}; choose one of {', '.join(PROFILES)}")
        return name

    @field_validator("calibration", mode="before")
    @classmethod
    def _read(cls, calibration: Any) -> Any:
        return Calibration.of_file(Path(calibration)) if isinstance(calibration, str) else calibration

    @field_validator("rerank_template")
    @classmethod
    def _known(cls, template: str | RerankTemplate | None) -> str | RerankTemplate | None:
        if isinstance(template, str) and template not in TEMPLATES:
            raise ValueError(f"there is no template {template!r}; choose one of {', '.join(TEMPLATES)}")
        return template

    @model_validator(mode="after")
    def _adapters_have_room(self) -> Self:
        if len(self.adapters) > self.adapter_room:
            raise ValueError(f"there are {len(self.adapters)} adapters; max_adapters has room for {self.adapter_room}")
        if self.adapter_room and self.tpu and self.tpu.hosts > 1:
            raise ValueError(
                "adapters: not implemented on slices of several hosts; serve each adapter as a model of its own "
                "(model: the adapter, base: its base), or a model that fits one host"
            )
        return self

    @model_validator(mode="after")
    def _one_kind_of_device(self) -> Self:
        if self.tpu and self.scorer_gpus:
            raise ValueError("a scorer computes on TPU chips or on a graphics card; leave out tpu or scorer_gpus")
        return self

    @model_validator(mode="after")
    def _starts_within_bounds(self) -> Self:
        bounds = self.autoscaling
        if bounds and not bounds.min_replicas <= self.scorer_replicas <= bounds.max_replicas:
            raise ValueError(
                f"scorer_replicas is {self.scorer_replicas}; with autoscaling choose a number from "
                f"autoscaling.min_replicas ({bounds.min_replicas}) to max_replicas ({bounds.max_replicas})"
            )
        return self

    def live(self, changes: Mapping[str, Any]) -> Self:
        """Return these settings with ``changes`` that a running replica can make. Limits change one by one.

        Raises:
            ValueError: a change needs a new replica, or its value is invalid.
        """
        limits = changes.get("limits") or {}
        if fixed := sorted(changes.keys() - RECONFIGURABLE):
            raise ValueError(
                f"{', '.join(fixed)}: cannot change in a running replica, only {', '.join(sorted(RECONFIGURABLE))} "
                "can; set it in args, which starts new replicas"
            )
        for name, why in _FIXED_LIMITS.items():
            if name in limits:
                raise ValueError(f"limits.{name}: {why}; set it in args, which starts new replicas")
        own = self.model_dump(exclude_unset=True)
        if "adapters" in changes:  # a replica that runs makes no more room
            own["max_adapters"] = self.adapter_room
        return self.model_validate({**own, **changes, "limits": {**own.get("limits", {}), **limits}})

    @property
    def adapter_room(self) -> int:
        """Adapters that have room."""
        if self.max_adapters is not None:
            return self.max_adapters
        return max(LEAST_ADAPTER_ROOM, len(self.adapters)) if self.adapters else 0

    def batch_tokens(self, platform: str) -> int:
        """The most tokens in one device batch, on a device of this kind as jax names it."""
        if self.max_batch_tokens is not None:
            return self.max_batch_tokens
        return BATCH_TOKENS_ON_ACCELERATORS if platform in ("tpu", "gpu") else BATCH_TOKENS_ON_CPU

    def queued_tokens(self, tokens_per_s: float, platform: str) -> int:
        """The number of tokens that may wait for one replica. More would be answered too late.

        Args:
            tokens_per_s: a replica's measured speed.
            platform: see ``batch_tokens``.
        """
        if self.limits.max_queued_tokens is not None:
            return self.limits.max_queued_tokens
        return max(self.batch_tokens(platform), min(int(tokens_per_s * self.timeout_s / 2), MOST_QUEUED_TOKENS))

    def dtype_reason(self, platform: str) -> str:
        """Why the weights have the type that they have, on a device of this kind as jax names it."""
        return f"the default on {platform}; dtype (--dtype) sets another" if self.dtype is None else "as set"

    @property
    def longest_batch_s(self) -> float:
        """Seconds after which a batch will never end, unless its tokens need more. A slice tries a batch twice, and
        restarts its processes in between."""
        return 2 * self.stall_s + self.rebuild_s if self.tpu and self.tpu.hosts > 1 else self.stall_s

    @property
    def most_replicas(self) -> int:
        """The largest number of scorers, except during an update."""
        return self.autoscaling.max_replicas if self.autoscaling else self.scorer_replicas

    @property
    def name(self) -> str:
        """The served name: ``served_name``, or the last part of ``model``."""
        if self.served_name is not None:
            return self.served_name
        return self.model.rstrip("/").removesuffix(".gguf").rsplit("/", 1)[-1]

    @property
    def names(self) -> tuple[str, ...]:
        """The served name and the aliases."""
        return tuple(dict.fromkeys((self.name, *self.aliases)))


def check_names(models: Iterable[ModelSettings]) -> None:
    """Raise ValueError if two models share a name, or a model other than the first is named ``default``."""
    taken: dict[str, str] = {}
    for index, each in enumerate(models):
        for name in (*each.names, *each.adapters):
            if name in taken:
                raise ValueError(
                    f"{taken[name]!r} and {each.model!r} are both named {name!r}; give one of them another "
                    "name: NAME=MODEL on the command line, served_name in a configuration"
                )
            if index and name == DEFAULT_NAME:
                raise ValueError(f"{each.model!r} is named {name!r}, a name of the first model; put it first")
            taken[name] = each.model


PRIORITIES = ("high", "normal", "low")
"""Classes of tenants. Each gets what those before it leave of the device, and a turn in one of eight batches."""


class TenantSettings(_Frozen):
    """What holds for the API keys of one name, for all of them together."""

    weight: Annotated[float, Field(gt=0, le=1_000)] = 1.0
    """Its part of the device, relative to that of other tenants of its class that have work."""
    priority: Literal["high", "normal", "low"] = "normal"
    """Its class: all work of an earlier class goes first, except for one turn in eight batches."""
    tokens_per_s: Annotated[float, Field(gt=0)] | None = None
    """Its quota: prompt tokens a second, shared prefixes counted once, of all models; ten seconds of them may come at
    once. Each front end has an equal part. A request beyond it gets a 429 with Retry-After. None: no quota."""


class ServiceSettings(_Frozen):
    """The whole service: its models, and the front ends that they share.

    A configuration may also give model settings here. Without ``models`` they describe the only model. With ``models``
    they hold for every model that does not set them itself.
    """

    models: tuple[ModelSettings, ...] = (ModelSettings(),)
    """All settings of each model. The first model is also named ``default``."""
    ingress_replicas: Annotated[int, Field(ge=1)] = 1
    """Number of front ends."""
    ingress_cpus: Annotated[float, Field(ge=0)] = 0.5
    """Processors that Ray reserves for each front end."""
    api_keys_file: str | None = None
    """File with an API key, or its hash, per line, perhaps after a name; it is read again when it changes. None: only
    the environment has keys, if any (``auth.py``)."""
    salt_by_api_key: bool = False
    """Whether callers with different API keys share nothing in the prefix cache, as with different ``cache_salt``."""
    tenants: dict[str, TenantSettings] = {}
    """What holds for some API keys, by the keys' names (``auth.py``). For the others the defaults hold."""
    cors_origins: tuple[str, ...] = ()
    """Origins of web pages that may call the service from a browser, such as ``https://example.org``; ``*`` allows
    all."""

    @model_validator(mode="wrap")
    @classmethod
    def _complete_models(cls, given: Any, validate: ModelWrapValidatorHandler[Self]) -> Self:
        if not isinstance(given, Mapping) or not given.keys() - cls.model_fields.keys():
            return validate(given)
        service = {name: value for name, value in given.items() if name in cls.model_fields}
        common = {name: value for name, value in given.items() if name not in cls.model_fields}
        if "models" not in service:
            models = [common]
        elif own := common.keys() & _OF_ONE:
            raise ValueError(f"{', '.join(sorted(own))}: models cannot share it; set it in each of models")
        else:
            try:
                models = [_completed(each, common) for each in service["models"]]
            except TypeError:
                raise ValueError(
                    "models must be a list of mappings, and limits a mapping, from name to value"
                ) from None
        try:
            return validate({**service, "models": models})
        except ValidationError as error:
            raise _located_as_given(error, service.get("models")) from None

    @field_validator("models")
    @classmethod
    def _go_together(cls, models: tuple[ModelSettings, ...]) -> tuple[ModelSettings, ...]:
        if not models:
            raise ValueError("models is empty; add a model, or leave out models to serve the demo model")
        if len({each.limits.max_body_bytes for each in models}) > 1:
            raise ValueError(
                "limits.max_body_bytes: a body is read before its model is known; set it outside of models"
            )
        check_names(models)
        return models

    @field_validator("cors_origins")
    @classmethod
    def _as_browsers_send_them(cls, origins: tuple[str, ...]) -> tuple[str, ...]:
        for origin in origins:
            if not _ORIGIN.fullmatch(origin):
                raise ValueError(f"{origin!r} is not an origin; write scheme://host, scheme://host:port, or * for all")
        return origins

    def replicas_on_chips(self, *, most: bool = False) -> dict[Tpu, int]:
        """The number of replicas of all models for each kind of chips: at the start, or with ``most`` the maximum."""
        wanted: dict[Tpu, int] = {}
        for each in self.models:
            if each.tpu:
                replicas = each.most_replicas if most else each.scorer_replicas
                chips = each.tpu.model_copy(update={"data": None})
                wanted[chips] = wanted.get(chips, 0) + replicas
        return wanted


def _completed(model: Mapping[str, Any], common: Mapping[str, Any]) -> dict[str, Any]:
    """Complete a model's settings with the common ones. Limits are completed one by one."""
    return {**common, **model, "limits": {**common.get("limits", {}), **model.get("limits", {})}}


def _located_as_given(error: ValidationError, models: Sequence[Mapping[str, Any]] | None) -> ValidationError:
    """Return ``error`` with each setting at its place in the configuration: in ``models``, if given there."""
    details: dict[tuple[object, ...], InitErrorDetails] = {}
    for each in error.errors():
        location = each["loc"]
        match location:
            case ("models", int(), *rest) if models is None:
                location = tuple(rest)
            case ("models", int(number), str(name), *rest) if models:
                own = models[number]
                if name not in own or (name == "limits" and rest and rest[0] not in own[name]):
                    location = (name, *rest)
            case _:
                pass
        detail = InitErrorDetails(type=each["type"], loc=location, input=each["input"], ctx=each.get("ctx", {}))
        details.setdefault((location, each["type"]), detail)
    return ValidationError.from_exception_data(error.title, [*details.values()])
