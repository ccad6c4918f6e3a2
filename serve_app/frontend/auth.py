"""API keys: where they come from, and the middleware that asks for one. A key is kept as its SHA-256, with a name."""

from __future__ import annotations

import hashlib
import hmac
import logging
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from serve_app.errors import AuthenticationError, QuotaExceededError, ScoringError

if TYPE_CHECKING:  # the command line reads keys too, and starts faster without
    from fastapi import FastAPI
    from starlette.types import ASGIApp, Receive, Scope, Send

logger = logging.getLogger("ray.serve")

VARIABLE = "SCORE_SERVE_API_KEY"
"""Environment variable: for the service its keys, comma-separated; for a client its own key."""

PUBLIC_ROUTES = (
    "/",
    "/static/common.js",
    "/static/csv.js",
    "/static/decide.js",
    "/static/examples.json",
    "/static/page.css",
    "/static/page.js",
    "/static/rerank.js",
    "/static/score.js",
    "/static/snippets.js",
    "/docs",
    "/docs/swagger-ui.css",
    "/docs/swagger-ui-bundle.js",
    "/openapi.json",
    "/health",
    "/ready",
)
"""Routes that need no key: probes have none, and the other routes show nothing about the model or its requests."""

_LINE = re.compile(r"(?:(?P<name>[A-Za-z0-9][A-Za-z0-9._-]{0,62}):\s+)?(?P<key>[!-~]+)")
"""A key, perhaps after its name. It has the characters that an HTTP header carries unchanged."""

HASHED = "sha256:"
"""Begins a line with a key's SHA-256 in place of the key. A plain hash is enough: keys are random, so nobody can guess
one and compare, as with passwords."""

_NAME_DIGITS = 12
"""Digits of its hash by which a key without a name is named."""


class ApiKeyError(ValueError):
    """The file or the environment variable of keys is unusable. The message says how to mend it, and shows no key."""


@dataclass(frozen=True, slots=True)
class ApiKey:
    """A key of the service.

    Attributes:
        name: for logs and metrics. Several keys may have one name, as in a rotation: they are one tenant.
        digest: its SHA-256.
    """

    name: str
    digest: bytes


def read_keys(file: str | None) -> list[ApiKey]:
    """Read the service's keys from ``file`` and the environment. Without any key the service is open to everyone.

    Args:
        file: has one key per line, or its hash, perhaps after a name and a colon; empty lines and lines that begin with
            # are skipped.

    Raises:
        ApiKeyError: the file cannot be read or has no key, or a line is wrong.
    """
    from_environment = os.environ.get(VARIABLE, "").replace(",", "\n")
    return _keys(from_environment, VARIABLE) + (_read(Path(file)) if file is not None else [])


class ApiKeys:
    """The service's keys. The environment is read once, the file again when it changes.

    If the file becomes unreadable, empty or wrong, this is logged, and its earlier keys stay valid.

    Raises:
        ApiKeyError: see ``read_keys``.
    """

    def __init__(self, file: str | None) -> None:
        self._path = Path(file) if file is not None else None
        self._stamp = self._stamped()  # before the file is read: what changes in between is read again
        self._keys = read_keys(file)

    def __len__(self) -> int:
        return len(self._keys)

    @property
    def names(self) -> set[str]:
        """The names of all keys."""
        return {key.name for key in self._keys}

    def check(self, authorization: str) -> str:
        """Accept a request with this ``Authorization`` header, and return its key's name.

        Raises:
            AuthenticationError: it is empty or not ``Bearer``, or its key is invalid.
        """
        scheme, _, key = authorization.partition(" ")
        if scheme.lower() != "bearer" or not key.strip():
            raise AuthenticationError("this service needs an API key; send it as 'Authorization: Bearer <key>'")
        self._reload()
        digest = _digest(key.strip())
        # Every key is compared, in constant time each: the time taken reveals nothing about a key.
        equal = [hmac.compare_digest(digest, known.digest) for known in self._keys]
        if not any(equal):
            raise AuthenticationError("invalid API key; ask the operator of this service for one")
        return self._keys[equal.index(True)].name

    def _reload(self) -> None:
        stamp = self._stamped()
        if self._path is None or stamp == self._stamp:
            return
        self._stamp = stamp
        try:
            self._keys = read_keys(str(self._path))
            names = ", ".join(dict.fromkeys(key.name for key in self._keys))
            logger.info("%s has changed; %d API keys are valid now, of %s", self._path, len(self._keys), names)
        except ApiKeyError as error:
            logger.error("%s; the %d API keys from before stay valid", error, len(self._keys))

    def _stamped(self) -> tuple[int, ...] | None:
        """A value that changes when the file does."""
        if self._path is None:
            return None
        try:
            found = self._path.stat()
        except OSError:
            return None
        return found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


