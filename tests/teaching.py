"""What the clients of teacher servers send, and how they read the answers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

Post = Callable[[str, dict[str, Any]], Any]
"""Posts a body to a path, and returns the JSON of the answer."""


def trl_logprobs(
    post: Post, sequences: Sequence[list[int]], prompt_lengths: Sequence[int], top: int, temperature: float
) -> dict[str, list[Any]]:
    """Ask as ``VLLMClient.get_sequence_logprobs`` of TRL 1.16.0 (``trl/generation/vllm_client.py``) asks.

    It cuts the completion's part out of a choice's prompt logprobs, and sorts each position's by rank. The keys are
    TRL's: of each position the most probable tokens, and the token itself, or -inf where it is not among them.
    """
    body = {
        "model": "default",
        "prompt": list(sequences),
        "max_tokens": 1,
        "temperature": temperature,
        "prompt_logprobs": top,
    }
    keys = ("logprobs", "logprob_token_ids", "actual_logprobs", "actual_token_ids")
    found: dict[str, list[Any]] = {key: [] for key in keys}
    choices = post("/v1/completions", body)["choices"]
    for choice, sequence, start in zip(choices, sequences, prompt_lengths, strict=True):
        rows: list[list[Any]] = []
        for token, entries in zip(sequence[start:], choice["prompt_logprobs"][start:], strict=True):
            ranked = sorted(entries.items(), key=lambda item: item[1]["rank"])[:top]
            own = entries.get(str(token), {"logprob": -math.inf})
            rows.append(
                [[each["logprob"] for _, each in ranked], [int(name) for name, _ in ranked], [own["logprob"]], [token]]
            )
        for key, column in zip(keys, zip(*rows, strict=True), strict=True):
            found[key].append(list(column))
    return found


def slime_logprobs(post: Post, tokens: list[int], response_length: int) -> list[float]:
    """Ask as ``reward_func`` of slime (``slime/rollout/on_policy_distillation.py``) asks, and read the answer as its
    ``post_process_rewards`` does: the logprobs of the response, without the first entry, which has none."""
    body = {
        "input_ids": tokens,
        "sampling_params": {"temperature": 0, "max_new_tokens": 0, "skip_special_tokens": False},
        "return_logprob": True,
        "logprob_start_len": 0,
    }
    answer = post("/generate", body)
    logprobs = [entry[0] for entry in answer["meta_info"]["input_token_logprobs"][1:]]
    return logprobs[-response_length:]
