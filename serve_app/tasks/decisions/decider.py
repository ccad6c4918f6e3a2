"""Decides typed questions about one state: a prompt for each question, and probabilities from the engine's values."""

from __future__ import annotations

import json
import math
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import chain
from typing import Any, TypeVar, cast

import numpy as np
from pydantic import BaseModel

from serve_app.contract import MOST_READS, BatchResult, Int32, common_prefix
from serve_app.errors import InternalError, InvalidRequestError, ScoringError, TooLargeError
from serve_app.profiles.calibration import Calibration, normalised
from serve_app.profiles.profile import NUMBERED, Profile, ShownOption
from serve_app.tasks.chat import ChatTemplate
from serve_app.tasks.decisions.bodies import DecisionRequest
from serve_app.tasks.decisions.labels import PAIRS, Answers, at_ends, at_starts, codes, lay_out
from serve_app.tasks.decisions.markers import within_window
from serve_app.tasks.decisions.questions import Decided, JsonText, Judged, Judgement, Kind, Option, Question
from serve_app.tasks.labels import added_tokens
from serve_app.tasks.model_facts import LABEL_CHARACTERS, ModelFacts
from serve_app.tasks.prompts import PreparedItems, Prompt, next_step, packed
from serve_app.tasks.steps import Steps
from serve_app.tasks.task import Prepare, PreparedRequest, Stream
from serve_app.tasks.tokenizer import Ending, Joined
from serve_app.tasks.validation import (
    Work,
    check_characters,
    check_decides,
    check_ids,
    check_text,
    check_work,
    of_field,
    too_many_tokens,
)

A = TypeVar("A")
T = TypeVar("T")
R = TypeVar("R", bound=DecisionRequest)

_KNOWN_ANSWERS = 256
"""Layouts of labels that are kept. Most prompts end alike, and their questions have few sets of labels."""
_LONGEST_END = 1_024
"""The most characters of a prompt's end whose layouts are kept: a longer one is of one state or question."""
_PLACES = [chr(code) for code in range(0xFDD4, 0xFDF0)]
"""Noncharacters: one that the state does not have stands for the question, to find the prompt's text around it."""

_ASKS = {"noul": "yes or no", "choice": "a choice", "score": "a score"}


def builder(
    state: Callable[[R], str],
    questions: Callable[[R], Sequence[Question]],
    answer: Callable[[R, str, Decided], A],
    field: str = "state",
) -> Callable[[ModelFacts], Prepare[R, A]]:
    """The ``Task.builder`` of a decision route.

    Args:
        state: the text that a request's questions are about.
        questions: the request's questions. It raises InvalidRequestError if one asks nothing.
        answer: makes the answer to a request, given the model's name.
        field: the name of the state in a request.
    """

    def build(model: ModelFacts) -> Prepare[R, A]:
        decider = Decider.of(model)

        def prepare(request: R, _: str) -> Steps[PreparedRequest[A]]:
            made = partial(answer, request, model.name)
            return decider.prepare(state(request), questions(request), request.permutations, made, field)

        return prepare

    return build


def streams(
    state: Callable[[R], str],
    questions: Callable[[R], Sequence[Question]],
    lines: Callable[[R, Mapping[int, Judged]], Sequence[BaseModel]],
    end: Callable[[str, int, int], BaseModel],
) -> Callable[[ModelFacts], Callable[[R], Stream]]:
    """The ``Lines.builder`` of a decision route, see ``builder``.

    Args:
        lines: makes the lines of some answers, given by the numbers of their questions.
        end: makes the last line of the model's name, the number of input tokens and of those that were cached.
    """

    def build(model: ModelFacts) -> Callable[[R], Stream]:
        decider = Decider.of(model)

        def stream(request: R) -> Stream:
            asked = decider.asked(state(request), "state", questions(request), request.permutations)
            return _Stream(decider, asked, partial(lines, request), partial(end, model.name))

        return stream

    return build


