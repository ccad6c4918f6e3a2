"""Decision models whose folders have a form of their own: what becomes of their files in Hugging Face layout.

The head's tensors are then in ``decision_head.safetensors`` beside the model's weights, but for Laya's. Code that comes
with a model is never executed, and its manifest is not read.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, cast

HEAD = "decision_head.safetensors"
"""What the engine looks for, see ``model.tensors.folder``."""
KEV_FILE = "kev.json"
"""Written beside a head that was made from kev's ``head.pt``: its temperature."""

LAYA_FILE = "rl_agent_config.json"
"""Says of a Laya checkpoint how its prompts are made and its answers calibrated."""

READ = ("head.pt",)
"""Files that are read once and written in another form."""

_BACKBONE = "backbone"
_ENCODER, _TOKENIZER = "encoder", "tokenizer"
_PROMPT = "decision2-segmented-options-global-query-v1"
_ANSWERS = ("decision_config.json", "score_bias.json", "README.md")
"""Files of a Decision 2.0 package that say how its answers are read."""
_KEV_HEAD = {"q.weight", "q.bias", "k.weight", "k.bias"}


class PackageError(ValueError):
    """The package asks for something that is not implemented. The message says what, and what to do."""


@dataclass(frozen=True, slots=True)
class Files:
    """The files of a folder in Hugging Face layout.

    Attributes:
        links: names -> the files that they are.
        written: JSON files.
        made: names -> functions that write the file, given its path.
    """

    links: Mapping[str, Path] = field(default_factory=dict[str, Path])
    written: Mapping[str, Any] = field(default_factory=dict[str, Any])
    made: Mapping[str, Callable[[Path], None]] = field(default_factory=dict[str, Callable[[Path], None]])


def subfolders(folder: Path) -> list[str]:
    """Folders within a model's on the hub that hold files of it."""
    if (folder / LAYA_FILE).is_file():
        return [_ENCODER, _TOKENIZER]
    return [_BACKBONE] if _is_decision2(_object(folder / "config.json")) else []


def decision2(folder: Path) -> Files | None:
    """The files of a Decision 2.0 package, ``dev2-package/1``; None: the folder is none.

    Source: vllm-project/semantic-router, src/training/decision2/v2/release/layout.py.

    Raises:
        PackageError: its head or prompt is of a kind that is not implemented, or its weights are those of an adapter.
    """
    package = _object(folder / "config.json")
    if not _is_decision2(package):
        return None
    backbone: object = package.get("backbone", {"config": f"{_BACKBONE}/config.json"})
    if not isinstance(backbone, dict) or "adapter" in package or "config" not in backbone:
        raise PackageError(
            f"{folder} is a Decision 2.0 package with an adapter in place of a backbone, which is not implemented: "
            "merge it onto its base with peft, and name a package with the merged backbone"
        )
    weights = _within(folder, cast("dict[str, str]", backbone)["config"]).parent
    said = _object(folder / str(package.get("model_config", "decision_config.json")))
    asked = {
        "prompt_version": (said.get("prompt_version"), _PROMPT),
        "head_variant": (said.get("head_variant", "shared"), "shared"),
        "readout": (said.get("readout"), None),
        "dec_residual": (said.get("dec_residual"), None),
    }
    for name, (found, known) in asked.items():
        if found != known:
            raise PackageError(
                f"{folder}: decision_config.json has {name} {found!r}, and only {known!r} is implemented; take another "
                "release of the model"
            )
    head = _within(folder, (package.get("decision_weights") or {}).get("decision_head", HEAD))
    if missing := [path for path in (weights / "config.json", head) if not path.is_file()]:
        raise PackageError(f"{missing[0]} is not there, and config.json names it; fetch the package again")
    config = _object(weights / "config.json")
    if (most := package.get("max_input_tokens")) is not None and "max_position_embeddings" in config:
        config["max_position_embeddings"] = min(config["max_position_embeddings"], most)
    links = {path.name: path for path in weights.iterdir() if path.suffix in (".safetensors", ".json")}
    links |= {path.name: path for path in folder.iterdir() if path.is_file() and _of_tokenizer(path.name)}
    links |= {name: folder / name for name in _ANSWERS if (folder / name).is_file()}
    links[HEAD] = head
    if calibration := package.get("calibration"):
        links["calibration.json"] = _within(folder, calibration["temperature_file"])
    return Files({name: path for name, path in links.items() if name != "config.json"}, {"config.json": config})


