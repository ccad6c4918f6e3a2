"""What a job is: a data set, what to ask about each of its rows, and where to write the answers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, cast

from serve_app.jobs import columns, deciding, scoring, teaching
from serve_app.jobs.columns import Column
from serve_app.jobs.files import Format
from serve_app.jobs.scoring import Cost, Told
from serve_app.jobs.targets import Ask, Target
from serve_app.schemas import ScoreRequest
from serve_app.tasks.logprobs import LOGPROBS, LogprobsRequest, LogprobsResponse
from serve_app.tasks.score import SCORE
from serve_app.tasks.systemone import SYSTEMONE, SystemOneRequest

Values = dict[str, Any]
"""A row's value in each of the columns that a job adds."""

AskRows = Callable[[Sequence[tuple[int, Sequence[str]]], Told], tuple[dict[int, Values | str], Cost]]
"""Asks about rows, each a position and its filled-in templates, and tells of each that is done. Returns their values,
or why a row has none.

Raises:
    ScoringError: no row can be answered.
"""


@dataclass(frozen=True)
class AnyJob(ABC):
    """What all kinds of jobs have.

    Attributes:
        inputs: files or folders of one format.
        output: the output folder.
        output_format: None for the input's.
        block_rows: rows that are read, asked about and written together.
        facts: names of facts about the model that the answers depend on, beside those that identify it.
    """

    facts: ClassVar[Sequence[str]] = ()

    inputs: tuple[Path, ...]
    output: Path
    output_format: Format | None = field(default=None, kw_only=True)
    block_rows: int = field(default=1_000, kw_only=True)

    @property
    @abstractmethod
    def model(self) -> str:
        """The served name of the model."""

    @property
    @abstractmethod
    def templates(self) -> Mapping[str, str]:
        """The templates of each row's texts by name."""

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """What the answers depend on beside the rows, the templates and the model, for ``job.json``."""

    @abstractmethod
    def columns(self, answers: Sequence[Values] = ()) -> dict[str, Column]:
        """The columns that the job adds, by name.

        Args:
            answers: some rows' values; they may name the labels.

        Raises:
            ValueError: two columns would have the same name.
        """

    @abstractmethod
    def connect(self, target: Target) -> AskRows:
        """Connect to what answers, once in each worker."""


@dataclass(frozen=True)
class Job(AnyJob):
    """A job that scores labels.

    Attributes:
        query, item: templates of each row's query and item.
        request: the other fields of the request for each row; its query and items are not used.
    """

    item: str
    request: ScoreRequest
    query: str = ""

    @property
    def model(self) -> str:
        return self.request.model

    @property
    def templates(self) -> Mapping[str, str]:
        return {"query": self.query, "item": self.item}

    def settings(self) -> dict[str, Any]:
        unused = {"query", "items", "stream", "on_error", "timeout_s"}
        return {"request": self.request.model_dump(exclude=unused, exclude_none=True)}

    def columns(self, answers: Sequence[Values] = ()) -> dict[str, Column]:
        given = self.request.labels or self.request.label_token_ids
        width = max((len(each["scores"]) for each in answers), default=0)  # a classifier's labels are its classes
        return columns.of_scores(self.request, [str(label) for label in given or range(width)])

    def connect(self, target: Target) -> AskRows:
        ask = target.connect(SCORE)
        return lambda asked, told: scoring.score(
            self.request, [(at, query, item) for at, (query, item) in asked], ask, told
        )


@dataclass(frozen=True)
class DecisionJob(AnyJob):
    """A job that decides questions.

    Attributes:
        state: template of each row's state.
        request: the questions, and the other fields of the request for each row; its state is not used.
    """

    facts = ("decision_profile", "calibration")

    state: str
    request: SystemOneRequest

    @property
    def model(self) -> str:
        return self.request.model

    @property
    def templates(self) -> Mapping[str, str]:
        return {"state": self.state}

    def settings(self) -> dict[str, Any]:
        # As text, since the order of a question's options counts; the order of the columns is that of the questions.
        questions = {name: each.model_dump_json() for name, each in self.request.questions.items()}
        return {"questions": questions, "columns": [*self.columns()], "permutations": self.request.permutations}

    def columns(self, answers: Sequence[Values] = ()) -> dict[str, Column]:  # noqa: ARG002 - the questions say it
        return columns.of_decisions(self.request.questions)

    def connect(self, target: Target) -> AskRows:
        ask = target.connect(SYSTEMONE)
        return lambda asked, told: deciding.decide(self.request, [(at, state) for at, (state,) in asked], ask, told)


@dataclass(frozen=True)
class LogprobsJob(AnyJob):
    """A job that writes a teacher's logprobs.

    Attributes:
        text: template of each row's sequence.
        request: the other fields of the request for each row; its input is not used.
    """

    text: str
    request: LogprobsRequest

    @property
    def model(self) -> str:
        return self.request.model

    @property
    def templates(self) -> Mapping[str, str]:
        return {"text": self.text}

    def settings(self) -> dict[str, Any]:
        return {"logprobs": self.request.model_dump(exclude={"input", "format", "timeout_s"}, exclude_none=True)}

    def columns(self, answers: Sequence[Values] = ()) -> dict[str, Column]:  # noqa: ARG002 - the request says it
        return columns.of_logprobs(self.request)

    def connect(self, target: Target) -> AskRows:
        ask = cast(Ask[LogprobsRequest, LogprobsResponse], target.connect(LOGPROBS))
        return lambda asked, told: teaching.teach(self.request, [(at, text) for at, (text,) in asked], ask, told)
