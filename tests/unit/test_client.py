"""The HTTP client, against an HTTP server that exists in this process only."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx
import pytest
from pydantic_core import to_json

from serve_app.client import LONGEST_WAIT_S, ScoreClient
from serve_app.errors import (
    ERRORS,
    SYSTEM_ONE,
    AuthenticationError,
    DeadlineExceededError,
    InvalidRequestError,
    OverloadedError,
    ScoringError,
    TooLargeError,
)
from serve_app.schemas import DetokenizeResponse, PromptTokensDetails, ScoreResponse, TokenizeResponse, Usage
from serve_app.tasks.systemone import AnswerLine, AnswersEnd, NoulAnswer, SystemOneResponse, SystemOneUsage

USAGE = Usage(prompt_tokens=4, total_tokens=4, prompt_tokens_details=PromptTokensDetails(cached_tokens=1))
ANSWER = ScoreResponse(scores=[[0.25, 0.75]], model="m", usage=USAGE)


@pytest.fixture(autouse=True)
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds that the client would wait between attempts; it does not wait."""
    slept: list[float] = []
    monkeypatch.setattr("tenacity.nap.time.sleep", slept.append)
    return slept


def client(
    *answers: httpx.Response | Exception, attempts: int = 5, api_key: str | None = None
) -> tuple[ScoreClient, list[httpx.Request]]:
    """A client whose requests get ``answers`` in turn, and the requests."""
    requests: list[httpx.Request] = []
    left = list(answers)

    def handle(request: httpx.Request) -> httpx.Response:
        requests.append(request)
        answer = left.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    transport = httpx.MockTransport(handle)
    made = ScoreClient("http://judge", api_key=api_key, attempts=attempts, timeout_s=3, transport=transport)
    return made, requests


class Pieces(httpx.SyncByteStream):
    """A body that comes in pieces, or breaks off with an error."""

    def __init__(self, *pieces: Any) -> None:
        self.left = iter(pieces[0] if len(pieces) == 1 else pieces)
        self.closed = False

    def __iter__(self) -> Iterator[bytes]:
        for piece in self.left:
            if isinstance(piece, Exception):
                raise piece
            yield piece

    def close(self) -> None:
        self.closed = True


def good(answer: Any = ANSWER) -> httpx.Response:
    return httpx.Response(200, text=answer.model_dump_json(exclude_none=True))


def failed(error: ScoringError, **headers: str) -> httpx.Response:
    return httpx.Response(error.status, json=error.body(), headers={k.replace("_", "-"): v for k, v in headers.items()})


def test_score_sends_the_fields_and_returns_the_response():
    asking, requests = client(good())
    with asking:
        answer = asking.score("q", ["a"], label_token_ids=[1, 2], apply_softmax=True, temperature=0.5)
    assert answer == ANSWER
    assert str(requests[0].url) == "http://judge/v1/score"
    assert requests[0].headers["content-type"] == "application/json"
    assert json.loads(requests[0].content) == {
        "query": "q",
        "items": ["a"],
        "label_token_ids": [1, 2],
        "length_normalize": False,
        "apply_softmax": True,
        "item_first": False,
        "temperature": 0.5,
        "model": "default",
        "return_token_logprobs": False,
        "return_label_mass": False,
        "return_prompt_token_ids": False,
        "add_special_tokens": True,
        "truncate": "error",
        "on_error": "fail",
        "stream": False,
    }


def test_every_argument_of_score_is_sent():
    asking, requests = client(good())
    fields: dict[str, Any] = {
        "labels": [" yes"],
        "length_normalize": True,
        "return_label_mass": True,
        "return_prompt_token_ids": True,
        "add_special_tokens": False,
        "truncate": "item",
        "on_error": "item",
        "timeout_s": 2.5,
    }
    with asking:
        asking.score("q", ["a"], **fields)
    assert json.loads(requests[0].content).items() >= fields.items()


