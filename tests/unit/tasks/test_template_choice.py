"""The rerank template that a model gets by the files in its folder and by its name."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from serve_app import local_ray
from serve_app.cli import launcher
from serve_app.cli.launcher import LaunchError
from serve_app.frontend.info import info as told
from serve_app.frontend.ingress import load_tokenizers
from serve_app.frontend.service import ModelService
from serve_app.scorer.fake_engine import FakeEngine
from serve_app.settings import ModelSettings
from serve_app.tasks.template_choice import CUSTOM, Choice, choose
from serve_app.tasks.tokenizer import TextTokenizer
from serve_app.templates import MXBAI_RERANK, PLAIN, PLAIN_V1, QWEN3_RERANKER, TEMPLATES, RerankTemplate
from tests.local import DirectReplicas, service_of
from tests.tiny import make_llama

QWEN3 = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "vocab_size": 151_936}
QWEN2 = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "vocab_size": 151_936}
HEAD = {**QWEN3, "architectures": ["Qwen3ForSequenceClassification"], "id2label": {"0": "LABEL_0"}}
LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
JUDGE = (
    "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the Instruct "
    'provided. Note that the answer can only be "yes" or "no".<|im_end|>\n'
)
EXPERT = "You are a search relevance expert who evaluates how well documents match search queries. For each ..."
MODULES = [{"idx": 1, "type": "sentence_transformers.cross_encoder.modules.logit_score.LogitScore"}]


def card(head: str, title: str = "# my model", text: str = "") -> str:
    return f"---\nlicense: apache-2.0\n{head}\n---\n\n{title}\n\n{text}\n"


def chosen(folder: Path, config: dict[str, Any], files: dict[str, object], model: str = "/models/mine") -> Choice:
    for name, content in {"config.json": config, **files}.items():
        (folder / name).write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return choose(ModelSettings(model=model), folder)


RECOGNISED: dict[str, tuple[str, dict[str, Any], dict[str, object], str]] = {
    "fine-tune of transformers 4": (
        QWEN3_RERANKER,
        {**QWEN3, "_name_or_path": "Qwen/Qwen3-Reranker-0.6B"},
        {},
        "config.json says Qwen3-Reranker",
    ),
    "fine-tune with a card": (
        QWEN3_RERANKER,
        QWEN3,
        {"README.md": card("base_model:\n- Qwen/Qwen3-Reranker-4B")},
        "README.md",
    ),
    "copy with its card": (
        QWEN3_RERANKER,
        QWEN3,
        {"README.md": card("base_model:\n- Qwen/Qwen3-0.6B-Base", "# Qwen3-Reranker-0.6B")},
        "README.md",
    ),
    "merge": (
        QWEN3_RERANKER,
        QWEN3,
        {"mergekit_config.yml": "models:\n  - model: Qwen/Qwen3-Reranker-8B\n"},
        "mergekit_config.yml",
    ),
    "merged adapter": (
        QWEN3_RERANKER,
        QWEN3,
        {"adapter_config.json": {"base_model_name_or_path": "/data/qwen3_reranker"}},
        "adapter_config.json",
    ),
    "for sentence-transformers": (
        QWEN3_RERANKER,
        QWEN3,
        {"chat_template.jinja": JUDGE + "{{ x }}", "modules.json": MODULES},
        "chat_template.jinja",
    ),
    "chat template in tokenizer_config.json": (
        QWEN3_RERANKER,
        QWEN3,
        {"tokenizer_config.json": {"chat_template": JUDGE}},
        "tokenizer_config.json",
    ),
    "vLLM's keys": (
        QWEN3_RERANKER,
        {**QWEN3, "is_original_qwen3_reranker": True},
        {},
        "is_original_qwen3_reranker",
    ),
    "vLLM's other key": (
        QWEN3_RERANKER,
        {**QWEN3, "classifier_from_token": ["no", "yes"]},
        {},
        "classifier_from_token",
    ),
    "as a classifier": (QWEN3_RERANKER, {**HEAD, "_name_or_path": "tomaarsen/Qwen3-Reranker-0.6B-seq-cls"}, {}, "says"),
    "mxbai fine-tune": (MXBAI_RERANK, {**QWEN2, "_name_or_path": "mixedbread-ai/mxbai-rerank-base-v2"}, {}, "config"),
    "mxbai with a card": (
        MXBAI_RERANK,
        QWEN2,
        {"README.md": card("base_model: mixedbread-ai/mxbai-rerank-large-v2")},
        "README.md",
    ),
    "mxbai for sentence-transformers": (MXBAI_RERANK, QWEN2, {"chat_template.jinja": EXPERT}, "chat_template.jinja"),
}


class TestRecognised:
    @pytest.mark.parametrize("kind", RECOGNISED)
    def test_by_what_is_in_the_folder(self, kind: str, tmp_path: Path):
        name, config, files, because = RECOGNISED[kind]
        choice = chosen(tmp_path, config, files)
        assert (choice.name, choice.template, choice.doubt) == (name, TEMPLATES[name], None)
        assert because in choice.because
        assert name in str(choice)

    @pytest.mark.parametrize(
        "model", ["Qwen/Qwen3-Reranker-0.6B", "/m/qwen3-reranker-4b", "Qwen3-Reranker-8B.Q8_0.gguf"]
    )
    def test_by_name(self, model: str, tmp_path: Path):
        assert choose(ModelSettings(model=model)).name == QWEN3_RERANKER
        assert chosen(tmp_path, QWEN3, {}, model).name == QWEN3_RERANKER

    def test_mxbai_by_name(self, tmp_path: Path):
        assert choose(ModelSettings(model="mixedbread-ai/mxbai-rerank-large-v2")).name == MXBAI_RERANK
        assert chosen(tmp_path, QWEN2, {}, "/models/mxbai-rerank-base-v2").name == MXBAI_RERANK
        assert choose(ModelSettings(model="mixedbread-ai/mxbai-rerank-base-v1")).name == PLAIN

    def test_by_the_size_of_its_vocabulary_with_a_doubt(self, tmp_path: Path):
        choice = chosen(tmp_path, {**QWEN3, "vocab_size": 151_669}, {})
        assert choice.name == QWEN3_RERANKER
        assert choice.doubt is not None
        assert "151669" in choice.doubt
        assert "set rerank_template" in choice.doubt

    def test_the_settings_come_first(self, tmp_path: Path):
        (tmp_path / "config.json").write_text(json.dumps({**QWEN3, "is_original_qwen3_reranker": True}))
        own = RerankTemplate(prompt="{query} {document}?")
        for asked, name in ((PLAIN_V1, PLAIN_V1), (own, CUSTOM)):
            choice = choose(ModelSettings(model="rerank", rerank_template=asked), tmp_path)
            assert (choice.name, choice.doubt) == (name, None)


class TestPlain:
    @pytest.mark.parametrize(
        ("config", "files", "model"),
        [
            (QWEN3, {}, "Qwen/Qwen3-0.6B"),
            (QWEN2, {}, "Qwen/Qwen2.5-0.5B-Instruct"),
            (LLAMA, {}, "demo"),
            (QWEN3, {"README.md": card("", text="Better than Qwen3-Reranker-0.6B and mxbai-rerank-base-v2.")}, "judge"),
            ({**HEAD, "id2label": {"0": "a", "1": "b", "2": "c"}}, {}, "sorter"),
        ],
        ids=["Qwen3", "Qwen2", "demo", "card that compares", "three classes"],
    )
    def test_without_a_doubt(self, config: dict[str, Any], files: dict[str, object], model: str, tmp_path: Path):
        choice = chosen(tmp_path, config, files, model)
        assert (choice.name, choice.doubt) == (PLAIN, None)

    @pytest.mark.parametrize(
        ("config", "files", "model", "said"),
        [
            (QWEN3, {}, "/models/legal-reranker", "its name says that this is a reranker"),
            (QWEN3, {}, "zeroentropy/zerank-2", "its name says that this is a reranker"),
            (LLAMA, {}, "/models/qwen3-reranker-of-llama", "its name says that this is a reranker"),
            (QWEN3, {"README.md": card("pipeline_tag: text-ranking")}, "/models/a", "README.md says"),
            (QWEN3, {"modules.json": MODULES}, "/models/a", "modules.json says"),
            (HEAD, {}, "/models/a", "has a classification head"),
            ({**HEAD, "id2label": {"0": "a", "1": "b"}}, {}, "/models/a", "has a classification head"),
            ({"architectures": ["LlamaForSequenceClassification"]}, {}, "/models/a", "has a classification head"),
        ],
    )
    def test_with_a_doubt(
        self, config: dict[str, Any], files: dict[str, object], model: str, said: str, tmp_path: Path
    ):
        choice = chosen(tmp_path, config, files, model)
        assert choice.name == PLAIN
        assert choice.doubt is not None
        assert said in choice.doubt
        assert "set rerank_template" in choice.doubt

    def test_files_that_cannot_be_read_are_no_evidence(self, tmp_path: Path):
        files: dict[str, object] = {"tokenizer_config.json": "{", "adapter_config.json": "[]", "README.md": "---\n"}
        assert chosen(tmp_path, QWEN3, files).name == PLAIN


class TestReported:
    """The template's name in ``/v1/info`` and the log."""

    @pytest.mark.parametrize(
        ("fields", "classes", "name"),
        [
            ({}, 0, QWEN3_RERANKER),
            ({}, 1, QWEN3_RERANKER),
            ({}, 3, None),
            ({"rerank_template": PLAIN_V1}, 0, PLAIN_V1),
            ({"rerank_template": {"prompt": "{query} {document}?", "yes": "a", "no": "b"}}, 0, CUSTOM),
        ],
    )
    def test_in_info(
        self, fields: dict[str, Any], classes: int, name: str | None, tokenizer: TextTokenizer, tmp_path: Path
    ):
        (tmp_path / "config.json").write_text(json.dumps({**QWEN3, "is_original_qwen3_reranker": True}))
        engine = FakeEngine(1_024, 512)
        info = replace(engine.info, classes=classes)
        settings = ModelSettings.model_validate({"model": "mine", "engine": "fake", **fields})
        service = ModelService(settings, tokenizer, info, DirectReplicas(engine), folder=tmp_path)
        assert told(service, ["mine"]).rerank_template == name
        service.reconfigure(settings)
        assert told(service, ["mine"]).rerank_template == name

    @pytest.mark.parametrize("doubtful", [False, True])
    def test_in_the_front_ends_log(self, doubtful: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture):
        folder = make_llama(tmp_path / ("my-reranker" if doubtful else "mine"), layers=1, vocab=271, tokenizer=True)
        caplog.set_level("INFO", logger="ray.serve")
        [(found, _)] = load_tokenizers([ModelSettings(model=str(folder), served_name="judge")])
        assert found == folder
        said = [(record.levelname, record.getMessage()) for record in caplog.records]
        assert said[0][0] == "INFO"
        assert said[0][1].startswith(f"judge: /v1/rerank uses the template {PLAIN} (")
        assert said.pop() == ("INFO", "judge: decisions use the profile plain-v1 (the model has no chat template)")
        assert [level for level, _ in said[1:]] == ["WARNING"] * doubtful
        assert all("judge: its name says that this is a reranker" in line for _, line in said[1:])

    def test_on_the_console_before_anything_starts(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
    ):
        def stop(*_: object, **__: object) -> None:
            raise LaunchError("far enough")

        folder = make_llama(tmp_path / "my-reranker", layers=1, vocab=271, tokenizer=True)
        monkeypatch.setattr(launcher, "_service", stop)
        monkeypatch.setattr(launcher, "interrupt_on_signals", lambda: None)
        with pytest.raises(LaunchError, match="far enough"):
            launcher.run(service_of(ModelSettings(model=str(folder))), host="127.0.0.1", port=local_ray.free_port())
        said = capfd.readouterr().err
        assert f"my-reranker: /v1/rerank uses the template {PLAIN} (" in said
        assert "warning: my-reranker: its name says that this is a reranker" in said
