"""Logprobs at every position of sequences: what an engine reads for them, and its values by sequence.

The shapes of requests and answers are those of the tasks: ``logprobs``, ``completions``, ``generate``.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from serve_app.batches import Reads, pack
from serve_app.contract import MOST_TOP, BatchResult, Float32, Int32, Int64, TokenBatch
from serve_app.errors import InvalidRequestError, TooLargeError
from serve_app.schemas import LOWEST
from serve_app.tasks.model_facts import ModelFacts
from serve_app.tasks.scores import not_finite
from serve_app.tasks.steps import Steps
from serve_app.tasks.validation import check_ids

MOST_IN_JSON = 2**22
"""The most numbers of an answer in JSON, which takes 20 bytes and more for each."""
LOWEST_TEMPERATURE = 0.001
"""Divided by less, logits may leave what float32 holds."""
MOST_IN_BINARY = 2**25
"""The most numbers of a binary answer, of 4 bytes each."""


@dataclass(frozen=True, slots=True)
class Positions:
    """Sequences, and what is asked at each of their positions.

    Attributes:
        sequences: token ids.
        starts: for each sequence the first token whose logprob is asked for, at least 1, at most its length.
        candidates: for each sequence, for each of these tokens, ids whose logprobs are asked for in its place; None:
            of none.
        top: how many of the most probable tokens are asked for at each position.
        temperature: divides all logits.
    """

    sequences: Sequence[Int32]
    starts: Sequence[int]
    candidates: Sequence[Sequence[Sequence[int]]] | None = None
    top: int = 0
    temperature: float = 1.0

    @property
    def numbers(self) -> int:
        """The number of logprobs and ids of the answer."""
        count = sum(len(ids) - start for ids, start in zip(self.sequences, self.starts, strict=True))
        chosen = itertools.chain.from_iterable(self.candidates or ())
        return count * (2 + 2 * self.top) + sum(map(len, chosen))

    def batch(self) -> TokenBatch:
        """What an engine computes: each token's read is at the token before it, its first target the token itself."""
        reads = [self._reads(number) for number in range(len(self.sequences))]
        return pack(self.sequences, reads, top=self.top, temperature=self.temperature)

    def _reads(self, number: int) -> Reads:
        ids, start = self.sequences[number], self.starts[number]
        at, own = np.arange(start - 1, len(ids) - 1, dtype=np.int32), ids[start:]
        if self.candidates is None:
            return Reads(at, own, np.ones(len(own), np.int32))
        chosen = self.candidates[number]
        counts = np.array([len(each) for each in chosen], np.int32)
        flat = np.fromiter(itertools.chain.from_iterable(chosen), np.int32, int(counts.sum()))
        places = np.cumsum(counts) - counts
        return Reads(at, np.insert(flat, places, own), counts + 1)

    def found(self, batch: TokenBatch, result: BatchResult, field: str) -> list[Found]:
        """The engine's values by sequence.

        Args:
            field: the sequences' name in the request.

        Raises:
            InternalError: the model's output for a sequence is not finite.
        """
        found: list[Found] = []
        bounds = np.searchsorted(batch.read_sequences, np.arange(batch.num_sequences + 1)).tolist()
        for number, (first, last) in enumerate(itertools.pairwise(bounds)):
            offsets = batch.target_offsets[first : last + 1]
            values, top = result.values[offsets[0] : offsets[-1]], result.top_values[first:last]
            if not all(_finite(each) for each in (values, top)):
                raise not_finite(number, field)
            offsets = offsets - offsets[0]
            logprobs = np.delete(values, offsets[:-1])
            counts = np.diff(offsets) - 1
            own = self.sequences[number][self.starts[number] :]
            found.append(Found(own, values[offsets[:-1]], logprobs, counts, result.top_ids[first:last], top))
        return found


@dataclass(frozen=True, slots=True)
class Found:
    """What is found of one sequence, a row for each of its tokens from the start on.

    Attributes:
        ids: these tokens.
        logprobs: their own logprobs, in nats; -inf may be among all logprobs.
        candidates: the candidates' logprobs, one position after the other.
        counts: how many candidates each position has.
        top_ids: the most probable tokens, the most probable first: [positions, top].
        top_logprobs: their logprobs.
    """

    ids: Int32
    logprobs: Float32
    candidates: Float32
    counts: Int64
    top_ids: Int32
    top_logprobs: Float32

    @property
    def candidate_rows(self) -> Iterator[list[float]]:
        """The candidates' logprobs for JSON, by position."""
        flat, ends = in_json(self.candidates), np.cumsum(self.counts).tolist()
        return (flat[start:end] for start, end in itertools.pairwise([0, *ends]))


def in_json(values: Float32) -> list[Any]:
    """Logprobs as JSON can hold them, in lists as they are in arrays."""
    return np.maximum(values, np.float32(LOWEST)).tolist()


def check_top(top: int, model: ModelFacts, param: str) -> None:
    """Raise InvalidRequestError when more of the most probable tokens are asked for than there may be."""
    most = min(MOST_TOP, model.info.vocab_size)
    if not 0 <= top <= most:
        raise InvalidRequestError(
            f"{param} is {top}; this service returns the 0 to {most} most probable tokens; send such a number",
            param=param,
        )


def check_start(start: int, length: int, param: str, index: int) -> None:
    """Raise InvalidRequestError when a sequence has no token with a logprob from its start on."""
    if not 1 <= start < length:
        limit = f"send a start of 1 to {length - 1}" if length > 1 else "send a longer sequence"
        raise InvalidRequestError(
            f"{param} of sequence {index} is {start}, and the sequence has {length} tokens; a token has a logprob if "
            f"another is before it; {limit}",
            param=param,
            index=index,
        )


def check_candidates(
    candidates: Sequence[Sequence[Sequence[int]]], positions: Sequence[int], vocab_size: int
) -> Steps[None]:
    """Check the candidates of each sequence.

    Args:
        positions: for each sequence how many it has.

    Raises:
        InvalidRequestError: there are more or fewer lists than sequences or positions, or an id is wrong.
    """
    if len(candidates) != len(positions):
        raise InvalidRequestError(
            f"candidates has {len(candidates)} lists; send one for each of the {len(positions)} sequences",
            param="candidates",
        )
    for index, (chosen, count) in enumerate(zip(candidates, positions, strict=True)):
        yield
        if len(chosen) != count:
            raise InvalidRequestError(
                f"candidates[{index}] has {len(chosen)} lists of ids; send one, which may be empty, for each of the "
                f"{count} tokens from the start on",
                param="candidates",
                index=index,
            )
        for place, ids in enumerate(chosen):
            check_ids(ids, vocab_size, f"candidates[{index}][{place}]", index)


def check_size(numbers: int, most: int, remedy: str) -> None:
    """Raise TooLargeError when an answer would have too many numbers."""
    if numbers > most:
        raise TooLargeError(
            f"the answer would have {numbers:,} numbers; this service answers with at most {most:,} so; {remedy}"
        )


def _finite(values: npt.NDArray[np.float32]) -> bool:
    """Whether none is NaN or above all numbers; a logprob may be -inf."""
    return bool((values < np.inf).all())
