"""The service's parts in this process: a small tokenizer, and replicas around the fake engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from serve_app.contract import Engine, JobResult, ScoreJob
from serve_app.settings import ModelSettings, ServiceSettings

VOCAB_SIZE = 512
"""More than the tokenizer has, as in real models with a padded head."""
CONTEXT = 256

CORPUS = [
    "the quick brown fox jumps over the lazy dog",
    "is this text positive or negative",
    " yes no yes no",
    " Yes No Yes No",
]


def service_of(model: ModelSettings, *, front_ends: int = 1) -> ServiceSettings:
    """A service of this one model, small enough for any machine."""
    return ServiceSettings(models=(model,), ingress_replicas=front_ends, ingress_cpus=0.1)


def save_tokenizer(folder: Path, *, adds_bos: bool) -> Path:
    """A byte-level BPE tokenizer in Hugging Face layout, with an added special token."""
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS * 4, trainer)
    tokenizer.add_special_tokens(["<|im_end|>"])
    if adds_bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    saved: Any = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    saved.save_pretrained(folder)
    return folder


class DirectReplicas:
    """Replicas without a queue or an event loop of their own: the engine answers at once."""

    def __init__(self, engine: Engine, count: int = 1) -> None:
        self.engine = engine
        self.count = count
        self.jobs: list[ScoreJob] = []

    async def score(self, job: ScoreJob) -> JobResult:
        self.jobs.append(job)
        return JobResult(self.engine.score(job.batch), queue_seconds=0.0, device_seconds=0.0)


async def no_metrics() -> str:
    """A stand-in for ``metrics.scrape``, which asks Ray."""
    return "# no Ray, no metrics\n"
