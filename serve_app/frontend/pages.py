"""Pages for people: one to try the service, and the API documentation. They load nothing from other hosts."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

from fastapi import FastAPI, Response
from fastapi.openapi.docs import get_swagger_ui_html

_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src data:; connect-src 'self'; "
    "form-action 'none'; base-uri 'none'; frame-ancestors 'none'"
)
"""Content security policy: the browser lets the page talk to this service only."""

_MEDIA_TYPES = {".css": "text/css", ".js": "text/javascript", ".json": "application/json"}
"""Media types of the page's files."""

_SWAGGER_UI = {"swagger-ui.css": "text/css", "swagger-ui-bundle.js": "text/javascript"}
"""Files of Swagger UI and their media types."""


def add_pages(app: FastAPI) -> None:
    """Add ``/``, ``/docs`` and the files of both. Their links are relative, so that they work under a path prefix."""
    static = resources.files("serve_app.frontend").joinpath("static")
    page = static.joinpath("index.html").read_bytes()

    @app.get("/", include_in_schema=False)
    async def index() -> Response:
        headers = {"content-security-policy": _POLICY, "cache-control": "no-cache"}
        return Response(page, media_type="text/html", headers=headers)

    @app.get("/docs", include_in_schema=False)
    async def docs() -> Response:
        return get_swagger_ui_html(
            openapi_url="openapi.json",
            title=app.title,
            swagger_css_url="docs/swagger-ui.css",
            swagger_js_url="docs/swagger-ui-bundle.js",
            swagger_favicon_url="data:,",
        )

    for file in static.iterdir():
        media_type = _MEDIA_TYPES.get(Path(file.name).suffix)
        if media_type:
            _add_file(app, f"/static/{file.name}", file.read_bytes(), media_type, "no-cache")
    for name, media_type in _SWAGGER_UI.items():
        content = resources.files("fastapi_offline").joinpath("static", name).read_bytes()
        _add_file(app, f"/docs/{name}", content, media_type, "max-age=86400")
    # FastAPI keeps the handlers; the names are only read by it.
    del index, docs


def _add_file(app: FastAPI, path: str, content: bytes, media_type: str, cached: str) -> None:
    @app.get(path, include_in_schema=False)
    async def asset() -> Response:
        return Response(content, media_type=media_type, headers={"cache-control": cached})

    del asset
