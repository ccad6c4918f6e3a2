"""Work in a window, and JSON in pieces."""

from __future__ import annotations

import asyncio
import time
from contextlib import aclosing

import pytest

from serve_app.errors import DeadlineExceededError
from serve_app.frontend.streaming import PIECE_VALUES, as_finished, json_pieces
from serve_app.schemas import ItemError, ScoreResponse, StatusResponse, TokenizeResponse
from serve_app.tasks.completions import CompletionChoice, CompletionLogprobs, CompletionResponse
from serve_app.tasks.scores import usage


class Work:
    """Calls that end when the test ends them, in any order."""

    def __init__(self, calls: int) -> None:
        self.left = calls
        self.ends: list[asyncio.Future[int]] = []
        self.cancelled = 0

    async def start(self) -> int:
        self.left -= 1
        end: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self.ends.append(end)
        try:
            return await end
        except asyncio.CancelledError:
            self.cancelled += 1
            raise

    def results(self, window: int, seconds: float = 9.0):
        deadline = time.time() + seconds
        return as_finished(
            self.start, lambda: self.left > 0, window=window, deadline=deadline, late=DeadlineExceededError("late")
        )


async def test_results_come_as_they_finish_and_no_more_are_started_than_fit():
    work = Work(5)
    results = work.results(window=2)
    first = asyncio.create_task(anext(results))
    await asyncio.sleep(0.01)
    assert len(work.ends) == 2
    work.ends[1].set_result(1)
    assert await first == 1
    await asyncio.sleep(0.01)
    assert len(work.ends) == 2  # nothing is started while no result is requested
    second = asyncio.create_task(anext(results))
    await asyncio.sleep(0.01)
    work.ends[2].set_result(2)
    assert await second == 2
    for number in (0, 3, 4):
        following = asyncio.create_task(anext(results))
        await asyncio.sleep(0.01)
        work.ends[number].set_result(number)
        assert await following == number
    with pytest.raises(StopAsyncIteration):
        await anext(results)


@pytest.mark.parametrize("failing", [0, 1, 2])
async def test_finished_results_come_before_an_error(failing: int):
    work = Work(9)
    results = work.results(window=3)
    following = asyncio.create_task(anext(results))
    await asyncio.sleep(0.01)
    for number, end in enumerate(work.ends):
        if number == failing:
            end.set_exception(ValueError("bad"))
        else:
            end.set_result(number)
    came = {await following, await anext(results)}
    with pytest.raises(ValueError, match="bad"):
        await anext(results)
    assert came == {0, 1, 2} - {failing}
    assert len(work.ends) == 3  # nothing is started after the error


async def test_an_error_or_closing_cancels_the_rest():
    work = Work(9)
    async with aclosing(work.results(window=3)) as results:
        following = asyncio.create_task(anext(results))
        await asyncio.sleep(0.01)
        work.ends[0].set_result(0)
        await following
    assert work.cancelled == 2
    work = Work(9)
    following = asyncio.create_task(anext(work.results(window=3)))
    await asyncio.sleep(0.01)
    work.ends[0].set_exception(ValueError("bad"))
    work.ends[1].set_exception(ValueError("worse"))  # this error is never raised, and no warning follows
    with pytest.raises(ValueError, match=r"bad|worse"):
        await following
    assert work.cancelled == 1
    assert asyncio.all_tasks() == {asyncio.current_task()}


async def test_the_deadline():
    work = Work(3)
    with pytest.raises(DeadlineExceededError, match="late"):
        await anext(work.results(window=2, seconds=0.01))
    assert work.cancelled == 2


def answer(items: int, labels: int) -> ScoreResponse:
    scores = [[i / (j + 1 + i) for j in range(labels)] if i % 7 else None for i in range(items)]
    errors = [ItemError(index=i, code=400, message='"é\n') for i in range(0, items, 7)]
    return ScoreResponse(
        scores=scores, model="m", usage=usage(7, 3), label_mass=[0.5] * items, truncated=[None] * items, errors=errors
    )


@pytest.mark.parametrize(
    "response",
    [
        answer(0, 0),
        answer(3, 2),
        answer(2 * PIECE_VALUES + 1, 1),
        answer(3, 3 * PIECE_VALUES),
        StatusResponse(),
        TokenizeResponse(tokens=[1, 2], count=2, max_model_len=9, token_strs=["a", "Ġé"]),
    ],
)
def test_pieces_are_the_whole(response: ScoreResponse | StatusResponse | TokenizeResponse):
    pieces = list(json_pieces(response))
    assert b"".join(pieces).decode() == response.model_dump_json(exclude_none=True)


def test_no_piece_is_long():
    most = max(len(piece) for piece in json_pieces(answer(20_000, 2)))
    assert most < 80 * PIECE_VALUES


def test_nested_values_count_towards_a_piece():
    told = CompletionLogprobs(tokens=["a"] * 1000, token_logprobs=[-0.5] * 1000, text_offset=[0] * 1000)
    choices = [CompletionChoice(text="a", index=index, logprobs=told) for index in range(8)]
    used = usage(1, 1)
    response = CompletionResponse(id="i", created=0, model="m", choices=choices, usage=used)
    pieces = list(json_pieces(response))
    assert b"".join(pieces).decode() == response.model_dump_json(exclude_none=True)
    assert sum(b'"logprobs"' in piece for piece in pieces) == 4