class _Stream:
    """A request's questions, asked some at a time."""

    def __init__(
        self,
        decider: Decider,
        asked: Asked,
        lines: Callable[[Mapping[int, Judged]], Sequence[BaseModel]],
        end: Callable[[int, int], BaseModel],
    ) -> None:
        self._decider, self._asked, self._lines, self._end = decider, asked, lines, end

    @property
    def left(self) -> int:
        return self._asked.left

    def some(self, tokens: int) -> Steps[PreparedRequest[Sequence[BaseModel]]]:
        piece = yield from self._decider.some(self._asked, tokens)
        return piece.prepared(lambda judged, _: self._lines(dict(zip(piece.questions, judged, strict=True))))

    def end(self, computed_tokens: int) -> BaseModel:
        tokens = self._asked.input_tokens
        return self._end(tokens, max(0, tokens - computed_tokens))


@dataclass(frozen=True, slots=True)
class _Order:
    """A question with its options in one order.

    Attributes:
        question: the question's number in the request.
        text: the prompt's text of the question.
        words: labels, the same ones for all orders of questions of one kind with as many options.
        options: the number of the option that each of the words stands for, or each of ``parts``.
        parts: for a decision head, the texts that follow: each option's, at whose end or beginning it reads, and the
            last one.
    """

    question: int
    text: str
    words: tuple[tuple[str, ...], ...]
    options: Sequence[int]
    parts: Sequence[str] = ()


@dataclass(frozen=True, slots=True)
class _Reading:
    """How a prompt is read.

    Attributes:
        answers: the labels.
        options: the number of the option that each answer stands for.
    """

    answers: Answers
    options: Sequence[int]

    def by_option(self, values: Sequence[T]) -> list[T]:
        """The answers' values in the order of the request's options."""
        found = dict(zip(self.options, values, strict=True))
        return [found[option] for option in range(len(values))]


@dataclass(slots=True)
class Asked:
    """A request whose questions are asked some at a time. Only one thread may use it at a time.

    Attributes:
        state: the text that the questions are about.
        field: its name in the request.
        permutations: the number of cyclic orders of each question's options, as far as it has so many.
        joined: the prompt's text before the question.
        front: the same as text.
        behind: the prompt's text after the question.
        done: the number of questions whose prompts are built.
        step: the number of questions to ask next.
        read: the tokens of all prompts so far, each counted for every sequence of its labels.
    """

    state: str
    field: str
    questions: Sequence[Question]
    permutations: int
    joined: Joined
    front: str
    behind: str
    done: int = 0
    step: int = 1
    read: int = 0
    _shared: Int32 | None = None
    _prompts: int = 0
    _tokens: int = 0

    @property
    def left(self) -> int:
        """The number of questions whose prompts are not built yet."""
        return len(self.questions) - self.done

    def count(self, ids: Int32) -> None:
        """Count a prompt's tokens."""
        self._shared = ids if self._shared is None else ids[: common_prefix(self._shared, ids)]
        self._prompts += 1
        self._tokens += len(ids)

    @property
    def input_tokens(self) -> int:
        """The number of tokens of the prompts so far, what they all begin with counted once."""
        shared = 0 if self._shared is None else len(self._shared)
        return self._tokens - max(self._prompts - 1, 0) * shared


