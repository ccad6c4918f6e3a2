"""Prompts of one request's items, packed into token batches a few at a time or all at once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, TypeVar, cast

import numpy as np
import numpy.typing as npt

from serve_app.contract import Int32, Int64, TokenBatch
from serve_app.errors import InvalidRequestError, ScoringError
from serve_app.schemas import ScoreRequest
from serve_app.tasks import labels
from serve_app.tasks.labels import Layout, Words
from serve_app.tasks.model_facts import LABEL_CHARACTERS, ModelFacts
from serve_app.tasks.pairs import Pairs
from serve_app.tasks.steps import Steps
from serve_app.tasks.tokenizer import Ending, Joined, in_chunks
from serve_app.tasks.truncation import item_span, shortened
from serve_app.tasks.validation import (
    Work,
    check_count,
    check_ids,
    check_scores,
    check_work,
    of_field,
    too_many_tokens,
    wrong_ids,
    wrong_texts,
)

L = TypeVar("L", int, str)
Spelling = list[list[str]]
"""Spelling in the vocabulary of each token of each label."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """The prompt of one item.

    Attributes:
        index: the item's index.
        ids: the tokens that the model sees before the labels; at least one.
        layout: how the labels are read.
        spelling: with ``labels``, their tokens as the vocabulary spells them.
        dropped: the number of tokens that the item lost because the prompt was too long.
    """

    index: int
    ids: Int32
    layout: Layout
    spelling: Spelling | None = None
    dropped: int = 0


@dataclass(frozen=True, slots=True)
class PreparedItems:
    """Prepared items of a request: a batch for the engine, and how its result maps back to the items.

    Attributes:
        batch: the prompts in order, each once per continuation.
        prompts: the prompts of the valid items.
        errors: the errors of the other items, each with its item's ``index``.
        parts: for each token of each label in turn, the position of its value among the batch's values.
        query_tokens: the number of tokens at the front of every prompt that are the query's and that another request
            may repeat.
        classes: whether the values are those of a classification head.
    """

    batch: TokenBatch
    prompts: Sequence[Prompt]
    errors: Sequence[ScoringError]
    parts: Int64
    query_tokens: int
    classes: bool

    @property
    def prompt_tokens(self) -> int:
        """The number of tokens of all prompts, without the labels."""
        return sum(len(prompt.ids) for prompt in self.prompts)


class PromptBuilder:
    """Builds the prompts of a request. Only one thread may use it at a time.

    Args:
        model: the model; if it has classes, they are the labels, whatever the request says.

    Raises:
        InvalidRequestError: the model scores no items; or labels, ids or the combination of fields is wrong.
        TooLargeError: the request has more items than the limits allow.
    """

    def __init__(self, request: ScoreRequest, model: ModelFacts) -> None:
        self._request = request
        self._model = model
        self._items = [request.items] if isinstance(request.items, str) else request.items
        self._done = 0
        self._tokens = 0
        self._step = 1
        self._wrong: dict[int, InvalidRequestError] = {}
        """The errors of items that are known to be wrong, by index."""
        check_scores(model.info)
        self._check_counts()
        self._tokenizer, self._special = model.tokenizer, request.add_special_tokens
        # Text is joined as a string first, then tokenised once, so that the tokens at the join are as in training.
        self._query = request.query if isinstance(request.query, str) else ""
        if request.messages is not None:
            self._check_messages()
            self._tokenizer, self._special = model.tokenizer.guarded, False
            self._query = model.prompt_of(request.messages)
        self._words, self._layouts = self._checked_labels()
        self._in_context = Words(model.tokenizer.pieces, model.info.vocab_size)
        self._text = self._checked_kind()
        self._check_characters()
        if request.messages is not None:
            self._guard()
        self._most_tokens, self._most = model.max_prompt_tokens, model.most_tokens
        self._work = Work(LABEL_CHARACTERS, "labels")
        self._joined = Joined(
            self._tokenizer,
            "" if request.item_first else self._query,
            add_special_tokens=self._special,
            many=len(self._items) > 1 or bool(self._words),
            work=self._work,
        )
        self._pairs = self._paired() if self._text and self._query and model.info.encoder else None

    @property
    def left(self) -> int:
        """The number of items that are not prepared yet."""
        return len(self._items) - self._done

    def rest(self) -> Steps[PreparedItems]:
        """Prepare all items that are left.

        Raises:
            InvalidRequestError: an item is wrong, and the request does not have ``on_error: "item"``.
            TooLargeError: the request has more tokens than the limits allow.
        """
        return self._take(self.left)

    def some(self, tokens: int) -> Steps[PreparedItems]:
        """Prepare the next items: one at first, then more each time, up to about ``tokens`` without the query.

        Raises:
            InvalidRequestError: an item is wrong, and the request does not have ``on_error: "item"``.
            TooLargeError: the request has more tokens than the limits allow.
        """
        made = yield from self._take(min(self._step, self.left))
        self._step = next_step(self._step, made, tokens)
        return made

    def _take(self, count: int) -> Steps[PreparedItems]:
        indices = range(self._done, self._done + count)
        prompts: list[Prompt] = []
        for chunk in self._chunks([index for index in indices if index not in self._wrong]):
            yield
            # The tokenizer may have more tokens than the model.
            read = [(index, ids) for index, ids in chunk if not isinstance(ids, InvalidRequestError)]
            check = self._text and not self._pairs
            unknown = wrong_ids(read, self._model.info.vocab_size, "items", of_text=True) if check else ()
            wrong = {error.index: error for error in unknown}
            for index, ids in chunk:
                try:
                    with of_field("items", index):
                        if isinstance(ids, InvalidRequestError):
                            raise ids
                    if index in wrong:
                        raise wrong[index]
                    prompt = yield from self._prompt(index, ids)
                except InvalidRequestError as error:
                    self._refuse([error])
                else:
                    self._count(prompt)
                    prompts.append(prompt)
        self._done = indices.stop
        errors = [self._wrong[index] for index in indices if index in self._wrong]
        request, classes = self._request, self._model.info.classes > 0
        # Class logits and a softmax over one-token labels need no vocabulary matmul; a probability or a logprob does.
        vocab_logprobs = not classes and (
            not request.apply_softmax
            or request.return_token_logprobs
            or request.return_label_mass
            or any(prompt.layout.depth for prompt in prompts)
        )
        return packed(
            prompts,
            errors,
            self._query_tokens(),
            vocab_logprobs=vocab_logprobs,
            classes=classes,
            pad=self._model.info.pad_token_id,
        )

    def _query_tokens(self) -> int:
        if self._text:
            return self._joined.query_tokens
        return 0 if self._request.item_first else len(self._request.query or ())

    def _count(self, prompt: Prompt) -> None:
        continuations = prompt.layout.continuations
        self._tokens += len(prompt.ids) * len(continuations) + sum(map(len, continuations))
        most = self._model.limits.max_request_tokens
        if self._tokens > most:
            again = " and again for labels of several tokens" if prompt.layout.depth else ""
            counted = f", counting the query once per item{again}"
            raise too_many_tokens(self._tokens, most, "items", prompt.index, counted)

    def _check_counts(self) -> None:
        request = self._request
        check_count(self._items, self._model.limits.max_items, "items")
        if request.temperature != 1.0 and not request.apply_softmax:
            raise InvalidRequestError(
                f"temperature is {request.temperature}, which needs apply_softmax: true", param="temperature"
            )
        info = self._model.info
        of_labels = ("labels", "label_token_ids") if info.encoder else ()
        for name in ("return_token_logprobs", "return_label_mass", *of_labels):
            if info.classes and getattr(request, name):
                kind = "encoder, with" if info.encoder else "one has"
                raise InvalidRequestError(
                    f"{name} is for causal models; this {kind} {info.classes} classes; leave it out", param=name
                )

    def _paired(self) -> Pairs:
        """The query with each item, as an encoder reads them."""
        request = self._request
        last, special = request.item_first, self._special
        return Pairs(self._tokenizer, self._model.info, self._query, "query", "items", last=last, special=special)

    def _check_messages(self) -> None:
        request, items = self._request, self._items
        if request.query is not None:
            raise InvalidRequestError("query and messages are both given; send one of them", param="query")
        if request.item_first:
            raise InvalidRequestError(
                "item_first needs a query: items follow the messages; leave it out", param="item_first"
            )
        if items and not isinstance(items[0], str):
            raise InvalidRequestError("with messages, items must be text, not token ids", param="items")

    def _guard(self) -> None:
        """Keep control tokens out of the items and labels that follow a conversation."""
        guard = self._tokenizer.plain.guard
        self._items = [
            own if index in self._wrong else guard(own) for index, own in enumerate(cast(list[str], self._items))
        ]
        shared = {id(words): [guard(word) for word in words] for words in self._words}
        self._words = [shared[id(words)] for words in self._words]

    def _checked_labels(self) -> tuple[Sequence[list[str]], Sequence[Layout]]:
        """Check the labels, and return each item's words, to be laid out after its prompt, or each item's layout."""
        if self._model.info.classes:
            return [], [labels.of_tokens(range(self._model.info.classes))] * len(self._items)
        words, ids = self._request.labels, self._request.label_token_ids
        if words is not None and ids is not None:
            raise InvalidRequestError(
                "labels and label_token_ids are both given; send the labels as text or as token ids", param="labels"
            )
        if words is not None:
            return self._each_items("labels", words), ()
        if ids is None:
            raise InvalidRequestError(
                "label_token_ids is required, unless labels are given as text",
                param="label_token_ids",
            )
        each = self._each_items("label_token_ids", ids)
        if isinstance(ids[0], int):
            return (), [labels.of_tokens(cast(list[int], ids))] * len(each)
        return (), [labels.of_tokens([] if index in self._wrong else own) for index, own in enumerate(each)]

    def _each_items(self, name: str, given: list[L] | list[list[L]]) -> Sequence[list[L]]:
        """Check the labels that were given, and return those of each item."""
        most, vocab_size = self._model.limits.max_labels, self._model.info.vocab_size
        if not given or not isinstance(given[0], list):
            shared = cast(list[L], given)
            labels.check(shared, name, None, most=most, vocab_size=vocab_size)
            return [shared] * len(self._items)
        lists = cast(list[list[L]], given)
        if len(lists) != len(self._items):
            raise InvalidRequestError(
                f"{name} has {len(lists)} lists for {len(self._items)} items; "
                "send one list for all items or one list per item",
                param=name,
            )
        self._refuse(labels.wrong_lists(lists, name, most=most, vocab_size=vocab_size))
        return lists

    def _checked_kind(self) -> bool:
        """Whether query and items are text. If they are token ids, check these."""
        query, items = self._request.query, self._items
        if not items or (isinstance(items[0], str) and not isinstance(query, list)):
            return True
        if isinstance(items[0], str) or isinstance(query, str):
            raise InvalidRequestError("Invalid combination of query/items types for score_request.", param="query")
        if self._words:
            raise InvalidRequestError(
                "labels are text, and their tokens depend on the text before them, but items are token ids; "
                "send label_token_ids (POST /tokenize returns them), or send items as text",
                param="labels",
            )
        check_ids(query or [], self._model.info.vocab_size, "query")
        each = enumerate(cast(list[list[int]], items))
        self._refuse(wrong_ids(each, self._model.info.vocab_size, "items"))
        return False

    def _check_characters(self) -> None:
        """Check before tokenising that it will not take too long."""
        if not self._text:
            return
        items, query = cast(list[str], self._items), len(self._query)
        words = self._words or [list[str]()] * len(items)
        longest = [query + max(map(len, own), default=0) for own in words]
        self._refuse(wrong_texts(items, longest, self._model.max_text_characters, "items"))
        total = sum(
            query + len(item) + sum(map(len, own))
            for index, (item, own) in enumerate(zip(items, words, strict=True))
            if index not in self._wrong
        )
        check_work(total, self._model.max_request_characters, "items")

    def _refuse(self, errors: Iterable[InvalidRequestError]) -> None:
        """Raise the first error, or keep the first error of each item if the request has ``on_error: "item"``."""
        for error in errors:
            if self._request.on_error == "fail":
                raise error
            assert error.index is not None
            self._wrong.setdefault(error.index, error)

    def _chunks(self, indices: Sequence[int]) -> Iterator[list[tuple[int, list[int] | InvalidRequestError]]]:
        """The index and the prompt's tokens of each item, or its error, as many at a time as take about one step."""
        request, numbers = self._request, iter(indices)
        items = [self._items[index] for index in indices]
        if self._pairs:
            made = self._pairs.checked(cast(list[str], items))
        elif self._text:
            own = map(self._own, indices) if request.item_first else cast(list[str], items)
            made = self._joined.checked(own)
        else:
            query = cast(list[int], request.query or [])
            made = (
                [item + query if request.item_first else query + item for item in chunk]
                for chunk in in_chunks(cast(list[list[int]], items), len(query))
            )
        with of_field("messages"):  # no other query is guarded, so that tokenising it may fail
            for sequences in made:
                yield list(zip(islice(numbers, len(sequences)), sequences, strict=True))

    def _own(self, index: int) -> str:
        """An item's text; with ``item_first`` the query follows it."""
        return cast(str, self._items[index]) + (self._query if self._request.item_first else "")

    def _prompt(self, index: int, ids: list[int]) -> Steps[Prompt]:
        """Build the prompt of one item.

        Raises:
            InvalidRequestError: the item is wrong.
        """
        if not ids:
            raise InvalidRequestError(
                f"items[{index}] and the query are both empty: a prompt needs at least one token",
                param="items",
                index=index,
            )
        whole = len(ids)
        shorten = self._request.truncate == "item"
        if not shorten:
            self._check_length(index, whole, 0)  # before any work on its labels
        if self._words:
            ending = self._joined.ending(self._own(index), ids)
            layout, spelling = yield from self._layout(index, ids, ending, fits=not shorten)
        else:
            layout, spelling = self._layouts[index], None
        if whole + layout.depth > self._most_tokens and shorten:
            ids, layout, spelling = yield from self._truncated(index, ids, layout, spelling)
        self._check_length(index, len(ids), layout.depth)
        return Prompt(index, np.asarray(ids, np.int32), layout, spelling, whole - len(ids))

    def _check_length(self, index: int, tokens: int, of_label: int) -> None:
        if tokens + of_label > self._most_tokens:
            labels_too = f", and a label adds {of_label} before its last" if of_label else ""
            raise InvalidRequestError(
                f"items[{index}]: the prompt has {tokens} tokens{labels_too}; this model reads at most "
                f'{self._most}; shorten the item or the query, or send truncate: "item"',
                param="items",
                index=index,
            )

    def _layout(self, index: int, ids: list[int], ending: Ending, *, fits: bool) -> Steps[tuple[Layout, Spelling]]:
        """Lay out an item's labels, given as words, after its prompt.

        Args:
            ending: the prompt's end.
            fits: whether to refuse a prompt that with its labels is longer than the model reads.
        """
        words = self._words[index]
        labelled: list[tuple[int, ...]] = []
        with of_field("labels", index, "labels"):
            for word, with_word in zip(words, ending.followed_by(words), strict=True):
                yield
                labelled.append(self._in_context.added(index, ids, word, with_word, ending))
                if fits:
                    self._check_length(index, len(ids), len(labelled[-1]) - 1)
        return self._in_context.layout(index, words, tuple(labelled))

    def _truncated(
        self, index: int, ids: list[int], layout: Layout, spelling: Spelling | None
    ) -> Steps[tuple[list[int], Layout, Spelling | None]]:
        """Shorten the prompt at the end of its item, and lay out the labels after what is left."""
        room = self._most_tokens - layout.depth
        item_first = self._request.item_first
        if not self._text:
            own = len(self._items[index])
            start, stop = (0, own) if item_first else (len(ids) - own, len(ids))
            return shortened(ids, start, stop, room, index), layout, spelling
        if self._pairs:
            return shortened(ids, *self._pairs.span(len(ids)), room, index), layout, spelling
        item = cast(str, self._items[index])
        text = item + self._query if item_first else self._query + item
        special, tokenizer = self._special, self._tokenizer
        _, ends = tokenizer.encode_with_ends(text, add_special_tokens=special)
        start, stop = item_span(ends, self._query, item, item_first=item_first)
        kept = shortened(ids, start, stop, room, index)
        if not self._words or item_first:
            return kept, layout, spelling
        # The labels now follow other text.
        text = text[: ends[stop - (len(ids) - len(kept)) - 1]]
        ending = tokenizer.ending(text, kept, add_special_tokens=special, work=self._work)
        ending = ending or Ending(tokenizer, [], text, [], special, self._work)
        return kept, *(yield from self._layout(index, kept, ending, fits=True))


