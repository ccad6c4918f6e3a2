"""Write docs/settings.md from the code: every setting with its type, default and meaning, and every variable.

Run it after a change of a setting: python -m scripts.settings_page. A test fails while the page is not what it writes.
"""

from __future__ import annotations

import json
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from model.compiled import FLAGS
from serve_app.frontend import auth
from serve_app.local_ray import FAST_FRONT, GRPC_ENV, LOOPBACK, PROCESSES
from serve_app.settings import RECONFIGURABLE, Autoscaling, Limits, ModelSettings, ServiceSettings, TenantSettings
from serve_app.tpu import Tpu

PAGE = Path(__file__).parents[1] / "docs" / "settings.md"

SECTIONS: dict[str, tuple[type[BaseModel], str]] = {
    "The service": (ServiceSettings, "At the top of `args`. Settings of a model may also stand there."),
    "tenants": (TenantSettings, "In `tenants`, by the name of the tenant's API keys."),
    "A model": (ModelSettings, "In each of `models`; or at the top, for the only model or for all of them."),
    "limits": (Limits, "In `limits`, which is completed field by field."),
    "autoscaling": (Autoscaling, "In `autoscaling`."),
    "tpu": (Tpu, "In `tpu`; `--tpu v6e:2x2:4` on the command line."),
}

VARIABLES = {
    auth.VARIABLE: "API keys that the service accepts beside those of `api_keys_file`, comma-separated. Commands and "
    "the page's examples send the first.",
    "SCORE_SERVE_CACHE": "Folder for the demo model, conversions and compiled programs. What lies there runs as code.",
    "XDG_CACHE_HOME": "Without `SCORE_SERVE_CACHE` the cache is the folder `score-serve` in it; by default in "
    "`~/.cache`.",
    "HF_HOME": "Folder of the Hugging Face hub's files; the hub's other variables, such as `HF_TOKEN` and "
    "`HF_HUB_OFFLINE`, hold, too.",
    "RAY_ADDRESS": "The Ray cluster that `--app` and `join_ray` connect to. Without it: one of this machine. With the "
    "address of a Ray that `scripts/serve` started, `RAY_AUTH_MODE=token` is needed, too.",
    "TMPDIR": "Where the logs go, and what a conversion needs for a moment.",
    "JAX_PLATFORMS": "The kind of device: `cpu`, `tpu` or `cuda`. Without it: what the machine has.",
    "CXX": "The C++20 compiler of the CPU's kernels; by default `c++`.",
    "CXXFLAGS": "More options of it.",
    **dict.fromkeys(FLAGS, "Read by XLA or libtpu; a change compiles all programs anew."),
    "XLA_PYTHON_CLIENT_MEM_FRACTION": "The share of a card's memory that a scorer takes; by default by `scorer_gpus`.",
    "RAY_BACKEND_LOG_LEVEL": "How much Ray itself says; `fatal` in data set jobs unless it is set.",
    "PYTHON": "The Python with which `scripts/` make `.venv`. Another than before makes it anew.",
}
"""Variables of the environment that users may set, and what each does."""


def page() -> str:
    """The text of the page."""
    parts = [
        "# Settings and variables",
        (
            "Written by `python -m scripts.settings_page` from the code; a test compares. Settings are `args` of a "
            "Serve config file ([operations](operations.md)), or options of `score-serve serve`, whose `--help` lists "
            "them. An unknown setting is refused by name. An empty default is None. **live** marks what a running "
            "replica can change by `user_config`."
        ),
    ]
    for title, (model, about) in SECTIONS.items():
        live = RECONFIGURABLE if model is ModelSettings else set[str]()
        rows = [_row(name, field, live=name in live) for name, field in model.model_fields.items()]
        parts += [f"## {title}", about, _table(("setting", "type", "default", "meaning"), rows)]
    parts += ["## Variables of the environment", _table(("variable", "meaning"), [*_variables()])]
    parts += [
        (
            "These are set for all of Ray's processes on a host that `score-serve serve` starts, unless they are set; "
            "[measurements](measurements.md) has the effect of some. On a cluster set the first "
            f"{len(PROCESSES)} yourself, as the manifests do."
        ),
        _table(("variable", "value", "when"), [*_of_ray()]),
    ]
    return "\n\n".join(parts) + "\n"


def _row(name: str, field: FieldInfo, *, live: bool) -> tuple[str, ...]:
    if not field.description:
        raise ValueError(f"the setting {name} has no text; write one below it in the code")
    meaning = " ".join(field.description.split()).replace("``", "`")
    return (f"`{name}`", _type(field), _default(field), meaning + (" **live**" if live else ""))


def _type(field: FieldInfo) -> str:
    words = _words(field.annotation)
    bounds = [f"{sign} {value:,}" for sign, value in _bounds(field)]
    return " ".join([words, *([f"({', '.join(bounds)})"] if bounds else [])])


def _words(annotation: Any) -> str:
    """A type in words; that it may also be left out, its default says."""
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return " or ".join(_words(each) for each in typing.get_args(annotation) if each is not type(None))
    if typing.get_origin(annotation) is typing.Literal:
        return " or ".join(f"`{value}`" for value in typing.get_args(annotation))
    if typing.get_origin(annotation) is tuple:
        return f"list of {_words(typing.get_args(annotation)[0])}"
    if typing.get_origin(annotation) is typing.Annotated:
        return _words(typing.get_args(annotation)[0])
    names = {str: "text", int: "integer", float: "number", bool: "true or false"}
    return names.get(annotation) or "mapping"


def _bounds(field: FieldInfo) -> Iterator[tuple[str, float]]:
    inside = [each for part in typing.get_args(field.annotation) for each in getattr(part, "__metadata__", ())]
    for constraint in (*field.metadata, *inside):
        for each in (constraint, *getattr(constraint, "metadata", ())):
            for name, sign in (("ge", "≥"), ("gt", ">"), ("le", "≤")):
                if (value := getattr(each, name, None)) is not None:
                    yield sign, value


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    match field.default:
        case None:
            return ""
        case BaseModel() | () | {}:
            return ""
        case tuple():
            return "the demo model"
        case bool() | str():
            return f"`{json.dumps(field.default).strip(chr(34))}`"
        case number:
            return f"{number:,}"


def _variables() -> Iterator[tuple[str, str]]:
    return ((f"`{name}`", text) for name, text in VARIABLES.items())


def _of_ray() -> Iterator[tuple[str, str, str]]:
    for values, when in (
        (PROCESSES, "always"),
        (GRPC_ENV | LOOPBACK, "on one host"),
        (FAST_FRONT, "unless `--no-fast-front`"),
    ):
        for name, value in values.items():
            yield f"`{name}`", f"`{value}`", when


def _table(heads: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    cells = [heads, ("---",) * len(heads), *rows]
    return "\n".join(f"| {' | '.join(cell for cell in row)} |" for row in cells)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
