"""Scores of ``/v1/rerank`` with a published reranker's template, against the reranker's own library."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from model import loading
from serve_app.frontend.service import ModelService
from serve_app.settings import ModelSettings
from serve_app.tasks.rerank import RERANK, RerankRequest
from serve_app.tasks.tokenizer import TextTokenizer
from tests import mxbai
from tests.local import DirectReplicas
from tests.parity.cases import HAVE_TORCH
from tests.tiny_families import make_family

DOCUMENTS = ["It is Paris.", "Berlin", "", "Paris?\n", "火星"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tiny Qwen 2; its tokenizer has tokens that end in a line break."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Punctuation("merged_with_next"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*[".\n?\n"] * 50, mxbai.TASK, mxbai.PREFIX], trainer)
    made = make_family(tmp_path / "judge", "qwen2")
    tokenizer.save(str(made / "tokenizer.json"))
    return made


@pytest.mark.skipif(not HAVE_TORCH, reason="torch is not installed")
@pytest.mark.parametrize(("query", "instruct"), [("Capital?", None), ("The capital.", "Find it."), ("x", None)])
async def test_mxbai_scores_equal_the_librarys(folder: Path, query: str, instruct: str | None) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    tokenizer = TextTokenizer.load(folder)
    yes, no = (tokenizer.backend.token_to_id(word) for word in ("1", "0"))
    wanted: list[float] = []
    with torch.no_grad():
        for document in DOCUMENTS:
            prompt = mxbai.prompt(folder, instruct, query, document, 512)
            logits = model(torch.tensor([prompt])).logits[0, -1].double()
            wanted.append(float(logits[yes] - logits[no]))
    scorer = loading.load(folder, max_segment_tokens=32, call_tokens=64, chunks=(64,), prefix_cache_bytes=2**21)
    settings = ModelSettings(model="mixedbread-ai/mxbai-rerank-base-v2")
    service = ModelService(settings, tokenizer, scorer.info, DirectReplicas(scorer), folder=folder)
    answer = await service.answer(
        RERANK, RerankRequest(query=query, documents=[*DOCUMENTS], instruct=instruct), request_id="r"
    )
    scores = {result.index: result.relevance_score for result in answer.results}
    got = [math.log(scores[index] / (1 - scores[index])) for index in range(len(DOCUMENTS))]
    assert np.std(wanted) > 0.1
    np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-4)
