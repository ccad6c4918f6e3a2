"""A tiny random Laya checkpoint as its publisher lays it out; and what torch's own layers make of it.

Prompts and mathematics are written out from NandhaKishorM/laya, laya/common.py at 8ef5b2d: ``build_sequence`` and
``DecisionModel``.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file
from tokenizers import AddedToken, Tokenizer

from tests.tiny import write_json
from tests.tiny_encoders import make_encoder
from tests.tiny_heads import byte_pairs

WIDTH, HEADS, MORE = 128, 2, 2
TYPES = ("choice", "score", "noul")
TEMPERATURES = [1.3, 0.2, 1.9]
"""One of them is lower than the publisher's code takes it."""
BY_OPTIONS = {"choice:3-5": 0.8, "choice:11+": 2.5, "score:2": 9.0}
WINDOW, LONGEST = 192, 900


def make_laya(folder: Path) -> Path:
    """Write a checkpoint, and return its folder."""
    sizes = {"hidden_size": WIDTH, "num_attention_heads": HEADS, "max_position_embeddings": 1_024}
    make_encoder(folder, "modernbert", changes=sizes)
    (folder / "encoder").mkdir()
    (folder / "tokenizer").mkdir()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").unlink()
    write_json(folder / "encoder" / "config.json", config | {"architectures": ["ModernBertModel"]})
    _tokenizer().save(str(folder / "tokenizer" / "tokenizer.json"))
    (folder / "tokenizer.json").unlink()
    shutil.move(folder / "tokenizer_config.json", folder / "tokenizer" / "tokenizer_config.json")
    own = load_file(folder / "model.safetensors")
    tensors = {
        f"encoder.{name.removeprefix('model.')}": each for name, each in own.items() if name.startswith("model.")
    }
    save_file({**tensors, **_head(np.random.default_rng(23))}, folder / "model.safetensors")
    write_json(
        folder / "rl_agent_config.json",
        {
            "encoder": "answerdotai/ModernBERT-large",
            "head_layers": MORE,
            "max_len": LONGEST,
            "head_max_len": WINDOW,
            "temperature": TEMPERATURES,
            "temperature_by_options": BY_OPTIONS,
            "act_costs": {"ask": 0.1},
        },
    )
    return folder


def _tokenizer() -> Tokenizer:
    """A byte-level BPE of 307 tokens, to which a question's beginning is a few."""
    # As of ModernBERT's tokenizer, the marker takes the spaces before it.
    specials = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", AddedToken("[MASK]", lstrip=True, special=True)]
    return byte_pairs(307, specials, "choice question: score question: noul question: level option: Which?")


def _head(rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Tensors of the layers that follow the encoder's, and of both heads."""
    found: dict[str, np.ndarray] = {}

    def linear(name: str, out: int, into: int, weight: str = ".weight", bias: str = ".bias") -> None:
        found[name + weight], found[name + bias] = rng.normal(0, 1.3 * into**-0.5, (out, into)), rng.normal(0, 0.3, out)

    def norm(name: str) -> None:
        found[f"{name}.weight"], found[f"{name}.bias"] = rng.uniform(0.6, 1.4, WIDTH), rng.normal(0, 0.3, WIDTH)

    for number in range(MORE):
        layer = f"head.layers.{number}"
        linear(f"{layer}.self_attn", 3 * WIDTH, WIDTH, ".in_proj_weight", ".in_proj_bias")
        linear(f"{layer}.self_attn.out_proj", WIDTH, WIDTH)
        linear(f"{layer}.linear1", 4 * WIDTH, WIDTH)
        linear(f"{layer}.linear2", WIDTH, 4 * WIDTH)
        norm(f"{layer}.norm1")
        norm(f"{layer}.norm2")
    found["type_emb.weight"] = rng.normal(0, 1.0, (3, WIDTH))
    norm("scorer.0")
    linear("scorer.1", WIDTH, WIDTH)
    linear("scorer.3", 1, WIDTH)
    linear("act_head.0", 256, WIDTH + 4)
    linear("act_head.2", 2, 256)
    found["temperature"] = np.ones(3)
    return {name: each.astype(np.float32) for name, each in found.items()}


def rendered(kind: str, options: Mapping[str, Any]) -> list[str]:
    """The text of each option.

    Args:
        options: the description of each by its key; of yes and no ``false`` and ``true``, of levels their numbers.
    """

    def text(value: Any) -> str:
        return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, separators=(", ", ": "))

    if kind == "score":
        return [f"level {number}: {text(each)}" for number, each in enumerate(options.values())]
    if kind == "noul":
        said = {"false": "no, the statement does not hold", "true": "yes, the statement holds"}
        return [f"{key}: {text(options.get(key) or said[key])}" for key in ("false", "true")]
    return [key if each in (None, "") else f"{key}: {text(each)}" for key, each in options.items()]


