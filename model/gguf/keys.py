"""The keys of a file that describe the model: each is read, or known to change nothing, or refused by name."""

from typing import Any

import numpy as np

from model.gguf.files import GgufError

IGNORED = {
    "vocab_size",  # the embedding's rows decide
    "rope.scaling.finetuned",  # a note
    "tensor_data_layout",  # "Meta AI original pth" in files of 2023: the layout that all llama files have
    "pooling_type",  # how an embedding model's output is made of the hidden states
}
"""Keys that no score depends on."""

NEUTRAL: dict[str, tuple[object, ...]] = {
    "attention.causal": (True,),
    "expert_count": (0,),
    "expert_used_count": (0,),
    "expert_shared_count": (0,),
    "expert_weights_norm": (True,),
    "expert_weights_scale": (0.0, 1.0),
    "expert_gating_func": (1,),  # softmax
}
"""Keys that change nothing at these values."""


class Keys:
    """The keys below the architecture's name. It remembers which were read, so that the others can be refused."""

    def __init__(self, fields: dict[str, Any], architecture: str) -> None:
        self._prefix = f"{architecture}."
        self._values = {
            key.removeprefix(self._prefix): value for key, value in fields.items() if key.startswith(self._prefix)
        }
        self._read: set[str] = set()

    def get(self, key: str, absent: Any = None) -> Any:
        """Its value, which must be one for all layers."""
        self._read.add(key)
        value = self._values.get(key, absent)
        if not isinstance(value, list):
            return value
        if any(one != value[0] for one in value):  # pyright: ignore[reportUnknownVariableType]
            raise GgufError(f"{self.name(key)} differs between layers; only one number for all is converted")
        return value[0]  # pyright: ignore[reportUnknownVariableType]

    def whole(self, key: str) -> Any:
        """Its value, which may be a list with one for each layer; None where it is absent."""
        self._read.add(key)
        return self._values.get(key)

    def required(self, key: str) -> Any:
        if key not in self._values:
            raise GgufError(f"{self.name(key)} is missing")
        return self.get(key)

    def number(self, key: str, absent: float | None = None) -> float:
        """The decimal number that was stored as float32: 1e-05, not 9.999999747378752e-06."""
        value = self.required(key) if absent is None else self.get(key, absent)
        return float(str(np.float32(value)))

    def same(self, key: str, value: int) -> None:
        """Refuse any other value than this; the key may be absent."""
        if (found := self.get(key, value)) != value:
            raise GgufError(f"{self.name(key)} is {found}; only the head width, {value}, is converted")

    def name(self, key: str) -> str:
        return self._prefix + key

    def refuse_rest(self, ignored: tuple[str, ...]) -> None:
        """Refuse every key that was not read, save those that change nothing.

        Args:
            ignored: what such keys of this architecture may begin with.

        Raises:
            GgufError: naming all of them.
        """
        rest = [
            f"{self.name(key)}={value!r}"
            for key, value in sorted(self._values.items())
            if key not in self._read | IGNORED and value not in NEUTRAL.get(key, ()) and not key.startswith(ignored)
        ]
        if rest:
            raise GgufError(
                f"keys not known to the conversion: {', '.join(rest)}. Use the model's safetensors checkpoint"
            )
