"""A context that memory has bounded, as a user sees it: in ``/v1/info``, ``/v1/models`` and errors."""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest

from model import loading
from model.memory import PROCESS_BYTES, Room
from serve_app.frontend.models import Models
from serve_app.frontend.routes import create_app
from serve_app.frontend.service import ModelService
from serve_app.settings import ModelSettings
from serve_app.tasks.tokenizer import TextTokenizer
from tests.local import VOCAB_SIZE, DirectReplicas
from tests.tiny import make_llama


@pytest.mark.heavy
async def test_a_context_that_memory_bounds_is_shown_with_the_reason(tokenizer: TextTokenizer, tmp_path: Path):
    folder = make_llama(tmp_path, context=8192, vocab=VOCAB_SIZE)
    engine = loading.load(folder, room=Room(free := PROCESS_BYTES + 10_000_000))
    service = ModelService(ModelSettings(model="tiny"), tokenizer, engine.info, DirectReplicas(engine))
    models = Models(service)
    async with httpx.AsyncClient(
        base_url="http://it", transport=httpx.ASGITransport(create_app(lambda: models))
    ) as http:
        info = (await http.get("/v1/info")).json()
        assert (info["context_length"], info["limits"]["max_prompt_tokens"]) == (8192, 6144)
        planned = engine.info.memory
        assert planned is not None
        assert info["memory"] == {
            "weights_bytes": planned.weights,
            "workspace_bytes": planned.workspace,
            "pages_bytes": planned.pages,
            "page_tokens": planned.page_tokens,
            "free_bytes": free,
        }
        assert {card["max_model_len"] for card in (await http.get("/v1/models")).json()["data"]} == {6144}
        long: list[int] = [1] * 6145
        for path, body in (
            ("/v1/score", {"query": [1], "items": [long], "label_token_ids": [1]}),
            ("/v1/rerank", {"query": "fox " * 6145, "documents": ["dog"]}),
            ("/v1/completions", {"prompt": long, "max_tokens": 1, "echo": True, "logprobs": 1}),
        ):
            answer = (await http.post(path, json=body)).json()
            assert (
                "6144 of its 8192 (what its memory holds; limits.max_prompt_tokens asks for more)"
                in answer.get("error", answer)["message"]
            )

    service.close()