def next_step(step: int, made: PreparedItems, tokens: int) -> int:
    """The number of entries to prepare after ``step`` of them: twice as many, as long as they have about ``tokens``
    without the query."""
    own = len(made.batch.tokens) - made.batch.num_sequences * made.query_tokens
    return max(1, min(2 * step, step * tokens // max(own, 1)))


def packed(
    prompts: Sequence[Prompt],
    errors: Sequence[ScoringError],
    query_tokens: int,
    *,
    vocab_logprobs: bool,
    classes: bool,
    pad: int | None,
) -> PreparedItems:
    """Pack prompts into a batch, see ``PreparedItems`` and ``TokenBatch``.

    Args:
        pad: the padding token of a model with classes, see ``ModelInfo.pad_token_id``.
    """
    layouts = [prompt.layout for prompt in prompts]
    sequences = [
        np.concatenate([prompt.ids, np.asarray(more, np.int32)]) if more else prompt.ids
        for prompt in prompts
        for more in prompt.layout.continuations
    ]
    reads = [len(layout.read_depths) for layout in layouts]
    first_sequences = _offsets([len(layout.continuations) for layout in layouts])[:-1]
    first_targets = _offsets([len(layout.targets) for layout in layouts])[:-1]
    last_positions = np.array([_read_at(prompt.ids, pad) for prompt in prompts], np.int64)
    batch = TokenBatch(
        tokens=_joined(sequences, np.int32),
        offsets=_offsets([len(sequence) for sequence in sequences]),
        read_sequences=(
            _joined([layout.read_sequences for layout in layouts], np.int64) + np.repeat(first_sequences, reads)
        ).astype(np.int32),
        read_positions=(
            _joined([layout.read_depths for layout in layouts], np.int64) + np.repeat(last_positions, reads)
        ).astype(np.int32),
        targets=_joined([layout.targets for layout in layouts], np.int32),
        target_offsets=_offsets(_joined([layout.target_counts for layout in layouts], np.int64)),
        vocab_logprobs=vocab_logprobs,
    )
    parts = _joined([layout.parts for layout in layouts], np.int64)
    parts += np.repeat(first_targets, [len(layout.parts) for layout in layouts])
    return PreparedItems(batch, prompts, errors, parts, query_tokens, classes)


def _read_at(ids: Int32, pad: int | None) -> int:
    """The position of the last token that is not padding; 0 if all are padding, as in transformers."""
    return len(ids) - 1 if pad is None else int(np.flatnonzero(ids != pad)[-1:].sum())


def _joined(arrays: Sequence[npt.NDArray[Any]], dtype: type[np.integer[Any]]) -> npt.NDArray[Any]:
    return np.concatenate([np.zeros(0, dtype), *arrays], dtype=dtype)


def _offsets(lengths: Sequence[int] | Int64) -> Int64:
    return np.concatenate(([0], np.cumsum(lengths, dtype=np.int64)))