def test_conversations_are_sent():
    messages = [{"role": "user", "content": "q"}]
    answer = TokenizeResponse(tokens=[5], count=1, max_model_len=9, token_strs=["q"], prompt="q")
    asking, requests = client(good(ANSWER), good(answer))
    with asking:
        asking.score(None, "", messages=messages, labels=["a"])
        assert asking.tokenize(messages=messages) == answer
    for request in requests:
        assert json.loads(request.content)["messages"] == messages


def test_tokens_and_back():
    tokens = TokenizeResponse(tokens=[5, 6], count=2, max_model_len=9, token_strs=["a", "b"])
    asking, requests = client(good(tokens), good(DetokenizeResponse(prompt="ab")))
    with asking:
        assert asking.tokenize("ab", add_special_tokens=False) == tokens
        assert asking.detokenize([5, 6]) == "ab"
    assert [json.loads(request.content) for request in requests] == [
        {"model": "default", "prompt": "ab", "add_special_tokens": False},
        {"model": "default", "tokens": [5, 6]},
    ]
    assert [request.url.path for request in requests] == ["/tokenize", "/detokenize"]


def test_a_wrong_request_is_not_sent():
    asking, requests = client()
    with asking, pytest.raises(InvalidRequestError, match=r"items\[1\] must be a valid string, not 3") as caught:
        asking.score("q", ["a", 3], label_token_ids=[1])  # type: ignore[list-item]
    assert caught.value.param == "items"
    assert not requests


QUESTIONS: dict[str, Any] = {
    "urgent": {"type": "noul", "instructions": "Is it urgent?", "criteria": {"true": {"hours": 1}}},
    "team": {"type": "choice", "criteria": {"billing": None, "shipping": "parcels"}},
}


def test_decide_sends_the_fields_and_returns_the_typed_answers():
    read: dict[str, Any] = {"x_label_mass": 0.5, "x_permutations": 1, "x_reads": [["no"], ["yes"]]}
    answer = SystemOneResponse.model_validate(
        {
            "model": "m",
            "answers": {
                "urgent": {"type": "noul", "noul": 0.75, **read},
                "team": {
                    "type": "choice",
                    "choice": "billing",
                    "probabilities": {"billing": 0.9, "shipping": 0.1},
                    "confidence": 0.8,
                    **read,
                },
            },
            "usage": {"input_tokens": 20, "output_tokens": 0},
            "x_cached_tokens": 3,
        }
    )
    asking, requests = client(good(answer))
    with asking:
        found = asking.decide({"text": "lost", "n": None}, QUESTIONS, permutations=2, on_error="item", timeout_s=2.5)
    assert found == answer
    urgent, team = found.answers["urgent"], found.answers["team"]
    assert (urgent.type, team.type) == ("noul", "choice")
    assert (urgent.noul, team.probabilities["shipping"]) == (0.75, 0.1)
    assert str(requests[0].url) == "http://judge/v1/systemone"
    sent = json.loads(requests[0].content)
    questions = sent.pop("questions")
    assert {
        name: {key: value for key, value in own.items() if value is not None} for name, own in questions.items()
    } == QUESTIONS
    assert list(questions["team"]["criteria"]) == ["billing", "shipping"]
    assert sent == {
        "state": {"text": "lost", "n": None},
        "model": "default",
        "permutations": 2,
        "on_error": "item",
        "stream": False,
        "timeout_s": 2.5,
    }


READ: dict[str, Any] = {"x_label_mass": 0.5, "x_permutations": 1, "x_reads": [["no"], ["yes"]]}
FIRST = AnswerLine(id="ist es \u2028 eilig?", answer=NoulAnswer(noul=0.75, **READ))
END = AnswersEnd(model="m", usage=SystemOneUsage(input_tokens=20), x_cached_tokens=3)


