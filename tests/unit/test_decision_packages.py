"""Decision models in folders of their own form become folders in Hugging Face layout."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file

from serve_app import model_source
from serve_app.decision_packages import subfolders
from serve_app.model_source import ModelSourceError, resolve
from serve_app.profiles.profile import ShownOption
from serve_app.settings import ModelSettings
from serve_app.tasks.profile_choice import choose_profile
from serve_app.tasks.tokenizer import TextTokenizer
from tests import tiny_heads
from tests.tiny import write_json
from tests.tiny_families import make_family
from tests.tiny_laya import make_laya

NEEDS_TORCH = pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="torch is not installed")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SCORE_SERVE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def changed(package: Path, **keys: Any) -> str:
    """Change ``config.json``, and return the error that follows."""
    write_json(package / "config.json", json.loads((package / "config.json").read_text()) | keys)
    with pytest.raises(ModelSourceError) as error:
        resolve(str(package))
    return str(error.value)


class TestDecision2:
    @pytest.fixture
    def package(self, tmp_path: Path) -> Path:
        return tiny_heads.make_decision2(tmp_path / "Decision-2.0-Tiny")

    def test_a_package_has_the_backbones_files_and_the_head(self, package: Path, cache: Path):
        folder = resolve(str(package))
        assert folder.parent == cache
        assert resolve(str(package)) == folder
        config = json.loads((folder / "config.json").read_text())
        assert (config["architectures"], config["max_position_embeddings"]) == (["Qwen3Model"], 1_024)
        assert (folder / "model.safetensors").readlink() == package / "backbone" / "model.safetensors"
        assert (folder / "decision_head.safetensors").readlink() == package / "decision_head.safetensors"
        kept = {"tokenizer.json", "decision_config.json", "score_bias.json"}
        assert kept <= {path.name for path in folder.iterdir()}
        assert not (folder / "modeling_decision2.py").exists()

    def test_its_calibration_counts_where_it_is_named(self, package: Path):
        (package / "calibration.json").write_text("{}")
        assert not (resolve(str(package)) / "calibration.json").exists()
        config = json.loads((package / "config.json").read_text())
        write_json(package / "config.json", config | {"calibration": {"temperature_file": "calibration.json"}})
        write_json(package / "backbone" / "config.json", {"changed": 1})
        assert (resolve(str(package)) / "calibration.json").readlink() == package / "calibration.json"

    @pytest.mark.parametrize(
        ("changes", "said"),
        [
            ({"head_variant": "candidate-interaction"}, "head_variant 'candidate-interaction', and only 'shared'"),
            ({"prompt_version": "decision2-x"}, "prompt_version 'decision2-x', and only 'decision2-segmented"),
            ({"readout": "label_token"}, "readout 'label_token', and only None"),
        ],
    )
    def test_other_heads_and_prompts_are_refused(self, changes: dict[str, Any], said: str, tmp_path: Path):
        package = tiny_heads.make_decision2(tmp_path / "other", changes=changes)
        with pytest.raises(ModelSourceError, match=said):
            resolve(str(package))

    def test_an_adapter_in_place_of_a_backbone_is_refused(self, package: Path):
        said = changed(package, backbone={"repository": "Qwen/Qwen3.8-27B"}, adapter={"config": "adapter/x.json"})
        assert "with an adapter in place of a backbone" in said
        assert "merge it onto its base" in said

    def test_a_file_that_is_missing_or_a_pointer_is_named(self, package: Path):
        (package / "decision_head.safetensors").write_text("version https://git-lfs.github.com/spec/v1")
        with pytest.raises(ModelSourceError, match=r"decision_head.safetensors in .* git-lfs's pointer"):
            resolve(str(package))
        (package / "decision_head.safetensors").unlink()
        assert "decision_head.safetensors is not there, and config.json names it" in changed(package)

    @pytest.mark.parametrize("name", ["../other/config.json", "/etc/config.json"])
    def test_a_file_outside_the_package_is_refused(self, package: Path, name: str):
        assert "is not in the package" in changed(package, backbone={"config": name})

    def test_the_backbones_folder_is_fetched_from_the_hub(self, package: Path, monkeypatch: pytest.MonkeyPatch):
        asked: list[tuple[list[str], list[str] | None]] = []

        def fetch(_: str, *, allow_patterns: list[str], ignore_patterns: list[str] | None, **__: Any) -> str:
            asked.append((allow_patterns, ignore_patterns))
            return str(package)

        monkeypatch.setattr(model_source, "snapshot_download", fetch)
        resolve("vllm-sr/Decision-2.0-Kai-0.6B")
        assert asked[1:] == [(["backbone/*"], None)]


@NEEDS_TORCH
class TestKev:
    @pytest.fixture
    def base(self, tmp_path: Path) -> Path:
        folder = make_family(tmp_path / "base", "qwen3")
        tiny_heads.tokenizer().save(str(folder / "tokenizer.json"))
        return folder

    def test_a_head_beside_a_model(self, base: Path):
        tiny_heads.add_kev_head(base, 48)
        folder = resolve(str(base))
        head, wanted = load_file(folder / "decision_head.safetensors"), tiny_heads.pointer_head(48)
        assert head.keys() == wanted.keys()
        assert all((head[name] == wanted[name]).all() for name in head)
        assert json.loads((folder / "kev.json").read_text()) == {"temperature": tiny_heads.TEMPERATURE}
        assert (folder / "model.safetensors").readlink() == base / "model.safetensors"

    def test_a_changed_head_has_another_folder(self, base: Path):
        tiny_heads.add_kev_head(base, 48)
        before = resolve(str(base))
        tiny_heads.add_kev_head(base, 48, suite="other")
        assert resolve(str(base)) != before

    def test_a_head_beside_an_adapter(self, base: Path, tmp_path: Path):
        adapter = tmp_path / "kev"
        adapter.mkdir()
        write_json(adapter / "adapter_config.json", {"peft_type": "LORA", "base_model_name_or_path": str(base)})
        (adapter / "adapter_model.safetensors").write_bytes(b"x")
        tiny_heads.add_kev_head(adapter, 48)
        folder = resolve(str(adapter))
        assert {"decision_head.safetensors", "kev.json", "model.safetensors", "adapter_model.safetensors"} <= {
            path.name for path in folder.iterdir()
        }

    def test_another_head_is_left_as_it_is(self, base: Path):
        (base / "head.pt").write_bytes(b"of something else")
        assert resolve(str(base)) == base

    @pytest.mark.parametrize(
        ("more", "said"),
        [
            ({"option_isolation": True}, "option_isolation hides a question's options from each other"),
            ({"head": {}}, "a pointer head has q and k"),
            ({"head": 1}, "is no head of kev's"),
        ],
    )
    def test_heads_that_are_refused(self, base: Path, more: dict[str, Any], said: str):
        tiny_heads.add_kev_head(base, 48, **more)
        with pytest.raises(ModelSourceError, match=said):
            resolve(str(base))

    def test_without_torch(self, base: Path, monkeypatch: pytest.MonkeyPatch):
        tiny_heads.add_kev_head(base, 48)
        found = importlib.util.find_spec
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "torch" else found(name))
        with pytest.raises(ModelSourceError, match="pip install torch"):
            resolve(str(base))


def test_files_by_which_an_adapter_says_how_it_is_asked_lie_beside_its_base(tmp_path: Path):
    base = make_family(tmp_path / "base", "qwen3")
    tiny_heads.tokenizer().save(str(base / "tokenizer.json"))
    adapter = tmp_path / "lev"
    adapter.mkdir()
    write_json(adapter / "adapter_config.json", {"peft_type": "LORA", "base_model_name_or_path": str(base)})
    (adapter / "adapter_model.safetensors").write_bytes(b"x")
    (adapter / "lev_release.json").write_text("{}")
    assert (resolve(str(adapter)) / "lev_release.json").is_file()


class TestLaya:
    def test_its_files_are_laid_out_as_a_models(self, tmp_path: Path):
        source = make_laya(tmp_path / "Laya")
        folder = resolve(str(source))
        config = json.loads((folder / "config.json").read_text())
        assert (config["architectures"], config["head_layers"]) == (["LayaDecisionModel"], 2)
        assert config["max_position_embeddings"] == 900
        assert (folder / "tokenizer.json").readlink() == source / "tokenizer" / "tokenizer.json"
        assert (folder / "model.safetensors").readlink() == source / "model.safetensors"

    def test_what_is_missing_is_named(self, tmp_path: Path):
        source = make_laya(tmp_path / "Laya")
        (source / "encoder" / "config.json").rename(tmp_path / "config.json")
        with pytest.raises(ModelSourceError, match=r"encoder/config\.json is not there"):
            resolve(str(source))

    def test_another_encoder_is_refused(self, tmp_path: Path):
        source = make_laya(tmp_path / "Laya")
        write_json(source / "encoder" / "config.json", {"model_type": "deberta-v2"})
        with pytest.raises(ModelSourceError, match="'deberta-v2', and only 'modernbert' is implemented"):
            resolve(str(source))

    def test_the_hub_is_asked_for_its_folders(self, tmp_path: Path):
        assert subfolders(make_laya(tmp_path / "Laya")) == ["encoder", "tokenizer"]

    def test_its_profile_has_the_checkpoints_tokens_and_usable_temperatures(self, tmp_path: Path):
        source = make_laya(tmp_path / "Laya")
        declared = json.loads((source / "tokenizer" / "tokenizer_config.json").read_text())
        own = {"cls_token": "<bos>", "sep_token": {"content": "<eos>"}, "mask_token": "<mask>"}
        write_json(source / "tokenizer" / "tokenizer_config.json", declared | own)
        said = json.loads((source / "rl_agent_config.json").read_text())
        write_json(source / "rl_agent_config.json", said | {"temperature": [1.3, 0.2, "none"], "head_max_len": 256})
        folder = resolve(str(source))
        profile = choose_profile(ModelSettings(model=str(source)), TextTokenizer.load(folder), None, folder).profile
        assert (profile.name, profile.window, profile.control) == ("laya-v1", 256, ("<bos>", "<eos>", "<mask>"))
        assert profile.front("x") == "<bos>"
        assert profile.option_text("choice", ShownOption("0", "a", "a", "b")) == "<mask> a: b"
        assert profile.closing_text({"a": 1}) == '<eos>{"a": 1}<eos>'
        assert [profile.divisor(kind, 40) for kind in ("choice", "score", "noul")] == [2.5, 0.5, 1.0]
        assert [profile.divisor("choice", 3), profile.divisor("score", 2)] == [0.8, 5.0]
