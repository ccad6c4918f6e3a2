"""Scores of adapters that are merged while they are loaded, against transformers with peft's own merge."""

import logging
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from model import loading, sharding
from model.fields import ConfigError
from model.tensors.adapters import CONFIG, WEIGHTS
from serve_app import model_source
from serve_app.frontend.info import info
from serve_app.frontend.service import ModelService
from serve_app.scorer.engines import load_engine
from serve_app.settings import ModelSettings
from serve_app.tasks.tokenizer import TextTokenizer
from tests.local import DirectReplicas
from tests.parity.cases import HAVE_TORCH, reference, sequences, torch_on_one_thread
from tests.parity.test_classifiers import class_batch
from tests.parity.test_heads import SIZES, logprobs
from tests.tiny import make_llama
from tests.tiny_families import make_family
from tests.tiny_peft import PEFT_WARNS, adapted

pytestmark = [PEFT_WARNS, pytest.mark.skipif(not HAVE_TORCH, reason="torch is not installed")]


def merged_by_peft(folder: Path, *, classes: bool = False) -> Any:
    import torch
    from peft import AutoPeftModelForCausalLM, AutoPeftModelForSequenceClassification

    torch_on_one_thread()
    auto: Any = AutoPeftModelForSequenceClassification if classes else AutoPeftModelForCausalLM
    more = {"num_labels": 3} if classes else {}
    model = auto.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager", **more)
    return model.merge_and_unload().eval()


@pytest.mark.parametrize("options", [{}, {"modules_to_save": ["lm_head"]}], ids=["plain", "with a head of its own"])
def test_a_causal_adapter(options: dict[str, Any], tmp_path: Path) -> None:
    """The base is tied: a saved head unties it."""
    base = make_family(tmp_path / "base", "qwen2")
    folder = tmp_path / "both"
    adapted(base, folder, target_modules="all-linear", **options)
    scorer = loading.load(folder, **SIZES)
    assert scorer.info.notes == (f"LoRA adapter {folder} is merged onto {base} (rank 4, scaling 1.5)",)
    merged_by_peft(folder).save_pretrained(tmp_path / "merged")
    wanted = np.array(reference(tmp_path / "merged"))
    assert np.abs(wanted - np.array(reference(base))).max() > 1
    np.testing.assert_allclose(logprobs(scorer), wanted, rtol=0, atol=1e-4)
    if not options:
        spread = loading.load(folder, mesh=sharding.mesh(1, 2, jax.devices()[:2]), **SIZES)
        np.testing.assert_allclose(logprobs(spread), wanted, rtol=0, atol=1e-4)


def test_an_adapter_with_a_classification_head_on_a_causal_base(tmp_path: Path) -> None:
    import torch

    base = make_family(tmp_path / "base", "qwen3")
    folder = tmp_path / "both"
    adapted(base, folder, target_modules=["q_proj", "gate_proj"], task_type="SEQ_CLS")
    scorer = loading.load(folder, **SIZES)
    assert (scorer.info.architecture, scorer.info.classes) == ("Qwen3ForSequenceClassification", 3)
    model = merged_by_peft(folder, classes=True)
    with torch.no_grad():
        wanted = np.stack([model(torch.tensor([tokens])).logits[0].numpy() for tokens in sequences()])
    got = scorer.score(class_batch(sequences(), 0)).values.reshape(-1, 3)
    assert wanted.std() > 0.3
    np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-4)


def test_an_adapter_is_served_with_a_note_of_what_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The folder that a user names has neither the base's tensors nor a tokenizer."""
    monkeypatch.setenv("SCORE_SERVE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("model.engine.Engine.warmup", lambda *_: None)
    base = make_llama(tmp_path / "base", layers=1, context=32, tokenizer=True)
    adapted(base, tmp_path / "both", target_modules=["q_proj"])
    (tmp_path / "my-judge").mkdir()
    for name in (CONFIG, WEIGHTS):
        (tmp_path / "both" / name).rename(tmp_path / "my-judge" / name)
    settings = ModelSettings(model=str(tmp_path / "my-judge"))
    folder = model_source.resolve(settings.model)
    with caplog.at_level(logging.INFO, "ray.serve"):
        engine = load_engine(settings)
    note = f"LoRA adapter {settings.model} is merged onto {base} (rank 4, scaling 1.5)"
    assert f"my-judge: {note}" in caplog.text
    service = ModelService(settings, TextTokenizer.load(folder), engine.info, DirectReplicas(engine))
    assert info(service, []).notes == [note]
    service.close()


def test_an_adapted_head_that_is_tied_is_refused(tmp_path: Path) -> None:
    base = make_family(tmp_path / "base", "qwen2")
    adapted(base, tmp_path / "both", target_modules=["lm_head"])
    with pytest.raises(ConfigError, match=r"lm_head.weight, which config.json ties"):
        loading.load(tmp_path / "both", **SIZES)
