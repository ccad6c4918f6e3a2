"""Tiny random decision models with heads of their own, as their publishers lay them out; and what they compute.

The heads' mathematics is written out from the sources that ``model.decision_heads`` names, in float32 with torch.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from tests.tiny import write_json
from tests.tiny_families import make_family

HEAD_WIDTH = 20
CONTROL = ("<|fim_prefix|>", "<|fim_middle|>", "<|box_start|>", "<|box_end|>", "<|fim_suffix|>")
OFFSETS = {"3": [0.7, -0.4, 0.1], "5": [0.1, 0.2, 0.3, -0.2, -0.4]}
TEMPERATURE = 1.7
"""Of the pointer head."""


def tokenizer() -> Tokenizer:
    """A byte-level BPE of 290 tokens, with the control tokens of kev's prompt."""
    text = '\n<option>\n{"description": "key":} option>\n\nSelect Decision: Options:'
    return byte_pairs(290, ["<|im_start|>", "<|im_end|>", *CONTROL], text)


def byte_pairs(tokens: int, specials: Sequence[str | AddedToken], text: str) -> Tokenizer:
    """A byte-level BPE of so many tokens, the special ones first, that has the words of a text as tokens."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=tokens,
        special_tokens=list(specials),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator([text] * 50, trainer)
    return made


def candidate_head(width: int, seed: int = 5) -> dict[str, np.ndarray]:
    """Tensors of Decision 2.0's head."""
    rng, inner = np.random.default_rng(seed), HEAD_WIDTH
    linears = dict.fromkeys(("key", "query", "candidate_mlp", "query_mlp"), (inner, width))
    found = {f"{name}.weight": rng.normal(0, 1.3 * width**-0.5, shape) for name, shape in linears.items()}
    for name in ("candidate_norm", "query_norm"):
        found[f"{name}.weight"] = rng.uniform(0.6, 1.4, width)
        found[f"{name}.bias"] = rng.normal(0, 0.3, width)
    found["candidate_mlp.bias"] = rng.normal(0, 0.5, inner)
    found["scalar.weight"] = rng.normal(0, 0.4, (1, inner))
    return {name: each.astype(np.float32) for name, each in found.items()}


def pointer_head(width: int, seed: int = 6) -> dict[str, np.ndarray]:
    """Tensors of kev's head."""
    rng = np.random.default_rng(seed)
    found: dict[str, np.ndarray] = {}
    for name in ("q", "k"):
        found[f"{name}.weight"] = rng.normal(0, width**-0.5, (HEAD_WIDTH, width)).astype(np.float32)
        found[f"{name}.bias"] = rng.normal(0, 0.3, HEAD_WIDTH).astype(np.float32)
    return found


def make_decision2(folder: Path, family: str = "qwen3", *, changes: Mapping[str, Any] | None = None) -> Path:
    """Write a Decision 2.0 package around a tiny model of the family, and return its folder.

    Args:
        changes: keys of ``decision_config.json`` in place of the release's.
    """
    backbone = make_family(folder / "backbone", family, changes={"max_position_embeddings": 2_048})
    weights = load_file(backbone / "model.safetensors")
    own = {name.removeprefix("model."): each for name, each in weights.items() if name != "lm_head.weight"}
    save_file(own, backbone / "model.safetensors")
    config = json.loads((backbone / "config.json").read_text())
    name = {"qwen3": "Qwen3Model", "qwen3_5": "Qwen3_5TextModel"}[family]
    write_json(backbone / "config.json", config | {"architectures": [name], "tie_word_embeddings": True})
    save_file(candidate_head(config["hidden_size"]), folder / "decision_head.safetensors")
    write_json(
        folder / "config.json",
        {
            "decision_format": "vllm-sr-decision",
            "format_version": 2,
            "package_schema": "dev2-package/1",
            "model_name": "Decision-2.0-Tiny",
            "manifest": "MODEL_MANIFEST.json",
            "max_input_tokens": 1_024,
            "calibration": None,
            "model_config": "decision_config.json",
            "backbone": {"config": "backbone/config.json", "weights": ["backbone/model.safetensors"]},
            "decision_weights": {"decision_head": "decision_head.safetensors"},
            "model_type": "decision2",
            "architectures": ["Decision2Model"],
            "auto_map": {"AutoModel": "modeling_decision2.Decision2Model"},
        },
    )
    said = {
        "architecture": "qwen3-text-endpoints-global-query-shared-bilinear-mlp",
        "prompt_version": "decision2-segmented-options-global-query-v1",
        "head_variant": "shared",
        "head_dim": HEAD_WIDTH,
        "max_options": 255,
    }
    write_json(folder / "decision_config.json", said | dict(changes or {}))
    write_json(folder / "score_bias.json", {"format": "dev2-score-bias-v1", "offsets": OFFSETS})
    (folder / "modeling_decision2.py").write_text("raise RuntimeError('code of a model is never executed')")
    tokenizer().save(str(folder / "tokenizer.json"))
    return folder


def add_kev_head(folder: Path, width: int, **more: Any) -> Path:
    """Write kev's ``head.pt`` and its training's notes beside an adapter or a model, and a tokenizer.

    Args:
        more: what ``head.pt`` has beside the head.
    """
    import torch

    head = {name: torch.from_numpy(each) for name, each in pointer_head(width).items()}
    torch.save({"head": head, "head_dim": HEAD_WIDTH, "temperature": TEMPERATURE, **more}, folder / "head.pt")
    write_json(folder / "training_config.json", {"args": {"head_dim": HEAD_WIDTH}})
    tokenizer().save(str(folder / "tokenizer.json"))
    return folder


class Backbone:
    """transformers' float32 model without a head.

    Args:
        load: a class of transformers with ``from_pretrained``.
    """

    def __init__(self, folder: Path, load: str = "AutoModel") -> None:
        import torch
        import transformers

        torch.set_num_threads(1)
        self._model = (
            getattr(transformers, load).from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
        )

    def states(self, ids: Sequence[int], places: Sequence[int]) -> Any:
        """Hidden states after the last norm at these places of a sequence."""
        import torch

        with torch.no_grad():
            return self._model(torch.tensor([list(ids)])).last_hidden_state[0, list(places)]


def candidate_logits(head: Mapping[str, np.ndarray], options: Any, query: Any) -> Any:
    """Decision 2.0: CandidateHead.forward."""
    import torch
    from torch.nn import functional as f

    own = {name: torch.from_numpy(each) for name, each in head.items()}

    def norm(x: Any, name: str) -> Any:
        return f.layer_norm(x, x.shape[-1:], own[f"{name}.weight"], own[f"{name}.bias"], 1e-5)

    c, q = norm(options, "candidate_norm"), norm(query, "query_norm")
    bilinear = (c @ own["key.weight"].T) @ (own["query.weight"] @ q) / math.sqrt(HEAD_WIDTH)
    mixed = c @ own["candidate_mlp.weight"].T + own["candidate_mlp.bias"] + own["query_mlp.weight"] @ q
    return bilinear + f.gelu(mixed) @ own["scalar.weight"][0]


def pointer_logits(head: Mapping[str, np.ndarray], options: Any, query: Any) -> Any:
    """kev: PointerHead.forward, before its temperature."""
    import torch

    own = {name: torch.from_numpy(each) for name, each in head.items()}
    k = options @ own["k.weight"].T + own["k.bias"]
    return k @ (own["q.weight"] @ query + own["q.bias"]) / math.sqrt(HEAD_WIDTH)