def sequence(
    tokenizer: Tokenizer, state: Any, kind: str, instructions: Any, options: Sequence[str]
) -> tuple[list[int], list[int]]:
    """The tokens of a question, and the places of its markers."""

    def ids(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False).ids

    def payload(value: Any) -> str:
        return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)

    first, end, mark = (tokenizer.token_to_id(name) for name in ("[CLS]", "[SEP]", "[MASK]"))
    asked = ids(f"{kind} question: {payload(instructions)}")
    shown = [[mark, *ids(f" {option}")[:48]] for option in options]
    room = WINDOW - sum(map(len, shown))
    if room < 16:
        each = max(4, (WINDOW - 16) // len(shown))
        shown = [option[:each] for option in shown]
        room = WINDOW - sum(map(len, shown))
    found, markers = [first, *asked[: max(8, room)], end], list[int]()
    for option in shown:
        markers.append(len(found))
        found += option
    return [*found, end, *ids(payload(state)), end], markers


class Reference:
    """The publisher's model, of transformers' encoder and torch's layers, in float32."""

    def __init__(self, folder: Path) -> None:
        import torch
        from transformers import ModernBertConfig, ModernBertModel

        config = ModernBertConfig.from_pretrained(folder / "encoder")
        config._attn_implementation = "eager"
        tensors = {name: torch.from_numpy(each) for name, each in load_file(folder / "model.safetensors").items()}

        def own(prefix: str) -> dict[str, Any]:
            return {name.removeprefix(prefix): each for name, each in tensors.items() if name.startswith(prefix)}

        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer" / "tokenizer.json"))
        self._encoder = ModernBertModel(config).eval()
        self._encoder.load_state_dict(own("encoder."))
        layer = torch.nn.TransformerEncoderLayer(WIDTH, HEADS, 4 * WIDTH, 0.1, batch_first=True, norm_first=True)
        self._head = torch.nn.TransformerEncoder(layer, MORE, enable_nested_tensor=False).eval()
        self._head.load_state_dict(own("head."))
        parts = torch.nn.LayerNorm(WIDTH), torch.nn.Linear(WIDTH, WIDTH), torch.nn.GELU(), torch.nn.Linear(WIDTH, 1)
        self._scorer = torch.nn.Sequential(*parts).eval()
        self._scorer.load_state_dict(own("scorer."))
        self._types = tensors["type_emb.weight"]

    def probabilities(
        self, state: Any, kind: str, instructions: Any, options: Mapping[str, Any], turn: int = 0
    ) -> np.ndarray:
        """The probability of each option, in the request's order.

        Args:
            turn: the number of the option that is shown first.
        """
        import torch

        texts = rendered(kind, options)
        order = [*range(turn, len(texts)), *range(turn)]
        ids, markers = sequence(self.tokenizer, state, kind, instructions, [texts[place] for place in order])
        with torch.no_grad():
            states = self._encoder(torch.tensor([ids])).last_hidden_state + self._types[TYPES.index(kind)]
            logits = self._scorer(self._head(states)[0, markers]).double().numpy()[:, 0]
        size = "2" if len(order) <= 2 else "3-5" if len(order) <= 5 else "6-10" if len(order) <= 10 else "11+"
        temperature = BY_OPTIONS.get(f"{kind}:{size}", TEMPERATURES[TYPES.index(kind)])
        own = np.exp((logits - logits.max()) / min(5.0, max(0.5, temperature)))
        found = np.zeros(len(order))
        found[order] = own / own.sum()
        return found
