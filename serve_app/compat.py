"""Fields and routes of other services that clients may send, and how this service answers them.

A field of another service is accepted if its value asks for nothing, as null does. If it asks for something that this
service cannot do, it is refused by name. Fields that have an effect are in the schemas.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Foreign:
    """A field of other services.

    Attributes:
        advice: what to do instead, for a client that sends a value that asks for something.
        neutral: values that ask for nothing besides null; None: every value, since the field has no effect on scores.
    """

    advice: str
    neutral: tuple[Any, ...] | None = ()

    def allows(self, value: Any) -> bool:
        """Whether ``value`` asks for nothing. As in JSON, true is not 1."""
        if value is None or self.neutral is None:
            return True
        return any(value == own and isinstance(value, bool) == isinstance(own, bool) for own in self.neutral)


READS_TEXT = "this service reads text; it takes no images"

_NO_EFFECT = Foreign("it has no effect", None)
_NOT_SAMPLED = Foreign("the one token is the top-1 token, never sampled", None)
_ONE = "at most one token follows a prompt"
_TOP_1 = "the one token is the top-1 token by the model's own logprobs"
_LABELS = "to score given answers, send them to /v1/score as labels"
_PAIRS = "this is the label-scoring API (query, items, labels); to score pairs of texts use /v1/rerank"

EVERYWHERE: Mapping[str, Foreign] = {
    "user": _NO_EFFECT,
    "metadata": _NO_EFFECT,
    "request_id": _NO_EFFECT,  # vLLM; the header x-request-id names a request
    "rid": _NO_EFFECT,  # sglang
    "priority": Foreign("requests have no priorities here", (0,)),
    "mm_processor_kwargs": Foreign("the models read text only", ({},)),
}

SCORE: Mapping[str, Foreign] = {
    **EVERYWHERE,
    **dict.fromkeys(("text_1", "text_2", "queries", "data_1", "documents", "texts"), Foreign(_PAIRS)),
    "truncate_prompt_tokens": Foreign('to have long items cut, send truncate: "item"'),
    "return_pooled_hidden_states": Foreign("only scores are returned", (False,)),
    "embed_override_token_id": Foreign("embeddings cannot be replaced"),
    "embed_overrides": Foreign("embeddings cannot be replaced"),
}

COMPLETIONS: Mapping[str, Foreign] = {
    **EVERYWHERE,
    "n": Foreign(_TOP_1, (1,)),
    "best_of": Foreign(_TOP_1, (1,)),
    "use_beam_search": Foreign(_TOP_1, (False,)),
    "stream": Foreign("the answer comes whole", (False,)),
    "stream_options": Foreign("the answer comes whole"),
    "stop": Foreign(_ONE, ([], "")),
    "stop_token_ids": Foreign(_ONE, ([],)),
    "ignore_eos": Foreign(_ONE, None),
    "min_tokens": Foreign(_ONE, (0,)),
    "suffix": Foreign("the model reads the prompt alone", ("",)),
    "seed": _NOT_SAMPLED,
    "top_p": _NOT_SAMPLED,
    "top_k": _NOT_SAMPLED,
    "min_p": _NOT_SAMPLED,
    "frequency_penalty": Foreign(_TOP_1, (0,)),
    "presence_penalty": Foreign(_TOP_1, (0,)),
    "repetition_penalty": Foreign(_TOP_1, (1,)),
    "length_penalty": Foreign(_ONE, (1,)),
    "logit_bias": Foreign(_LABELS, ({},)),
    "allowed_token_ids": Foreign(_LABELS),
    "guided_choice": Foreign(_LABELS),
    "structured_outputs": Foreign(_LABELS),
    "response_format": Foreign("the answer is text", ({"type": "text"},)),
    "add_special_tokens": Foreign("to choose the prompt's tokens, send their ids", (True,)),
    "truncate_prompt_tokens": Foreign("a prompt that is too long is an error; shorten it"),
    "return_tokens_as_token_ids": Foreign("POST /tokenize returns the ids", (False,)),
    "return_token_ids": Foreign("POST /tokenize returns the ids", (False,)),
}

LOGPROBS: Mapping[str, Foreign] = {
    **EVERYWHERE,
    "prompt": Foreign("send the sequences as input"),
    "stream": Foreign("the answer comes whole", (False,)),
    "truncate_prompt_tokens": Foreign("a sequence that is too long is an error; shorten it"),
}

GENERATE: Mapping[str, Foreign] = {
    **EVERYWHERE,
    "stream": Foreign("the answer comes whole", (False,)),
    "input_embeds": Foreign("send text or input_ids"),
    "image_data": Foreign(READS_TEXT),
    "video_data": Foreign(READS_TEXT),
    "audio_data": Foreign(READS_TEXT),
    "modalities": Foreign(READS_TEXT),
    "lora_path": Foreign("name the model in model"),
    "return_hidden_states": Foreign("only logprobs are returned", (False,)),
    "log_metrics": _NO_EFFECT,
    "bootstrap_host": _NO_EFFECT,
    "background": Foreign("the answer comes at once", (False,)),
}

RERANK: Mapping[str, Foreign] = {
    **EVERYWHERE,
    "texts": Foreign("send documents or texts, not both"),
    "instruct": Foreign("send instruct or instruction, not both"),
    "instruction": Foreign("send instruct or instruction, not both"),
    "rank_fields": Foreign("only the field text of a document is read; put everything there", (["text"],)),
    "max_chunks_per_doc": Foreign(
        "one chunk of each document is read; max_tokens_per_doc sets how long it may be", (1,)
    ),
    "truncation": Foreign("to get an error for a document that is too long, send truncate: false", (True,)),
    "truncation_direction": Foreign("a document that is too long loses its end", ("Right", "right")),
    "use_activation": Foreign("for scores that are not probabilities send raw_scores: true", (True,)),
    "activation": Foreign("for scores that are not probabilities send raw_scores: true", (True,)),
    "return_embeddings": Foreign("only scores are returned", (False,)),
}

GENERATIVE: Mapping[str, Foreign] = {**EVERYWHERE, "truncate_prompt_tokens": Foreign("shorten the items")}

_SWITCH = Foreign("send use_activation alone; activation and softmax are its older names")
_REWARDS: Mapping[str, Foreign] = {
    **EVERYWHERE,
    "text": Foreign("send the texts as input"),
    "truncate_prompt_tokens": Foreign("a text that is too long is an error; shorten it"),
    "truncation_side": Foreign("a text that is too long is an error; shorten it"),
    "padding": Foreign("padding would change nothing", ("do_not_pad",)),
    "continue_final_message": Foreign("the conversation ends with its last message", (False,)),
    "chat_template": Foreign("the model's own chat template is used"),
    "chat_template_kwargs": Foreign("the chat template is used without reasoning", ({}, {"enable_thinking": False})),
    "media_io_kwargs": Foreign("the models read text only", ({},)),
}
_ENCODINGS: Mapping[str, Foreign] = {
    "dimensions": Foreign("every class has a value; leave it out"),
    "embed_dtype": Foreign("values in base64 are float32", ("float32",)),
    "endianness": Foreign("values in base64 are little-endian", ("native", "little")),
}
_OLDER: Mapping[str, Foreign] = dict.fromkeys(("use_activation", "activation", "softmax"), _SWITCH)

CLASSIFY: Mapping[str, Foreign] = {**_REWARDS, **_OLDER}
POOLING: Mapping[str, Foreign] = {
    **_REWARDS,
    **_OLDER,
    **_ENCODINGS,
    "task": Foreign("only the classes of whole texts are returned", ("classify",)),
    "normalize": Foreign("classes are not normalised; send use_activation"),
}
EMBEDDINGS: Mapping[str, Foreign] = {
    **_REWARDS,
    **_ENCODINGS,
    "normalize": Foreign("rewards are not normalised", (False,)),
    "use_activation": Foreign("for probabilities use /classify"),
}

TOKENIZE: Mapping[str, Foreign] = {
    **EVERYWHERE,
    "return_token_strs": Foreign("they are always returned", None),
    "truncate_prompt_tokens": Foreign("all tokens are returned"),
    "continue_final_message": Foreign("the answer begins after the messages", (False,)),
    "chat_template": Foreign("the model's own chat template is used"),
    "chat_template_kwargs": Foreign("the chat template is used without reasoning", ({}, {"enable_thinking": False})),
    "tools": Foreign("the chat template is used without tools", ([],)),
}

DETOKENIZE: Mapping[str, Foreign] = {
    **EVERYWHERE,
    "skip_special_tokens": Foreign("special tokens are returned as text", (False,)),
}

SYSTEM_ONE: Mapping[str, Foreign] = {"assets": Foreign(READS_TEXT, ({},))}
"""All other unknown fields are ignored, as TypeSafe's own service does."""

