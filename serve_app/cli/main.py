"""The command line ``score-serve``: ``serve``; what asks one, such as ``score``; ``dataset``; checks and tools."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import ValidationError

from serve_app import __version__
from serve_app.cli import calibrate, checks, client, dataset, decide, doctor, launcher, rerank, tools
from serve_app.cli.dataset import BY_DEVICE, Dtype, Engine
from serve_app.cli.process_limits import LimitError
from serve_app.frontend import auth
from serve_app.model_source import ModelSourceError, absolute
from serve_app.settings import BATCH_TOKENS_ON_ACCELERATORS, BATCH_TOKENS_ON_CPU, ModelSettings, ServiceSettings
from serve_app.tpu import Tpu

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["--help", "-h"]},
)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"score-serve {__version__}")
        raise typer.Exit


@app.callback()
def _about(  # pyright: ignore[reportUnusedFunction]
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_version, help="Print the version.")
    ] = False,
) -> None:
    """A language model as a judge: label probabilities for many items. No token is ever generated."""


@app.command()
def serve(
    model: Annotated[
        list[str],
        typer.Option(
            help="'demo', a folder in Hugging Face layout, a hub id, or a .gguf file. Repeat it, also as NAME=MODEL, "
            "to serve several models; the request's 'model' field picks one, by default the first. The other options "
            "apply to every model; for different ones use a Serve config file, such as configs/two-models.yaml."
        ),
    ] = ["demo"],  # noqa: B006 - typer's way
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub id.")] = None,
    base: Annotated[
        str | None,
        typer.Option(help="The model that a LoRA adapter is merged onto.", show_default="the one that it names"),
    ] = None,
    served_name: Annotated[
        str | None, typer.Option(help="Name of the model in requests.", show_default="from --model")
    ] = None,
    adapter: Annotated[
        list[str] | None,
        typer.Option(
            help="NAME=FOLDER or NAME=HUB_ID: a LoRA adapter beside the model's own weights, which requests choose by "
            "its name as 'model'. Repeatable.",
            show_default="none",
        ),
    ] = None,
    trust_config: Annotated[
        list[str] | None,
        typer.Option(
            help="Key of config.json to skip although it is unknown; if it matters, all scores are wrong. Repeatable.",
            show_default="none",
        ),
    ] = None,
    dtype: Annotated[Dtype | None, typer.Option(help="Type of the weights.", show_default=BY_DEVICE)] = None,
    int8: Annotated[
        bool, typer.Option("--int8", help="Keep the layers' weights as int8: less memory, less accuracy.")
    ] = False,
    engine: Annotated[Engine, typer.Option(help="'fake' computes scores from hashed tokens, for tests.")] = "jax",
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 opens the service to the network.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(min=1, max=65535)] = 8000,
    fast_front: Annotated[
        bool,
        typer.Option(
            help="Use HAProxy, where Ray has it, instead of Ray Serve's own proxy: requests take some milliseconds "
            "less. It answers 503 while the only front end is being replaced.",
        ),
    ] = True,
    access_log: Annotated[
        bool,
        typer.Option(
            "--access-log",
            help="Log a line with route, status and duration for each request, in the folder of logs that the start "
            "names.",
        ),
    ] = False,
    api_keys_file: Annotated[
        Path | None,
        typer.Option(
            resolve_path=True,
            help="File of API keys or their hashes, one per line; it is read again when it changes. Requests must then "
            "send a key. "
            f"{auth.VARIABLE} in the environment adds more, comma-separated. Without any, no key is required.",
        ),
    ] = None,
    cors_origin: Annotated[
        list[str] | None,
        typer.Option(
            help="Origin, such as https://example.org, with pages that may send requests from a browser; '*' allows "
            "all. Repeatable.",
            show_default="none",
        ),
    ] = None,
    replicas: Annotated[int, typer.Option(min=1, help="Number of scorers, each with the whole model.")] = 1,
    max_batch_tokens: Annotated[
        int | None,
        typer.Option(
            min=64,
            help="Most tokens in a device batch.",
            show_default=f"{BATCH_TOKENS_ON_CPU} on a CPU, {BATCH_TOKENS_ON_ACCELERATORS} elsewhere",
        ),
    ] = None,
    max_prompt_tokens: Annotated[
        int | None,
        typer.Option(min=1, help="Tokens of the longest prompt.", show_default="the context, or what memory allows"),
    ] = None,
    prefix_cache_gb: Annotated[
        float | None,
        typer.Option(
            min=0, help="Memory for the beginnings of prompts.", show_default="by the context and what is free"
        ),
    ] = None,
    calibration: Annotated[
        Path | None,
        typer.Option(
            help="File that 'score-serve calibrate' wrote: how the probabilities of decisions are calibrated."
        ),
    ] = None,
    tpu: Annotated[
        str | None,
        typer.Option(
            help="This host's TPU chips and topology, such as 'v6e:2x2'. Each scorer gets one chip; 'v6e:2x2:4' gives "
            "it four, for a model too large for one. For slices of several hosts see configs/tpu-slice.yaml."
        ),
    ] = None,
) -> None:
    """Serve one or more models on this machine until Ctrl-C. The demo model is downloaded once (93 MB).

    For example:
    score-serve serve --model judge=./checkpoint --model demo
    """
    models = [_named(each) for each in model]
    trusted = tuple(trust_config or ())
    one: dict[str, Any] = {
        "revision": revision,
        "base": base and absolute(base),
        "adapters": dict(map(_adapter, adapter or ())),
        "served_name": served_name,
        "trust_config": trusted,
        "calibration": None if calibration is None else str(calibration),
    }
    if len(models) > 1 and any(one.values()):
        raise typer.BadParameter(
            "--revision, --base, --served-name, --adapter, --trust-config and --calibration are for a single --model; "
            "name several models with NAME=MODEL"
        )
    if served_name and "served_name" in models[0]:
        raise typer.BadParameter(f"--model {model[0]!r} has a name already; leave out --served-name")
    try:
        common: dict[str, Any] = {
            **one,
            "dtype": dtype,
            "quantization": "int8" if int8 else None,
            "engine": engine,
            "scorer_replicas": replicas,
            "max_batch_tokens": max_batch_tokens,
            "limits": {"max_prompt_tokens": max_prompt_tokens},
            "prefix_cache_gb": prefix_cache_gb,
            "tpu": None if tpu is None else _tpu(tpu),
        }
        settings = ServiceSettings(
            models=tuple(ModelSettings.model_validate({**common, **each}) for each in models),
            api_keys_file=None if api_keys_file is None else str(api_keys_file),
            cors_origins=tuple(cors_origin or ()),
        )
        launcher.run(settings, host=host, port=port, fast_front=fast_front, access_log=access_log)
    except ValidationError as error:
        client.complain(client.faults(error))
        raise typer.Exit(1) from None
    except (launcher.LaunchError, auth.ApiKeyError, LimitError, ModelSourceError) as error:
        client.complain(str(error))
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        raise typer.Exit(130) from None


app.command()(client.score)
app.command()(rerank.rerank)
app.command()(decide.decide)
app.command()(calibrate.calibrate)
app.command()(client.models)
app.command()(dataset.dataset)
app.command()(doctor.doctor)
app.command()(checks.tpu_check)
app.command()(checks.gpu_check)
app.command(context_settings=tools.PASSED_ON, add_help_option=False)(tools.bench)
app.command(context_settings=tools.PASSED_ON, add_help_option=False)(tools.plan)


def _adapter(words: str) -> tuple[str, str]:
    name, equals, source = words.partition("=")
    if not (name and equals and source):
        raise typer.BadParameter(f"--adapter {words!r}: write NAME=FOLDER or NAME=HUB_ID")
    return name, absolute(source)


def _named(words: str) -> dict[str, Any]:
    """Settings for ``NAME=MODEL``, or for a model alone; its path may contain ``=`` after a ``/``."""
    name, sign, model = words.partition("=")
    if sign and "/" not in name:
        return {"served_name": name, "model": absolute(model)}
    return {"model": absolute(words)}


def _tpu(words: str) -> Tpu:
    return Tpu.model_validate(dict(zip(("chip", "topology", "chips"), words.split(":"), strict=False)))


def main() -> None:
    """Entry point of ``score-serve``."""
    app()
