"""OpenAPI descriptions for handlers that read the body and write the response themselves."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel

from serve_app.errors import BY_STATUS
from serve_app.schemas import ErrorResponse


def errors_of(*codes: int, error: type[BaseModel] = ErrorResponse) -> dict[int | str, dict[str, Any]]:
    return {code: {"model": error, "description": BY_STATUS[code].__doc__} for code in codes}


def documented(
    answer: type[BaseModel],
    asked: type[BaseModel] | None = None,
    *statuses: int,
    error: type[BaseModel] = ErrorResponse,
    lines: str | None = None,
) -> dict[str, Any]:
    """Describe a route for FastAPI.

    Args:
        error: the type of its error responses.
        lines: describes the lines of a streamed answer, if the route can stream.
    """
    codes = ([400, 404, 413, 415] if asked else []) + [500, *statuses]
    options: dict[str, Any] = {"response_model": answer, "responses": errors_of(*codes, error=error)}
    if lines:
        content = {"application/x-ndjson": {"schema": {"type": "string", "description": lines}}}
        options["responses"][200] = {"content": content}
    if asked:
        content = {"application/json": {"schema": asked.model_json_schema()}}
        options["openapi_extra"] = {"requestBody": {"required": True, "content": content}}
    return options
