"""The self-test of ``/ready``: healthy models of every kind pass it, broken ones are refused with the reason."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from model import loading
from serve_app.contract import BatchResult, Engine, TokenBatch
from serve_app.errors import OverloadedError, SelfTestError
from serve_app.frontend.readiness import SelfTest
from serve_app.frontend.service import ModelService
from serve_app.scorer.fake_engine import FakeEngine
from serve_app.settings import ModelSettings
from serve_app.tasks.tokenizer import TextTokenizer
from tests.local import CONTEXT, VOCAB_SIZE, DirectReplicas
from tests.tiny import make_llama
from tests.tiny_families import TESTED, make_family

Families = Callable[[str], tuple[Path, Any]]
Answer = Callable[[TokenBatch, BatchResult], np.ndarray]


async def ready(tokenizer: TextTokenizer, scorer: Engine) -> None:
    service = ModelService(ModelSettings(engine="fake"), tokenizer, scorer.info, DirectReplicas(scorer))
    try:
        await SelfTest(service).passed()
    finally:
        service.close()


async def refused(tokenizer: TextTokenizer, scorer: Engine) -> str:
    with pytest.raises(SelfTestError) as raised:
        await ready(tokenizer, scorer)
    return raised.value.message


def load(folder: Path, **options: Any) -> Any:
    return loading.load(
        folder, max_segment_tokens=32, call_tokens=64, chunks=(64,), prefix_cache_bytes=2**21, **options
    )


def change(folder: Path, kept: Callable[[str, np.ndarray], np.ndarray]) -> Path:
    """Replace each tensor with what ``kept`` makes of it."""
    file = folder / "model.safetensors"
    save_file({name: kept(name, tensor) for name, tensor in load_file(file).items()}, file, {"format": "pt"})
    return folder


class Answering(FakeEngine):
    """An engine with the given scores in place of its own."""

    def __init__(self, answer: Answer, classes: int = 0) -> None:
        super().__init__(VOCAB_SIZE, CONTEXT, classes=classes)
        self.answer = answer

    def score(self, batch: TokenBatch) -> BatchResult:
        result = super().score(batch)
        return replace(result, values=self.answer(batch, result).astype(np.float32))


@pytest.mark.parametrize("classes", [0, 1, 2, 3])
@pytest.mark.parametrize("vocab_size", [24, VOCAB_SIZE, 262_144])
async def test_the_fake_engine_passes(classes: int, vocab_size: int, tokenizer: TextTokenizer) -> None:
    await ready(tokenizer, FakeEngine(vocab_size, CONTEXT, classes=classes))


@pytest.mark.heavy
@pytest.mark.parametrize("family", ["llama", *TESTED])
async def test_every_family_passes(family: str, families: Families, tokenizer: TextTokenizer) -> None:
    await ready(tokenizer, families(family)[1])


@pytest.mark.heavy
@pytest.mark.parametrize("classes", [1, 2])
async def test_classifiers_pass(classes: int, tmp_path: Path, tokenizer: TextTokenizer) -> None:
    await ready(tokenizer, load(make_family(tmp_path, "qwen2", classes=classes)))


@pytest.mark.heavy
@pytest.mark.parametrize("options", [{"dtype": "bfloat16"}, {"dtype": "bfloat16", "quantization": "int8"}])
async def test_coarse_numbers_pass(options: dict[str, Any], model_folder: Path, tokenizer: TextTokenizer) -> None:
    await ready(tokenizer, load(model_folder, **options))


class Saturated:
    """An engine with 200 more on class 0's logit."""

    def __init__(self, scorer: Any) -> None:
        self.info, self._scorer = scorer.info, scorer

    def score(self, batch: TokenBatch) -> Any:
        result = self._scorer.score(batch)
        result.values[batch.targets == 0] += 200
        return result


@pytest.mark.heavy
async def test_a_classifier_that_is_sure_of_one_class_passes(tmp_path: Path, tokenizer: TextTokenizer) -> None:
    """Its softmax is 1 and 0 for every prompt; only the logits show that it works."""
    await ready(tokenizer, Saturated(load(make_family(tmp_path, "llama", classes=2))))