class TestDecideEach:
    def lines(self, *lines: Any, stream: httpx.SyncByteStream | None = None) -> httpx.Response:
        """A response whose pieces end anywhere."""
        body = b"".join(to_json(line, exclude_none=True) + b"\n" for line in lines)
        return httpx.Response(200, stream=stream or Pieces(body[at : at + 7] for at in range(0, len(body), 7)))

    def test_each_answer_comes_as_it_is_read(self):
        asking, requests = client(self.lines(FIRST, END))
        with asking:
            assert list(asking.decide_each("lost", QUESTIONS, timeout_s=2.5)) == [FIRST, END]
        sent = json.loads(requests[0].content)
        assert (sent["stream"], sent["timeout_s"], sent["state"]) == (True, 2.5, "lost")

    def test_only_a_request_without_an_answer_is_retried(self):
        broken = httpx.ReadError("gone")
        asking, requests = client(failed(OverloadedError("full")), self.lines(FIRST, END))
        with asking:
            assert list(asking.decide_each("lost", QUESTIONS)) == [FIRST, END]
        assert len(requests) == 2
        asking, requests = client(self.lines(stream=Pieces(to_json(FIRST) + b"\n", broken)))
        with asking:
            answers = asking.decide_each("lost", QUESTIONS)
            assert next(answers) == FIRST
            with pytest.raises(OverloadedError, match="gone"):
                next(answers)
        assert len(requests) == 1

    @pytest.mark.parametrize("kind", ERRORS)
    def test_an_error_may_be_the_last_line(self, kind: type[ScoringError]):
        _, body = kind("what is wrong", param="questions").answer_on(SYSTEM_ONE)
        asking, _ = client(self.lines(FIRST, body))
        with asking, pytest.raises(kind, match="what is wrong") as caught:
            list(asking.decide_each("lost", QUESTIONS))
        assert type(caught.value) is kind
        assert caught.value.param == "questions"

    def test_an_answer_that_ends_too_early_is_no_answer(self):
        asking, _ = client(self.lines(FIRST))
        with asking, pytest.raises(OverloadedError, match="too early"):
            list(asking.decide_each("lost", QUESTIONS))

    def test_a_reader_that_leaves_closes_the_connection(self):
        pieces = Pieces(to_json(FIRST) + b"\n", b"", b"never read")
        asking, _ = client(self.lines(stream=pieces))
        answers = asking.decide_each("lost", QUESTIONS)
        assert next(answers) == FIRST
        answers.close()
        assert pieces.closed
        asking.close()

    def test_a_wrong_question_is_found_at_once(self):
        asking, requests = client()
        with asking, pytest.raises(InvalidRequestError, match=r"questions has 0 entries"):
            asking.decide_each("lost", {})
        assert not requests


def test_a_wrong_question_is_not_sent():
    asking, requests = client()
    wrong = QUESTIONS | {"team": {"type": "choice", "criteria": {"billing": None}}}
    with asking, pytest.raises(InvalidRequestError, match=r"questions.team.criteria has 1 entries") as caught:
        asking.decide("lost", wrong)
    assert caught.value.param == "questions"
    assert not requests


@pytest.mark.parametrize("kind", ERRORS)
def test_errors_of_other_services_shapes_are_the_services_classes(kind: type[ScoringError]):
    error = kind("what is wrong", param="questions")
    status, body = error.answer_on(SYSTEM_ONE)
    assert "detail" in body
    asking, _ = client(httpx.Response(status, json=body), attempts=1)
    with asking, pytest.raises(kind, match="what is wrong") as caught:
        asking.decide("lost", QUESTIONS)
    assert type(caught.value) is kind
    assert caught.value.param == "questions"


@pytest.mark.parametrize("kind", ERRORS)
def test_errors_are_the_services_classes(kind: type[ScoringError]):
    asking, _ = client(failed(kind("what is wrong", param="items")), attempts=1)
    with asking, pytest.raises(kind, match="what is wrong") as caught:
        asking.info()
    assert type(caught.value) is kind
    assert caught.value.param == "items"


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (401, AuthenticationError),
        (418, InvalidRequestError),
        (413, TooLargeError),
        (500, OverloadedError),
        (502, OverloadedError),
    ],
)
def test_errors_of_a_proxy(status: int, kind: type[ScoringError]):
    asking, _ = client(httpx.Response(status, text="<html>no</html>"), attempts=1)
    with asking, pytest.raises(kind, match=f"HTTP {status}: <html>no"):
        asking.models()


