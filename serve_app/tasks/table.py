"""All kinds of requests. A new one is a file beside this one, and a line here."""

from __future__ import annotations

from collections.abc import Sequence

from serve_app.tasks.completions import COMPLETIONS
from serve_app.tasks.generative import GENERATIVE
from serve_app.tasks.rerank import RERANK
from serve_app.tasks.score import SCORE
from serve_app.tasks.task import AnyTask
from serve_app.tasks.tei import TEI_RERANK
from serve_app.tasks.tokenize import DETOKENIZE, TOKENIZE

TASKS: Sequence[AnyTask] = (SCORE, TEI_RERANK, RERANK, COMPLETIONS, GENERATIVE, TOKENIZE, DETOKENIZE)
"""Where several share a route, the first that matches a body takes it."""
