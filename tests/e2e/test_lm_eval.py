"""lm-evaluation-harness on the demo model: its own transformers backend, and this service by ``local-completions``."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from serve_app import model_source
from serve_app.app import build
from serve_app.settings import Settings

pytestmark = [
    pytest.mark.ray,
    pytest.mark.demo,
    pytest.mark.skipif(find_spec("lm_eval") is None, reason="lm-eval is not installed: pip install -e .[clients]"),
    # Not ours: what the harness and its packages warn of.
    pytest.mark.filterwarnings("ignore"),
]

QUESTIONS = [
    ("The capital of France is", ["Paris", "London", "a banana"], 0),
    ("Water freezes at zero degrees", ["Kelvin", "Celsius", "of latitude"], 1),
    ("The opposite of hot is", ["warm", "boiling", "cold"], 2),
    ("Two plus two makes", ["four", "five", "seven hundred"], 0),
    ("A dog says woof, a cat says", ["moo", "meow", "quack quack"], 1),
    ("The sun rises in the", ["west", "north", "east"], 2),
    ("Romeo and", ["Juliet", "Hamlet", "Ophelia"], 0),
    ("An apple a day keeps the", ["teacher away", "doctor away", "apple"], 1),
]


@pytest.fixture(scope="module")
def client(deploy: Callable[[Any], httpx.Client]) -> httpx.Client:
    return deploy(build(Settings(model="demo", scorer_cpus=0.1, ingress_cpus=0.1)))


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a task of a few lines."""
    folder = tmp_path_factory.mktemp("tasks")
    rows = [{"question": question, "choices": choices, "answer": answer} for question, choices, answer in QUESTIONS]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "facts.yaml").write_text(
        textwrap.dedent(f"""\
            task: facts
            dataset_path: json
            dataset_kwargs:
              data_files: {{test: {folder}/rows.jsonl}}
            output_type: multiple_choice
            test_split: test
            doc_to_text: "{{{{question}}}}"
            doc_to_choice: "{{{{choices}}}}"
            doc_to_target: answer
            metric_list:
              - {{metric: acc}}
            """)
    )
    return folder


def evaluated(model: str, tasks: Path, **model_args: Any) -> tuple[float, list[list[tuple[float, bool]]]]:
    """Accuracy; and of each question's choices log-likelihood, and whether it is what the model would say."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    answer = lm_eval.simple_evaluate(
        model=model, model_args=model_args, tasks=["facts"], task_manager=manager, bootstrap_iters=0, device="cpu"
    )
    samples = sorted(answer["samples"]["facts"], key=lambda sample: sample["doc_id"])
    return answer["results"]["facts"]["acc,none"], [sample["filtered_resps"] for sample in samples]


def test_log_likelihoods_are_those_of_its_own_backend(client: httpx.Client, tasks: Path) -> None:
    folder = str(model_source.resolve("demo"))
    own, wanted = evaluated("hf", tasks, pretrained=folder, dtype="float32")
    ours, told = evaluated(
        "local-completions",
        tasks,
        model="default",
        base_url=f"{client.base_url}/v1/completions",
        tokenizer=folder,
        tokenizer_backend="huggingface",
    )
    assert len(told) == len(QUESTIONS)
    for mine, theirs in zip(told, wanted, strict=True):
        np.testing.assert_allclose([nats for nats, _ in mine], [nats for nats, _ in theirs], rtol=0, atol=1e-3)
        assert [greedy for _, greedy in mine] == [greedy for _, greedy in theirs]
    assert ours == own > 0.5