def test_overload_is_retried_after_the_time_in_retry_after(waits: list[float]):
    asking, requests = client(
        failed(OverloadedError("full"), retry_after="7"),
        failed(OverloadedError("full"), retry_after="86400"),
        failed(OverloadedError("full"), retry_after="Wed, 21 Oct 2026 07:28:00 GMT"),
        good(),
    )
    with asking:
        assert asking.score("q", ["a"], label_token_ids=[1]) == ANSWER
    assert len(requests) == 4
    assert waits[:2] == [7, LONGEST_WAIT_S]
    assert 0 < waits[2] < LONGEST_WAIT_S


@pytest.mark.parametrize(
    "failure", [httpx.ConnectError("refused"), httpx.ReadError("reset"), httpx.RemoteProtocolError("closed")]
)
def test_a_lost_connection_is_retried(failure: Exception, waits: list[float]):
    asking, requests = client(failure, good())
    with asking:
        asking.score("q", ["a"], label_token_ids=[1])
    assert len(requests) == 2
    assert len(waits) == 1


def test_attempts_end(waits: list[float]):
    asking, requests = client(*[httpx.ConnectError("refused")] * 3, attempts=3)
    with asking, pytest.raises(OverloadedError, match="http://judge cannot be reached: refused"):
        asking.score("q", ["a"], label_token_ids=[1])
    assert len(requests) == 3
    assert waits == sorted(waits)


@pytest.mark.parametrize("failure", [httpx.ReadTimeout("slow"), failed(InvalidRequestError("no"))])
def test_other_failures_are_not_retried(failure: Any):
    asking, requests = client(failure)
    with asking, pytest.raises((DeadlineExceededError, InvalidRequestError)):
        asking.score("q", ["a"], label_token_ids=[1])
    assert len(requests) == 1


@pytest.mark.parametrize("ask", [ScoreClient.health, ScoreClient.ready])
def test_health_and_ready_are_asked_once(ask: Callable[[ScoreClient], bool]):
    asking, requests = client(httpx.Response(200), httpx.Response(503), httpx.ConnectError("refused"))
    with asking:
        assert [ask(asking) for _ in range(3)] == [True, False, False]
    assert len(requests) == 3


def test_the_api_key_goes_with_every_request_and_none_is_sent_without():
    asking, requests = client(good(), httpx.Response(200), api_key="secret")
    with asking:
        asking.score("q", ["a"], label_token_ids=[1])
        asking.ready()
    assert [request.headers["authorization"] for request in requests] == ["Bearer secret"] * 2
    asking, requests = client(good())
    with asking:
        asking.score("q", ["a"], label_token_ids=[1])
    assert "authorization" not in requests[0].headers


def test_closing_closes_the_connections():
    asking, _ = client(good())
    with asking:
        pass
    with pytest.raises(RuntimeError, match="closed"):
        asking.health()


@contextmanager
def server(threads: int) -> Iterator[tuple[str, list[Any]]]:
    """A server that answers when ``threads`` requests have come. Yields its address and the connections it accepts."""
    accepted: list[Any] = []
    together = threading.Barrier(threads)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def setup(self) -> None:
            accepted.append(self.client_address)
            super().setup()

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["content-length"]))
            together.wait(timeout=30)
            body = ANSWER.model_dump_json(exclude_none=True).encode()
            self.send_response(200)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            pass

    class Server(ThreadingHTTPServer):
        request_queue_size = 2 * threads

    with Server(("127.0.0.1", 0), Handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}", accepted
        running.shutdown()


def test_connections_of_many_threads_are_kept():
    """httpx closes connections over its limits, even one that another thread was just given."""
    threads = 120  # over httpx's own limits of 20 kept and 100 in all
    with (
        server(threads) as (url, accepted),
        ScoreClient(url, attempts=1, timeout_s=30) as asking,
        ThreadPoolExecutor(threads) as pool,
    ):
        for _ in range(2):
            answers = list(pool.map(lambda _: asking.score("q", ["a"], label_token_ids=[1, 2]), range(threads)))
            assert answers == [ANSWER] * threads
    assert len(accepted) == threads
