"""The self-test of a served model: the scores of a few short prompts must be consistent."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable, Sequence
from functools import partial

from serve_app.batches import pack_labels
from serve_app.contract import BatchResult, TokenBatch
from serve_app.errors import OverloadedError, ScoringError, SelfTestError
from serve_app.frontend.service import ModelService
from serve_app.tasks.model_facts import ModelFacts
from serve_app.tasks.scores import label_scores

Score = Callable[[TokenBatch], Awaitable[BatchResult]]

DEMO_PROBE = ([504, 3575, 282, 4649, 314], [7042, 4528], [0.7725, 0.0125])
"""For the demo model: the prompt "The capital of France is", the labels " Paris" and " London", and the probabilities
that transformers computes."""

_TOLERANCE = 0.02
"""Largest accepted difference between two batches' probabilities: bfloat16 stays far below it, wrong answers do not."""

_DIVISORS = (2, 3, 5, 7, 11, 13, 17, 19, 23)
"""Divisors of the largest id. They give ids in the lower half of the vocabulary, where real models have trained
tokens."""
_LAST_ALIKE = ((0, 1, 2, 3, 4), (5, 6, 7, 8, 4), (3, 5, 0, 1, 4))
_LAST_OTHER = ((1, 6, 3, 0, 5), (2, 8, 7, 1, 0))
"""Prompts, as indices into those ids. They have the same length and are scored alone: if the model's output does not
depend on the ids, the device computes the same numbers, and the scores are equal to the last bit."""

_REMEDY = (
    "its weights are damaged, or part of them is zero: compare the checkpoint's files with their source, fetch them "
    "again, or serve another checkpoint"
)


class SelfTest:
    """Tests a served model until it has passed once."""

    def __init__(self, service: ModelService) -> None:
        self._service = service
        self._passed = False
        self._running = asyncio.Lock()

    async def passed(self) -> None:
        """Return once the model has passed.

        Raises:
            SelfTestError: it failed.
            OverloadedError: it cannot score yet; the message says why.
        """
        async with self._running:
            if self._passed:
                return
            try:
                await self._service.in_time(self._run())
            except ScoringError as error:
                kind = SelfTestError if isinstance(error, SelfTestError) else OverloadedError
                name = self._service.settings.name
                raise kind(f"{name} is not ready: {error.message}", retry_after_s=1) from error
            self._passed = True

    async def _run(self) -> None:
        settings, score = self._service.settings, partial(self._service.compute, request_id="ready")
        await check(score, self._service.model)
        if settings.model == "demo" and settings.engine == "jax":
            await check_demo(score)


async def check(score: Score, model: ModelFacts) -> None:
    """Check that a model's scores are consistent.

    The scores must be finite, depend on the whole prompt and on the label, and be the same for a prompt alone and in a
    batch. Raw log-probabilities or class logits are compared, which differ even where a softmax over the labels
    saturates.

    Raises:
        SelfTestError: they are not; the message says what was found and what to do.
        ScoringError: no answer came.
    """
    last = model.info.vocab_size - 1
    ids = [last // divisor for divisor in _DIVISORS]
    labels = [*range(model.info.classes)] or sorted({0, last // 3, last // 2, last})
    if model.info.decision_head:
        labels = [0]  # the last token is an option, and its own query
    alike, other = ([[ids[place] for place in prompt] for prompt in prompts] for prompts in (_LAST_ALIKE, _LAST_OTHER))
    causal = not model.info.classes and not model.info.decision_head
    alone = [(await score(_batch([prompt], labels, causal))).values.tolist() for prompt in (*alike, *other)]
    for row in alone:
        if any(math.isnan(value) for value in row) or math.inf in row or max(row) == -math.inf:
            raise SelfTestError(f"the model's output is not finite: a prompt's scores are {_shown(row)}; {_REMEDY}")
    if _equal(alone):
        raise SelfTestError(
            f"{len(alone)} different prompts all scored {_shown(alone[0])}, so the output does not depend on the "
            f"prompt; {_REMEDY}"
        )
    if _equal(alone[: len(alike)]):
        raise SelfTestError(
            f"{len(alike)} prompts that differ in all but their last token scored {_shown(alone[0])}, so the output "
            f"depends on the last token alone; {_REMEDY}"
        )
    if len(labels) > 1 and all(len(set(row)) == 1 for row in alone):
        raise SelfTestError(
            f"{len(labels)} labels have equal scores after each of {len(alone)} prompts, such as {_shown(alone[0])}, "
            f"so the output does not depend on the label; {_REMEDY}"
        )
    together = (await score(_batch([[*ids, 0, last], *alike, *other], labels, causal))).values.reshape(-1, len(labels))
    for row, batched in zip(alone, together[1:].tolist(), strict=True):
        first, second = (label_scores(values, 0, softmax=True) for values in (row, batched))
        if max(abs(a - b) for a, b in zip(first, second, strict=True)) > _TOLERANCE:
            raise SelfTestError(
                f"a prompt scored {first} alone and {second} in a batch: this is a bug of score-serve; report it"
            )


async def check_demo(score: Score) -> None:
    """Check that the demo model gives the probabilities that transformers gives.

    Raises:
        SelfTestError: they differ.
        ScoringError: no answer came.
    """
    prompt, labels, known = DEMO_PROBE
    scores = label_scores((await score(_batch([prompt], labels))).values.tolist(), 0, softmax=False)
    if max(abs(a - b) for a, b in zip(scores, known, strict=True)) > _TOLERANCE:
        raise SelfTestError(f"a known prompt scored {scores}, not {known}; {_REMEDY}")


def _equal(rows: Sequence[Sequence[float]]) -> bool:
    return all(row == rows[0] for row in rows)


def _shown(row: Sequence[float]) -> str:
    """The first scores of a row."""
    return f"[{', '.join(f'{value:.5g}' for value in row[:4])}{', ...' if len(row) > 4 else ''}]"


def _batch(prompts: Sequence[Sequence[int]], labels: Sequence[int], vocab_logprobs: bool = True) -> TokenBatch:
    return pack_labels(prompts, [labels] * len(prompts), vocab_logprobs=vocab_logprobs)
