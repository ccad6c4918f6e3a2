"""Pages for people: one to try the service, and the API documentation. They load nothing from other hosts."""

from __future__ import annotations

from importlib import resources

from fastapi import FastAPI, Response
from fastapi.openapi.docs import get_swagger_ui_html

_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data:; connect-src 'self'; "
    "form-action 'none'; base-uri 'none'; frame-ancestors 'none'"
)
"""Content security policy: the browser lets the page talk to this service only."""

_SWAGGER_UI = {"swagger-ui.css": "text/css", "swagger-ui-bundle.js": "text/javascript"}
"""Files of Swagger UI and their media types."""


def add_pages(app: FastAPI) -> None:
    """Add ``/`` and ``/docs``. Their links are relative, so that they work under a path prefix."""
    page = resources.files("serve_app.frontend").joinpath("static", "index.html").read_bytes()

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

    for name, media_type in _SWAGGER_UI.items():
        _add_file(app, name, media_type)
    # FastAPI keeps the handlers; the names are only read by it.
    del index, docs


def _add_file(app: FastAPI, name: str, media_type: str) -> None:
    content = resources.files("fastapi_offline").joinpath("static", name).read_bytes()

    @app.get(f"/docs/{name}", include_in_schema=False)
    async def asset() -> Response:
        return Response(content, media_type=media_type, headers={"cache-control": "max-age=86400"})

    del asset
