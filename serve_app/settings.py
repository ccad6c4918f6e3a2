"""The one configuration: typed, frozen, unknown keys refused.

Serve hands ``args:`` of a YAML file, or ``key=value`` words of ``serve run``, to ``app.build`` as this model.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from serve_app.templates import TEMPLATES, RerankTemplate
from serve_app.tpu import Tpu

ANY_ORIGIN = "*"
_ORIGIN = re.compile(r"\*|null|[a-z][a-z0-9+.-]*://[^/\s*]+")

DEFAULT_NAME = "default"
"""Always a name of the first model."""

LIVE = {"aliases", "limits", "max_batch_tokens", "stall_s", "timeout_s"}
"""Settings that a running replica can change."""
_FIXED_LIMITS = {
    "max_prompt_tokens": "programs are compiled for it",
    "max_body_bytes": "a body is read before its model is known",
}
"""Limits that it cannot, and why."""

MOST_QUEUED_TOKENS = 4_000_000
"""For one replica, where nothing else is said: 16 MB of ids, and some times that with all that describes them."""

_OF_ONE = {"model", "revision", "served_name", "aliases"}
"""Settings that two models cannot share."""


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Limits(_Frozen):
    """What a request may ask at most. Published in ``/v1/info``."""

    max_items: Annotated[int, Field(ge=1)] = 10_000
    max_labels: Annotated[int, Field(ge=1)] = 1_000
    max_body_bytes: Annotated[int, Field(ge=1024)] = 32 * 2**20
    max_prompt_tokens: Annotated[int, Field(ge=1)] | None = None
    """Per item. None: as many as the engine reads (``/v1/info`` shows the number)."""
    max_request_tokens: Annotated[int, Field(ge=1)] = 20_000_000
    """Summed over a request's prompts, the query counted once per item."""
    max_queued_tokens: Annotated[int, Field(ge=1)] | None = None
    """For each replica, shared prefixes counted once; a request past it gets 503 with Retry-After, first at the front
    end, by all that is not answered (a front end's share, where there are several), then in the replica's queue. None:
    what a replica computes in half of ``timeout_s``, by its measured speed, and at most 4,000,000."""


class Autoscaling(_Frozen):
    """Bounds and speed of a number of replicas that follows the work."""

    min_replicas: Annotated[int, Field(ge=0)] = 1
    """0: none while there are no requests; the next request waits until one has started."""
    max_replicas: Annotated[int, Field(ge=1)]
    tokens_per_replica: Annotated[int, Field(ge=1)] = 65_536
    """Accepted and not answered, shared prefixes counted once; when there are more, another replica starts."""
    upscale_delay_s: Annotated[float, Field(ge=0)] = 10.0
    downscale_delay_s: Annotated[float, Field(ge=0)] = 300.0
    """A replica goes after too little work for so long: it takes minutes to be back."""


class ModelSettings(_Frozen):
    """One model, its engine and its replicas."""

    model: str = "demo"
    """``demo``, a folder in Hugging Face layout, a hub id, or a ``.gguf`` file."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    served_name: str | None = None
    """The name that requests and ``/v1/models`` use. None: taken from ``model``."""
    aliases: tuple[str, ...] = ()
    """More names for the same model. ``default`` is always one."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the weights and matmul operands; sums, norms, softmax and the head are float32 in both."""
    quantization: Literal["int8"] | None = None
    """Layers' weights, with a scale for each output channel: a quarter of float32's memory. None: ``dtype``."""
    engine: Literal["jax", "fake"] = "jax"
    """``fake``: deterministic scores from hashed tokens, for tests of everything but the model."""

    max_batch_tokens: Annotated[int, Field(ge=64)] = 8_192
    """Tokens in one device batch, shared prefixes counted once; half as many in one that is prepared meanwhile."""
    scorer_replicas: Annotated[int, Field(ge=1)] = 1
    """With autoscaling, at the start."""
    autoscaling: Autoscaling | None = None
    max_surge_percent: Annotated[int, Field(ge=0, le=100)] = 0
    """Scorers that may run beside the others while a new version replaces the old one, in percent of them, rounded up:
    1 is one of up to a hundred. They need room (chips, processors), else the update waits for it. 0: the old ones go
    first, a fifth of them at a time, one at least."""
    scorer_cpus: Annotated[float, Field(ge=0)] = 1.0
    tpu: Tpu | None = None
    """The chips of each scorer. None: it computes on whatever its host has."""
    tokenizer_threads: Annotated[int, Field(ge=1)] = 2
    timeout_s: Annotated[float, Field(gt=0)] = 600.0
    """Past it a request gets 504 and its queued work is dropped."""
    stall_s: Annotated[float, Field(gt=0)] = 300.0
    """A batch that is on the device for longer, and for longer than its tokens take by the measured speed, makes the
    replica unhealthy, and Serve replaces it; on a slice of several hosts its processes are restarted. A tokenizer
    that is at one request for longer makes its front end unhealthy."""
    rebuild_s: Annotated[float, Field(gt=0)] = 900.0
    """When the processes of a slice have been restarting for longer, Serve replaces the replica."""

    rerank_template: str | RerankTemplate | None = None
    """Template of ``/v1/rerank``: a name in ``templates.py``, or a template itself. None: the one that its files
    and name tell (``template_choice.py``), else a plain one."""

    limits: Limits = Limits()

    @field_validator("rerank_template")
    @classmethod
    def _known(cls, template: str | RerankTemplate | None) -> str | RerankTemplate | None:
        if isinstance(template, str) and template not in TEMPLATES:
            raise ValueError(f"there is no template {template!r}; the names are {', '.join(TEMPLATES)}")
        return template

    @model_validator(mode="after")
    def _starts_within_bounds(self) -> Self:
        bounds = self.autoscaling
        if bounds and not bounds.min_replicas <= self.scorer_replicas <= bounds.max_replicas:
            raise ValueError(
                f"scorer_replicas is {self.scorer_replicas}; at the start there can be "
                f"autoscaling.min_replicas ({bounds.min_replicas}) to max_replicas ({bounds.max_replicas})"
            )
        return self

    def live(self, changes: Mapping[str, Any]) -> Self:
        """These settings with ``changes``, as a running replica can take them.

        Raises:
            ValueError: a change needs a new replica, or its value is no such setting's.
        """
        limits = changes.get("limits") or {}
        if fixed := sorted(changes.keys() - LIVE):
            raise ValueError(
                f"{', '.join(fixed)}: not to be changed in a running replica, as {', '.join(sorted(LIVE))} are; "
                "set it in args, which starts new ones"
            )
        for name, why in _FIXED_LIMITS.items():
            if name in limits:
                raise ValueError(f"limits.{name}: {why}; set it in args, which starts new replicas")
        own = self.model_dump(exclude_unset=True)
        return self.model_validate({**own, **changes, "limits": {**own.get("limits", {}), **limits}})

    def queued_tokens(self, tokens_per_s: float) -> int:
        """How many tokens may wait for one replica: more would be late.

        Args:
            tokens_per_s: of a replica, as measured.
        """
        if self.limits.max_queued_tokens is not None:
            return self.limits.max_queued_tokens
        return max(self.max_batch_tokens, min(int(tokens_per_s * self.timeout_s / 2), MOST_QUEUED_TOKENS))

    @property
    def longest_batch_s(self) -> float:
        """Past it, and past what its tokens should take, a batch will not end. A slice restarts its processes
        meanwhile, and tries a batch twice."""
        return 2 * self.stall_s + self.rebuild_s if self.tpu and self.tpu.hosts > 1 else self.stall_s

    @property
    def most_replicas(self) -> int:
        """Scorers that may run at once."""
        return self.autoscaling.max_replicas if self.autoscaling else self.scorer_replicas

    @property
    def name(self) -> str:
        """The served name."""
        if self.served_name is not None:
            return self.served_name
        return self.model.rstrip("/").removesuffix(".gguf").rsplit("/", 1)[-1]

    @property
    def names(self) -> tuple[str, ...]:
        """The served name and the aliases."""
        return tuple(dict.fromkeys((self.name, *self.aliases)))