class Decider:
    """Decides questions with one model.

    Args:
        profile: how a question becomes a prompt.
        chat: the model's chat template, if the profile needs it.
        calibration: how its probabilities are calibrated, if they are.
    """

    def __init__(
        self, model: ModelFacts, profile: Profile, chat: ChatTemplate | None, calibration: Calibration | None = None
    ) -> None:
        self._model, self._profile, self._chat, self._calibration = model, profile, chat, calibration
        self._tokenizer = model.tokenizer.guarded
        self._answers: OrderedDict[tuple[str, tuple[tuple[str, ...], ...]], Answers] = OrderedDict()

    @classmethod
    def of(cls, model: ModelFacts) -> Decider:
        """The decider of a served model."""
        return cls(model, model.profile, model.chat if model.profile.chat else None, model.calibration)

    def prepare(
        self,
        state: str,
        questions: Sequence[Question],
        permutations: int,
        answer: Callable[[Decided], A],
        field: str = "state",
    ) -> Steps[PreparedRequest[A]]:
        """Build the prompts of all questions, each as often as its options are shown in another order.

        Args:
            permutations: the number of cyclic orders of each question's options, as far as it has so many.
            answer: makes the request's answer.
            field: the state's name in the request, for errors.

        Raises:
            InvalidRequestError: the model is a classifier, it cannot answer with its profile, its tokenizer cannot tell
                this profile's labels apart, or a text cannot be tokenised.
            TooLargeError: the questions have more prompts, characters or tokens than the limits allow.
        """
        asked = self.asked(state, field, questions, permutations)
        piece = yield from self._take(asked, len(questions))

        def answered(judgements: Sequence[Judged], result: BatchResult) -> A:
            cached = max(0, asked.input_tokens - int(result.computed_tokens.sum()))
            return answer(Decided(judgements, asked.input_tokens, cached))

        return piece.prepared(answered)

    def asked(self, state: str, field: str, questions: Sequence[Question], permutations: int) -> Asked:
        """Check a request, and make ready to build its prompts.

        Args:
            field: the state's name in the request, for errors.

        Raises:
            InvalidRequestError: the model is a classifier or cannot answer with its profile, or a text is too long or
                cannot be shown.
            TooLargeError: the questions have more prompts or characters than the limits allow.
        """
        model = self._model
        check_decides(model.info)
        if model.profile_problem:
            raise InvalidRequestError(model.profile_problem, param="model")
        check_text(state, field)
        for number, question in enumerate(questions):
            options = (text for option in question.options for text in (option.name, option.description or ""))
            check_text("".join((question.instructions or "", *options)), "questions", number)
        prompts = self._check_work(len(state), field, questions, permutations)
        front, behind = self._around(state, field)
        special = not (self._profile.chat or self._profile.option)
        work = Work(LABEL_CHARACTERS, "questions")
        joined = Joined(self._tokenizer, front, add_special_tokens=special, many=prompts > 1, work=work)
        return Asked(state, field, questions, permutations, joined, front, behind)

    def some(self, asked: Asked, tokens: int) -> Steps[Piece]:
        """Build the prompts of the next questions: of one at first, then of more each time, up to about ``tokens``
        without the state.

        Raises:
            InvalidRequestError: see ``prepare``.
            TooLargeError: see ``prepare``.
        """
        piece = yield from self._take(asked, min(asked.step, asked.left))
        asked.step = next_step(asked.step, piece.made, tokens)
        return piece

    def _take(self, asked: Asked, count: int) -> Steps[Piece]:
        model, questions, joined = self._model, asked.questions, asked.joined
        numbers = range(asked.done, asked.done + count)
        orders: list[_Order] = []
        errors: dict[int, ScoringError] = {}
        for number in numbers:
            if refused := self._refused(number, questions[number]):
                errors[number] = refused
                continue
            for order in self._orders(number, questions[number], asked.permutations, asked.state):
                yield
                orders.append(order)
        tails = [order.text if order.parts else order.text + asked.behind for order in orders]
        prompts: list[Prompt] = []
        reads: list[_Reading] = []
        for order, tail, ids in zip(orders, tails, self._tokenised(asked, tails), strict=True):
            yield
            if order.question in errors:
                continue
            where = questions[order.question].where
            read: tuple[list[int], Answers] | InvalidRequestError
            if isinstance(ids, InvalidRequestError):
                read = ids
            elif order.parts:
                read = self._options_after(ids, order.parts)
            else:
                read = ids, (yield from self._answers_after(joined, asked.front, tail, ids, order.words))
            if isinstance(read, InvalidRequestError):
                errors[order.question] = InvalidRequestError(
                    read.message, param="questions", index=order.question, where=where
                )
                continue
            ids, answers = read
            check_ids(ids, model.info.vocab_size, asked.field, of_text=True)
            if (long := len(ids) + answers.layout.depth) > model.max_prompt_tokens:
                errors[order.question] = InvalidRequestError(
                    f"state and question make a prompt of {long} tokens; this model reads at most "
                    f"{model.most_tokens}; shorten the state or the question",
                    param="questions",
                    index=order.question,
                    where=where,
                )
                continue
            asked.read += len(ids) * len(answers.layout.continuations)
            if asked.read > model.limits.max_request_tokens:
                raise too_many_tokens(asked.read, model.limits.max_request_tokens, "questions", order.question)
            typed = np.asarray(ids, np.int32) + self._of_type(questions[order.question].kind)
            prompts.append(Prompt(order.question, typed, answers.layout))
            reads.append(_Reading(answers, order.options))
        asked.done = numbers.stop
        kept = [(prompt, read) for prompt, read in zip(prompts, reads, strict=True) if prompt.index not in errors]
        prompts = [prompt for prompt, _ in kept]
        for prompt in prompts:
            asked.count(prompt.ids)
        labelled = not self._profile.option
        made = packed(prompts, (), joined.query_tokens, vocab_logprobs=labelled, classes=False, pad=None)
        own = {number: questions[number] for number in numbers}
        return Piece(self._profile, own, made, [read for _, read in kept], errors, self._calibration)

    def _tokenised(self, asked: Asked, tails: Sequence[str]) -> Iterator[list[int] | InvalidRequestError]:
        with of_field(asked.field):
            yield from chain.from_iterable(asked.joined.checked(tails))

    def _check_work(self, state: int, field: str, questions: Sequence[Question], permutations: int) -> int:
        """Check before any prompt is built that they are not too many or too long, and return their number; ``state``
        is its length."""
        prompts = characters = 0
        for number, question in enumerate(questions):
            asked = len(question.instructions or "")
            asked += sum(len(option.name) + len(option.description or "") for option in question.options)
            own = state + asked
            place = (field, None) if state > asked else ("questions", number)
            check_characters(own, self._model.max_text_characters, *place)
            used = min(permutations, self._most_orders(question))
            prompts += used
            characters += used * own
        if prompts > self._model.limits.max_items:
            raise TooLargeError(
                f"questions make {prompts} prompts, one for each order of a question's options; this service takes at "
                f"most {self._model.limits.max_items}; send fewer, or lower permutations",
                param="questions",
            )
        check_work(characters, self._model.max_request_characters, "questions")
        return prompts

    def _around(self, state: str, field: str = "state") -> tuple[str, str]:
        """The prompt's text before the question, and the text after it.

        Raises:
            InvalidRequestError: the chat template refuses the state.
        """
        front = self._profile.front(self._value(state))
        if self._chat is None:
            return front, self._profile.opening
        place = next((each for each in _PLACES if each not in front), None)
        if place is None:
            raise InvalidRequestError(
                f"{field} has all of the noncharacters U+FDD4 to U+FDEF; take one out", param=field
            )
        messages = [{"role": "user", "content": front + place}]
        if self._profile.system:
            messages.insert(0, {"role": "system", "content": self._profile.system})
        try:
            parts = self._chat.render(messages).split(place)
        except InvalidRequestError as error:
            raise InvalidRequestError(error.message, param=field) from None
        if len(parts) != 2:
            raise InvalidRequestError(
                f"this model's chat template shows this {field} {len(parts) - 1} times in place of once; send another",
                param=field,
            )
        before, behind = parts
        return before, behind + self._profile.opening

    def _refused(self, number: int, question: Question) -> InvalidRequestError | None:
        """Why the profile cannot ask this question; None if it can."""
        profile, kind, count = self._profile, question.kind.value, len(question.options)
        described = any(option.description is not None for option in question.options)
        if kind not in profile.types:
            said = (
                f"asks for {_ASKS[kind]}; this model answers only {' or '.join(_ASKS[each] for each in profile.types)}"
            )
        elif question.kind is Kind.NOUL and profile.outcomes == "unseen" and described:
            said = "describes its outcomes, which this model's prompt does not show; say it in the instructions"
        elif profile.closing and count > MOST_READS:
            said = f"has {count} options; this model reads at most {MOST_READS}; send fewer"
        elif profile.alphabet and count > len(profile.alphabet) and (kind == "choice" or count > len(profile.levels)):
            said = f"has {count} options; this model has codes for at most {len(profile.alphabet)}; send fewer"
        else:
            return None
        return InvalidRequestError(
            f"questions[{number}] {said} (decision_profile {profile.name})",
            param="questions",
            index=number,
            where=question.where,
        )

    def _most_orders(self, question: Question) -> int:
        """The number of cyclic orders in which a prompt can show the options. Outcomes that are not shown, or always
        no first, have one."""
        if question.kind is not Kind.NOUL:
            return len(question.options)
        described = sum(option.description is not None for option in question.options)
        return max(1, described) if self._profile.outcomes == "words" else 1

    def _orders(self, number: int, question: Question, permutations: int, state: str) -> Iterator[_Order]:
        """The question with its options in evenly spaced cyclic orders, beginning with that of the request."""
        count = len(question.options)
        used = min(permutations, self._most_orders(question))
        for turn in range(used):
            start = turn * count // used
            order = [*range(start, count), *range(start)]
            if self._profile.option:
                yield self._in_parts(number, question, order, state)
                continue
            if question.kind is Kind.NOUL and self._profile.outcomes != "codes":
                shown = [question.options[option].name for option in order]
                words, options = (self._profile.no, self._profile.yes), range(count)
            elif question.kind is Kind.SCORE and count <= len(self._profile.levels):
                levels = self._profile.levels[:count]
                shown = [levels[option] for option in order]
                words, options = self._profile.labels(levels), range(count)
            else:
                # A code belongs to a place in the prompt.
                shown = (self._profile.alphabet or codes(count, self._single))[:count]
                words, options = self._profile.labels(shown), order
            yield _Order(number, self._tail(question, order, shown, state), words, options)

    def _in_parts(self, number: int, question: Question, order: Sequence[int], state: str) -> _Order:
        """The question for a decision head, with its options in this order."""
        profile, kind = self._profile, question.kind.value
        shown: list[ShownOption] = []
        for place in order:
            option = question.options[place]
            described = None if option.description is None else self._value(option.description)
            shown.append(ShownOption(str(place), option.name, self._value(option.name), described))
        instructions = None if question.instructions is None else self._value(question.instructions)
        value = self._value(state)
        tail = profile.tail(kind, instructions, shown, value)
        parts = [profile.option_text(kind, option) for option in shown]
        last = profile.closing_text(value) if profile.closing else profile.opening
        return _Order(number, tail, (), order, (*parts, last))

    def _of_type(self, kind: Kind) -> np.int32:
        """What is added to the ids of a question's tokens, for an encoder that tells types of questions apart."""
        return np.int32(NUMBERED.index(kind.value) * self._model.info.vocab_size if self._profile.closing else 0)

    def _options_after(self, ids: list[int], parts: Sequence[str]) -> tuple[list[int], Answers] | InvalidRequestError:
        """The tokens of a whole prompt, and where a decision head reads them.

        Args:
            ids: the prompt's tokens up to the options.
            parts: see ``_Order``.
        """
        try:
            more = self._tokenizer.encode(parts, add_special_tokens=False)
            if not self._profile.closing:
                return [*ids, *chain.from_iterable(more)], at_ends([len(own) for own in more])
            *options, last = more
            more = [*within_window(ids, options, self._profile.window), last]
        except InvalidRequestError as error:
            return error
        return [*ids, *chain.from_iterable(more)], at_starts([len(own) for own in more])

    def _value(self, text: str) -> Any:
        """A request's text for the profile's templates. In a chat, the chat template guards the whole message."""
        if self._chat:
            return text
        guard = self._tokenizer.plain.guard
        value = json.loads(text) if self._profile.option and isinstance(text, JsonText) else text
        return _guarded(value, guard)

    def _tail(self, question: Question, order: Sequence[int], shown: Sequence[str], state: str) -> str:
        """The prompt's text of a question.

        Args:
            order: the numbers of the options in the order in which they are shown.
            shown: their codes in that order.
        """
        options: list[ShownOption] = []
        for number, code in zip(order, shown, strict=True):
            option = question.options[number]
            name, described = self._value(option.name), option.description
            description = None if described is None else self._value(described)
            if question.kind is not Kind.NOUL or self._profile.outcomes == "codes":
                text = name if description is None else f"{name} - {description}"
                options.append(ShownOption(code, text, name, description))
            elif description is not None:
                options.append(ShownOption(code, description, name, description))
        instructions = None if question.instructions is None else self._value(question.instructions)
        tail = self._profile.tail(question.kind.value, instructions, options, self._value(state))
        return self._tokenizer.plain.guard(tail) if self._chat else tail

    @cached_property
    def _single(self) -> Sequence[str]:
        """The pairs of letters that are one token each where the answer begins."""
        front, behind = self._around("")
        question = Question(Kind.CHOICE, None, (Option(""),) * len(PAIRS), ())
        text = front + self._tail(question, range(len(PAIRS)), PAIRS, "") + behind
        end = text[self._tokenizer.last_boundary(text) :]
        words = [own[0] for own in self._profile.labels(PAIRS)]
        prompt, *labelled = self._tokenizer.encode([end, *(end + word for word in words)], add_special_tokens=False)
        return [pair for pair, ids in zip(PAIRS, labelled, strict=True) if len(added_tokens(prompt, ids)) == 1]

    def _answers_after(
        self, joined: Joined, front: str, tail: str, ids: list[int], words: tuple[tuple[str, ...], ...]
    ) -> Steps[Answers]:
        """The labels after the prompt ``front + tail``, which has the tokens ``ids``. Prompts that end alike have the
        same ones.

        Raises:
            InvalidRequestError: see ``lay_out``.
        """
        tokenizer, vocab_size = self._tokenizer, self._model.info.vocab_size
        text = front + tail
        end = text[tokenizer.last_boundary(text) :]
        if len(end) <= _LONGEST_END:
            (last,) = tokenizer.encode([end], add_special_tokens=False)
            if ids[len(ids) - len(last) :] == last:
                # Threads share what is known, and another may drop it.
                known = self._answers.get((end, words))
                if known is None:
                    ending = Ending(tokenizer, [], end, [], work=joined.work)
                    known = yield from lay_out(words, ending, last, vocab_size)
                    self._answers[end, words] = known
                    if len(self._answers) > _KNOWN_ANSWERS:
                        self._answers.popitem(last=False)
                return known
        return (yield from lay_out(words, joined.ending(tail, ids), ids, vocab_size))


