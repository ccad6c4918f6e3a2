"""Tensors under the names, and in the shapes, that the families know, whichever program saved them."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy.typing as npt

from model.tensors.stored import Stored, Tensors

SPELLINGS = tuple(
    (re.compile(pattern), name)
    for pattern, name in (
        # A model that reads images too, by transformers before 4.52; since then its prefixes are in the other order.
        (r"language_model\.lm_head\.", "lm_head."),
        # A BERT or a RoBERTa with its head.
        (r"(bert|roberta)\.", ""),
        (r"(model\.language_model|language_model\.model|language_model)\.", "model."),
        # A model that was saved without its head, as an embedder.
        (r"(?=(embed_tokens|layers|norm|embeddings\.(tok_embeddings|norm)|final_norm)\.)", "model."),
    )
)
"""How a name may begin, and the beginning that the families know. The first that matches counts."""

LAYER_NORMS = {"ln1": "input_layernorm", "ln2": "post_attention_layernorm"}
"""Name in a layer of the first Yi -> Llama's."""
_LAYER_NORM = re.compile(rf"(model\.layers\.\d+\.)({'|'.join(LAYER_NORMS)})\.")

_FIRST_NORMS = {"gamma": "weight", "beta": "bias"}
"""Name in a norm of the first BERT -> today's."""
_FIRST_NORM = re.compile(rf"(.+\.LayerNorm\.)({'|'.join(_FIRST_NORMS)})")

_EXPERTS = re.compile(r"(.+\.experts)\.(gate_up_proj|down_proj)")
"""All experts of a layer in one tensor of three axes, as transformers 5 has them in memory."""


def known_name(name: str) -> str:
    """The name that the families know, of one that may be spelt otherwise; any other name as it is."""
    for pattern, beginning in SPELLINGS:
        if found := pattern.match(name):
            name = beginning + name[found.end() :]
            break
    name = _FIRST_NORM.sub(lambda found: f"{found[1]}{_FIRST_NORMS[found[2]]}", name)
    return _LAYER_NORM.sub(lambda found: f"{found[1]}{LAYER_NORMS[found[2]]}.", name)


def known(tensors: Tensors) -> tuple[dict[str, Stored], list[str]]:
    """The tensors by the names that the families know, and what is wrong: tensors that are there in two spellings."""
    found: dict[str, Stored] = {}
    spelt: dict[str, str] = {}
    problems: list[str] = []
    for own, tensor in sorted(tensors.items()):
        for name, part in _parts(known_name(own), tensor):
            if name in found:
                problems.append(f"twice: {name}, as {spelt[name]} and as {own}; only one of them can be meant")
            else:
                found[name], spelt[name] = part, own
    return found, problems


def _parts(name: str, tensor: Stored) -> Iterator[tuple[str, Stored]]:
    """A tensor, or those of the single experts that it holds."""
    fused = _EXPERTS.fullmatch(name)
    if fused is None or len(tensor.shape) != 3:
        yield name, tensor
        return
    experts, rows, width = tensor.shape
    projections = ("gate_proj", "up_proj") if fused[2] == "gate_up_proj" else ("down_proj",)
    shape = (rows // len(projections), width)
    for expert in range(experts):
        for number, projection in enumerate(projections):
            part = Matrix(tensor, expert, number * shape[0], shape)
            yield f"{fused[1]}.{expert}.{projection}.weight", part


@dataclass(frozen=True, slots=True)
class Matrix:
    """Rows, from ``start`` on, of one matrix in a stack of matrices, see ``Stored``."""

    stack: Stored
    number: int
    start: int
    shape: tuple[int, ...]

    @property
    def dtype(self) -> str:
        return self.stack.dtype

    @property
    def file(self) -> str:
        return self.stack.file

    def read(self, cut: tuple[slice, ...]) -> npt.NDArray[Any]:
        rows, columns = cut
        first, stop, _ = rows.indices(self.shape[0])
        of_stack = (slice(self.number, self.number + 1), slice(self.start + first, self.start + stop), columns)
        return self.stack.read(of_stack)[0]
