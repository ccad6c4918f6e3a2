"""Tiny random Llama checkpoints against transformers' float32 forward."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from model import loading
from tests.batches import label_batch, reads_batch
from tests.parity.cases import CASES, GOLDENS, HAVE_TORCH, LABELS, expected, sequences
from tests.tiny import make_llama

OFTEN = {"no-groups", "untied"}
"""Cases that every run compares with ``paged``, too; the others are of the parts that all implementations share."""


@pytest.mark.parametrize(
    ("case", "implementation"),
    [
        *((case, "native") for case in CASES),
        *(pytest.param(case, "paged", marks=() if case in OFTEN else pytest.mark.slow) for case in CASES),
        ("untied", "reference"),
        pytest.param("tied", "reference", marks=pytest.mark.slow),
    ],
)
def test_float32_logprobs_equal_transformers(case: str, implementation: str, tmp_path: Path) -> None:
    folder = make_llama(tmp_path, **CASES[case])
    scorer = loading.load(folder, implementation=implementation, max_segment_tokens=64, call_tokens=64)
    prompts = sequences()
    values = scorer.score(label_batch(prompts, [LABELS] * len(prompts))).values
    wanted = np.array(expected(case, folder))
    assert wanted.std() > 1, "the reference must vary, or the case shows nothing"
    np.testing.assert_allclose(values.reshape(wanted.shape), wanted, rtol=0, atol=1e-4)


@pytest.mark.skipif(not HAVE_TORCH, reason="torch, the reference, is not installed")
def test_every_token_of_a_prompt_and_the_top_ones(tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    folder = make_llama(tmp_path, **CASES["untied"])
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    prompts = [sequences()[i] for i in (0, 6, 12)]
    reads = [[*((at, [token]) for at, token in enumerate(tokens[1:])), (len(tokens) - 1, [])] for tokens in prompts]
    scorer = loading.load(folder, max_segment_tokens=64, call_tokens=64)
    result = scorer.score(replace(reads_batch(prompts, reads), argmax=True))
    with torch.no_grad():
        logprobs = [torch.log_softmax(reference(torch.tensor([tokens])).logits[0], -1).numpy() for tokens in prompts]
    own = [rows[np.arange(len(tokens) - 1), tokens[1:]] for rows, tokens in zip(logprobs, prompts, strict=True)]
    np.testing.assert_allclose(result.values, np.concatenate(own), rtol=0, atol=1e-4)
    np.testing.assert_array_equal(result.argmax, np.concatenate([rows.argmax(-1) for rows in logprobs]))
    highest = np.concatenate([rows.max(-1) for rows in logprobs])
    np.testing.assert_allclose(result.argmax_values, highest, rtol=0, atol=1e-4)


@pytest.mark.skipif(not HAVE_TORCH, reason="torch is not installed: nothing to compare the stored answers with")
@pytest.mark.parametrize("case", ["untied", "llama3-rope"])
def test_stored_answers_are_transformers_own(case: str, tmp_path: Path) -> None:
    stored = json.loads(GOLDENS.read_text())[case]
    np.testing.assert_allclose(stored, expected(case, make_llama(tmp_path, **CASES[case])), rtol=0, atol=1e-5)


def test_bfloat16_stays_near_float32(tmp_path: Path) -> None:
    folder = make_llama(tmp_path)
    prompts = sequences()
    batch = label_batch(prompts, [LABELS] * len(prompts))
    values = loading.load(folder, dtype="bfloat16", max_segment_tokens=64, call_tokens=64).score(batch).values
    difference = np.abs(values - np.array(expected("untied", folder)).ravel())
    assert 1e-5 < difference.max() < 0.5
