"""What the service answers. Fields that a newer service adds are kept, as attributes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict

if TYPE_CHECKING:
    import pandas as pd


class Answer(BaseModel):
    """What all answers have in common."""

    model_config = ConfigDict(extra="allow")


class Usage(Answer):
    """The tokens of a request's prompts."""

    prompt_tokens: int
    total_tokens: int


class Scores(Answer):
    """Scores in the order of the items, each row in the order of the labels."""

    scores: list[list[float] | None]
    model: str
    usage: Usage
    token_logprobs: list[list[float] | None] | None = None
    label_mass: list[float | None] | None = None

    def frame(self, labels: list[str] | None = None, index: Any = None) -> pd.DataFrame:
        """The scores as a DataFrame, with a row for each item and a column for each label; NaN for an item that failed.

        Args:
            labels: the columns; None: numbers.
            index: the rows' index, such as that of the Series of the items.
        """
        import pandas as pd

        width = len(labels) if labels else max((len(row) for row in self.scores if row is not None), default=0)
        rows = [row if row is not None else [float("nan")] * width for row in self.scores]
        return pd.DataFrame(rows, columns=labels or [*range(width)], index=index)


class Row(Answer):
    """One item's scores in a stream."""

    index: int
    scores: list[float] | None = None
    error: dict[str, Any] | None = None


class Result(Answer):
    """One document's place in the request, and its relevance."""

    index: int
    relevance_score: float


class Ranking(Answer):
    """Documents, best first."""

    results: list[Result]
    model: str
    usage: Usage


class Decision(Answer):
    """One question's answer; the fields of its kind are set.

    Attributes:
        type: noul, choice, score, or error where the question has no answer.
        noul: of a question for yes or no: the probability of yes.
        choice: the most probable option.
        score: the mean level.
        probabilities: of each option or level.
        confidence: how sure the answer is, 0 to 1.
        x_label_mass: the options' share of the model's whole probability.
        x_error: why there is no answer.
    """

    type: str
    noul: float | None = None
    choice: str | None = None
    score: float | None = None
    probabilities: dict[str, float] | None = None
    confidence: float | None = None
    x_label_mass: float | None = None
    x_error: dict[str, Any] | None = None


class Decisions(Answer):
    """The answers by the questions' names."""

    answers: dict[str, Decision]


class DecisionLine(Answer):
    """One question's answer in a stream."""

    id: str
    answer: Decision


class ModelCard(Answer):
    """One served model."""

    id: str
    max_model_len: int


class Models(Answer):
    """The served models."""

    data: list[ModelCard]
