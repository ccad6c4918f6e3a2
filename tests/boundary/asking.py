"""Requests to the service over HTTP, with the checks that hold for every answer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import httpx


@dataclass
class Http:
    """A client of the service that checks what holds for every answer."""

    client: httpx.AsyncClient
    info: dict[str, Any]

    @property
    def vocab_size(self) -> int:
        return self.info["vocab_size"]

    async def score(self, **body: Any) -> dict[str, Any]:
        response = await self.client.post("/v1/score", json=body)
        assert response.status_code == 200, response.text
        return response.json()

    async def refused(self, path: str = "/v1/score", *, status: int = 400, **body: Any) -> dict[str, Any]:
        """Return the error that a JSON body gets."""
        return self.flat(await self.client.post(path, json=body), status)

    def flat(self, response: httpx.Response, status: int) -> dict[str, Any]:
        """Return the error body, which must have the service's own shape."""
        error = response.json()
        assert response.status_code == status, error
        assert set(error) == {"object", "message", "type", "param", "code"}
        assert error["object"] == "error"
        assert error["code"] == status
        assert error["message"]
        return error

    def nested(self, response: httpx.Response, status: int) -> dict[str, Any]:
        """Return the error of a body, which must have OpenAI's shape."""
        assert response.status_code == status, response.text
        assert set(response.json()) == {"error"}
        error = response.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert error["code"] == status
        assert error["message"]
        return error

    def typesafe(self, response: httpx.Response, status: int) -> dict[str, Any]:
        """The error of a body in TypeSafe's shape, which has OpenAI's beside it."""
        assert response.status_code == status, response.text
        body = response.json()
        assert set(body) == {"detail", "error"}
        if status == 422:
            (found,) = body["detail"]
            assert set(found) == {"loc", "msg", "type"}
            assert found["loc"][0] == "body"
            message = found["msg"]
        else:
            assert set(body["detail"]) == {"error_type", "message"}
            message = body["detail"]["message"]
        assert message == body["error"]["message"] != ""
        assert set(body["error"]) == {"message", "type", "param", "code"}
        assert body["error"]["code"] == status
        return body

    async def ids(self, text: str) -> list[int]:
        response = await self.client.post("/tokenize", json={"prompt": text})
        return response.json()["tokens"]

    async def post(self, body: str | bytes, path: str = "/v1/score", **headers: str) -> httpx.Response:
        """Send a body unchanged."""
        headers = {"content-type": "application/json"} | {k.replace("_", "-"): v for k, v in headers.items()}
        return await self.client.post(path, content=body, headers=headers)
