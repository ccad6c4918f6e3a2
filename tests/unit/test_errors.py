"""Each route's errors have the shape that its clients read."""

from __future__ import annotations

import pickle

import pytest

from serve_app.errors import ERRORS, InvalidRequestError, ScoringError

TYPESAFE = {
    "AuthenticationError": "authentication_error",
    "NotFoundError": "not_found_error",
    "MethodNotAllowedError": "method_not_allowed_error",
    "RequestTooLargeError": "request_too_large_error",
    "UnsupportedEncodingError": "unsupported_encoding_error",
    "RateLimitError": "rate_limit_error",
    "InternalServerError": "internal_server_error",
    "ServiceUnavailableError": "service_unavailable_error",
    "TimeoutError": "timeout_error",
}
OTHERS = [error for error in ERRORS if error is not InvalidRequestError]


@pytest.mark.parametrize("kind", ERRORS)
def test_shapes_by_route(kind: type[ScoringError]):
    error = kind("no", param="model")
    object_ = {"message": "no", "type": kind.type, "param": "model", "code": kind.status}
    for path in ("/v1/score", "/v1/rerank", "/v1/models/completions", "/v1/models/systemone", "/v1/models/a/decisions"):
        assert error.answer_on(path) == (kind.status, {"object": "error", **object_})
    for path in ("/v1/completions", "/v1/decisions", "/v1/v1/decisions", "/v1/decisions/"):
        assert error.answer_on(path) == (kind.status, {"error": object_})


@pytest.mark.parametrize("kind", OTHERS)
@pytest.mark.parametrize("path", ["/v1/systemone", "/v1/v1/systemone", "/v1/systemone/"])
def test_typesafes_details(kind: type[ScoringError], path: str):
    status, body = kind("no").answer_on(path)
    assert (status, body["error"]["code"]) == (kind.status, kind.status)
    assert body["detail"] == {"error_type": TYPESAFE[kind.type], "message": "no"}


def test_an_invalid_request_has_its_place():
    error = InvalidRequestError("no", param="questions")
    for own, loc in ((error, ["questions"]), (error.at(("questions", "q", 1)), ["questions", "q", 1])):
        status, body = pickle.loads(pickle.dumps(own)).answer_on("/v1/systemone")
        assert (status, body["error"]["code"]) == (422, 422)
        assert body["detail"] == [{"loc": ["body", *loc], "msg": "no", "type": "value_error"}]
    assert InvalidRequestError("no").answer_on("/v1/systemone")[1]["detail"][0]["loc"] == ["body"]