@dataclass(frozen=True, slots=True)
class Piece:
    """Some questions of a request, with their prompts built.

    Attributes:
        questions: by their numbers in the request.
        reads: how each prompt is read.
        errors: the questions that have no answer, by number.
    """

    profile: Profile
    questions: Mapping[int, Question]
    made: PreparedItems
    reads: Sequence[_Reading]
    errors: Mapping[int, ScoringError]
    calibration: Calibration | None = None

    def prepared(self, answer: Callable[[Sequence[Judged], BatchResult], A]) -> PreparedRequest[A]:
        """The work for the engine.

        Args:
            answer: makes the answer of the judgements, one for each question.
        """
        made = self.made
        return PreparedRequest(
            made.batch,
            made.query_tokens,
            len(self.questions),
            len(made.parts),
            lambda result: answer(self._judged(result), result),
        )

    def _judged(self, result: BatchResult) -> list[Judged]:
        tokens = result.values[self.made.parts].astype(np.float64)
        lengths = np.concatenate([np.zeros(0, np.int64), *(own.answers.layout.lengths for own in self.reads)])
        sums = (np.add.reduceat(tokens, np.cumsum(lengths) - lengths) if len(lengths) else tokens).tolist()
        found: dict[int, list[tuple[list[float], float | None]]] = {number: [] for number in self.questions}
        words: dict[int, tuple[tuple[str, ...], ...]] = {}
        at = 0
        for prompt, own in zip(self.made.prompts, self.reads, strict=True):
            values = sums[at : at + len(own.answers.layout.lengths)]
            at += len(values)
            kind = self.questions[prompt.index].kind
            temperature = self.profile.divisor(kind.value, len(own.options))
            if self.profile.option:
                offsets = self.profile.level_offsets.get(len(values)) if kind is Kind.SCORE else None
                logs = own.by_option(values)
                logs = [logit + offset for logit, offset in zip(logs, offsets or [0.0] * len(logs), strict=True)]
                found[prompt.index].append((_normalised(logs, temperature), None))
            else:
                logs, mass = _read(values, own.answers, temperature)
                found[prompt.index].append((own.by_option(logs), mass))
            words.setdefault(prompt.index, tuple(own.by_option(own.answers.words)))
        return [
            self.errors.get(number) or _judgement(number, own, found[number], words[number], self.calibration)
            for number, own in self.questions.items()
        ]


