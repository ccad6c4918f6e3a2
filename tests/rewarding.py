"""A tiny reward model with a tokenizer and a chat template, and what the clients of reward servers send."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx

from tests.local import save_tokenizer
from tests.tiny_families import make_family

Message = dict[str, str]

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
ASKED: Message = {"role": "user", "content": "is this text positive or negative"}
CHATS: list[list[Message]] = [
    [ASKED, {"role": "assistant", "content": answer}]
    for answer in ("yes", "the quick brown fox", "no no no", "negative, the dog is lazy")
]


def make_reward_model(folder: Path, *, classes: int = 1) -> Path:
    """A tiny Llama with a classification head, or a causal one, whose tokenizer adds a BOS as its template does."""
    ids = {"vocab_size": 512, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None}
    make_family(folder, "llama", classes=classes, changes=ids)
    save_tokenizer(folder, adds_bos=True)
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    return folder


def verl_reward(url: str, model: str, tokenizer: Any, chat: Sequence[Message], engine: str) -> float:
    """Ask as ``RewardLoopWorker.compute_score_disrm`` of verl 0.9.1 (``verl/experimental/reward_loop``) asks.

    It renders the chat with the reward model's tokenizer, takes a BOS off the front, and reads the last value of the
    last entry: of ``/classify`` where the server is vLLM, of ``/v1/embeddings`` where it is sglang.
    """
    text: str = tokenizer.apply_chat_template(list(chat), add_generation_prompt=False, tokenize=False)
    body: dict[str, Any] = {"model": model, "input": text.removeprefix(tokenizer.bos_token)}
    if engine == "vllm":
        answer = _posted(f"{url}/classify", body | {"use_activation": False})
        return answer["data"][-1]["probs"][-1]
    return _posted(f"{url}/v1/embeddings", body)["data"][-1]["embedding"][-1]


def openrlhf_rewards(
    url: str, queries: Sequence[str], prompts: Sequence[str], labels: Sequence[Any]
) -> tuple[list[float], list[float], dict[str, Any]]:
    """Ask as ``SingleTurnAgentExecutor`` of OpenRLHF 0.11.2 (``openrlhf/utils/agent.py``) asks."""
    body = {"query": list(queries), "prompts": list(prompts), "labels": list(labels)}
    answer = _posted(f"{url}/get_reward", body)
    return answer["rewards"], answer["scores"], answer["extra_logs"] or {}


def _posted(url: str, body: dict[str, Any]) -> Any:
    response = httpx.post(url, json=body, timeout=120)
    response.raise_for_status()
    return response.json()
