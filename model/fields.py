"""Reading ``config.json`` of a Hugging Face checkpoint by allow-list.

A key that is not read would give wrong scores with no error. So each key is read, or ignored on purpose, or stands at
the value that changes nothing; any other is refused by name.
"""

import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, cast


class ConfigError(ValueError):
    """The config asks for something that is not implemented, or contradicts itself. The message names the keys."""


IGNORED = {
    # About the file.
    "architectures", "model_type", "transformers_version", "_name_or_path", "_attn_implementation_autoset",
    "unsloth_fixed",
    "is_decoder",
    # What others make of a reranker; the template is the service's.
    "is_original_qwen3_reranker", "classifier_from_token",
    # Ours to choose.
    "torch_dtype", "dtype", "use_cache",
    # Read with the tensors, see ``model.tensors.quantised``.
    "quantization_config", "compression_config",
    # The tokenizer's, and generation's.
    "bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id", "sep_token_id", "decoder_start_token_id",
    "max_length", "min_length", "do_sample", "temperature", "top_k", "top_p", "repetition_penalty",
    # A classification head's.
    "id2label", "label2id", "num_labels", "problem_type",
    # Training's.
    "initializer_range", "attention_dropout",
}  # fmt: skip
"""Keys that no scoring depends on, in any family."""

NEUTRAL: Mapping[str, object] = {
    "is_encoder_decoder": False,
    "add_cross_attention": False,
    "tie_encoder_decoder": False,
    "chunk_size_feed_forward": 0,
    "output_attentions": False,
    "output_hidden_states": False,
    "return_dict": True,
    "return_dict_in_generate": False,
    "torchscript": False,
    "use_bfloat16": False,
    "pruned_heads": {},
}
"""Keys that may be present at the one value that changes nothing, in any family."""


class Fields:
    """A config that remembers which of its keys were read, so that the others can be refused.

    A null counts as absent: it is how transformers writes a setting that is off.
    """

    def __init__(self, values: Mapping[str, Any], where: str = "config.json") -> None:
        self._values = {key: value for key, value in values.items() if value is not None}
        self._nulls = values.keys() - self._values.keys()
        self._where = where
        self._read: set[str] = set()

    def __contains__(self, key: str) -> bool:
        return key in self._values

    def integer(self, key: str, default: int | None = None) -> int:
        """An integer of at least 1."""
        value = self._get(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ConfigError(f"{self._where}: {key} is {value!r}; it must be an integer of at least 1")
        return value

    def count(self, key: str, default: int | None = None) -> int:
        """An integer of at least 0."""
        value = self._get(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise ConfigError(f"{self._where}: {key} is {value!r}; it must be an integer of at least 0")
        return value

    def integer_or_none(self, key: str, *, absent: int | None) -> int | None:
        """An integer, or None for null; ``absent`` where the key is not there."""
        if key in self._nulls or (absent is None and key not in self):
            self._read.add(key)
            return None
        return self.integer(key, absent)

    def id_or_none(self, key: str, *, absent: int | None) -> int | None:
        """A token's number, or None for null and for -1, which some configs have; ``absent`` without the key."""
        if key in self._nulls or (absent is None and key not in self):
            self._read.add(key)
            return None
        value = self._get(key, absent)
        if isinstance(value, bool) or not isinstance(value, int):
            raise ConfigError(f"{self._where}: {key} is {value!r}; it must be a token's number, or null")
        return value if value >= 0 else None

    def number_or_none(self, key: str, *, absent: float | None) -> float | None:
        """A number, or None for null; ``absent`` where the key is not there."""
        if key in self._nulls or (absent is None and key not in self):
            self._read.add(key)
            return None
        return self.number(key, absent)

    def number(self, key: str, default: float | None = None) -> float:
        """A finite number above 0."""
        value = self._get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
            raise ConfigError(f"{self._where}: {key} is {value!r}; it must be a finite number above 0")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        value = self._get(key, default)
        if not isinstance(value, bool):
            raise ConfigError(f"{self._where}: {key} is {value!r}; it must be true or false")
        return value

    def text(self, key: str, default: str | None = None) -> str:
        value = self._get(key, default)
        if not isinstance(value, str):
            raise ConfigError(f"{self._where}: {key} is {value!r}; it must be a string")
        return value

    def texts(self, key: str, default: Sequence[str]) -> list[str]:
        value = self._get(key, list(default))
        if not isinstance(value, list) or not all(isinstance(text, str) for text in cast("list[object]", value)):
            raise ConfigError(f"{self._where}: {key} is {value!r}; it must be a list of strings")
        return cast("list[str]", value)

    def numbers(self, key: str) -> tuple[float, ...]:
        """Each above 0 and finite."""
        value = self._get(key, None)
        numbers = cast("list[object]", value) if isinstance(value, list) else [value]
        if not isinstance(value, list) or not all(
            isinstance(n, int | float) and not isinstance(n, bool) and 0 < n < float("inf") for n in numbers
        ):
            raise ConfigError(f"{self._where}: {key} is {value!r}; it must be a list of finite numbers above 0")
        return tuple(float(cast(float, n)) for n in numbers)

    def size(self, key: str) -> int:
        """Entries of a nested object, at least 1."""
        value = self._get(key, None)
        if not isinstance(value, dict) or not value:
            raise ConfigError(f"{self._where}: {key} is {value!r}; it must be an object with entries")
        return len(cast("dict[str, Any]", value))

    def group(self, key: str) -> "Fields":
        """The fields of a nested object."""
        value = self._get(key, None)
        if not isinstance(value, dict):
            raise ConfigError(f"{self._where}: {key} is {value!r}; it must be an object")
        return Fields(cast("dict[str, Any]", value), f"{self._where}: {key}")

    def groups(self, key: str) -> "list[Fields]":
        """The fields of each object in a nested object."""
        inner = self.group(key)
        return [inner.group(name) for name, value in inner._values.items() if isinstance(value, dict)]

    def refuse_rest(self, *, ignored: Collection[str] = (), neutral: Mapping[str, object] | None = None) -> None:
        """Refuse every key that was not read, is not ignored, and is not at its neutral value.

        Raises:
            ConfigError: naming all of them with their values.
        """
        neutral = neutral or {}
        rest = [
            f"{key}={value!r}" + (f" (only {neutral[key]!r} is implemented)" if key in neutral else "")
            for key, value in sorted(self._values.items())
            if key not in self._read and key not in ignored and not (key in neutral and neutral[key] == value)
        ]
        if rest:
            raise ConfigError(
                f"{self._where} has settings that this program does not implement, so that its scores would be wrong: "
                + "; ".join(rest)
            )

    def _get(self, key: str, default: object) -> object:
        self._read.add(key)
        value = self._values.get(key, default)
        if value is None:
            raise ConfigError(f"{self._where} lacks {key}")
        return value


def read_config(folder: Path) -> dict[str, Any]:
    """``config.json`` as it stands.

    Raises:
        ConfigError: it is absent or is not a JSON object.
    """
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{folder} has no config.json; name a folder in Hugging Face layout") from None
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise ConfigError(f"{path} holds {type(config).__name__}; it must be a JSON object")
    return cast("dict[str, Any]", config)
