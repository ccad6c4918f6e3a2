"""Decides typed questions about one state: a prompt for each question, and probabilities from the engine's values."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import TypeVar

import numpy as np

from serve_app.contract import BatchResult, Int32, common_prefix
from serve_app.errors import InternalError, InvalidRequestError, ScoringError, TooLargeError
from serve_app.profiles.profile import CODE, Profile, ShownOption
from serve_app.tasks.chat import ChatTemplate
from serve_app.tasks.decisions.bodies import DecisionRequest
from serve_app.tasks.decisions.labels import PAIRS, Answers, codes, lay_out
from serve_app.tasks.decisions.questions import Decided, Judgement, Kind, Option, Question
from serve_app.tasks.labels import added_tokens
from serve_app.tasks.model_facts import ModelFacts
from serve_app.tasks.prompts import PreparedItems, Prompt, packed
from serve_app.tasks.steps import Steps
from serve_app.tasks.task import Prepare, PreparedRequest
from serve_app.tasks.tokenizer import Ending, Joined
from serve_app.tasks.validation import (
    check_causal,
    check_characters,
    check_ids,
    check_text,
    check_work,
    too_many_tokens,
)

A = TypeVar("A")
R = TypeVar("R", bound=DecisionRequest)

_KNOWN_ANSWERS = 256
"""Layouts of labels that are kept. Most prompts end alike, and their questions have few sets of labels."""
_LONGEST_END = 1_024
"""The most characters of a prompt's end whose layouts are kept: a longer one is of one state or question."""
_PLACES = [chr(code) for code in range(0xFDD4, 0xFDF0)]
"""Noncharacters: one that the state does not have stands for the question, to find the prompt's text around it."""


def builder(
    state: Callable[[R], str],
    questions: Callable[[R], Sequence[Question]],
    answer: Callable[[R, str, Decided], A],
) -> Callable[[ModelFacts], Prepare[R, A]]:
    """The ``Task.builder`` of a decision route.

    Args:
        state: the text that a request's questions are about.
        questions: the request's questions. It raises InvalidRequestError if one asks nothing.
        answer: makes the answer to a request, given the model's name.
    """

    def build(model: ModelFacts) -> Prepare[R, A]:
        decider = Decider.of(model)

        def prepare(request: R, _: str) -> Steps[PreparedRequest[A]]:
            made = partial(answer, request, model.name)
            return decider.prepare(state(request), questions(request), request.permutations, made)

        return prepare

    return build


@dataclass(frozen=True, slots=True)
class _Order:
    """A question with its options in one order.

    Attributes:
        question: the question's number in the request.
        text: the prompt's text of the question.
        words: the labels of each option, in the request's order.
    """

    question: int
    text: str
    words: tuple[tuple[str, ...], ...]


