"""Logprobs of every position, of candidates and of the highest tokens, against transformers' float32 forward."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from model import loading
from tests.batches import reads_batch
from tests.parity.cases import HAVE_TORCH
from tests.tiny import make_llama

pytestmark = pytest.mark.skipif(not HAVE_TORCH, reason="torch, the reference, is not installed")

VOCAB = 307
TOP = 40
FEW_SIZES: dict[str, Any] = {"max_segment_tokens": 64, "call_tokens": 64, "chunks": (128,), "target_sizes": (512,)}


@pytest.mark.parametrize("implementation", ["native", "paged"])
def test_every_position_equals_transformers(implementation: str, tmp_path: Path) -> None:
    """Prompts with few reads and with many, from a start within and beyond their pages, cold and from the cache."""
    import torch
    from transformers import AutoModelForCausalLM

    folder = make_llama(tmp_path, vocab=VOCAB)
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    rng = np.random.default_rng(3)
    shared = rng.integers(0, VOCAB, 150).tolist()
    tails = [rng.integers(0, VOCAB, length).tolist() for length in (330, 90, 20)]
    prompts = [shared + tails[0], shared + tails[1], shared[:140] + tails[2], shared[:9]]
    starts = [1, 150, 3, 1]
    with torch.no_grad():
        logits = [reference(torch.tensor([tokens])).logits[0].double() for tokens in prompts]
    scorer = loading.load(folder, implementation=implementation, **FEW_SIZES)
    for temperature in (1.0, 0.7):
        scaled = [torch.log_softmax(rows / temperature, -1).numpy() for rows in logits]
        reads = [
            [(at - 1, [tokens[at], *rng.integers(0, VOCAB, at % 4).tolist()]) for at in range(start, len(tokens))]
            for tokens, start in zip(prompts, starts, strict=True)
        ]
        batch = replace(reads_batch(prompts, reads), top=TOP, temperature=temperature)
        result = scorer.score(batch)
        rows = np.concatenate([of[[at for at, _ in own]] for of, own in zip(scaled, reads, strict=True)])
        owners = np.repeat(np.arange(len(rows)), np.diff(batch.target_offsets))
        np.testing.assert_allclose(result.values, rows[owners, batch.targets], rtol=0, atol=1e-4)
        np.testing.assert_allclose(result.top_values, -np.sort(-rows, axis=1)[:, :TOP], rtol=0, atol=1e-4)
        np.testing.assert_allclose(
            result.top_values, np.take_along_axis(rows, result.top_ids.astype(int), axis=1), rtol=0, atol=1e-4
        )
        assert all(len(set(row)) == TOP for row in result.top_ids.tolist())
        without = scorer.score(replace(batch, top=0))
        np.testing.assert_allclose(without.values, result.values, rtol=0, atol=2e-5 if implementation == "paged" else 0)
        assert without.top_ids.shape == (len(rows), 0)
    assert scorer.score(batch).computed_tokens.sum() <= sum(map(len, prompts))


def test_completions_of_one_prompt_compute_it_once(tmp_path: Path) -> None:
    """Only pages that are read are computed again."""
    scorer = loading.load(make_llama(tmp_path, vocab=VOCAB), **FEW_SIZES)
    rng = np.random.default_rng(4)
    prompt = rng.integers(0, VOCAB, 256).tolist()
    completions = [prompt + rng.integers(0, VOCAB, 100).tolist() for _ in range(4)]
    batch = reads_batch(completions, [[(at, [0]) for at in range(256, 355)]] * 4)
    assert scorer.score(batch).computed_tokens.sum() == 256 + 4 * 99
    assert scorer.score(batch).computed_tokens.sum() == 4 * 99
    from_the_middle = reads_batch(completions[:1], [[(at, [0]) for at in range(200, 355)]])
    assert scorer.score(from_the_middle).computed_tokens.tolist() == [355 - 128]
