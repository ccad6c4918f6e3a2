"""The benchmark's decision requests: D1, D2 and D3, questions of four options about a state."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from model.contract import ModelInfo, common_prefix
from serve_app import model_source
from serve_app.settings import ModelSettings
from serve_app.tasks.decisions.decider import Decider
from serve_app.tasks.decisions.questions import Kind, Option, Question
from serve_app.tasks.model_facts import ModelFacts
from serve_app.tasks.steps import finish
from serve_app.tasks.tokenizer import TextTokenizer

if TYPE_CHECKING:
    from scripts.benchmarks.work import Request

SHAPES = {"D1": (1, 300, 5), "D2": (1, 2_000, 50), "D3": (16, 300, 5)}
"""Clients that ask at once, tokens of the state, and number of questions, each about 60 tokens with its options."""
OPTIONS = ("yes, surely", "rather yes", "rather no", "no")

_FRONT, _TAIL = 28, 36
"""Tokens that the demo model's chat template and the profile add before a state, and to a question with its options."""


def lengths(name: str) -> tuple[int, list[int]]:
    """Tokens of running text for the state, and for each question."""
    _, state, questions = SHAPES[name]
    return state - _FRONT, [60 - _TAIL] * questions


def as_decision(cut: Request) -> Request:
    """A request whose query is the state and whose items are the questions, as the service tokenises it.

    Its ids are those of the service's own prompts, so that all systems compute the same tokens.
    """
    state, asked = cut.query_text.strip(), [text.strip() for text in cut.items_text]
    questions = [Question(Kind.CHOICE, text, tuple(map(Option, OPTIONS)), ()) for text in asked]
    batch = finish(_decider().prepare(state, questions, 1, lambda decided: decided)).batch
    prompts = [batch.tokens[start:stop] for start, stop in pairwise(batch.offsets.tolist())]
    shared = min(common_prefix(prompts[0], prompt) for prompt in prompts)
    labels = batch.targets[: batch.target_offsets[1]].tolist()
    choices = [{"value": option} for option in OPTIONS]
    body: dict[str, Any] = {
        "model": "default",
        "input": state,
        "questions": [{"type": "choice", "instructions": text, "choices": choices} for text in asked],
    }
    return replace(
        cut,
        query_ids=prompts[0][:shared].tolist(),
        items_ids=[prompt[shared:].tolist() for prompt in prompts],
        label_ids=labels,
        decision=body,
    )


def probabilities(rows: list[list[float]]) -> list[list[float]]:
    """Logarithms of the options' probabilities from those of their labels, of which each option has as many."""
    values = np.array(rows).reshape(len(rows), len(OPTIONS), -1)
    options = np.logaddexp.reduce(values, axis=2)
    return (options - np.logaddexp.reduce(options, axis=1, keepdims=True)).tolist()


def qwen3_folder() -> Path:
    """A checkpoint of Qwen3's architecture, with the demo model's sizes, its tokenizer and random weights.

    vLLM's decision routes take that architecture, and not the demo model's. The sizes are all that time depends on.
    """
    folder = model_source.cache_folder() / "qwen3-of-demo-sizes"
    if not (folder / "config.json").exists():
        import torch
        from transformers import Qwen3Config, Qwen3ForCausalLM

        demo = model_source.resolve("demo")
        sizes = json.loads((demo / "config.json").read_text())
        config = Qwen3Config(**{key: sizes[key] for key in sizes.keys() - {"architectures", "model_type", "dtype"}})
        torch.manual_seed(0)
        Qwen3ForCausalLM(config).save_pretrained(folder)
        for file in demo.glob("tokenizer*"):
            shutil.copy(file, folder)
    return folder


def as_systemone(decision: dict[str, Any]) -> dict[str, Any]:
    """The same request in TypeSafe's shape, which vLLM takes."""
    questions = {
        str(number): {
            "type": "choice",
            "instructions": question["instructions"],
            "criteria": {choice["value"]: None for choice in question["choices"]},
        }
        for number, question in enumerate(decision["questions"])
    }
    return {"model": decision["model"], "state": decision["input"], "questions": questions}


@cache
def _decider() -> Decider:
    folder = model_source.resolve("demo")
    tokenizer = TextTokenizer.load(folder)
    size = tokenizer.backend.get_vocab_size()
    info = ModelInfo(size, 8_192, 8_192, "float32", "LlamaForCausalLM", "cpu", ())
    return Decider.of(ModelFacts.of(ModelSettings(), tokenizer, info, folder))
