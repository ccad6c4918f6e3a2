"""The page at ``/`` and its files, without a browser."""

from __future__ import annotations

import json
from typing import Any

from tests.documents import ROOT

STATIC = ROOT / "serve_app" / "frontend" / "static"
ROUTES = {"decide": "/v1/systemone", "score": "/v1/score", "rerank": "/v1/rerank"}
EXAMPLES: dict[str, dict[str, dict[str, Any]]] = json.loads((STATIC / "examples.json").read_text("utf-8"))