def check_names(models: Iterable[ModelSettings]) -> None:
    """Raise ValueError unless each name is one model's, and ``default`` the first's."""
    taken: dict[str, str] = {}
    for index, each in enumerate(models):
        for name in each.names:
            if name in taken:
                raise ValueError(
                    f"{taken[name]!r} and {each.model!r} are both named {name!r}; give one another served_name"
                )
            if index and name == DEFAULT_NAME:
                raise ValueError(f"{each.model!r} is named {name!r}, as the first model always is; put it first")
            taken[name] = each.model


class ServiceSettings(_Frozen):
    """The whole service: its models, and the front ends that all of them share.

    A configuration may leave out ``models`` and give the settings of its one model here. With ``models``, what is given
    here holds for each model that does not set it itself.
    """

    models: tuple[ModelSettings, ...] = (ModelSettings(),)
    """Complete settings of each model. Requests name one of them; the first is also ``default``."""
    ingress_replicas: Annotated[int, Field(ge=1)] = 1
    ingress_cpus: Annotated[float, Field(ge=0)] = 0.5
    api_keys_file: str | None = None
    """One key a line; read again when it changes. None: only the environment's keys, if there are any (``auth.py``)."""
    cors_origins: tuple[str, ...] = ()
    """Whose pages may ask the service from a browser, such as ``https://example.org``; ``*``: those of all."""

    @model_validator(mode="before")
    @classmethod
    def _complete_models(cls, given: Any) -> Any:
        if not isinstance(given, Mapping) or not given.keys() - cls.model_fields.keys():
            return given
        service = {name: value for name, value in given.items() if name in cls.model_fields}
        common = {name: value for name, value in given.items() if name not in cls.model_fields}
        if "models" not in service:
            return {**service, "models": [common]}
        if own := common.keys() & _OF_ONE:
            raise ValueError(f"{', '.join(sorted(own))}: with models, set it for each of them")
        try:
            return {**service, "models": [_completed(each, common) for each in service["models"]]}
        except TypeError:
            raise ValueError("models is a list, and each model and its limits are settings by name") from None

    @field_validator("models")
    @classmethod
    def _go_together(cls, models: tuple[ModelSettings, ...]) -> tuple[ModelSettings, ...]:
        if not models:
            raise ValueError("there is no model; name one, or leave out models for the demo")
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
                raise ValueError(f"{origin!r} is no origin; write scheme://host or scheme://host:port, or * for all")
        return origins

    def replicas_on_chips(self, *, most: bool = False) -> dict[Tpu, int]:
        """How many replicas of all models want the same kind of chips: at the start, or at most."""
        wanted: dict[Tpu, int] = {}
        for each in self.models:
            if each.tpu:
                replicas = each.most_replicas if most else each.scorer_replicas
                wanted[each.tpu] = wanted.get(each.tpu, 0) + replicas
        return wanted


def _completed(model: Mapping[str, Any], common: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a model, completed with the common ones; each limit counts as a setting."""
    return {**common, **model, "limits": {**common.get("limits", {}), **model.get("limits", {})}}