def laya(folder: Path) -> Files | None:
    """The files of a Laya checkpoint; None: the folder is none.

    Source: NandhaKishorM/laya, laya/agent.py at 8ef5b2d.

    Raises:
        PackageError: files are missing, or its encoder is of a kind that is not implemented.
    """
    said, config = _object(folder / LAYA_FILE), _object(folder / _ENCODER / "config.json")
    if not said or ((folder / "config.json").is_file() and not config):
        return None
    weights = folder / "model.safetensors"
    tokenizer = folder / _TOKENIZER if (folder / _TOKENIZER).is_dir() else folder
    for path in (folder / _ENCODER / "config.json", weights, tokenizer / "tokenizer.json"):
        if not path.is_file():
            raise PackageError(f"{path} is not there, and a Laya checkpoint has it; fetch the checkpoint again")
    if config.get("model_type") != "modernbert":
        raise PackageError(
            f"{folder}: the encoder is of the type {config.get('model_type')!r}, and only 'modernbert' is implemented; "
            "take another checkpoint of the model"
        )
    most, longest = said.get("max_len", 512), config.get("max_position_embeddings", 8192)
    if not isinstance(most, int) or not isinstance(longest, int):
        raise PackageError(f"{folder / LAYA_FILE} has max_len {most!r}; it must be a number of tokens")
    most = min(most, longest)
    config |= {"architectures": ["LayaDecisionModel"], "max_position_embeddings": most}
    config["head_layers"] = said.get("head_layers", 2)
    links = {path.name: path for path in tokenizer.iterdir() if path.is_file() and _of_tokenizer(path.name)}
    links |= {path.name: path for path in (weights, folder / LAYA_FILE, folder / "README.md") if path.is_file()}
    return Files(links, {"config.json": config})


def kev(folder: Path) -> Files | None:
    """The head of kev's that lies beside an adapter or a model; None: there is none.

    Source: jaredpalmer/kev, kev/checkpoint.py at 04f48a2.

    Raises:
        PackageError: torch is not installed; or the head is of a kind that is not implemented.
    """
    path, trained = folder / "head.pt", _object(folder / "training_config.json").get("args")
    if not path.is_file() or not isinstance(trained, dict) or "head_dim" not in trained:
        return None
    if importlib.util.find_spec("torch") is None:
        raise PackageError(f"{path} is read by torch, which is not installed: pip install torch")
    import torch

    try:
        found: Any = torch.load(path, map_location="cpu", weights_only=True)
        head = {str(name): tensor.float().numpy() for name, tensor in found["head"].items()}
        temperature = float(found.get("temperature", 1.0))
    except Exception as error:  # whatever is in a pickle
        raise PackageError(f"{path} is no head of kev's: {error!r}; copy it again") from error
    if set(head) != _KEV_HEAD:
        raise PackageError(f"{path} has the tensors {', '.join(sorted(head))}; a pointer head has q and k with biases")
    if found.get("option_isolation"):
        raise PackageError(
            f"{path}: option_isolation hides a question's options from each other, which is not implemented; take a "
            "checkpoint that was trained without it"
        )

    def write(to: Path) -> None:
        from safetensors.numpy import save_file

        save_file(head, to)

    return Files(written={KEV_FILE: {"temperature": temperature}}, made={HEAD: write})


def _is_decision2(config: Mapping[str, Any]) -> bool:
    return config.get("model_type") == "decision2" or config.get("decision_format") == "vllm-sr-decision"


def _of_tokenizer(name: str) -> bool:
    return name in ("vocab.json", "merges.txt", "added_tokens.json", "special_tokens_map.json") or name.startswith(
        ("tokenizer", "chat_template")
    )


def _within(folder: Path, name: str) -> Path:
    """A file of a package, which may not name one outside it."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts:
        raise PackageError(f"{folder}: config.json names the file {name}, which is not in the package; fetch it again")
    return folder / path


def _object(path: Path) -> dict[str, Any]:
    """The JSON object in a file; empty if there is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # code that needs the file reports it
        return {}
    return cast("dict[str, Any]", found) if isinstance(found, dict) else {}
