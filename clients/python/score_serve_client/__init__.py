"""A light client of score-serve: it needs httpx, pydantic and tenacity, and neither Ray nor jax."""

from score_serve_client.answers import (
    Decision,
    DecisionLine,
    Decisions,
    Models,
    Ranking,
    Result,
    Row,
    Scores,
    Usage,
)
from score_serve_client.client import AsyncClient, Client
from score_serve_client.errors import ScoreServeError, UnavailableError

__all__ = [
    "AsyncClient",
    "Client",
    "Decision",
    "DecisionLine",
    "Decisions",
    "Models",
    "Ranking",
    "Result",
    "Row",
    "ScoreServeError",
    "Scores",
    "UnavailableError",
    "Usage",
]