class Decider:
    """Decides questions with one model.

    Args:
        profile: how a question becomes a prompt.
        chat: the model's chat template, if the profile needs it.
    """

    def __init__(self, model: ModelFacts, profile: Profile, chat: ChatTemplate | None) -> None:
        self._model, self._profile, self._chat = model, profile, chat
        self._tokenizer = model.tokenizer.guarded
        self._answers: OrderedDict[tuple[str, tuple[tuple[str, ...], ...]], Answers] = OrderedDict()

    @classmethod
    def of(cls, model: ModelFacts) -> Decider:
        """The decider of a served model."""
        return cls(model, model.profile, model.chat if model.profile.chat else None)

    def prepare(
        self, state: str, questions: Sequence[Question], permutations: int, answer: Callable[[Decided], A]
    ) -> Steps[PreparedRequest[A]]:
        """Build the prompts of all questions, each as often as its options are shown in another order.

        Args:
            permutations: the number of cyclic orders of each question's options, as far as it has so many.
            answer: makes the request's answer.

        Raises:
            InvalidRequestError: the model is a classifier, its tokenizer cannot tell this profile's labels apart, or a
                text cannot be tokenised.
            TooLargeError: the questions have more prompts, characters or tokens than the limits allow.
        """
        model = self._model
        check_causal(model.info.classes)
        check_text(state, "state")
        for number, question in enumerate(questions):
            options = (text for option in question.options for text in (option.name, option.description or ""))
            check_text("".join((question.instructions or "", *options)), "questions", number)
        self._check_work(len(state), questions, permutations)
        front, behind = self._around(state)
        orders: list[_Order] = []
        for number, question in enumerate(questions):
            for order in self._orders(number, question, permutations):
                yield
                orders.append(order)
        tails = [order.text + behind for order in orders]
        joined = Joined(self._tokenizer, front, add_special_tokens=not self._profile.chat, many=len(tails) > 1)
        prompts: list[Prompt] = []
        answers: list[Answers] = []
        errors: dict[int, ScoringError] = {}
        total = 0
        for order, tail, ids in zip(orders, tails, joined.each(tails), strict=True):
            yield
            if order.question in errors:
                continue
            check_ids(ids, model.info.vocab_size, "state", of_text=True)
            own = yield from self._answers_after(joined, front, tail, ids, order.words)
            if (long := len(ids) + own.layout.depth) > model.max_prompt_tokens:
                errors[order.question] = InvalidRequestError(
                    f"state and question make a prompt of {long} tokens; this model reads at most "
                    f"{model.most_tokens}; shorten the state or the question",
                    param="questions",
                    index=order.question,
                    where=questions[order.question].where,
                )
                continue
            total += len(ids) * len(own.layout.continuations)
            if total > model.limits.max_request_tokens:
                raise too_many_tokens(total, model.limits.max_request_tokens, "questions", order.question)
            prompts.append(Prompt(order.question, np.asarray(ids, np.int32), own.layout))
            answers.append(own)
        kept = [(prompt, own) for prompt, own in zip(prompts, answers, strict=True) if prompt.index not in errors]
        prompts = [prompt for prompt, _ in kept]
        made = packed(prompts, (), joined.query_tokens, vocab_logprobs=True, classes=False, pad=None)
        judge = _Judge(self._profile, questions, made, [own for _, own in kept], errors)
        return PreparedRequest(
            made.batch, made.query_tokens, len(questions), len(made.parts), lambda result: answer(judge.decided(result))
        )

    def _check_work(self, state: int, questions: Sequence[Question], permutations: int) -> None:
        """Check before any prompt is built that they are not too many or too long; ``state`` is its length."""
        prompts = characters = 0
        for number, question in enumerate(questions):
            asked = len(question.instructions or "")
            asked += sum(len(option.name) + len(option.description or "") for option in question.options)
            own = state + asked
            place = ("state", None) if state > asked else ("questions", number)
            check_characters(own, self._model.max_text_characters, *place)
            used = min(permutations, _most_orders(question))
            prompts += used
            characters += used * own
        if prompts > self._model.limits.max_items:
            raise TooLargeError(
                f"questions make {prompts} prompts, one for each order of a question's options; this service takes at "
                f"most {self._model.limits.max_items}; send fewer, or lower permutations",
                param="questions",
            )
        check_work(characters, self._model.max_request_characters, "questions")

    def _around(self, state: str) -> tuple[str, str]:
        """The prompt's text before the question, and the text after it.

        Raises:
            InvalidRequestError: the chat template refuses the state.
        """
        front = self._profile.front(state)
        if self._chat is None:
            return self._tokenizer.plain.guard(front), self._profile.opening
        place = next((each for each in _PLACES if each not in front), None)
        if place is None:
            raise InvalidRequestError(
                "state has all of the noncharacters U+FDD4 to U+FDEF; take one out", param="state"
            )
        messages = [{"role": "user", "content": front + place}]
        if self._profile.system:
            messages.insert(0, {"role": "system", "content": self._profile.system})
        if self._chat.problem:
            raise InvalidRequestError(self._chat.problem, param="model")
        try:
            parts = self._chat.render(messages).split(place)
        except InvalidRequestError as error:
            raise InvalidRequestError(error.message, param="state") from None
        if len(parts) != 2:
            raise InvalidRequestError(
                f"this model's chat template shows this state {len(parts) - 1} times in place of once; send another",
                param="state",
            )
        before, behind = parts
        return before, behind + self._profile.opening

    def _orders(self, number: int, question: Question, permutations: int) -> Iterator[_Order]:
        """The question with its options in evenly spaced cyclic orders, beginning with that of the request."""
        count = len(question.options)
        used = min(permutations, _most_orders(question))
        for turn in range(used):
            start = turn * count // used
            order = [*range(start, count), *range(start)]
            match question.kind:
                case Kind.NOUL:
                    shown = [option.name for option in question.options]
                    words = (self._profile.no, self._profile.yes)
                case Kind.SCORE:
                    shown = [str(level) for level in range(count)]
                    words = self._labels(shown)
                case Kind.CHOICE:
                    # A code belongs to a place in the prompt.
                    by_place = codes(count, self._single)
                    shown = [by_place[(option - start) % count] for option in range(count)]
                    words = self._labels(shown)
            yield _Order(number, self._tail(question, order, shown), words)

    def _labels(self, shown: Sequence[str]) -> tuple[tuple[str, ...], ...]:
        return tuple(tuple(form.replace(CODE, code) for form in self._profile.codes) for code in shown)

    def _tail(self, question: Question, order: Sequence[int], shown: Sequence[str]) -> str:
        """The prompt's text of a question.

        Args:
            order: the numbers of the options in the order in which they are shown.
            shown: the code of each option.
        """
        options: list[ShownOption] = []
        for number in order:
            option, code = question.options[number], shown[number]
            if question.kind is not Kind.NOUL:
                text = option.name if option.description is None else f"{option.name} - {option.description}"
                options.append(ShownOption(code, text))
            elif option.description is not None:
                options.append(ShownOption(code, option.description))
        return self._tokenizer.plain.guard(self._profile.tail(question.kind.value, question.instructions, options))

    @cached_property
    def _single(self) -> Sequence[str]:
        """The pairs of letters that are one token each where the answer begins."""
        front, behind = self._around("")
        question = Question(Kind.CHOICE, None, (Option(""),) * len(PAIRS), ())
        text = front + self._tail(question, range(len(PAIRS)), PAIRS) + behind
        end = text[self._tokenizer.last_boundary(text) :]
        words = [own[0] for own in self._labels(PAIRS)]
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
                    known = yield from lay_out(words, Ending(tokenizer, [], end, []), last, vocab_size)
                    self._answers[end, words] = known
                    if len(self._answers) > _KNOWN_ANSWERS:
                        self._answers.popitem(last=False)
                return known
        return (yield from lay_out(words, joined.ending(tail, ids), ids, vocab_size))