DECISIONS: Mapping[str, Foreign] = {
    **EVERYWHERE,
    "stream": Foreign("the answer comes whole", (False,)),
    "temperature": Foreign("nothing is sampled; the probabilities are the model's own"),
    "instructions": Foreign("each question has its own"),
}

NOT_HERE: Mapping[str, str] = {"box": READS_TEXT, "input_image": READS_TEXT}
"""Types of questions and of parts of a text that other services have, and why they are refused."""

_GENERATES = "this service scores text and generates none; score answers with POST /v1/score, whole texts with POST "
ROUTES: Mapping[str, str] = {
    "/score": "score labels with POST /v1/score, and pairs of texts with POST /v1/rerank",
    "/chat/completions": f"{_GENERATES}/v1/completions",
    "/completions/chat": f"{_GENERATES}/v1/completions",
    "/messages": f"{_GENERATES}/v1/completions",
    "/responses": f"{_GENERATES}/v1/completions",
    "/embeddings": "this service makes no embeddings; rewards are at POST /v1/embeddings, and POST /v1/rerank ranks",
    "/embed": "this service makes no embeddings; rank texts with POST /v1/rerank",
}
"""Routes of other services, without ``/v1``, and what to use instead."""


def instead_of(path: str, routes: Mapping[str, Collection[str]]) -> str:
    """Say what to use in place of a route that does not exist.

    Args:
        routes: the routes that exist, with their methods.
    """
    parts = [part for part in path.lower().split("/") if part]
    clean = "/" + "/".join(parts)
    bare = "/" + "/".join(parts[1:] if parts[:1] in (["v1"], ["v2"]) else parts)
    if clean not in routes and bare in ROUTES:
        return ROUTES[bare]
    found = next((each for each in (clean, bare, "/v1" + bare) if each in routes), None)
    for near in [found] if found else difflib.get_close_matches(clean, routes, n=1, cutoff=0.75):
        return f"did you mean {' or '.join(f'{method} {near}' for method in sorted(routes[near]))}?"
    return "see /docs for the routes"