def _guarded(value: Any, guard: Callable[[str], str]) -> Any:
    """A JSON value with its texts guarded."""
    match value:
        case str():
            return guard(value)
        case list():
            return [_guarded(each, guard) for each in cast(list[Any], value)]
        case dict():
            entries = cast(dict[str, Any], value).items()
            return {guard(name): _guarded(each, guard) for name, each in entries}
        case _:
            return value


def _read(values: Sequence[float], answers: Answers, temperature: float) -> tuple[list[float], float]:
    """The log-probabilities of the answers, normalised over them, and the labels' probability over the vocabulary.

    NaN if the model's output is not finite.
    """
    if not math.isfinite(log_mass := _log_sum(values)):
        return [math.nan] * len(answers.groups), math.nan
    logs = [_log_sum([values[label] for label in own]) for own in answers.groups]
    return _normalised(logs, temperature), math.exp(min(0.0, log_mass))


def _normalised(logs: Sequence[float], temperature: float) -> list[float]:
    """Logarithms divided by the temperature, less that of their sum; NaN if they are not finite."""
    scaled = [value / temperature for value in logs]
    if not math.isfinite(total := _log_sum(scaled)):
        return [math.nan] * len(logs)
    return [value - total for value in scaled]


def _judgement(
    number: int,
    question: Question,
    reads: Sequence[tuple[list[float], float | None]],
    words: tuple[tuple[str, ...], ...],
    calibration: Calibration | None,
) -> Judgement | InternalError:
    """The mean of a question's log-probabilities over the orders of its options, normalised and calibrated."""
    masses = [mass for _, mass in reads if mass is not None]
    if any(math.isnan(logs[0]) for logs, _ in reads):
        return InternalError(
            f"questions[{number}]: the model's output is not finite, so there is no answer; leave this question out",
            param="questions",
            index=number,
            where=question.where,
        )
    means = [math.fsum(values) / len(reads) for values in zip(*(logs for logs, _ in reads), strict=True)]
    raw = normalised(means)
    judged = Judgement(raw, math.fsum(masses) / len(masses) if masses else None, len(reads), words)
    if calibration and (curve := calibration.curve(question.kind.value, len(raw))):
        return replace(judged, probabilities=curve.calibrated(raw), raw=raw, calibration=calibration.name)
    return judged


def _log_sum(values: Sequence[float]) -> float:
    """The logarithm of the summed exponentials."""
    peak = max(values)
    return peak if peak == -math.inf else peak + math.log(math.fsum(math.exp(value - peak) for value in values))