def _most_orders(question: Question) -> int:
    """The number of cyclic orders in which a prompt can show the options. Outcomes without a description are not
    shown."""
    if question.kind is Kind.NOUL:
        return max(1, sum(option.description is not None for option in question.options))
    return len(question.options)


@dataclass(frozen=True, slots=True)
class _Judge:
    """Makes judgements from the engine's values.

    Attributes:
        answers: the labels of each prompt.
        errors: the questions that have no answer, by number.
    """

    profile: Profile
    questions: Sequence[Question]
    prepared: PreparedItems
    answers: Sequence[Answers]
    errors: dict[int, ScoringError]

    def decided(self, result: BatchResult) -> Decided:
        """The answers to all questions."""
        tokens = result.values[self.prepared.parts].astype(np.float64)
        lengths = np.concatenate([np.zeros(0, np.int64), *(own.layout.lengths for own in self.answers)])
        sums = (np.add.reduceat(tokens, np.cumsum(lengths) - lengths) if len(lengths) else tokens).tolist()
        reads: list[list[tuple[list[float], float]]] = [[] for _ in self.questions]
        at = 0
        for prompt, own in zip(self.prepared.prompts, self.answers, strict=True):
            values = sums[at : at + len(own.layout.lengths)]
            at += len(values)
            temperature = self.profile.temperature.get(self.questions[prompt.index].kind.value, 1.0)
            reads[prompt.index].append(_read(values, own, temperature))
        words = {
            prompt.index: own.words
            for prompt, own in reversed([*zip(self.prepared.prompts, self.answers, strict=True)])
        }
        judgements = [
            self.errors.get(number) or _judgement(number, own, reads[number], words[number])
            for number, own in enumerate(self.questions)
        ]
        input_tokens = _input_tokens([prompt.ids for prompt in self.prepared.prompts])
        computed = int(result.computed_tokens.sum())
        return Decided(judgements, input_tokens, max(0, input_tokens - computed))


def _read(values: Sequence[float], answers: Answers, temperature: float) -> tuple[list[float], float]:
    """The log-probabilities of the answers, normalised over them, and the labels' probability over the vocabulary.

    NaN if the model's output is not finite.
    """
    if not math.isfinite(log_mass := _log_sum(values)):
        return [math.nan], math.nan
    logs = [_log_sum([values[label] for label in own]) / temperature for own in answers.groups]
    total = _log_sum(logs)
    return [value - total for value in logs], math.exp(min(0.0, log_mass))


def _judgement(
    number: int, question: Question, reads: Sequence[tuple[list[float], float]], words: tuple[tuple[str, ...], ...]
) -> Judgement | InternalError:
    """The mean of a question's log-probabilities over the orders of its options, normalised."""
    masses = [mass for _, mass in reads]
    if any(map(math.isnan, masses)):
        return InternalError(
            f"questions[{number}]: the model's output is not finite, so there is no answer; leave this question out",
            param="questions",
            index=number,
            where=question.where,
        )
    means = [math.fsum(values) / len(reads) for values in zip(*(logs for logs, _ in reads), strict=True)]
    peak = max(means)
    weights = [math.exp(value - peak) for value in means]
    total = math.fsum(weights)
    return Judgement(tuple(weight / total for weight in weights), math.fsum(masses) / len(masses), len(reads), words)


def _log_sum(values: Sequence[float]) -> float:
    """The logarithm of the summed exponentials."""
    peak = max(values)
    return peak if peak == -math.inf else peak + math.log(math.fsum(math.exp(value - peak) for value in values))


def _input_tokens(prompts: Sequence[Int32]) -> int:
    """The number of tokens, those that all prompts begin with counted once."""
    if not prompts:
        return 0
    shared = min(common_prefix(prompts[0], other) for other in prompts)
    return shared + sum(len(ids) - shared for ids in prompts)
