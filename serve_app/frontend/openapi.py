"""OpenAPI descriptions for handlers that read the body and write the response themselves."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from functools import cache
from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel

from serve_app.errors import BY_STATUS, UNPROCESSABLE, InvalidRequestError
from serve_app.schemas import ErrorResponse


def share_parts(app: FastAPI) -> None:
    """Move the objects that requests consist of to the document's components, where references find them."""
    described = app.openapi

    def openapi() -> dict[str, Any]:
        schema = described()
        for operations in schema["paths"].values():
            for operation in operations.values():
                for content in operation.get("requestBody", {}).get("content", {}).values():
                    own = content["schema"]
                    for name, part in own.pop("$defs", {}).items():
                        schema["components"]["schemas"][f"{own['title']}.{name}"] = part
        return schema

    app.openapi = openapi


def errors_of(*codes: int, error: type[BaseModel] = ErrorResponse) -> dict[int | str, dict[str, Any]]:
    described = {**BY_STATUS, UNPROCESSABLE: InvalidRequestError}
    return {code: {"model": error, "description": described[code].__doc__} for code in codes}


@cache
def _schema(asked: type[BaseModel]) -> dict[str, Any]:
    """The schema of a request; two requests may have objects of the same name."""
    return asked.model_json_schema(ref_template=f"#/components/schemas/{asked.__name__}.{{model}}")


def documented(
    answer: type[BaseModel],
    asked: type[BaseModel] | None = None,
    *statuses: int,
    example: Mapping[str, Any] | None = None,
    error: type[BaseModel] = ErrorResponse,
    others: Mapping[str, str] | None = None,
    invalid: int = InvalidRequestError.status,
) -> dict[str, Any]:
    """Describe a route for FastAPI.

    Args:
        example: a request that works.
        error: the type of its error responses.
        others: the media types of answers that are not JSON, such as lines, each with a description.
        invalid: the status of an invalid request.
    """
    codes = ([invalid, 404, 413, 415] if asked else []) + [500, *statuses]
    options: dict[str, Any] = {"response_model": answer, "responses": errors_of(*codes, error=error)}
    if others:
        content = {kind: {"schema": {"type": "string", "description": text}} for kind, text in others.items()}
        options["responses"][200] = {"content": content}
    if asked:
        content = {"application/json": {"schema": deepcopy(_schema(asked)), "example": example}}
        options["openapi_extra"] = {"requestBody": {"required": True, "content": content}}
    return options