BROKEN: dict[str, tuple[Callable[[str, np.ndarray], np.ndarray], str]] = {
    "head": (lambda name, kept: kept * (name != "lm_head.weight"), "does not depend on the prompt"),
    "embedding": (lambda name, kept: kept * ("embed_tokens" not in name), "does not depend on the prompt"),
    "final norm": (lambda name, kept: kept * (name != "model.norm.weight"), "does not depend on the prompt"),
    "all": (lambda _, kept: kept * 0, "does not depend on the prompt"),
    "layers": (lambda name, kept: kept * ("layers" not in name), "depends on the last token alone"),
    "attention": (lambda name, kept: kept * ("o_proj" not in name), "depends on the last token alone"),
    "one row for all": (
        lambda name, kept: np.repeat(kept[:1], len(kept), 0) if name == "lm_head.weight" else kept,
        "does not depend on the label",
    ),
    "not a number": (lambda name, kept: kept * np.float32("nan" if name == "model.norm.weight" else 1), "not finite"),
}


@pytest.mark.heavy
@pytest.mark.parametrize("what", BROKEN)
async def test_a_checkpoint_with_dead_weights_is_refused(what: str, tmp_path: Path, tokenizer: TextTokenizer) -> None:
    broken, said = BROKEN[what]
    message = await refused(tokenizer, load(change(make_llama(tmp_path), broken)))
    assert said in message
    assert "fetch them again" in message


@pytest.mark.heavy
@pytest.mark.parametrize("family", ["qwen2", "gemma2"])
async def test_biases_and_caps_hide_no_dead_embedding(family: str, tmp_path: Path, tokenizer: TextTokenizer) -> None:
    """With biases a zero embedding still gives numbers, but the same ones for every prompt."""
    folder = change(make_family(tmp_path, family, classes=2), lambda name, kept: kept * ("embed_tokens" not in name))
    assert "does not depend on the prompt" in await refused(tokenizer, load(folder))


@pytest.mark.heavy
@pytest.mark.parametrize("classes", [1, 2])
async def test_a_classifier_with_a_dead_head_is_refused(classes: int, tmp_path: Path, tokenizer: TextTokenizer) -> None:
    folder = change(make_family(tmp_path, "llama", classes=classes), lambda name, kept: kept * (name != "score.weight"))
    assert "does not depend on the prompt" in await refused(tokenizer, load(folder))


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (lambda _, result: np.nan_to_num(result.values * np.nan), "5 different prompts all scored [0, 0, 0, 0]"),
        (lambda batch, _: -1.5 - batch.targets / VOCAB_SIZE, "does not depend on the prompt"),
        (lambda batch, _: np.full(len(batch.targets), -np.inf), "not finite"),
        (lambda batch, result: np.where(batch.targets, result.values, np.inf), "not finite"),
        (lambda batch, result: np.full(len(batch.targets), result.values[0]), "4 labels have equal scores"),
        (lambda batch, result: result.values / batch.num_sequences, "in a batch: this is a bug of score-serve"),
    ],
    ids=["all NaN made 0", "labels alone", "nothing likely", "beyond all", "labels alike", "other in a batch"],
)
async def test_a_dead_output_is_refused(answer: Answer, said: str, tokenizer: TextTokenizer) -> None:
    assert said in await refused(tokenizer, Answering(answer))


async def test_the_demo_is_known_by_its_answer(tokenizer: TextTokenizer) -> None:
    scorer = FakeEngine(49_152, CONTEXT)
    service = ModelService(ModelSettings(model="demo", engine="jax"), tokenizer, scorer.info, DirectReplicas(scorer))
    with pytest.raises(SelfTestError, match=r"a known prompt scored .*, not \[0.7725, 0.0125\]; its weights"):
        await SelfTest(service).passed()
    service.close()


async def test_a_fault_that_passes_is_no_failed_test(tokenizer: TextTokenizer) -> None:
    """A replica is unreachable for a moment: the launcher keeps waiting."""

    class Away(DirectReplicas):
        async def score(self, _job: Any) -> Any:
            raise OverloadedError("no healthy replica")

    scorer = FakeEngine(VOCAB_SIZE, CONTEXT)
    service = ModelService(ModelSettings(engine="fake"), tokenizer, scorer.info, Away(scorer))
    with pytest.raises(OverloadedError) as raised:
        await SelfTest(service).passed()
    assert not isinstance(raised.value, SelfTestError)
    service.close()