class RequireKey:
    """Middleware that asks for a key on all routes except ``PUBLIC_ROUTES``. Plain ASGI; the body is not read.

    It notes in the request's state, as ``tenant``, the name of the key.
    """

    def __init__(self, app: ASGIApp, *, keys: ApiKeys) -> None:
        self._app = app
        self._keys = keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"].removeprefix(scope.get("root_path", "")) not in PUBLIC_ROUTES:
            given = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
            scope.setdefault("state", {})["tenant"] = self._keys.check(given.decode("latin-1"))
        await self._app(scope, receive, send)


def document(app: FastAPI) -> None:
    """Mark in the app's OpenAPI which routes need a key."""
    described = app.openapi

    def openapi() -> dict[str, Any]:
        schema = described()
        parts = schema.setdefault("components", {})
        parts["securitySchemes"] = {"ApiKey": {"type": "http", "scheme": "bearer"}}
        for path, operations in schema["paths"].items():
            if path not in PUBLIC_ROUTES:
                for operation in operations.values():
                    operation["security"] = [{"ApiKey": []}]
                    answers = operation["responses"]
                    # In the shape of the route's other errors.
                    errors: list[type[ScoringError]] = [AuthenticationError]
                    if {"503", "504"} <= answers.keys():  # it scores
                        errors.append(QuotaExceededError)
                    for error in errors:
                        answers[str(error.status)] = {
                            "description": error.__doc__,
                            "content": answers["500"]["content"],
                        }
        return schema

    app.openapi = openapi


def _read(path: Path) -> list[ApiKey]:
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ApiKeyError(f"the file of API keys {path} cannot be read: {error}") from error
    keys = _keys(text, str(path))
    if not keys:
        raise ApiKeyError(f"the file of API keys {path} has no key; write one per line")
    return keys


def _keys(text: str, where: str) -> list[ApiKey]:
    keys: list[ApiKey] = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip() or line.strip().startswith("#"):
            continue
        found = _LINE.fullmatch(line.strip())
        if not found:
            raise ApiKeyError(
                f"API key {number} of {where} has a space or a character outside ASCII; use a key without them, "
                "alone or after a name of letters, digits, dots, _ and -, a colon and a space"
            )
        digest = _digest_of(found["key"])
        if digest is None:
            raise ApiKeyError(
                f"API key {number} of {where} begins with {HASHED} but has no 64 hexadecimal digits after it; print "
                'them with: printf %s "$KEY" | sha256sum'
            )
        keys.append(ApiKey(found["name"] or f"key-{digest.hex()[:_NAME_DIGITS]}", digest))
    return keys


def _digest_of(given: str) -> bytes | None:
    """The digest of a key in a file, which may be its hash. None: the hash is none."""
    if not given.startswith(HASHED):
        return _digest(given)
    digits = given.removeprefix(HASHED)
    return bytes.fromhex(digits) if re.fullmatch("[0-9a-fA-F]{64}", digits) else None


def _digest(key: str) -> bytes:
    """The digest of a key, which has the same length for every key."""
    return hashlib.sha256(key.encode()).digest()
