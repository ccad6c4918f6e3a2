"""Table of all tasks. A new task is a file in this folder and an entry here."""

from __future__ import annotations

from collections.abc import Sequence

from serve_app.tasks.classify import CLASSIFY
from serve_app.tasks.completions import COMPLETIONS
from serve_app.tasks.generate import GENERATE
from serve_app.tasks.generative import GENERATIVE
from serve_app.tasks.logprobs import LOGPROBS
from serve_app.tasks.openai_decisions import OPENAI_DECISIONS
from serve_app.tasks.pooling import EMBEDDINGS, POOLING
from serve_app.tasks.remote_reward import REMOTE_REWARD
from serve_app.tasks.rerank import RERANK
from serve_app.tasks.score import SCORE
from serve_app.tasks.systemone import SYSTEMONE
from serve_app.tasks.task import AnyTask
from serve_app.tasks.tei import TEI_RERANK
from serve_app.tasks.tokenize import DETOKENIZE, TOKENIZE

TASKS: Sequence[AnyTask] = (
    SCORE,
    TEI_RERANK,
    RERANK,
    SYSTEMONE,
    OPENAI_DECISIONS,
    COMPLETIONS,
    LOGPROBS,
    GENERATE,
    GENERATIVE,
    CLASSIFY,
    POOLING,
    EMBEDDINGS,
    REMOTE_REWARD,
    TOKENIZE,
    DETOKENIZE,
)
"""All tasks. If several share a route, the first that matches a body takes it."""
